//! What stands behind each dense layer of a post-norm BERT layer: out = LayerNorm(dropout(dense + bias) + residual).
//!
//! The backward pass computes the sum and the dropout again from what it was made of, so that a row's mean and deviation are
//! all that is stored.

use crate::dropout::Dropout;
use crate::element::{Element, vectors};
use crate::parallel::{self, add_partials, check_length, optional_chunks, optional_chunks_mut, rows};
use crate::simd::{Kernel, Level, Simd};

/// Rows of a block. Sums over rows go block by block.
const ROWS: usize = 16;

/// The parameters of bias, dropout and layer norm; all slices `[D]`.
#[derive(Clone, Copy, Debug)]
pub struct ResidualNorm<'a> {
    /// Of the dense layer.
    pub bias: &'a [f32],
    pub gamma: &'a [f32],
    pub beta: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
    pub dropout: Dropout,
}

/// Of a row before its scale and shift.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowStatistics {
    pub mean: f32,
    /// 1 / sqrt(variance + eps)
    pub rstd: f32,
}

/// What the backward pass needs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a, E, R> {
    /// `[T, D]`
    pub dense: &'a [E],
    /// `[T, D]`
    pub residual: &'a [R],
    /// `[T]`
    pub statistics: &'a [RowStatistics],
}

/// Gradients in and out of the backward pass.
#[derive(Debug)]
pub struct NormGradients<'a, E, R> {
    /// `[T, D]`: that of the output comes in, that of the residual goes out.
    pub gradient: &'a mut [R],
    /// `[T, D]`: a second part of the output's gradient, from the product that read it.
    pub more: Option<&'a [E]>,
    /// `[T, D]`: written.
    pub dense: &'a mut [E],
    /// `[D]`: added to.
    pub bias: &'a mut [f32],
    /// `[D]`: added to.
    pub gamma: &'a mut [f32],
    /// `[D]`: added to.
    pub beta: &'a mut [f32],
}

impl ResidualNorm<'_> {
    fn width(&self) -> usize {
        let width = self.gamma.len();
        check_length("bias", self.bias, width);
        check_length("beta", self.beta, width);
        width
    }

    /// `dense`, `residual`, `out` `[T, D]`; `low`, if given, gets `out` too, as the next product reads it.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn forward<E: Element, R: Element>(
        &self,
        dense: &[E],
        residual: &[R],
        out: &mut [R],
        low: Option<&mut [E]>,
        statistics: &mut [RowStatistics],
    ) {
        let width = self.width();
        let count = rows("dense", dense, width);
        check_length("residual", residual, count * width);
        check_length("out", out, count * width);
        check_length("statistics", statistics, count);
        if let Some(low) = &low {
            check_length("low", low, count * width);
        }
        let level = Level::current();
        let size = ROWS * width;
        let inputs = dense.chunks(size).zip(residual.chunks(size));
        let outputs = out.chunks_mut(size).zip(optional_chunks_mut(low, size)).zip(statistics.chunks_mut(ROWS));
        let blocks = inputs.zip(outputs).enumerate().map(|(number, ((dense, residual), ((out, low), statistics)))| {
            Forward { norm: *self, first_row: number * ROWS, dense, residual, out, low, statistics }
        });
        parallel::map(blocks.collect(), |block| level.run(block));
    }

    /// The gradients of everything, given that of the output.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn backward<E: Element, R: Element>(&self, saved: Saved<'_, E, R>, gradients: NormGradients<'_, E, R>) {
        let width = self.width();
        let count = rows("dense", saved.dense, width);
        check_length("residual", saved.residual, count * width);
        check_length("statistics", saved.statistics, count);
        check_length("gradient", gradients.gradient, count * width);
        check_length("gradient of dense", gradients.dense, count * width);
        if let Some(more) = gradients.more {
            check_length("more", more, count * width);
        }
        for (what, gradient) in [("bias", &gradients.bias), ("gamma", &gradients.gamma), ("beta", &gradients.beta)] {
            check_length(what, gradient, width);
        }
        let level = Level::current();
        let size = ROWS * width;
        let inputs = saved.dense.chunks(size).zip(saved.residual.chunks(size)).zip(saved.statistics.chunks(ROWS));
        let outputs = gradients.gradient.chunks_mut(size).zip(gradients.dense.chunks_mut(size));
        let all = inputs.zip(outputs).zip(optional_chunks(gradients.more, size)).enumerate();
        let blocks = all.map(|(number, ((((dense, residual), statistics), (gradient, d_dense)), more))| Backward {
            norm: *self,
            first_row: number * ROWS,
            saved: Saved { dense, residual, statistics },
            gradient,
            more,
            d_dense,
        });
        let partials = parallel::map(blocks.collect(), |block| level.run(block));
        add_partials(gradients.bias, partials.iter().map(|sums| sums.bias.as_slice()));
        add_partials(gradients.gamma, partials.iter().map(|sums| sums.gamma.as_slice()));
        add_partials(gradients.beta, partials.iter().map(|sums| sums.beta.as_slice()));
    }
}

