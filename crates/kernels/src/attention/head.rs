//! One head of one sequence: its keys and values in f32, rows padded with zeros to whole vectors, and a few queries at a time.
//!
//! A query goes through several steps, each of which waits for the one before. The caller takes each step for a few queries
//! before the next step, so that the processor has something to do meanwhile.

use super::Sequence;
use crate::dropout::RowDropout;
use crate::element::{Element, vectors};
use crate::math::exp;
use crate::simd::Simd;

/// Vectors that loops over keys hold in registers.
const HELD: usize = 4;

/// Keys and values. Room for the longest sequence of a block.
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
}

/// One query, and what it makes of the keys that it sees.
pub(super) struct Query {
    /// Keys that it sees.
    seen: usize,
    dropout: RowDropout,
    /// `[padded]`, divided by the root of the head's share.
    query: Vec<f32>,
    /// Of the keys, padded: the scores, then their softmax.
    probabilities: Vec<f32>,
    /// Of the keys, padded: what dropout multiplies them by.
    factors: Vec<f32>,
    /// Of the keys, padded: their product.
    weights: Vec<f32>,
    /// `[padded]`: the weighted sum of the values, or its gradient.
    context: Vec<f32>,
    /// Of the keys, padded: gradient of the probabilities, then of the scores.
    d_scores: Vec<f32>,
}

/// Gradients of keys and values.
pub(super) struct HeadGradients {
    padded: usize,
    /// `[keys, padded]`
    keys: Vec<f32>,
    /// `[keys, padded]`
    values: Vec<f32>,
}

fn padded<S: Simd>(length: usize) -> usize {
    length.next_multiple_of(S::LANES)
}

fn longest(sequences: &[Sequence]) -> usize {
    sequences.iter().map(|sequence| sequence.keys).max().unwrap_or_default()
}

impl Head {
    pub(super) fn new<S: Simd>(share: usize, sequences: &[Sequence]) -> Self {
        let row = padded::<S>(share);
        let zeros = || vec![0.0; longest(sequences) * row];
        Self { share, padded: row, scale: 1.0 / (share as f32).sqrt(), keys: zeros(), values: zeros() }
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
}

impl Query {
    /// Room for any query of these sequences.
    pub(super) fn new<S: Simd>(head: &Head, sequences: &[Sequence]) -> Self {
        let (row, keys) = (|| vec![0.0; head.padded], || vec![0.0; padded::<S>(longest(sequences))]);
        Self {
            seen: 0,
            dropout: crate::Dropout::OFF.row(0),
            query: row(),
            probabilities: keys(),
            factors: keys(),
            weights: keys(),
            context: row(),
            d_scores: keys(),
        }
    }

    /// The weighted sum of the values, or the gradient of the query, `[padded]`.
    pub(super) fn result(&self) -> &[f32] {
        &self.context
    }

    /// Takes over a query that sees so many keys, and scores them.
    #[inline(always)]
    pub(super) fn score<S: Simd, E: Element>(
        &mut self,
        s: S,
        head: &Head,
        from: &[E],
        (seen, dropout): (usize, RowDropout),
    ) {
        self.seen = seen;
        self.dropout = dropout;
        read(s, from, &mut self.query, head.scale);
        dots(s, &self.query, &head.keys, &mut self.probabilities[..seen]);
        for score in &mut self.probabilities[seen..padded::<S>(seen)] {
            *score = f32::NEG_INFINITY;
        }
    }

    /// From scores to probabilities, and to weights by way of dropout.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(&mut self, s: S) {
        let end = padded::<S>(self.seen);
        let (probabilities, factors) = (&mut self.probabilities[..end], &mut self.factors[..end]);
        let weights = &mut self.weights[..end];
        let mut most = s.splat(f32::NEG_INFINITY);
        for at in (0..end).step_by(S::LANES) {
            most = s.max(most, s.load(&probabilities[at..]));
        }
        let most = s.splat(s.largest(most));
        let mut total = s.splat(0.0);
        for at in (0..end).step_by(S::LANES) {
            let e = exp(s, s.sub(s.load(&probabilities[at..]), most));
            total = s.add(total, e);
            s.store(e, &mut probabilities[at..]);
            s.store(self.dropout.factors(s, at), &mut factors[at..]);
        }
        let share = s.splat(1.0 / s.sum(total));
        for at in (0..end).step_by(S::LANES) {
            let probability = s.mul(s.load(&probabilities[at..]), share);
            s.store(probability, &mut probabilities[at..]);
            s.store(s.mul(probability, s.load(&factors[at..])), &mut weights[at..]);
        }
    }

