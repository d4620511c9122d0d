//! Rows of matrices: sums, gathering, scattering, unit length.

use crate::element::{Element, vectors};
use crate::parallel::{self, add_partials, check_length, rows};
use crate::simd::{Kernel, Level, Simd};

/// Elements of a block, about.
const ELEMENTS: usize = 1 << 15;

/// Rows of a block of this width.
fn block_rows(width: usize) -> usize {
    (ELEMENTS / width).max(1)
}

/// Adds the sums over the rows of `x` `[T, W]` to `sums` `[W]`: a bias's gradient.
///
/// # Panics
/// The lengths do not fit together.
pub fn column_sums<E: Element>(x: &[E], sums: &mut [f32]) {
    struct Sums<'a, E> {
        x: &'a [E],
        width: usize,
    }
    impl<E: Element> Kernel for Sums<'_, E> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<f32> {
            let mut sums = vec![0.0; self.width];
            for x in self.x.chunks_exact(self.width) {
                add_into(s, x, &mut sums);
            }
            sums
        }
    }
    let width = sums.len();
    rows("x", x, width);
    let level = Level::current();
    let blocks = x.chunks(block_rows(width) * width).map(|x| Sums { x, width }).collect();
    let partials = parallel::map(blocks, |block| level.run(block));
    add_partials(sums, partials.iter().map(Vec::as_slice));
}

/// Copies rows of `x` `[N, W]`: row i of `out` `[rows, W]` is row `rows[i]` of x.
///
/// # Panics
/// The lengths do not fit together, or x has no such row.
pub fn gather_rows<E: Element>(x: &[E], width: usize, rows: &[u32], out: &mut [E]) {
    check_length("out", out, rows.len() * width);
    let size = block_rows(width);
    parallel::map(rows.chunks(size).zip(out.chunks_mut(size * width)).collect(), |(rows, out)| {
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
            let start = *row as usize * width;
            out.copy_from_slice(&x[start..start + width]);
        }
    });
}

/// Adds row i of `x` `[rows, W]` to row `rows[i]` of `out` `[N, W]`, in the order of the rows.
///
/// # Panics
/// The lengths do not fit together, or `out` has no such row.
pub fn scatter_add_rows<E: Element, R: Element>(x: &[E], width: usize, rows: &[u32], out: &mut [R]) {
    struct Scatter<'a, E, R> {
        x: &'a [E],
        rows: &'a [u32],
        width: usize,
        /// The rows from `first` on.
        out: &'a mut [R],
        first: usize,
    }
    impl<E: Element, R: Element> Kernel for Scatter<'_, E, R> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let own = self.first..self.first + self.out.len() / self.width;
            for (row, x) in self.rows.iter().zip(self.x.chunks_exact(self.width)) {
                let row = *row as usize;
                if own.contains(&row) {
                    let start = (row - self.first) * self.width;
                    add_into(s, x, &mut self.out[start..start + self.width]);
                }
            }
        }
    }
    check_length("x", x, rows.len() * width);
    let count = self::rows("out", out, width);
    if let Some(row) = rows.iter().find(|row| **row as usize >= count) {
        panic!("out has {count} rows and no row {row}");
    }
    let level = Level::current();
    let size = block_rows(width);
    let blocks = out.chunks_mut(size * width).enumerate();
    let blocks = blocks.map(|(number, out)| Scatter { x, rows, width, out, first: number * size }).collect();
    parallel::map(blocks, |block| level.run(block));
}

/// `out` += `x`, element by element.
///
/// # Panics
/// The lengths differ.
pub fn add<E: Element, R: Element>(x: &[E], out: &mut [R]) {
    struct Add<'a, E, R>(&'a [E], &'a mut [R]);
    impl<E: Element, R: Element> Kernel for Add<'_, E, R> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            add_into(s, self.0, self.1);
        }
    }
    check_length("x", x, out.len());
    let level = Level::current();
    let blocks = x.chunks(ELEMENTS).zip(out.chunks_mut(ELEMENTS)).map(|(x, out)| Add(x, out)).collect();
    parallel::map(blocks, |block| level.run(block));
}