struct Forward<'a, E, R> {
    norm: ResidualNorm<'a>,
    first_row: usize,
    dense: &'a [E],
    residual: &'a [R],
    out: &'a mut [R],
    low: Option<&'a mut [E]>,
    statistics: &'a mut [RowStatistics],
}

impl<E: Element, R: Element> Kernel for Forward<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let width = self.norm.gamma.len();
        let mut sums = vec![0.0; width];
        for (row, statistics) in self.statistics.iter_mut().enumerate() {
            let own = row * width..(row + 1) * width;
            let (dense, residual) = (&self.dense[own.clone()], &self.residual[own.clone()]);
            let dropout = self.norm.dropout.row((self.first_row + row) as u64);
            let mut total = s.splat(0.0);
            vectors!(S, width, |at| {
                let dense =
                    s.add(E::load_at::<WHOLE, _>(s, dense, at), f32::load_at::<WHOLE, _>(s, self.norm.bias, at));
                let sum = s.mul_add(dense, dropout.factors(s, at), R::load_at::<WHOLE, _>(s, residual, at));
                // behind the row's end all of it is 0
                f32::store_at::<WHOLE, _>(s, sum, &mut sums, at);
                total = s.add(total, sum);
            });
            let mean = s.sum(total) / width as f32;
            let rstd = 1.0 / (centred_squares(s, &sums, mean) / width as f32 + self.norm.eps).sqrt();
            *statistics = RowStatistics { mean, rstd };
            let out = &mut self.out[own.clone()];
            vectors!(S, width, |at| {
                let unit = s.mul(s.sub(f32::load_at::<WHOLE, _>(s, &sums, at), s.splat(mean)), s.splat(rstd));
                let y = s.mul_add(
                    unit,
                    f32::load_at::<WHOLE, _>(s, self.norm.gamma, at),
                    f32::load_at::<WHOLE, _>(s, self.norm.beta, at),
                );
                R::store_at::<WHOLE, _>(s, y, out, at);
                if let Some(low) = &mut self.low {
                    E::store_at::<WHOLE, _>(s, y, &mut low[own.clone()], at);
                }
            });
        }
    }
}

/// The sum of (x - mean)^2.
#[inline(always)]
fn centred_squares<S: Simd>(s: S, x: &[f32], mean: f32) -> f32 {
    let mut squares = s.splat(0.0);
    vectors!(S, x.len(), |at| {
        // lanes behind the end are the mean too
        let x = if WHOLE { s.load(&x[at..]) } else { f32::load_part(s, &x[at..], mean) };
        let centred = s.sub(x, s.splat(mean));
        squares = s.mul_add(centred, centred, squares);
    });
    s.sum(squares)
}