    /// The weighted sum of the values.
    #[inline(always)]
    pub(super) fn mix<S: Simd>(&mut self, s: S, head: &Head) {
        let mut at = 0;
        while at + HELD * S::LANES <= head.padded {
            self.mix_at::<HELD, S>(s, head, at);
            at += HELD * S::LANES;
        }
        while at < head.padded {
            self.mix_at::<1, S>(s, head, at);
            at += S::LANES;
        }
    }

    /// N vectors of it.
    #[inline(always)]
    fn mix_at<const N: usize, S: Simd>(&mut self, s: S, head: &Head, at: usize) {
        let mut sums = [s.splat(0.0); N];
        for (weight, value) in self.weights[..self.seen].iter().zip(head.values.chunks_exact(head.padded)) {
            let weight = s.splat(*weight);
            let value = &value[at..at + N * S::LANES];
            for (number, sum) in sums.iter_mut().enumerate() {
                *sum = s.mul_add(weight, s.load(&value[number * S::LANES..]), *sum);
            }
        }
        for (sum, out) in sums.into_iter().zip(self.context[at..].chunks_exact_mut(S::LANES)) {
            s.store(sum, out);
        }
    }

    /// Takes over the gradient of the context, and finds that of the weights.
    #[inline(always)]
    pub(super) fn score_back<S: Simd, E: Element>(&mut self, s: S, head: &Head, from: &[E]) {
        read(s, from, &mut self.context, 1.0);
        dots(s, &self.context, &head.values, &mut self.d_scores[..self.seen]);
        for d in &mut self.d_scores[self.seen..padded::<S>(self.seen)] {
            *d = 0.0;
        }
    }

    /// From the gradient of the weights to that of the scores.
    #[inline(always)]
    pub(super) fn weigh_back<S: Simd>(&mut self, s: S) {
        let end = padded::<S>(self.seen);
        let (probabilities, factors) = (&self.probabilities[..end], &self.factors[..end]);
        let d_scores = &mut self.d_scores[..end];
        let mut mean = s.splat(0.0);
        for at in (0..end).step_by(S::LANES) {
            let d = s.mul(s.load(&d_scores[at..]), s.load(&factors[at..]));
            mean = s.mul_add(d, s.load(&probabilities[at..]), mean);
            s.store(d, &mut d_scores[at..]);
        }
        let mean = s.splat(s.sum(mean));
        for at in (0..end).step_by(S::LANES) {
            let d = s.mul(s.sub(s.load(&d_scores[at..]), mean), s.load(&probabilities[at..]));
            s.store(d, &mut d_scores[at..]);
        }
    }
}

impl HeadGradients {
    pub(super) fn new(head: &Head) -> Self {
        Self { padded: head.padded, keys: vec![0.0; head.keys.len()], values: vec![0.0; head.values.len()] }
    }

    pub(super) fn clear(&mut self, keys: usize) {
        self.keys[..keys * self.padded].fill(0.0);
        self.values[..keys * self.padded].fill(0.0);
    }

    /// Of a key and its value.
    pub(super) fn key(&self, key: usize) -> (&[f32], &[f32]) {
        let own = key * self.padded..(key + 1) * self.padded;
        (&self.keys[own.clone()], &self.values[own])
    }

    /// From the gradients of a query's scores and context to those of keys and values, and to the query's own.
    #[inline(always)]
    pub(super) fn mix_back<S: Simd>(&mut self, s: S, head: &Head, query: &mut Query) {
        let mut at = 0;
        while at + HELD * S::LANES <= self.padded {
            self.mix_back_at::<HELD, S>(s, head, query, at);
            at += HELD * S::LANES;
        }
        while at < self.padded {
            self.mix_back_at::<1, S>(s, head, query, at);
            at += S::LANES;
        }
    }

    /// N vectors of each row.
    #[inline(always)]
    fn mix_back_at<const N: usize, S: Simd>(&mut self, s: S, head: &Head, asked: &mut Query, at: usize) {
        let range = at..at + N * S::LANES;
        let (mut d_query, mut query, mut d_context) = ([s.splat(0.0); N], [s.splat(0.0); N], [s.splat(0.0); N]);
        for number in 0..N {
            query[number] = s.load(&asked.query[at + number * S::LANES..]);
            d_context[number] = s.load(&asked.context[at + number * S::LANES..]);
        }
        let scores = asked.d_scores[..asked.seen].iter().zip(&asked.weights);
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
        for (d_query, out) in d_query.into_iter().zip(asked.context[range].chunks_exact_mut(S::LANES)) {
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