#[inline(always)]
fn add_into<S: Simd, E: Element, R: Element>(s: S, x: &[E], out: &mut [R]) {
    vectors!(S, out.len(), |at| {
        R::store_at::<WHOLE, _>(
            s,
            s.add(R::load_at::<WHOLE, _>(s, out, at), E::load_at::<WHOLE, _>(s, x, at)),
            out,
            at,
        );
    });
}

/// Rows of unit length: y = x / max(|x|, eps).
#[derive(Clone, Copy, Debug)]
pub struct Normalize {
    pub width: usize,
    /// The shortest length to divide by.
    pub eps: f32,
}

impl Normalize {
    /// `x` `[N, W]` to `out` `[N, W]`; `norms` `[N]` gets what was divided by.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn forward<E: Element, R: Element>(&self, x: &[E], out: &mut [R], norms: &mut [f32]) {
        struct Forward<'a, E, R> {
            normalize: Normalize,
            x: &'a [E],
            out: &'a mut [R],
            norms: &'a mut [f32],
        }
        impl<E: Element, R: Element> Kernel for Forward<'_, E, R> {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                let Normalize { width, eps } = self.normalize;
                let rows = self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width));
                for ((x, out), norm) in rows.zip(self.norms) {
                    *norm = dot(s, x, x).sqrt().max(eps);
                    vectors!(S, width, |at| {
                        R::store_at::<WHOLE, _>(s, s.div(E::load_at::<WHOLE, _>(s, x, at), s.splat(*norm)), out, at);
                    });
                }
            }
        }
        let count = rows("x", x, self.width);
        check_length("out", out, count * self.width);
        check_length("norms", norms, count);
        let level = Level::current();
        let size = block_rows(self.width);
        let parts = x.chunks(size * self.width).zip(out.chunks_mut(size * self.width)).zip(norms.chunks_mut(size));
        let blocks = parts.map(|((x, out), norms)| Forward { normalize: *self, x, out, norms }).collect();
        parallel::map(blocks, |block| level.run(block));
    }

    /// `d_x` `[N, W]` from what [`Normalize::forward`] gave and the gradient of its `out`. A row shorter than `eps` was divided
    /// by a constant.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn backward<E: Element, R: Element>(&self, out: &[R], norms: &[f32], gradient: &[R], d_x: &mut [E]) {
        struct Backward<'a, E, R> {
            normalize: Normalize,
            out: &'a [R],
            norms: &'a [f32],
            gradient: &'a [R],
            d_x: &'a mut [E],
        }
        impl<E: Element, R: Element> Kernel for Backward<'_, E, R> {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                let Normalize { width, eps } = self.normalize;
                let rows = self.out.chunks_exact(width).zip(self.gradient.chunks_exact(width));
                for (((out, gradient), d_x), norm) in rows.zip(self.d_x.chunks_exact_mut(width)).zip(self.norms) {
                    let along = if *norm > eps { dot(s, out, gradient) } else { 0.0 };
                    vectors!(S, width, |at| {
                        let across = s.mul_add(
                            R::load_at::<WHOLE, _>(s, out, at),
                            s.splat(-along),
                            R::load_at::<WHOLE, _>(s, gradient, at),
                        );
                        E::store_at::<WHOLE, _>(s, s.div(across, s.splat(*norm)), d_x, at);
                    });
                }
            }
        }
        let count = rows("out", out, self.width);
        check_length("norms", norms, count);
        check_length("gradient", gradient, count * self.width);
        check_length("d_x", d_x, count * self.width);
        let level = Level::current();
        let size = block_rows(self.width);
        let inputs = out.chunks(size * self.width).zip(gradient.chunks(size * self.width)).zip(norms.chunks(size));
        let parts = inputs.zip(d_x.chunks_mut(size * self.width));
        let blocks =
            parts.map(|(((out, gradient), norms), d_x)| Backward { normalize: *self, out, norms, gradient, d_x });
        parallel::map(blocks.collect(), |block| level.run(block));
    }
}

#[inline(always)]
fn dot<S: Simd, A: Element, B: Element>(s: S, a: &[A], b: &[B]) -> f32 {
    let mut sum = s.splat(0.0);
    vectors!(S, a.len(), |at| {
        sum = s.mul_add(A::load_at::<WHOLE, _>(s, a, at), B::load_at::<WHOLE, _>(s, b, at), sum);
    });
    s.sum(sum)
}

#[cfg(test)]
mod tests;
