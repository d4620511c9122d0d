//! Causal attention over packed sequences, without padding and without moving heads about.
//!
//! Input: queries, keys and values as products leave them, rows of tokens, heads side by side. Output: contexts in the same
//! layout; in the backward pass their gradients. Each sequence attends within itself. The backward pass computes the
//! probabilities again from queries and keys, which costs less than storing them for sequences of tens of items. Memory
//! beside inputs and outputs is O(keys x D / heads) a thread.

mod head;

use crate::dropout::{Dropout, RowDropout};
use crate::element::{Element, vectors};
use crate::parallel::{self, check_length, rows};
use crate::simd::{Kernel, Level, Simd};

use self::head::{Head, HeadGradients, Query};

/// Queries of a head that take each step together.
const TOGETHER: usize = 4;
/// Pairs of a query and a key in a block of sequences, about.
const PAIRS: usize = 400;

/// Where a sequence lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its queries are the rows `first_query..first_query + queries` of q; there may be none.
    pub first_query: usize,
    pub queries: usize,
    /// Its keys and values are the rows `first_key..first_key + keys` of k and v.
    pub first_key: usize,
    pub keys: usize,
}

impl Sequence {
    /// One whose tokens all ask.
    #[must_use]
    pub fn whole(start: usize, length: usize) -> Self {
        Self { first_query: start, queries: length, first_key: start, keys: length }
    }
}

/// Attention of all sequences of a pass, in one layer.
///
/// A sequence of one key has nothing to choose: its weight is 1, and dropout leaves it alone, since dropping it would erase the
/// token instead of thinning its context.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// One behind the other in q and in k and v, without gaps.
    pub sequences: &'a [Sequence],
    /// Of each query its place in its sequence: it sees the keys up to there. Without them query i stands at place i.
    pub places: Option<&'a [u32]>,
    pub heads: usize,
    /// D, of all heads together. Scores are divided by the root of a head's share.
    pub width: usize,
    /// Of the probabilities. Row `query * heads + head`, column key.
    pub dropout: Dropout,
}

