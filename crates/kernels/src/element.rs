//! What a number is stored as: f32 or bf16; arithmetic is in f32.

use half::bf16;

use crate::simd::Simd;

/// A stored number.
pub trait Element: Copy + Default + PartialEq + Send + Sync + std::fmt::Debug + bytemuck::Pod {
    fn to_f32(self) -> f32;
    /// Rounds to the nearest, ties to even.
    fn from_f32(x: f32) -> Self;
    #[doc(hidden)]
    fn load<S: Simd>(simd: S, from: &[Self]) -> S::Float;
    #[doc(hidden)]
    fn store<S: Simd>(simd: S, x: S::Float, to: &mut [Self]);

    /// A vector of the first `from.len()` numbers, and `rest` in the other lanes.
    #[doc(hidden)]
    #[inline(always)]
    fn load_part<S: Simd>(simd: S, from: &[Self], rest: f32) -> S::Float {
        let mut lanes = [rest; MOST_LANES];
        for (lane, x) in lanes.iter_mut().zip(from) {
            *lane = x.to_f32();
        }
        simd.load(&lanes)
    }

    /// The first `to.len()` lanes.
    #[doc(hidden)]
    #[inline(always)]
    fn store_part<S: Simd>(simd: S, x: S::Float, to: &mut [Self]) {
        let mut lanes = [0.0; MOST_LANES];
        simd.store(x, &mut lanes);
        for (lane, to) in lanes.iter().zip(to) {
            *to = Self::from_f32(*lane);
        }
    }

    /// The vector at place `at`: a whole one, or what is left and 0 in the other lanes.
    #[doc(hidden)]
    #[inline(always)]
    fn load_at<const WHOLE: bool, S: Simd>(simd: S, from: &[Self], at: usize) -> S::Float {
        let from = &from[at..];
        if WHOLE { Self::load(simd, from) } else { Self::load_part(simd, from, 0.0) }
    }

    /// Stores a whole vector at place `at`, or as much of it as there is room for.
    #[doc(hidden)]
    #[inline(always)]
    fn store_at<const WHOLE: bool, S: Simd>(simd: S, x: S::Float, to: &mut [Self], at: usize) {
        let to = &mut to[at..];
        if WHOLE {
            Self::store(simd, x, to);
        } else {
            Self::store_part(simd, x, to);
        }
    }
}

/// Runs the block for each vector of a row: `vectors!(S, length, |at| { .. })`. In the block `at` is the vector's first place, and
/// the constant `WHOLE` says whether it is a whole one, for [`Element::load_at`] and [`Element::store_at`].
macro_rules! vectors {
    ($simd:ident, $length:expr, |$at:ident| $block:block) => {{
        let length = $length;
        let mut $at = 0;
        while $at + $simd::LANES <= length {
            const WHOLE: bool = true;
            $block
            $at += $simd::LANES;
        }
        if $at < length {
            const WHOLE: bool = false;
            $block
        }
    }};
}
pub(crate) use vectors;

/// No vector has more.
pub(crate) const MOST_LANES: usize = 16;

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[f32]) -> S::Float {
        simd.load(from)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::Float, to: &mut [f32]) {
        simd.store(x, to);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[bf16]) -> S::Float {
        simd.load_bf16(from)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::Float, to: &mut [bf16]) {
        simd.store_bf16(x, to);
    }
}
