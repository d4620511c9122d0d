//! Vectors of f32 and u32 lanes, as wide as the processor has them.
//!
//! A kernel is a [`Kernel`]: code that is generic over [`Simd`] and is compiled once for each [`Level`]. [`Level::run`] takes
//! the copy for the level. Everything between `run` and the operations must be `#[inline(always)]` and free of closures, or
//! the operations become calls.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::Cell;

use half::bf16;

/// What a processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Plain Rust, for any processor.
    Portable,
    /// 8 lanes and fused multiply-add.
    Avx2,
    /// 16 lanes.
    Avx512,
}

thread_local! {
    static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
}

impl Level {
    /// All that this processor has.
    #[must_use]
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|level| level.is_available()).collect()
    }

    /// The one that kernels called from this thread take: the best, unless [`Level::with`] says otherwise.
    #[must_use]
    pub fn current() -> Self {
        let best = || [Self::Avx512, Self::Avx2].into_iter().find(|level| level.is_available());
        FORCED.get().or_else(best).unwrap_or(Self::Portable)
    }

    /// Calls `work` with this level for the kernels that it calls on this thread; a level that the processor does not have
    /// is the portable one.
    pub fn with<T>(self, work: impl FnOnce() -> T) -> T {
        let before = FORCED.replace(Some(self));
        let result = work();
        FORCED.set(before);
        result
    }

    fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::Avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::Avx512::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// Runs the kernel's copy for this level.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if x86::Avx512::is_available() => x86::Avx512::run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if x86::Avx2::is_available() => x86::Avx2::run(kernel),
            _ => kernel.run(Portable),
        }
    }
}

/// Work on vectors; a struct of its arguments. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;

    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Operations on vectors of [`Simd::LANES`] lanes. Loads read the first lanes of a slice, stores write them; a shorter slice
/// panics.
pub trait Simd: Copy {
    const LANES: usize;
    /// f32 lanes.
    type Float: Copy;
    /// u32 lanes.
    type Bits: Copy;
    /// What a comparison gives.
    type Mask: Copy;

    fn splat(self, x: f32) -> Self::Float;
    fn load(self, from: &[f32]) -> Self::Float;
    fn store(self, x: Self::Float, to: &mut [f32]);
    fn load_bf16(self, from: &[bf16]) -> Self::Float;
    /// Rounds to the nearest, ties to even; NaN stays NaN.
    fn store_bf16(self, x: Self::Float, to: &mut [bf16]);
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// a b + c, with one rounding where the processor can.
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    fn sqrt(self, a: Self::Float) -> Self::Float;
    /// The larger one; `b` if one is NaN.
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// a < b
    fn less(self, a: Self::Float, b: Self::Float) -> Self::Mask;
    /// `a` where the mask is set, else `b`.
    fn select(self, mask: Self::Mask, a: Self::Float, b: Self::Float) -> Self::Float;
    /// The sum of the lanes.
    fn sum(self, a: Self::Float) -> f32;
    /// The largest lane.
    fn largest(self, a: Self::Float) -> f32;

    fn splat_bits(self, x: u32) -> Self::Bits;
    /// 0, 1, 2, ..
    fn counting(self) -> Self::Bits;
    fn bits(self, a: Self::Float) -> Self::Bits;
    fn float(self, a: Self::Bits) -> Self::Float;
    fn add_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    fn mul_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    fn and_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    fn xor_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    fn shift_left<const N: u32>(self, a: Self::Bits) -> Self::Bits;
    fn shift_right<const N: u32>(self, a: Self::Bits) -> Self::Bits;
    /// a < b, unsigned.
    fn less_bits(self, a: Self::Bits, b: Self::Bits) -> Self::Mask;

    /// Rows become columns.
    #[inline(always)]
    fn transpose(self, rows: &mut [Line; 16]) {
        let before = *rows;
        for (number, row) in rows.iter_mut().enumerate() {
            for (to, from) in row.0.iter_mut().zip(&before) {
                *to = from.0[number];
            }
        }
    }
}

/// A line of the processor's caches; also a row of its matrix tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Line(pub [u32; 16]);

impl Line {
    pub const ZERO: Self = Self([0; 16]);
}

/// Lanes as arrays.
#[derive(Clone, Copy, Debug)]
struct Portable;

const PORTABLE_LANES: usize = 8;
type Lanes<T> = [T; PORTABLE_LANES];

impl Portable {
    #[inline(always)]
    fn each<A: Copy, B: Copy, T>(a: Lanes<A>, b: Lanes<B>, of: impl Fn(A, B) -> T) -> Lanes<T> {
        std::array::from_fn(|lane| of(a[lane], b[lane]))
    }
}