impl Attention<'_> {
    /// `qkv` `[T, 3D]` to `context` `[T, D]`, for sequences whose tokens all ask.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn forward<E: Element>(&self, qkv: &[E], context: &mut [E]) {
        let width = self.width;
        self.check(rows("qkv", qkv, 3 * width), rows("qkv", qkv, 3 * width));
        check_length("context", context, qkv.len() / 3);
        self.contexts(Inputs { q: qkv, q_stride: 3 * width, kv: qkv, kv_stride: 3 * width, k_column: width }, context);
    }

    /// The gradient `[T, 3D]` of `qkv`, from that of the context `[T, D]`.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn backward<E: Element>(&self, qkv: &[E], d_context: &[E], d_qkv: &mut [E]) {
        let width = self.width;
        self.check(rows("qkv", qkv, 3 * width), rows("qkv", qkv, 3 * width));
        check_length("d_context", d_context, qkv.len() / 3);
        check_length("d_qkv", d_qkv, qkv.len());
        let inputs = Inputs { q: qkv, q_stride: 3 * width, kv: qkv, kv_stride: 3 * width, k_column: width };
        self.gradients(inputs, d_context, None, d_qkv);
    }

    /// Where only some tokens ask: `q` `[Q, D]` and `kv` `[T, 2D]` to `context` `[Q, D]`.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn forward_some<E: Element>(&self, q: &[E], kv: &[E], context: &mut [E]) {
        let width = self.width;
        self.check(rows("q", q, width), rows("kv", kv, 2 * width));
        check_length("context", context, q.len());
        self.contexts(Inputs { q, q_stride: width, kv, kv_stride: 2 * width, k_column: 0 }, context);
    }

    /// The gradients `[Q, D]` of q and `[T, 2D]` of kv, from that of the context `[Q, D]`.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn backward_some<E: Element>(&self, q: &[E], kv: &[E], d_context: &[E], d_q: &mut [E], d_kv: &mut [E]) {
        let width = self.width;
        self.check(rows("q", q, width), rows("kv", kv, 2 * width));
        check_length("d_context", d_context, q.len());
        check_length("d_q", d_q, q.len());
        check_length("d_kv", d_kv, kv.len());
        let inputs = Inputs { q, q_stride: width, kv, kv_stride: 2 * width, k_column: 0 };
        self.gradients(inputs, d_context, Some(d_q), d_kv);
    }

    fn check(&self, queries: usize, keys: usize) {
        let Self { heads, width, .. } = *self;
        assert!(heads > 0 && width.is_multiple_of(heads), "{heads} heads do not divide a width of {width}");
        let mut next = (0, 0);
        for sequence in self.sequences {
            let at = (sequence.first_query, sequence.first_key);
            assert!(at == next, "{sequence:?} does not begin at query {} and key {}", next.0, next.1);
            next = (at.0 + sequence.queries, at.1 + sequence.keys);
            match self.places {
                None => assert!(sequence.queries == sequence.keys, "{sequence:?} needs the places of its queries"),
                Some(places) => {
                    let own = places.get(at.0..next.0).unwrap_or_default();
                    assert!(own.len() == sequence.queries, "there are {} places, and {sequence:?}", places.len());
                    let beyond = own.iter().find(|place| **place as usize >= sequence.keys);
                    assert!(beyond.is_none(), "{sequence:?} has no place {beyond:?}");
                }
            }
        }
        assert!(next == (queries, keys), "sequences of {next:?} and not {:?} queries and keys", (queries, keys));
    }

    /// Neighbouring sequences with enough work for a task.
    fn blocks(&self) -> Vec<&[Sequence]> {
        let mut blocks = Vec::new();
        let mut rest = self.sequences;
        while !rest.is_empty() {
            let mut pairs = 0;
            let enough = rest.iter().position(|sequence| {
                pairs += (sequence.queries + 1) * sequence.keys;
                pairs >= PAIRS
            });
            let (block, others) = rest.split_at(enough.map_or(rest.len(), |last| last + 1));
            blocks.push(block);
            rest = others;
        }
        blocks
    }

    fn contexts<E: Element>(&self, inputs: Inputs<'_, E>, mut context: &mut [E]) {
        let level = Level::current();
        let blocks = self.blocks().into_iter().map(|sequences| {
            let queries = sequences.iter().map(|sequence| sequence.queries).sum::<usize>();
            let own = context.split_off_mut(..queries * self.width).unwrap_or_default();
            Forward { attention: Attention { sequences, ..*self }, inputs, context: own }
        });
        let blocks = blocks.collect();
        parallel::map(blocks, |block| level.run(block));
    }

    fn gradients<E: Element>(
        &self,
        inputs: Inputs<'_, E>,
        d_context: &[E],
        mut d_q: Option<&mut [E]>,
        mut d_kv: &mut [E],
    ) {
        let level = Level::current();
        let blocks = self.blocks().into_iter().map(|sequences| {
            let queries = sequences.iter().map(|sequence| sequence.queries).sum::<usize>();
            let keys = sequences.iter().map(|sequence| sequence.keys).sum::<usize>();
            let own_q = d_q.as_mut().map(|d_q| d_q.split_off_mut(..queries * self.width).unwrap_or_default());
            let own_kv = d_kv.split_off_mut(..keys * inputs.kv_stride).unwrap_or_default();
            Backward { attention: Attention { sequences, ..*self }, inputs, d_context, d_q: own_q, d_kv: own_kv }
        });
        let blocks = blocks.collect();
        parallel::map(blocks, |block| level.run(block));
    }
}

/// Queries, keys and values as they lie; v stands D columns behind k.
#[derive(Clone, Copy)]
struct Inputs<'a, E> {
    q: &'a [E],
    q_stride: usize,
    kv: &'a [E],
    kv_stride: usize,
    k_column: usize,
}

struct Forward<'a, E> {
    attention: Attention<'a>,
    inputs: Inputs<'a, E>,
    /// Of the block's queries.
    context: &'a mut [E],
}

impl<E: Element> Kernel for Forward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Attention { sequences, heads, width, .. } = self.attention;
        let Some(block_start) = sequences.first().map(|sequence| sequence.first_query) else { return };
        let share = width / heads;
        let mut head = Head::new::<S>(share, sequences);
        let mut together = Vec::from_iter((0..TOGETHER).map(|_| Query::new::<S>(&head, sequences)));
        for sequence in sequences {
            for number in 0..heads {
                let column = number * share;
                self.inputs.load_keys(s, &mut head, sequence, (column, width));
                let end = sequence.first_query + sequence.queries;
                for first in (sequence.first_query..end).step_by(TOGETHER) {
                    let queries = &mut together[..TOGETHER.min(end - first)];
                    for (place, query) in queries.iter_mut().enumerate() {
                        let row = first + place;
                        let from = &self.inputs.q[row * self.inputs.q_stride + column..][..share];
                        query.score(s, &head, from, self.attention.sight(sequence, row, number));
                    }
                    for query in queries.iter_mut() {
                        query.weigh(s);
                    }
                    for (place, query) in queries.iter_mut().enumerate() {
                        query.mix(s, &head);
                        let start = (first + place - block_start) * width + column;
                        write(s, query.result(), &mut self.context[start..start + share]);
                    }
                }
            }
        }
    }
}

