//! Against the sums in f64.

use proptest::prelude::*;

use super::*;
use crate::testing::{assert_near, assert_same_with_any_threads, at_every_level, exact, numbers};

fn check(tokens: usize, shape: (usize, usize), seed: u64) {
    let (outputs, inputs) = shape;
    let (d_y, x): (Vec<bf16>, Vec<bf16>) = (numbers(seed, tokens * outputs), numbers(seed + 1, tokens * inputs));
    let start: Vec<f32> = numbers(seed + 2, outputs * inputs);
    let (left, right) = (exact(&d_y), exact(&x));
    let mut product = vec![0.0; outputs * inputs];
    for (d_y, x) in left.chunks(outputs).zip(right.chunks(inputs)) {
        for (d_y, row) in d_y.iter().zip(product.chunks_mut(inputs)) {
            for (sum, x) in row.iter_mut().zip(x) {
                *sum += d_y * x;
            }
        }
    }
    // beside columns of others
    let (before, behind) = (seed as usize % 3, seed as usize % 5);
    let width = before + outputs + behind;
    let mut wide: Vec<bf16> = numbers(seed + 3, tokens * width);
    for (row, d_y) in wide.chunks_mut(width).zip(d_y.chunks(outputs)) {
        row[before..before + outputs].copy_from_slice(d_y);
    }
    let gradient = WeightGradient { d_y: &wide, width, outputs: (before, outputs), x: &x, inputs };
    let mut out = start.clone();
    gradient.write(&mut out);
    let tolerance = 1e-6 * (1.0 + tokens as f64).sqrt();
    assert_near("fresh", &out, &product, tolerance);
    out.copy_from_slice(&start);
    gradient.add_to(&mut out);
    let sum: Vec<f64> = exact(&start).iter().zip(&product).map(|(start, product)| start + product).collect();
    assert_near("sum", &out, &sum, tolerance);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn follows_the_formula(
        tokens in 0_usize..100,
        shape in (1_usize..80, 1_usize..80),
        seed in any::<u32>(),
    ) {
        at_every_level(|_| check(tokens, shape, seed.into()));
    }
}

#[test]
fn blocks_and_tasks_meet() {
    at_every_level(|_| {
        for (tokens, shape) in
            [(32, (32, 32)), (33, (ROWS + 33, 65)), (96, (2 * ROWS, 64)), (31, (1, ROWS + 1)), (33, (1, ROWS + 33))]
        {
            check(tokens, shape, 3);
        }
    });
}

#[test]
fn the_same_with_any_number_of_threads() {
    let (d_y, x): (Vec<bf16>, Vec<bf16>) = (numbers(1, 70 * 300), numbers(2, 70 * 90));
    assert_same_with_any_threads(|| {
        let mut out = vec![0.0; 300 * 90];
        WeightGradient { d_y: &d_y, width: 300, outputs: (0, 300), x: &x, inputs: 90 }.write(&mut out);
        out
    });
}

#[test]
#[should_panic(expected = "x has 4 elements and not 6")]
fn a_wrong_length_is_refused() {
    let zeros = [bf16::ZERO; 6];
    let gradient = WeightGradient { d_y: &zeros[..4], width: 2, outputs: (0, 2), x: &zeros[..4], inputs: 3 };
    gradient.add_to(&mut [0.0; 6]);
}
