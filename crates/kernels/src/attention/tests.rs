//! Against attention spelled out in f64, and its differences.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::testing::{assert_near, assert_same_with_any_threads, at_every_level, exact, numbers, precision, slopes};

/// Contexts `[Q, D]` of q `[Q, D]` and kv `[T, 2D]`, one behind the other in `all`.
fn reference(attention: &Attention<'_>, queries: usize, all: &[f64]) -> Vec<f64> {
    let (width, share) = (attention.width, attention.width / attention.heads);
    let (q, kv) = all.split_at(queries * width);
    let mut context = vec![0.0; queries * width];
    for sequence in attention.sequences {
        for row in sequence.first_query..sequence.first_query + sequence.queries {
            let place = attention.places.map_or(row - sequence.first_query, |places| places[row] as usize);
            for head in 0..attention.heads {
                let at = |x: &[f64], row: usize, stride: usize, column: usize| {
                    x[row * stride + column + head * share..][..share].to_vec()
                };
                let query = at(q, row, width, 0);
                let score = |key: usize| {
                    let key = at(kv, sequence.first_key + key, 2 * width, 0);
                    (query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() / (share as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = (0..=place).map(score).collect();
                let total: f64 = scores.iter().sum();
                for (key, score) in scores.iter().enumerate() {
                    let factor = match sequence.keys {
                        1 => 1.0,
                        _ => attention.dropout.factor((row * attention.heads + head) as u64, key as u32),
                    };
                    let value = at(kv, sequence.first_key + key, 2 * width, width);
                    for (context, value) in context[row * width + head * share..].iter_mut().zip(value) {
                        *context += score / total * f64::from(factor) * value;
                    }
                }
            }
        }
    }
    context
}

fn zeros<E: Element>(count: usize) -> Vec<E> {
    vec![E::default(); count]
}

fn check<E: Element>(attention: &Attention<'_>, seed: u64) {
    let width = attention.width;
    let queries: usize = attention.sequences.iter().map(|sequence| sequence.queries).sum();
    let keys: usize = attention.sequences.iter().map(|sequence| sequence.keys).sum();
    let longest = attention.sequences.iter().map(|sequence| sequence.keys.max(sequence.queries)).max().unwrap_or(0);
    let q: Vec<E> = numbers(seed, queries * width);
    let kv: Vec<E> = numbers(seed + 1, keys * 2 * width);
    let upstream: Vec<E> = numbers(seed + 2, queries * width);
    let all = [exact(&q), exact(&kv)].concat();
    let truth = reference(attention, queries, &all);
    let slopes = slopes(&all, &exact(&upstream), |all| reference(attention, queries, all));
    let tolerance = precision::<E>() * (1.0 + longest as f64);

    if attention.places.is_some() {
        let mut context = zeros(q.len());
        attention.forward_some(&q, &kv, &mut context);
        assert_near("context", &context, &truth, tolerance);
        let (mut d_q, mut d_kv) = (zeros(q.len()), zeros(kv.len()));
        attention.backward_some(&q, &kv, &upstream, &mut d_q, &mut d_kv);
        assert_near("d_q", &d_q, &slopes[..q.len()], tolerance);
        assert_near("d_kv", &d_kv, &slopes[q.len()..], tolerance);
    } else {
        let join = |q: &[E], kv: &[E]| -> Vec<E> {
            q.chunks(width).zip(kv.chunks(2 * width)).flat_map(|(q, kv)| [q, kv].concat()).collect()
        };
        let qkv = join(&q, &kv);
        let mut context = zeros(q.len());
        attention.forward(&qkv, &mut context);
        assert_near("context", &context, &truth, tolerance);
        let mut d_qkv = zeros(qkv.len());
        attention.backward(&qkv, &upstream, &mut d_qkv);
        let part = |of: std::ops::Range<usize>| -> Vec<E> {
            d_qkv.chunks(3 * width).flat_map(|row| row[of.clone()].to_vec()).collect()
        };
        assert_near("d_q", &part(0..width), &slopes[..q.len()], tolerance);
        assert_near("d_kv", &part(width..3 * width), &slopes[q.len()..], tolerance);
    }
}

fn whole(lengths: &[usize]) -> Vec<Sequence> {
    let mut start = 0;
    let next = |length: &usize| {
        start += length;
        Sequence::whole(start - length, *length)
    };
    lengths.iter().map(next).collect()
}

/// Sequences of these lengths, each with these draws of places.
fn some(parts: &[(usize, Vec<usize>)]) -> (Vec<Sequence>, Vec<u32>) {
    let (mut sequences, mut places, mut first_key) = (Vec::new(), Vec::new(), 0);
    for (keys, draws) in parts {
        let queries = if *keys == 0 { 0 } else { draws.len() };
        sequences.push(Sequence { first_query: places.len(), queries, first_key, keys: *keys });
        places.extend(draws[..queries].iter().map(|draw| (draw % keys) as u32));
        first_key += keys;
    }
    (sequences, places)
}

fn dropout() -> impl Strategy<Value = Dropout> {
    (prop_oneof![Just(0.0_f32), Just(0.3)], any::<u64>()).prop_map(|(rate, key)| Dropout { rate, key })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn whole_sequences_follow_the_formula(
        lengths in prop::collection::vec(0_usize..6, 0..4),
        heads in 1_usize..3,
        share in 1_usize..20,
        dropout in dropout(),
        seed in any::<u32>(),
    ) {
        let sequences = whole(&lengths);
        let attention = Attention { sequences: &sequences, places: None, heads, width: heads * share, dropout };
        at_every_level(|_| {
            check::<f32>(&attention, seed.into());
            check::<bf16>(&attention, seed.into());
        });
    }

    #[test]
    fn any_queries_follow_the_formula(
        parts in prop::collection::vec((0_usize..6, prop::collection::vec(any::<usize>(), 0..5)), 0..4),
        heads in 1_usize..3,
        share in 1_usize..20,
        dropout in dropout(),
        seed in any::<u32>(),
    ) {
        let (sequences, places) = some(&parts);
        let attention =
            Attention { sequences: &sequences, places: Some(&places), heads, width: heads * share, dropout };
        at_every_level(|_| {
            check::<f32>(&attention, seed.into());
            check::<bf16>(&attention, seed.into());
        });
    }
}

#[test]
fn longer_than_a_vector() {
    let sequences = whole(&[1, 37]);
    let dropout = Dropout { rate: 0.2, key: 5 };
    at_every_level(|_| {
        check::<f32>(&Attention { sequences: &sequences, places: None, heads: 1, width: 3, dropout }, 1);
    });
}

#[test]
fn large_scores_do_not_overflow() {
    let mut qkv: Vec<f32> = numbers(3, 5 * 3 * 16);
    for x in &mut qkv {
        *x *= 100.0;
    }
    let sequences = whole(&[5]);
    let attention = Attention { sequences: &sequences, places: None, heads: 1, width: 16, dropout: Dropout::OFF };
    at_every_level(|_| {
        let mut context = zeros::<f32>(5 * 16);
        attention.forward(&qkv, &mut context);
        assert!(context.iter().all(|x| x.is_finite()));
    });
}

#[test]
fn what_is_no_number_is_seen_in_the_contexts_that_it_reaches() {
    let (tokens, width) = (20, 16);
    let sequences = whole(&[tokens]);
    let attention = Attention { sequences: &sequences, places: None, heads: 1, width, dropout: Dropout::OFF };
    // a query reaches its own token, a key all from its own on
    for (column, reached) in [(3, 7..8), (width + 3, 7..tokens)] {
        let mut qkv: Vec<f32> = numbers(5, tokens * 3 * width);
        qkv[7 * 3 * width + column] = f32::NAN;
        at_every_level(|level| {
            let mut context = zeros::<f32>(tokens * width);
            attention.forward(&qkv, &mut context);
            for (token, context) in context.chunks_exact(width).enumerate() {
                let as_it_should = |x: &f32| x.is_nan() == reached.contains(&token);
                assert!(context.iter().all(as_it_should), "{level:?}, column {column}, token {token}: {context:?}");
            }
        });
    }
}

#[test]
fn the_same_with_any_number_of_threads_and_in_any_company() {
    let lengths: Vec<usize> = (0..60).map(|i| i * 7 % 23).collect();
    let sequences = whole(&lengths);
    let tokens: usize = lengths.iter().sum();
    let (heads, width) = (2, 24);
    let qkv: Vec<bf16> = numbers(1, tokens * 3 * width);
    let upstream: Vec<bf16> = numbers(2, tokens * width);
    let attention =
        Attention { sequences: &sequences, places: None, heads, width, dropout: Dropout { rate: 0.1, key: 4 } };
    let both = || {
        let (mut context, mut d_qkv) = (zeros::<bf16>(tokens * width), zeros::<bf16>(tokens * 3 * width));
        attention.forward(&qkv, &mut context);
        attention.backward(&qkv, &upstream, &mut d_qkv);
        (context, d_qkv)
    };
    assert_same_with_any_threads(both);
    let own = Sequence::whole(0, lengths[40]);
    let start = sequences[40].first_key;
    let mut context = zeros::<bf16>(own.keys * width);
    let without = Attention { sequences: &[own], dropout: Dropout::OFF, ..attention };
    without.forward(&qkv[start * 3 * width..][..own.keys * 3 * width], &mut context);
    let mut together = zeros::<bf16>(tokens * width);
    Attention { dropout: Dropout::OFF, ..attention }.forward(&qkv, &mut together);
    assert_eq!(context, together[start * width..][..own.keys * width]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |sequences: &[Sequence], places: Option<&[u32]>| {
        let attention = Attention { sequences, places, heads: 1, width: 1, dropout: Dropout::OFF };
        std::panic::catch_unwind(|| attention.forward_some(&[0.0_f32; 2], &[0.0; 6], &mut [0.0; 2])).is_err()
    };
    let fits = Sequence { first_query: 0, queries: 2, first_key: 0, keys: 3 };
    assert!(!refused(&[fits], Some(&[0, 2])));
    assert!(refused(&[fits], Some(&[0, 3])));
    assert!(refused(&[fits], Some(&[0])));
    assert!(refused(&[fits], None));
    assert!(refused(&[Sequence { first_key: 1, keys: 2, ..fits }], Some(&[0, 1])));
    assert!(refused(&[Sequence { keys: 2, ..fits }], Some(&[0, 1])));
}