impl<E: Element> Inputs<'_, E> {
    #[inline(always)]
    fn load_keys<S: Simd>(&self, s: S, head: &mut Head, sequence: &Sequence, (column, width): (usize, usize)) {
        let start = sequence.first_key * self.kv_stride + self.k_column + column;
        head.load_keys(s, sequence.keys, self.kv_stride, (&self.kv[start.min(self.kv.len())..], width));
    }
}

impl Attention<'_> {
    /// How many keys a query sees, and its dropout.
    #[inline(always)]
    fn sight(&self, sequence: &Sequence, row: usize, head: usize) -> (usize, RowDropout) {
        let place = match self.places {
            Some(places) => places[row] as usize,
            None => row - sequence.first_query,
        };
        let dropout = if sequence.keys == 1 { Dropout::OFF } else { self.dropout };
        (place + 1, dropout.row((row * self.heads + head) as u64))
    }
}

struct Backward<'a, E> {
    attention: Attention<'a>,
    inputs: Inputs<'a, E>,
    /// Of all queries.
    d_context: &'a [E],
    /// Of the block's queries, if they do not stand in `d_kv`.
    d_q: Option<&'a mut [E]>,
    /// Of the block's keys and values, and of its queries, laid out as in the inputs.
    d_kv: &'a mut [E],
}

impl<E: Element> Kernel for Backward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Attention { sequences, heads, width, .. } = self.attention;
        let Some(first) = sequences.first().copied() else { return };
        let Inputs { q, q_stride, kv_stride, k_column, .. } = self.inputs;
        let share = width / heads;
        let mut head = Head::new::<S>(share, sequences);
        let mut gradients = HeadGradients::new(&head);
        let mut together = Vec::from_iter((0..TOGETHER).map(|_| Query::new::<S>(&head, sequences)));
        for sequence in sequences {
            for number in 0..heads {
                let column = number * share;
                self.inputs.load_keys(s, &mut head, sequence, (column, width));
                gradients.clear(sequence.keys);
                let end = sequence.first_query + sequence.queries;
                for begin in (sequence.first_query..end).step_by(TOGETHER) {
                    let queries = &mut together[..TOGETHER.min(end - begin)];
                    for (place, query) in queries.iter_mut().enumerate() {
                        let row = begin + place;
                        let sight = self.attention.sight(sequence, row, number);
                        query.score(s, &head, &q[row * q_stride + column..][..share], sight);
                        query.score_back(s, &head, &self.d_context[row * width + column..][..share]);
                    }
                    for query in queries.iter_mut() {
                        query.weigh(s);
                    }
                    for query in queries.iter_mut() {
                        query.weigh_back(s);
                    }
                    for (place, query) in queries.iter_mut().enumerate() {
                        gradients.mix_back(s, &head, query);
                        let own = begin + place - first.first_query;
                        let (to, start) = match &mut self.d_q {
                            Some(d_q) => (&mut **d_q, own * width),
                            None => (&mut *self.d_kv, own * kv_stride),
                        };
                        write(s, query.result(), &mut to[start + column..][..share]);
                    }
                }
                for key in 0..sequence.keys {
                    let start = (sequence.first_key - first.first_key + key) * kv_stride + k_column + column;
                    let (d_key, d_value) = gradients.key(key);
                    write(s, d_key, &mut self.d_kv[start..start + share]);
                    write(s, d_value, &mut self.d_kv[start + width..][..share]);
                }
            }
        }
    }
}

/// Stores the first `to.len()` numbers of a row.
#[inline(always)]
fn write<S: Simd, E: Element>(s: S, row: &[f32], to: &mut [E]) {
    vectors!(S, to.len(), |at| {
        E::store_at::<WHOLE, _>(s, f32::load_at::<WHOLE, _>(s, row, at), to, at);
    });
}

#[cfg(test)]
mod tests;
