//! Against the formula in f64, and its differences.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::testing::{assert_near, assert_same_with_any_threads, at_every_level, exact, numbers, precision, slopes};

/// Everything that a result depends on, in one row of numbers for [`slopes`].
struct Inputs {
    rows: usize,
    width: usize,
    dropout: Dropout,
}

const EPS: f32 = 1e-5;

impl Inputs {
    /// dense, residual, bias, gamma, beta, one behind the other.
    fn reference(&self, all: &[f64]) -> Vec<f64> {
        let (size, width) = (self.rows * self.width, self.width);
        let (dense, rest) = all.split_at(size);
        let (residual, rest) = rest.split_at(size);
        let (bias, rest) = rest.split_at(width);
        let (gamma, beta) = rest.split_at(width);
        let mut out = Vec::new();
        for row in 0..self.rows {
            let sum = |c: usize| {
                let factor = f64::from(self.dropout.factor(row as u64, c as u32));
                (dense[row * width + c] + bias[c]) * factor + residual[row * width + c]
            };
            let sums: Vec<f64> = (0..width).map(sum).collect();
            let mean = sums.iter().sum::<f64>() / width as f64;
            let variance = sums.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let rstd = 1.0 / (variance + f64::from(EPS)).sqrt();
            out.extend(sums.iter().enumerate().map(|(c, x)| (x - mean) * rstd * gamma[c] + beta[c]));
        }
        out
    }

    fn check<E: Element, R: Element>(&self, seed: u64, with_more: bool) {
        let (size, width) = (self.rows * self.width, self.width);
        let dense: Vec<E> = numbers(seed, size);
        let residual: Vec<R> = numbers(seed + 1, size);
        let parameters: Vec<f32> = numbers(seed + 2, 3 * width);
        let norm = ResidualNorm {
            bias: &parameters[..width],
            gamma: &parameters[width..2 * width],
            beta: &parameters[2 * width..],
            eps: EPS,
            dropout: self.dropout,
        };
        let all = [exact(&dense), exact(&residual), exact(&parameters)].concat();
        let (mut out, mut low) = (vec![R::default(); size], vec![E::default(); size]);
        let mut statistics = vec![RowStatistics::default(); self.rows];
        norm.forward(&dense, &residual, &mut out, Some(&mut low), &mut statistics);
        let truth = self.reference(&all);
        assert_near("out", &out, &truth, 4.0 * precision::<R>());
        assert_near("low", &low, &truth, 4.0 * precision::<E>());
        let mut again = vec![R::default(); size];
        norm.forward(&dense, &residual, &mut again, None, &mut statistics);
        assert_eq!(out, again);

        let upstream: Vec<R> = numbers(seed + 3, size);
        let more: Vec<E> = numbers(seed + 4, size);
        let total: Vec<f64> = match with_more {
            true => exact(&upstream).iter().zip(exact(&more)).map(|(a, b)| a + b).collect(),
            false => exact(&upstream),
        };
        let (mut gradient, mut d_dense) = (upstream, vec![E::default(); size]);
        let mut sums = [vec![1.0; width], vec![2.0; width], vec![3.0; width]];
        let [bias, gamma, beta] = &mut sums;
        norm.backward(
            Saved { dense: &dense, residual: &residual, statistics: &statistics },
            NormGradients {
                gradient: &mut gradient,
                more: with_more.then_some(&more),
                dense: &mut d_dense,
                bias,
                gamma,
                beta,
            },
        );
        let slopes = slopes(&all, &total, |all| self.reference(all));
        // a row with a small deviation has large gradients
        let steepest = statistics.iter().map(|row| f64::from(row.rstd)).fold(1.0, f64::max);
        let tolerance = 4.0 * steepest * width as f64;
        assert_near("d_dense", &d_dense, &slopes[..size], tolerance * precision::<E>());
        assert_near("d_residual", &gradient, &slopes[size..2 * size], tolerance * precision::<R>());
        for (number, sum) in sums.iter().enumerate() {
            let truth: Vec<f64> =
                slopes[2 * size + number * width..][..width].iter().map(|d| d + 1.0 + number as f64).collect();
            assert_near("sum", sum, &truth, tolerance * precision::<f32>() * self.rows.max(1) as f64);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn follows_the_formula(
        rows in 0_usize..4,
        width in 2_usize..40,
        rate in prop_oneof![Just(0.0_f32), Just(0.3)],
        seed in any::<u32>(),
        more in any::<bool>(),
    ) {
        let inputs = Inputs { rows, width, dropout: Dropout { rate, key: seed.into() } };
        at_every_level(|_| {
            inputs.check::<f32, f32>(seed.into(), more);
            inputs.check::<bf16, f32>(seed.into(), more);
            inputs.check::<bf16, bf16>(seed.into(), more);
        });
    }
}

#[test]
fn many_rows_have_dropout_of_their_own() {
    let inputs = Inputs { rows: ROWS + 3, width: 7, dropout: Dropout { rate: 0.4, key: 3 } };
    at_every_level(|_| inputs.check::<f32, f32>(4, true));
}

#[test]
fn the_same_with_any_number_of_threads() {
    let (rows, width) = (150, 70);
    let dense: Vec<bf16> = numbers(1, rows * width);
    let residual: Vec<f32> = numbers(2, rows * width);
    let parameters: Vec<f32> = numbers(3, width);
    let norm = ResidualNorm {
        bias: &parameters,
        gamma: &parameters,
        beta: &parameters,
        eps: EPS,
        dropout: Dropout { rate: 0.1, key: 8 },
    };
    assert_same_with_any_threads(|| {
        let mut out = vec![0.0; rows * width];
        let mut statistics = vec![RowStatistics::default(); rows];
        norm.forward(&dense, &residual, &mut out, None, &mut statistics);
        let mut gradient = out.clone();
        let mut d_dense = dense.clone();
        let mut sums = [vec![0.0; width], vec![0.0; width], vec![0.0; width]];
        let [bias, gamma, beta] = &mut sums;
        norm.backward(
            Saved { dense: &dense, residual: &residual, statistics: &statistics },
            NormGradients { gradient: &mut gradient, more: None, dense: &mut d_dense, bias, gamma, beta },
        );
        (out, statistics, gradient, d_dense, sums)
    });
}

#[test]
#[should_panic(expected = "statistics has 1 elements and not 2")]
fn a_wrong_length_is_refused() {
    let three = [0.0; 3];
    let norm = ResidualNorm { bias: &three, gamma: &three, beta: &three, eps: EPS, dropout: Dropout::OFF };
    norm.forward(&[0.0_f32; 6], &[0.0_f32; 6], &mut [0.0; 6], None, &mut [RowStatistics::default()]);
}
