//! AdamW over flat buffers: every number is read once and written once.
//!
//! The arithmetic is that of `torch.optim.AdamW`: decoupled decay, bias correction, epsilon outside the root. The gradient is
//! scaled while it is read (by a clip factor, say), and the values are written as bf16 too where products read them so.

use std::borrow::Cow;

use half::bf16;

use crate::element::{Element, MOST_LANES, vectors};
use crate::parallel::{self, check_length, optional_chunks_mut};
use crate::simd::{Kernel, Level, Simd};

/// Elements of a block.
const ELEMENTS: usize = 1 << 15;

/// One update.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// The number of this update; the first is 1.
    pub step: u64,
    /// What the gradient is multiplied by.
    pub gradient_scale: f32,
}

/// What an update changes; all `[P]`.
#[derive(Debug)]
pub struct State<'a> {
    pub values: &'a mut [f32],
    /// Mean of the gradients.
    pub first: &'a mut [f32],
    /// Mean of their squares.
    pub second: &'a mut [f32],
    /// The values in bf16.
    pub shadow: Option<&'a mut [bf16]>,
}

impl AdamW {
    /// Updates the state with a gradient `[P]`; `decays` says whether weight decay applies.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn update<G: Element>(&self, gradient: &[G], state: State<'_>, decays: bool) {
        let count = gradient.len();
        check_length("values", state.values, count);
        check_length("first", state.first, count);
        check_length("second", state.second, count);
        if let Some(shadow) = &state.shadow {
            check_length("shadow", shadow, count);
        }
        let factors = self.factors(decays);
        let level = Level::current();
        let moments = state.first.chunks_mut(ELEMENTS).zip(state.second.chunks_mut(ELEMENTS));
        let written = state.values.chunks_mut(ELEMENTS).zip(moments).zip(optional_chunks_mut(state.shadow, ELEMENTS));
        let blocks = gradient.chunks(ELEMENTS).zip(written);
        let blocks = blocks.map(|(gradient, ((values, (first, second)), shadow))| Update {
            factors,
            gradient,
            state: State { values, first, second, shadow },
        });
        parallel::map(blocks.collect(), |block| level.run(block));
    }

    fn factors(&self, decays: bool) -> Factors {
        // past i32::MAX steps both corrections have long been 1
        let exponent = i32::try_from(self.step).unwrap_or(i32::MAX);
        let (correction1, correction2) = (1.0 - self.beta1.powi(exponent), 1.0 - self.beta2.powi(exponent));
        Factors {
            gradient: self.gradient_scale,
            keep: if decays { (1.0 - self.learning_rate * self.weight_decay) as f32 } else { 1.0 },
            // 1 - beta is taken before it is rounded to f32
            new1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            new2: (1.0 - self.beta2) as f32,
            root: (1.0 / correction2.sqrt()) as f32,
            epsilon: self.epsilon as f32,
            rate: (self.learning_rate / correction1) as f32,
        }
    }
}

/// The update's numbers as they are used.
#[derive(Clone, Copy, Debug)]
struct Factors {
    gradient: f32,
    /// What values are multiplied by first.
    keep: f32,
    new1: f32,
    beta2: f32,
    new2: f32,
    /// 1 / sqrt(second correction)
    root: f32,
    epsilon: f32,
    /// Learning rate / first correction
    rate: f32,
}

/// A block.
struct Update<'a, G> {
    factors: Factors,
    gradient: &'a [G],
    state: State<'a>,
}

impl<G: Element> Kernel for Update<'_, G> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { factors, gradient, state: State { values, first, second, mut shadow } } = self;
        vectors!(S, gradient.len(), |at| {
            let g = s.mul(G::load_at::<WHOLE, _>(s, gradient, at), s.splat(factors.gradient));
            let mean = f32::load_at::<WHOLE, _>(s, first, at);
            let mean = s.mul_add(s.sub(g, mean), s.splat(factors.new1), mean);
            let square = s.mul(f32::load_at::<WHOLE, _>(s, second, at), s.splat(factors.beta2));
            let square = s.mul_add(s.mul(g, g), s.splat(factors.new2), square);
            let spread = s.mul_add(s.sqrt(square), s.splat(factors.root), s.splat(factors.epsilon));
            let value = s.mul(f32::load_at::<WHOLE, _>(s, values, at), s.splat(factors.keep));
            let value = s.sub(value, s.mul(s.div(mean, spread), s.splat(factors.rate)));
            f32::store_at::<WHOLE, _>(s, mean, first, at);
            f32::store_at::<WHOLE, _>(s, square, second, at);
            f32::store_at::<WHOLE, _>(s, value, values, at);
            if let Some(shadow) = &mut shadow {
                bf16::store_at::<WHOLE, _>(s, value, shadow, at);
            }
        });
    }
}

/// Elements whose squares are added up in f32, so that rounding stays far below that of a single f32 sum.
const SQUARES: usize = 64 * MOST_LANES;

/// The sum of squares of a vector in parts, in f64 from blocks of a fixed size, however it is parted.
///
/// In a block element n joins sum n % 16, whatever the lanes of the processor are: all that multiply and add with one rounding
/// come to the same bits, so ranks on processors of different kinds scale the same gradient alike.
#[must_use]
pub fn squared_norm<E: Element>(parts: &[&[E]]) -> f64 {
    struct Squares<'a, E: Element>(Cow<'a, [E]>);
    impl<E: Element> Kernel for Squares<'_, E> {
        type Output = f64;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f64 {
            let mut total = 0.0;
            for part in self.0.chunks(SQUARES) {
                // of which as many are used as make 16 lanes
                let mut sums = [s.splat(0.0); MOST_LANES];
                let lines = part.chunks_exact(MOST_LANES);
                let rest = lines.remainder();
                for line in lines {
                    let mut own = 0;
                    while own < MOST_LANES / S::LANES {
                        let x = E::load(s, &line[own * S::LANES..]);
                        sums[own] = s.mul_add(x, x, sums[own]);
                        own += 1;
                    }
                }
                let mut own = 0;
                while own * S::LANES < rest.len() {
                    let x = E::load_part(s, &rest[own * S::LANES..], 0.0);
                    sums[own] = s.mul_add(x, x, sums[own]);
                    own += 1;
                }
                let mut lanes = [0.0; MOST_LANES];
                for (lanes, sum) in lanes.chunks_exact_mut(S::LANES).zip(sums) {
                    s.store(sum, lanes);
                }
                for lane in lanes {
                    total += f64::from(lane);
                }
            }
            total
        }
    }
    let level = Level::current();
    let mut blocks: Vec<Squares<'_, E>> = Vec::new();
    for mut part in parts.iter().copied() {
        // a block that reaches over the end of a part is put together
        if let Some(Squares(last)) = blocks.last_mut().filter(|last| last.0.len() < ELEMENTS) {
            let (begin, rest) = part.split_at(part.len().min(ELEMENTS - last.len()));
            if !begin.is_empty() {
                last.to_mut().extend_from_slice(begin);
            }
            part = rest;
        }
        blocks.extend(part.chunks(ELEMENTS).map(|block| Squares(Cow::Borrowed(block))));
    }
    parallel::map(blocks, |block| level.run(block)).into_iter().sum()
}

#[cfg(test)]
mod tests;
