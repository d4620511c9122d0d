//! Bias and exact GELU: x Phi(x), with the gradients of both.

use crate::element::{Element, vectors};
use crate::math::Normal;
use crate::parallel::{self, add_partials, check_length, rows};
use crate::simd::{Kernel, Level, Simd};

/// Rows of a block. Sums over rows go block by block.
const ROWS: usize = 32;
/// 1 / sqrt(2 pi)
const DENSITY: f32 = 0.398_942_3;

/// GELU of x + bias. The product x `[T, F]` comes without its bias.
#[derive(Clone, Copy, Debug)]
pub struct BiasGelu<'a> {
    /// `[F]`
    pub bias: &'a [f32],
}

impl BiasGelu<'_> {
    /// `out` `[T, F]` = GELU(x + bias).
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn forward<E: Element>(&self, x: &[E], out: &mut [E]) {
        check_length("out", out, rows("x", x, self.bias.len()) * self.bias.len());
        let level = Level::current();
        let size = ROWS * self.bias.len();
        let blocks = x.chunks(size).zip(out.chunks_mut(size));
        let blocks = blocks.map(|(x, out)| Forward { bias: self.bias, x, out }).collect();
        parallel::map(blocks, |block| level.run(block));
    }

    /// `gradient` `[T, F]`: that of the output comes in, that of x goes out; `bias_gradient` `[F]` is added to.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn backward<E: Element>(&self, x: &[E], gradient: &mut [E], bias_gradient: &mut [f32]) {
        let width = self.bias.len();
        check_length("gradient", gradient, rows("x", x, width) * width);
        check_length("bias_gradient", bias_gradient, width);
        let level = Level::current();
        let blocks = x.chunks(ROWS * width).zip(gradient.chunks_mut(ROWS * width));
        let blocks = blocks.map(|(x, gradient)| Backward { bias: self.bias, x, gradient }).collect();
        let partials = parallel::map(blocks, |block| level.run(block));
        add_partials(bias_gradient, partials.iter().map(Vec::as_slice));
    }
}

struct Forward<'a, E> {
    bias: &'a [f32],
    x: &'a [E],
    out: &'a mut [E],
}

impl<E: Element> Kernel for Forward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.bias.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            vectors!(S, width, |at| {
                let x = s.add(E::load_at::<WHOLE, _>(s, x, at), f32::load_at::<WHOLE, _>(s, self.bias, at));
                E::store_at::<WHOLE, _>(s, s.mul(x, Normal::at(s, x).below), out, at);
            });
        }
    }
}

struct Backward<'a, E> {
    bias: &'a [f32],
    x: &'a [E],
    gradient: &'a mut [E],
}

impl<E: Element> Kernel for Backward<'_, E> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let width = self.bias.len();
        let mut sums = vec![0.0; width];
        for (x, gradient) in self.x.chunks_exact(width).zip(self.gradient.chunks_exact_mut(width)) {
            vectors!(S, width, |at| {
                let x = s.add(E::load_at::<WHOLE, _>(s, x, at), f32::load_at::<WHOLE, _>(s, self.bias, at));
                let normal = Normal::at(s, x);
                let slope = s.mul_add(s.mul(x, s.splat(DENSITY)), normal.bell, normal.below);
                let d_x = s.mul(E::load_at::<WHOLE, _>(s, gradient, at), slope);
                f32::store_at::<WHOLE, _>(s, s.add(f32::load_at::<WHOLE, _>(s, &sums, at), d_x), &mut sums, at);
                E::store_at::<WHOLE, _>(s, d_x, gradient, at);
            });
        }
        sums
    }
}

#[cfg(test)]
mod tests;
