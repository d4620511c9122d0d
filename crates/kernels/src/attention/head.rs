//! One head of one sequence: its keys and values in f32, rows padded with zeros to whole vectors, and one query at a time.

use super::Sequence;
use crate::dropout::RowDropout;
use crate::element::{Element, vectors};
use crate::math::exp;
use crate::simd::Simd;

/// What is known of a query beside its vector.
#[derive(Clone, Copy, Debug)]
pub(super) struct Query {
    /// Keys that it sees.
    pub seen: usize,
    pub dropout: RowDropout,
}

/// Room for the longest sequence of a block.
pub(super) struct Head {
    /// D / heads
    share: usize,
    /// Numbers of a padded row.
    padded: usize,
    /// 1 / sqrt(share)
    scale: f32,
    /// `[keys, padded]`
    keys: Vec<f32>,
    /// `[keys, padded]`
    values: Vec<f32>,
    /// `[padded]`, divided by the root of the head's share.
    query: Vec<f32>,
    /// Of the keys, padded: the softmax of the scores.
    probabilities: Vec<f32>,
    /// Of the keys, padded: what dropout multiplies them by.
    factors: Vec<f32>,
    /// Of the keys, padded: their product.
    weights: Vec<f32>,
}

/// Vectors that loops over keys hold in registers.
const HELD: usize = 4;

fn padded<S: Simd>(length: usize) -> usize {
    length.next_multiple_of(S::LANES)
}

impl Head {
    pub(super) fn new<S: Simd>(share: usize, sequences: &[Sequence]) -> Self {
        let longest = sequences.iter().map(|sequence| sequence.keys).max().unwrap_or_default();
        let row = padded::<S>(share);
        let zeros = |count| vec![0.0; count];
        Self {
            share,
            padded: row,
            scale: 1.0 / (share as f32).sqrt(),
            keys: zeros(longest * row),
            values: zeros(longest * row),
            query: zeros(row),
            probabilities: zeros(padded::<S>(longest)),
            factors: zeros(padded::<S>(longest)),
            weights: zeros(padded::<S>(longest)),
        }
    }

    pub(super) fn padded(&self) -> usize {
        self.padded
    }

    /// Takes over keys and values that stand `width` behind them, a row every `stride`.
    #[inline(always)]
    pub(super) fn load_keys<S: Simd, E: Element>(
        &mut self,
        s: S,
        count: usize,
        stride: usize,
        (from, width): (&[E], usize),
    ) {
        let share = self.share;
        for key in 0..count {
            let own = key * self.padded..(key + 1) * self.padded;
            read(s, &from[key * stride..][..share], &mut self.keys[own.clone()], 1.0);
            read(s, &from[key * stride + width..][..share], &mut self.values[own], 1.0);
        }
    }

    #[inline(always)]
    pub(super) fn load_query<S: Simd, E: Element>(&mut self, s: S, from: &[E]) {
        read(s, from, &mut self.query, self.scale);
    }

    /// Probabilities and dropout's factors of the keys that the query sees.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(&mut self, s: S, query: Query) {
        let Query { seen, dropout } = query;
        let end = padded::<S>(seen);
        dots(s, &self.query, &self.keys, &mut self.probabilities[..seen]);
        self.probabilities[seen..end].fill(f32::NEG_INFINITY);
        let mut most = s.splat(f32::NEG_INFINITY);
        for at in (0..end).step_by(S::LANES) {
            most = s.max(most, s.load(&self.probabilities[at..]));
        }
        let most = s.splat(s.largest(most));
        let mut total = s.splat(0.0);
        for at in (0..end).step_by(S::LANES) {
            let e = exp(s, s.sub(s.load(&self.probabilities[at..]), most));
            total = s.add(total, e);
            s.store(e, &mut self.probabilities[at..]);
            s.store(dropout.factors(s, at), &mut self.factors[at..]);
        }
        let share = s.splat(1.0 / s.sum(total));
        for at in (0..end).step_by(S::LANES) {
            let probability = s.mul(s.load(&self.probabilities[at..]), share);
            s.store(probability, &mut self.probabilities[at..]);
            s.store(s.mul(probability, s.load(&self.factors[at..])), &mut self.weights[at..]);
        }
    }

    /// The weighted sum of the values, `[padded]`.
    #[inline(always)]
    pub(super) fn context<S: Simd>(&self, s: S, seen: usize, out: &mut [f32]) {
        let mut at = 0;
        while at + HELD * S::LANES <= out.len() {
            self.context_at::<HELD, S>(s, seen, (out, at));
            at += HELD * S::LANES;
        }
        while at < out.len() {
            self.context_at::<1, S>(s, seen, (out, at));
            at += S::LANES;
        }
    }

    /// N vectors of it.
    #[inline(always)]
    fn context_at<const N: usize, S: Simd>(&self, s: S, seen: usize, (out, at): (&mut [f32], usize)) {
        let mut sums = [s.splat(0.0); N];
        for (weight, value) in self.weights[..seen].iter().zip(self.values.chunks_exact(self.padded)) {
            let weight = s.splat(*weight);
            let value = &value[at..at + N * S::LANES];
            for (number, sum) in sums.iter_mut().enumerate() {
                *sum = s.mul_add(weight, s.load(&value[number * S::LANES..]), *sum);
            }
        }
        for (sum, out) in sums.into_iter().zip(out[at..].chunks_exact_mut(S::LANES)) {
            s.store(sum, out);
        }
    }
}