struct Backward<'a, E, R> {
    norm: ResidualNorm<'a>,
    first_row: usize,
    saved: Saved<'a, E, R>,
    gradient: &'a mut [R],
    more: Option<&'a [E]>,
    d_dense: &'a mut [E],
}

/// Sums over the rows of a block, all `[D]`.
struct Sums {
    bias: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
}

impl<E: Element, R: Element> Kernel for Backward<'_, E, R> {
    type Output = Sums;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Sums {
        let width = self.norm.gamma.len();
        let zeros = || vec![0.0; width];
        let mut sums = Sums { bias: zeros(), gamma: zeros(), beta: zeros() };
        // of one row: the normalised sum, the gradient before the scale, the dropout's factors
        let (mut units, mut scaled, mut factors) = (zeros(), zeros(), zeros());
        for (row, statistics) in self.saved.statistics.iter().enumerate() {
            let own = row * width..(row + 1) * width;
            let (dense, residual) = (&self.saved.dense[own.clone()], &self.saved.residual[own.clone()]);
            let dropout = self.norm.dropout.row((self.first_row + row) as u64);
            let gradient = &mut self.gradient[own.clone()];
            let d_dense = &mut self.d_dense[own.clone()];
            let (mean, rstd) = (s.splat(statistics.mean), s.splat(statistics.rstd));
            let (mut total, mut along) = (s.splat(0.0), s.splat(0.0));
            vectors!(S, width, |at| {
                let factor = dropout.factors(s, at);
                let dense =
                    s.add(E::load_at::<WHOLE, _>(s, dense, at), f32::load_at::<WHOLE, _>(s, self.norm.bias, at));
                let sum = s.mul_add(dense, factor, R::load_at::<WHOLE, _>(s, residual, at));
                let unit = s.mul(s.sub(sum, mean), rstd);
                let mut d_out = R::load_at::<WHOLE, _>(s, gradient, at);
                if let Some(more) = self.more {
                    d_out = s.add(d_out, E::load_at::<WHOLE, _>(s, &more[own.clone()], at));
                }
                // behind the row's end gradient and scale are 0
                let d_unit = s.mul(d_out, f32::load_at::<WHOLE, _>(s, self.norm.gamma, at));
                total = s.add(total, d_unit);
                along = s.mul_add(d_unit, unit, along);
                f32::store_at::<WHOLE, _>(s, unit, &mut units, at);
                f32::store_at::<WHOLE, _>(s, d_unit, &mut scaled, at);
                f32::store_at::<WHOLE, _>(s, factor, &mut factors, at);
                f32::store_at::<WHOLE, _>(
                    s,
                    s.mul_add(d_out, unit, f32::load_at::<WHOLE, _>(s, &sums.gamma, at)),
                    &mut sums.gamma,
                    at,
                );
                f32::store_at::<WHOLE, _>(
                    s,
                    s.add(d_out, f32::load_at::<WHOLE, _>(s, &sums.beta, at)),
                    &mut sums.beta,
                    at,
                );
            });
            let total = s.splat(s.sum(total) / width as f32);
            let along = s.splat(-s.sum(along) / width as f32);
            vectors!(S, width, |at| {
                let across = s.sub(f32::load_at::<WHOLE, _>(s, &scaled, at), total);
                let d_sum = s.mul(s.mul_add(f32::load_at::<WHOLE, _>(s, &units, at), along, across), rstd);
                let d = s.mul(d_sum, f32::load_at::<WHOLE, _>(s, &factors, at));
                R::store_at::<WHOLE, _>(s, d_sum, gradient, at);
                E::store_at::<WHOLE, _>(s, d, d_dense, at);
                f32::store_at::<WHOLE, _>(s, s.add(d, f32::load_at::<WHOLE, _>(s, &sums.bias, at)), &mut sums.bias, at);
            });
        }
        sums
    }
}

#[cfg(test)]
mod tests;
