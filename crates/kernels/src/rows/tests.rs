//! Against plain loops.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::testing::{assert_near, assert_same_with_any_threads, at_every_level, exact, numbers, precision, slopes};

fn unit(x: &[f64], width: usize, eps: f64) -> Vec<f64> {
    let row = |row: &[f64]| {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(eps);
        row.iter().map(|x| x / norm).collect::<Vec<_>>()
    };
    x.chunks(width).flat_map(row).collect()
}

fn check_sums<E: Element>(rows: usize, width: usize, seed: u64) {
    let x: Vec<E> = numbers(seed, rows * width);
    let mut sums = vec![1.0; width];
    column_sums(&x, &mut sums);
    let exact = exact(&x);
    let truth: Vec<f64> = (0..width).map(|c| 1.0 + exact.iter().skip(c).step_by(width).sum::<f64>()).collect();
    assert_near("sums", &sums, &truth, precision::<f32>() * rows.max(1) as f64);
}

fn check_unit<E: Element, R: Element>(rows: usize, width: usize, seed: u64) {
    let mut x: Vec<E> = numbers(seed, rows * width);
    let eps = 1e-3;
    if rows > 1 {
        // shorter than eps
        x[..width].fill(E::from_f32(1e-5));
    }
    let normalize = Normalize { width, eps };
    let (mut out, mut norms) = (vec![R::default(); x.len()], vec![0.0; rows]);
    normalize.forward(&x, &mut out, &mut norms);
    let of = |x: &[f64]| unit(x, width, f64::from(eps));
    assert_near("out", &out, &of(&exact(&x)), precision::<R>());
    let upstream: Vec<R> = numbers(seed + 1, x.len());
    let mut d_x = vec![E::default(); x.len()];
    normalize.backward(&out, &norms, &upstream, &mut d_x);
    let truth = slopes(&exact(&x), &exact(&upstream), of);
    let steepest = norms.iter().fold(1.0, |most, norm| f64::from(1.0 / norm).max(most));
    let tolerance = (precision::<E>() + precision::<R>()) * steepest * (1.0 + width as f64).sqrt();
    assert_near("d_x", &d_x, &truth, 4.0 * tolerance);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sums_and_unit_rows_follow_the_formulas(rows in 0_usize..5, width in 1_usize..40, seed in any::<u32>()) {
        at_every_level(|_| {
            check_sums::<f32>(rows, width, seed.into());
            check_sums::<bf16>(rows, width, seed.into());
            check_unit::<f32, f32>(rows, width, seed.into());
            check_unit::<bf16, f32>(rows, width, seed.into());
        });
    }

    #[test]
    fn rows_come_and_go(
        width in 1_usize..40,
        count in 1_u32..20,
        draws in prop::collection::vec(any::<u32>(), 0..30),
        seed in any::<u32>(),
    ) {
        let rows: Vec<u32> = draws.iter().map(|draw| draw % count).collect();
        let x: Vec<bf16> = numbers(seed.into(), count as usize * width);
        let mut out = vec![bf16::ZERO; rows.len() * width];
        gather_rows(&x, width, &rows, &mut out);
        let row = |row: &u32| x[*row as usize * width..][..width].to_vec();
        prop_assert_eq!(&out, &rows.iter().flat_map(row).collect::<Vec<_>>());
        let start: Vec<f32> = numbers(7, count as usize * width);
        let mut expected = start.clone();
        for (row, from) in rows.iter().zip(out.chunks(width)) {
            for (to, from) in expected[*row as usize * width..].iter_mut().zip(from) {
                *to += from.to_f32();
            }
        }
        at_every_level(|level| {
            let mut sums = start.clone();
            scatter_add_rows(&out, width, &rows, &mut sums);
            assert_eq!(sums, expected, "{level:?}");
        });
    }
}

#[test]
fn blocks_of_long_slices_meet() {
    let count = 2 * ELEMENTS + 5;
    let (x, start): (Vec<bf16>, Vec<f32>) = (numbers(1, count), numbers(2, count));
    at_every_level(|_| {
        let mut out = start.clone();
        add(&x, &mut out);
        assert!(out.iter().zip(x.iter().zip(&start)).all(|(out, (x, start))| *out == start + x.to_f32()));
        check_sums::<f32>(3, ELEMENTS, 5);
        check_sums::<bf16>(2 * block_rows(1000) + 3, 1000, 6);
    });
    let rows: Vec<u32> = (0..200).map(|i| i * 37 % 100).collect();
    let x: Vec<f32> = numbers(3, 200 * 1000);
    assert_same_with_any_threads(|| {
        let mut out = vec![0.0; 100 * 1000];
        scatter_add_rows(&x, 1000, &rows, &mut out);
        let mut sums = vec![0.0; 1000];
        column_sums(&x, &mut sums);
        (out, sums)
    });
}

#[test]
#[should_panic(expected = "out has 2 rows and no row 2")]
fn a_row_beyond_the_end_is_refused() {
    scatter_add_rows(&[1.0_f32; 3], 3, &[2], &mut [0.0_f32; 6]);
}