/// Gradients of one head of one sequence.
pub(super) struct HeadGradients {
    padded: usize,
    /// `[keys, padded]`
    keys: Vec<f32>,
    /// `[keys, padded]`
    values: Vec<f32>,
    /// `[padded]`
    query: Vec<f32>,
    /// `[padded]`, of the query's context.
    context: Vec<f32>,
    /// Of the keys, padded: gradient of the probabilities, then of the scores.
    scores: Vec<f32>,
}

impl HeadGradients {
    pub(super) fn new(head: &Head) -> Self {
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        Self {
            padded: head.padded,
            keys: zeros(&head.keys),
            values: zeros(&head.values),
            query: zeros(&head.query),
            context: zeros(&head.query),
            scores: zeros(&head.probabilities),
        }
    }

    pub(super) fn clear(&mut self, keys: usize) {
        self.keys[..keys * self.padded].fill(0.0);
        self.values[..keys * self.padded].fill(0.0);
    }

    /// Of the query added last.
    pub(super) fn query(&self) -> &[f32] {
        &self.query
    }

    /// Of a key and its value.
    pub(super) fn key(&self, key: usize) -> (&[f32], &[f32]) {
        let own = key * self.padded..(key + 1) * self.padded;
        (&self.keys[own.clone()], &self.values[own])
    }

    /// What the gradient of a query's context does to the query, the keys and the values; the head holds the query and its
    /// probabilities.
    #[inline(always)]
    pub(super) fn add_query<S: Simd, E: Element>(&mut self, s: S, head: &Head, query: Query, d_context: &[E]) {
        let seen = query.seen;
        let end = padded::<S>(seen);
        read(s, d_context, &mut self.context, 1.0);
        dots(s, &self.context, &head.values, &mut self.scores[..seen]);
        self.scores[seen..end].fill(0.0);
        // through dropout, and the probabilities' mean of it
        let mut mean = s.splat(0.0);
        for at in (0..end).step_by(S::LANES) {
            let d = s.mul(s.load(&self.scores[at..]), s.load(&head.factors[at..]));
            mean = s.mul_add(d, s.load(&head.probabilities[at..]), mean);
            s.store(d, &mut self.scores[at..]);
        }
        let mean = s.splat(s.sum(mean));
        for at in (0..end).step_by(S::LANES) {
            let d = s.mul(s.sub(s.load(&self.scores[at..]), mean), s.load(&head.probabilities[at..]));
            s.store(d, &mut self.scores[at..]);
        }
        let mut at = 0;
        while at + HELD * S::LANES <= self.padded {
            self.spread_at::<HELD, S>(s, head, seen, at);
            at += HELD * S::LANES;
        }
        while at < self.padded {
            self.spread_at::<1, S>(s, head, seen, at);
            at += S::LANES;
        }
    }

    /// From the gradient of the scores to those of query, keys and values; N vectors of each row.
    #[inline(always)]
    fn spread_at<const N: usize, S: Simd>(&mut self, s: S, head: &Head, seen: usize, at: usize) {
        let range = at..at + N * S::LANES;
        let (mut d_query, mut query, mut d_context) = ([s.splat(0.0); N], [s.splat(0.0); N], [s.splat(0.0); N]);
        for number in 0..N {
            query[number] = s.load(&head.query[at + number * S::LANES..]);
            d_context[number] = s.load(&self.context[at + number * S::LANES..]);
        }
        let scores = self.scores[..seen].iter().zip(&head.weights);
        let gradients = self.keys.chunks_exact_mut(self.padded).zip(self.values.chunks_exact_mut(self.padded));
        let keys = head.keys.chunks_exact(self.padded);
        for (((d_score, weight), key), (d_key, d_value)) in scores.zip(keys).zip(gradients) {
            let (d_score, weight) = (s.splat(*d_score), s.splat(*weight));
            let (key, d_key, d_value) = (&key[range.clone()], &mut d_key[range.clone()], &mut d_value[range.clone()]);
            for number in 0..N {
                let place = number * S::LANES;
                d_query[number] = s.mul_add(d_score, s.load(&key[place..]), d_query[number]);
                // the query has been scaled already
                s.store(s.mul_add(d_score, query[number], s.load(&d_key[place..])), &mut d_key[place..]);
                s.store(s.mul_add(weight, d_context[number], s.load(&d_value[place..])), &mut d_value[place..]);
            }
        }
        let scale = s.splat(head.scale);
        for (d_query, out) in d_query.into_iter().zip(self.query[range].chunks_exact_mut(S::LANES)) {
            s.store(s.mul(d_query, scale), out);
        }
    }
}

/// The products of a padded row with the first rows of a matrix of such rows.
#[inline(always)]
fn dots<S: Simd>(s: S, row: &[f32], matrix: &[f32], out: &mut [f32]) {
    for (out, other) in out.iter_mut().zip(matrix.chunks_exact(row.len())) {
        let mut sum = s.splat(0.0);
        for at in (0..row.len()).step_by(S::LANES) {
            sum = s.mul_add(s.load(&row[at..]), s.load(&other[at..]), sum);
        }
        *out = s.sum(sum);
    }
}

/// A padded row in f32, scaled. The padding of `to` is 0 and stays so.
#[inline(always)]
fn read<S: Simd, E: Element>(s: S, from: &[E], to: &mut [f32], scale: f32) {
    vectors!(S, from.len(), |at| {
        s.store(s.mul(E::load_at::<WHOLE, _>(s, from, at), s.splat(scale)), &mut to[at..]);
    });
}
