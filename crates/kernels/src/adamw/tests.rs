//! Against the update spelled out in f64.

use proptest::prelude::*;

use super::*;
use crate::testing::{assert_near, assert_same_with_any_threads, at_every_level, exact, numbers, precision};

const UPDATE: AdamW = AdamW {
    learning_rate: 0.02,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-6,
    weight_decay: 0.3,
    step: 1,
    gradient_scale: 1.0,
};

fn reference(update: &AdamW, gradient: &[f64], state: &mut [Vec<f64>; 3], decays: bool) {
    let [values, first, second] = state;
    let correction1 = 1.0 - update.beta1.powi(update.step as i32);
    let correction2 = 1.0 - update.beta2.powi(update.step as i32);
    for (place, g) in gradient.iter().enumerate() {
        let g = g * f64::from(update.gradient_scale);
        if decays {
            values[place] -= update.learning_rate * update.weight_decay * values[place];
        }
        first[place] = update.beta1 * first[place] + (1.0 - update.beta1) * g;
        second[place] = update.beta2 * second[place] + (1.0 - update.beta2) * g * g;
        let spread = (second[place] / correction2).sqrt() + update.epsilon;
        values[place] -= update.learning_rate * first[place] / correction1 / spread;
    }
}

fn check<G: Element>(count: usize, decays: bool, scale: f32) {
    let values: Vec<f32> = numbers(1, count);
    let mut ours = [values.clone(), vec![0.0; count], vec![0.0; count]];
    let mut shadow = vec![bf16::ZERO; count];
    let mut truth = [exact(&values), vec![0.0; count], vec![0.0; count]];
    for step in 1..=4 {
        let gradient: Vec<G> = numbers(10 + step, count);
        let update = AdamW { step, gradient_scale: scale, ..UPDATE };
        let [values, first, second] = &mut ours;
        update.update(&gradient, State { values, first, second, shadow: Some(&mut shadow) }, decays);
        reference(&update, &exact(&gradient), &mut truth, decays);
    }
    for (what, (ours, truth)) in ["values", "first", "second"].iter().zip(ours.iter().zip(&truth)) {
        assert_near(what, ours, truth, precision::<f32>());
    }
    let rounded: Vec<bf16> = ours[0].iter().map(|x| bf16::from_f32(*x)).collect();
    assert_eq!(shadow, rounded);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn follows_the_formula(count in 0_usize..90, decays in any::<bool>(), scale in 0.1_f32..1.0) {
        at_every_level(|_| {
            check::<f32>(count, decays, scale);
            check::<bf16>(count, decays, scale);
        });
    }
}

#[test]
fn all_blocks_are_updated() {
    at_every_level(|_| check::<f32>(3 * ELEMENTS + 7, true, 1.0));
}

#[test]
fn a_spared_value_without_a_gradient_keeps_its_bits() {
    let values: Vec<f32> = numbers(4, 50);
    for decays in [false, true] {
        let [mut now, mut first, mut second] = [values.clone(), vec![0.0; 50], vec![0.0; 50]];
        let state = State { values: &mut now, first: &mut first, second: &mut second, shadow: None };
        UPDATE.update(&[0.0_f32; 50], state, decays);
        assert!(now.iter().zip(&values).all(|(now, before)| (now != before) == decays), "{decays}");
    }
}

#[test]
fn the_norm_is_exact_enough_and_the_same_with_any_number_of_threads() {
    let x: Vec<f32> = numbers(5, 3 * ELEMENTS + 100);
    let truth: f64 = exact(&x).iter().map(|x| x * x).sum();
    at_every_level(|level| {
        assert!((squared_norm(&[&x[..]]) / truth - 1.0).abs() < 1e-7, "{level:?}");
        assert!((squared_norm::<f32>(&[&[3.0, -4.0]]) - 25.0).abs() < 1e-12);
        assert!(squared_norm::<f32>(&[&[f32::NAN, 1.0]]).is_nan());
    });
    assert_eq!(squared_norm::<f32>(&[]), 0.0);
    let start: Vec<f32> = numbers(6, x.len());
    assert_same_with_any_threads(|| {
        let [mut values, mut first, mut second] = [start.clone(), start.clone(), vec![0.0; x.len()]];
        let state = State { values: &mut values, first: &mut first, second: &mut second, shadow: None };
        UPDATE.update(&x, state, true);
        (squared_norm(&[&x[..]]).to_bits(), values, first, second)
    });
}

#[test]
fn a_norm_has_the_same_bits_whatever_the_lanes_are() {
    let spelled_out = |x: &[f32], add: fn(f32, f32) -> f32| -> f64 {
        let of_block = |block: &[f32]| {
            let parts = block.chunks(SQUARES).map(|part| {
                let mut sums = [0.0; MOST_LANES];
                part.iter().enumerate().for_each(|(n, &x)| sums[n % MOST_LANES] = add(x, sums[n % MOST_LANES]));
                sums
            });
            parts.flatten().map(f64::from).sum::<f64>()
        };
        x.chunks(ELEMENTS).map(of_block).sum()
    };
    for count in [1, 7, 16, 23, SQUARES + 9, 2 * ELEMENTS + 77] {
        let x: Vec<f32> = numbers(7, count);
        for level in Level::available() {
            let add: fn(f32, f32) -> f32 = match level {
                Level::Portable => |x, sum| x * x + sum,
                Level::Avx2 | Level::Avx512 => |x, sum| x.mul_add(x, sum),
            };
            let norm = level.with(|| squared_norm(&[&x[..]]));
            assert_eq!(norm.to_bits(), spelled_out(&x, add).to_bits(), "{level:?}, {count}");
        }
    }
}

#[test]
fn a_norm_does_not_depend_on_how_the_vector_is_parted() {
    let x: Vec<f32> = numbers(5, 2 * ELEMENTS + 77);
    let whole = squared_norm(&[&x[..]]).to_bits();
    for cuts in [[1, 2, 3], [0, ELEMENTS, 2 * ELEMENTS], [ELEMENTS - 1, ELEMENTS + 1, x.len()], [50, 50, 40_000]] {
        let [a, b, c] = cuts;
        assert_eq!(squared_norm(&[&x[..a], &x[a..b], &x[b..c], &x[c..]]).to_bits(), whole, "{cuts:?}");
    }
}
