//! Against the sums in f64.

use proptest::prelude::*;

use super::*;
use crate::testing::{assert_near, assert_same_with_any_threads, at_every_level, exact, numbers};

/// A side as the tests make it: how it lies in memory, and beside how many columns of others.
#[derive(Clone, Copy, Debug)]
struct Lying {
    transposed: bool,
    before: usize,
    behind: usize,
}

const PLAIN: Lying = Lying { transposed: false, before: 0, behind: 0 };
const TURNED: Lying = Lying { transposed: true, ..PLAIN };

impl Lying {
    /// The stored values of a matrix, and their pitch.
    fn stored(self, values: &[bf16], (rows, columns): (usize, usize)) -> (Vec<bf16>, usize) {
        let (stored_rows, stored_columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        let pitch = self.before + stored_columns + self.behind;
        let mut stored: Vec<bf16> = numbers(99, stored_rows * pitch);
        for (number, value) in values.iter().enumerate() {
            let (row, column) = (number / columns, number % columns);
            let (row, column) = if self.transposed { (column, row) } else { (row, column) };
            stored[row * pitch + self.before + column] = *value;
        }
        (stored, pitch)
    }

    fn matrix(self, (stored, pitch): &(Vec<bf16>, usize), (rows, columns): (usize, usize)) -> Matrix<'_> {
        let values = &stored[self.before..];
        match self.transposed {
            true => Matrix::strided(values, (columns, rows), *pitch).transposed(),
            false => Matrix::strided(values, (rows, columns), *pitch),
        }
    }
}

fn check<O: Element>((m, depth, n): (usize, usize, usize), lying: (Lying, Lying), tolerance: f64) {
    let seed = (m * 1_000_003 + depth * 1009 + n) as u64;
    let (left, right): (Vec<bf16>, Vec<bf16>) = (numbers(seed, m * depth), numbers(seed + 1, depth * n));
    let (x, y) = (exact(&left), exact(&right));
    let mut product = vec![0.0; m * n];
    for (x, row) in x.chunks(depth).zip(product.chunks_mut(n)) {
        for (x, y) in x.iter().zip(y.chunks(n)) {
            for (sum, y) in row.iter_mut().zip(y) {
                *sum += x * y;
            }
        }
    }
    let stored = (lying.0.stored(&left, (m, depth)), lying.1.stored(&right, (depth, n)));
    let multiplied =
        Product { left: lying.0.matrix(&stored.0, (m, depth)), right: lying.1.matrix(&stored.1, (depth, n)) };
    let held: Vec<O> = numbers(seed + 2, m * n);
    let row: Vec<O> = numbers(seed + 3, n);
    let added = |plus: &[f64]| -> Vec<f64> { product.iter().zip(plus.iter().cycle()).map(|(x, y)| x + y).collect() };
    for (plus, expected) in [
        (Plus::Nothing, product.clone()),
        (Plus::Held, added(&exact(&held))),
        (Plus::Row(&row[..]), added(&exact(&row))),
    ] {
        let mut out = held.clone();
        multiplied.write(&mut out, plus);
        assert_near(&format!("{m} x {depth} x {n}, {lying:?}, {plus:?}"), &out, &expected, tolerance);
    }
}

/// Rounding of sums in f32, and of the numbers that come out.
fn check_all(shape: (usize, usize, usize), lying: (Lying, Lying)) {
    let sums = 1e-6 + f64::from(f32::EPSILON) * shape.1 as f64;
    check::<f32>(shape, lying, sums);
    check::<bf16>(shape, lying, sums + 1.0 / 256.0);
}

fn lying() -> impl Strategy<Value = Lying> {
    (any::<bool>(), 0_usize..3, 0_usize..5).prop_map(|(transposed, before, behind)| Lying {
        transposed,
        before,
        behind,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn follows_the_formula(shape in (1_usize..100, 1_usize..100, 1_usize..100), lying in (lying(), lying())) {
        at_every_level(|_| check_all(shape, lying));
    }
}

#[test]
fn blocks_parts_and_tasks_meet() {
    at_every_level(|_| {
        for shape in [
            (32, 32, 32),
            (33, 31, 65),
            (1, 1, 1),
            (64, PART, 64),
            (3, 2 * PART + 1, 40),
            (40, PART + 33, 3),
            (2, 40, (OWN + 1) * BLOCK + 1),
            ((OWN + 1) * BLOCK + 1, 40, 2),
        ] {
            for lying in [(PLAIN, PLAIN), (PLAIN, TURNED), (TURNED, PLAIN), (TURNED, TURNED)] {
                check_all(shape, lying);
            }
        }
    });
}

#[test]
fn what_is_empty_is_zero() {
    at_every_level(|_| {
        let nothing: [bf16; 0] = [];
        let (left, right) = (Matrix::new(&nothing, 3).transposed(), Matrix::new(&nothing, 5));
        let mut out = [1.0_f32; 15];
        Product { left, right }.write(&mut out, Plus::Held);
        assert_eq!(out, [1.0; 15]);
        Product { left, right }.write(&mut out, Plus::Nothing);
        assert_eq!(out, [0.0; 15]);
        Product { left: left.transposed(), right: Matrix::new(&[bf16::ONE; 6], 2) }
            .write::<f32>(&mut [], Plus::Nothing);
    });
}

#[test]
fn not_a_number_stays_one() {
    at_every_level(|_| {
        let finite = [bf16::ONE; 40];
        for wrong in [bf16::NAN, bf16::INFINITY] {
            let mut left = finite;
            left[17] = wrong;
            let mut out = [0.0_f32];
            Product { left: Matrix::new(&left, 40), right: Matrix::new(&finite, 1) }.write(&mut out, Plus::Nothing);
            assert!(!out[0].is_finite(), "{wrong} gives {out:?}");
        }
    });
}

#[test]
fn the_same_with_any_number_of_threads() {
    let (x, y): (Vec<bf16>, Vec<bf16>) = (numbers(1, 70 * 300), numbers(2, 70 * 90));
    assert_same_with_any_threads(|| {
        let mut out = vec![0.0_f32; 300 * 90];
        Product { left: Matrix::new(&x, 300).transposed(), right: Matrix::new(&y, 90) }.write(&mut out, Plus::Nothing);
        out
    });
}

#[test]
#[should_panic(expected = "a left side of 3 columns and a right side of 2 rows")]
fn sides_that_do_not_fit_are_refused() {
    let zeros = [bf16::ZERO; 6];
    Product { left: Matrix::new(&zeros, 3), right: Matrix::new(&zeros, 3) }.write(&mut [0.0_f32; 6], Plus::Nothing);
}

#[test]
#[should_panic(expected = "out has 4 elements and not 6")]
fn a_wrong_length_is_refused() {
    let zeros = [bf16::ZERO; 6];
    let product = Product { left: Matrix::new(&zeros, 3).transposed(), right: Matrix::new(&zeros[..4], 2) };
    product.write(&mut [0.0_f32; 4], Plus::Nothing);
}