impl Simd for Portable {
    const LANES: usize = PORTABLE_LANES;
    type Float = Lanes<f32>;
    type Bits = Lanes<u32>;
    type Mask = Lanes<bool>;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes<f32> {
        [x; PORTABLE_LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> Lanes<f32> {
        *first(from)
    }
    #[inline(always)]
    fn store(self, x: Lanes<f32>, to: &mut [f32]) {
        *first_mut(to) = x;
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16]) -> Lanes<f32> {
        first::<PORTABLE_LANES, _>(from).map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }
    #[inline(always)]
    fn store_bf16(self, x: Lanes<f32>, to: &mut [bf16]) {
        *first_mut(to) = x.map(|x| {
            let bits = x.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
            bf16::from_bits(((if x.is_nan() { bits | 0x0040_0000 } else { rounded }) >> 16) as u16)
        });
    }
    #[inline(always)]
    fn add(self, a: Lanes<f32>, b: Lanes<f32>) -> Lanes<f32> {
        Self::each(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Lanes<f32>, b: Lanes<f32>) -> Lanes<f32> {
        Self::each(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Lanes<f32>, b: Lanes<f32>) -> Lanes<f32> {
        Self::each(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Lanes<f32>, b: Lanes<f32>) -> Lanes<f32> {
        Self::each(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Lanes<f32>, b: Lanes<f32>, c: Lanes<f32>) -> Lanes<f32> {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn sqrt(self, a: Lanes<f32>) -> Lanes<f32> {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn max(self, a: Lanes<f32>, b: Lanes<f32>) -> Lanes<f32> {
        Self::each(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn less(self, a: Lanes<f32>, b: Lanes<f32>) -> Lanes<bool> {
        Self::each(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn select(self, mask: Lanes<bool>, a: Lanes<f32>, b: Lanes<f32>) -> Lanes<f32> {
        std::array::from_fn(|lane| if mask[lane] { a[lane] } else { b[lane] })
    }
    #[inline(always)]
    fn sum(self, a: Lanes<f32>) -> f32 {
        let [a, b, c, d, e, f, g, h] = a;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
    #[inline(always)]
    fn largest(self, a: Lanes<f32>) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |most, x| if x > most { x } else { most })
    }
    #[inline(always)]
    fn splat_bits(self, x: u32) -> Lanes<u32> {
        [x; PORTABLE_LANES]
    }
    #[inline(always)]
    fn counting(self) -> Lanes<u32> {
        std::array::from_fn(|lane| lane as u32)
    }
    #[inline(always)]
    fn bits(self, a: Lanes<f32>) -> Lanes<u32> {
        a.map(f32::to_bits)
    }
    #[inline(always)]
    fn float(self, a: Lanes<u32>) -> Lanes<f32> {
        a.map(f32::from_bits)
    }
    #[inline(always)]
    fn add_bits(self, a: Lanes<u32>, b: Lanes<u32>) -> Lanes<u32> {
        Self::each(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn mul_bits(self, a: Lanes<u32>, b: Lanes<u32>) -> Lanes<u32> {
        Self::each(a, b, u32::wrapping_mul)
    }
    #[inline(always)]
    fn and_bits(self, a: Lanes<u32>, b: Lanes<u32>) -> Lanes<u32> {
        Self::each(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn xor_bits(self, a: Lanes<u32>, b: Lanes<u32>) -> Lanes<u32> {
        Self::each(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: Lanes<u32>) -> Lanes<u32> {
        a.map(|a| a << N)
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Lanes<u32>) -> Lanes<u32> {
        a.map(|a| a >> N)
    }
    #[inline(always)]
    fn less_bits(self, a: Lanes<u32>, b: Lanes<u32>) -> Lanes<bool> {
        Self::each(a, b, |a, b| a < b)
    }
}

#[inline(always)]
fn first<const N: usize, T>(from: &[T]) -> &[T; N] {
    match from.first_chunk() {
        Some(chunk) => chunk,
        None => short(from.len(), N),
    }
}

#[inline(always)]
fn first_mut<const N: usize, T>(to: &mut [T]) -> &mut [T; N] {
    let length = to.len();
    match to.first_chunk_mut() {
        Some(chunk) => chunk,
        None => short(length, N),
    }
}

#[cold]
fn short(length: usize, lanes: usize) -> ! {
    panic!("a slice of {length} is shorter than a vector of {lanes}")
}

#[cfg(test)]
mod tests;
