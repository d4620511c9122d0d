//! Against the formula in f64, and its differences.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::math::tests::below;
use crate::testing::{assert_near, assert_same_with_any_threads, at_every_level, exact, numbers, precision, slopes};

fn reference(x: &[f64], bias: &[f64]) -> Vec<f64> {
    x.iter().zip(bias.iter().cycle()).map(|(x, bias)| (x + bias) * below(x + bias)).collect()
}

fn check<E: Element>(rows: usize, width: usize, seed: u64) {
    let x: Vec<E> = numbers::<f32>(seed, rows * width).iter().map(|x| E::from_f32(3.0 * x)).collect();
    let bias: Vec<f32> = numbers(seed + 1, width);
    let gelu = BiasGelu { bias: &bias };
    let mut out = vec![E::default(); x.len()];
    gelu.forward(&x, &mut out);
    assert_near("out", &out, &reference(&exact(&x), &exact(&bias)), precision::<E>());

    let upstream: Vec<E> = numbers(seed + 2, x.len());
    let (mut gradient, mut bias_gradient) = (upstream.clone(), vec![1.0; width]);
    gelu.backward(&x, &mut gradient, &mut bias_gradient);
    let d_x = slopes(&exact(&x), &exact(&upstream), |x| reference(x, &exact(&bias)));
    assert_near("d_x", &gradient, &d_x, precision::<E>());
    let d_bias: Vec<f64> = (0..width).map(|c| 1.0 + d_x.iter().skip(c).step_by(width).sum::<f64>()).collect();
    // summed before the rounding
    assert_near("d_bias", &bias_gradient, &d_bias, precision::<f32>() * rows.max(1) as f64);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn follows_the_formula(rows in 0_usize..6, width in 1_usize..40, seed in any::<u32>()) {
        at_every_level(|_| {
            check::<f32>(rows, width, seed.into());
            check::<bf16>(rows, width, seed.into());
        });
    }
}

#[test]
fn many_rows_and_any_number_of_threads() {
    at_every_level(|_| check::<f32>(2 * ROWS + 3, 5, 9));
    let (x, bias): (Vec<bf16>, Vec<f32>) = (numbers(1, 300 * 37), numbers(2, 37));
    assert_same_with_any_threads(|| {
        let (mut gradient, mut bias_gradient) = (x.clone(), vec![0.0; 37]);
        BiasGelu { bias: &bias }.backward(&x, &mut gradient, &mut bias_gradient);
        (gradient, bias_gradient)
    });
}

#[test]
fn far_values_and_broken_ones() {
    let x = [40.0_f32, -40.0, 0.0, f32::NAN, f32::INFINITY, 1e30, -1e30];
    at_every_level(|level| {
        let mut out = [0.0; 7];
        BiasGelu { bias: &[0.0; 7] }.forward(&x, &mut out);
        assert_eq!((out[0], out[2]), (40.0, 0.0), "{level:?}");
        assert!(
            out[1].abs() < 1e-25
                && out[6].abs() < 1e-25
                && out[3].is_nan()
                && out[4] == f32::INFINITY
                && out[5] == 1e30,
            "{level:?}"
        );
    });
}

#[test]
#[should_panic(expected = "out has 5 elements and not 6")]
fn a_wrong_length_is_refused() {
    BiasGelu { bias: &[0.0; 3] }.forward(&[0.0_f32; 6], &mut [0.0; 5]);
}
