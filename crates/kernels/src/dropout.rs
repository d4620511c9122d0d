//! Which elements dropout keeps: a pure function of (key, row, column).
//!
//! Nothing is stored for the backward pass, and neither the number of threads nor the width of vectors matters. A row's own
//! 64-bit key comes from the rules that all draws use (`learn_domain::random`); within the row each column is hashed to 32
//! bits with two rounds of multiply and shift (constants of Chris Wellons' "lowbias32" search), the row's halves entering
//! before each.

use learn_domain::random::mix;

use crate::simd::Simd;

/// Dropout of one place of a model in one pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Share of elements set to 0, below 1; the others are divided by 1 - rate.
    pub rate: f32,
    /// Names the pass and the place; see `learn_domain::random::key`.
    pub key: u64,
}

impl Dropout {
    /// Everything stays as it is.
    pub const OFF: Self = Self { rate: 0.0, key: 0 };

    /// What an element is multiplied by: 0, or 1 / (1 - rate). Kernels multiply by the same.
    #[must_use]
    pub fn factor(&self, row: u64, column: u32) -> f32 {
        let row = self.row(row);
        let mut hash = column.wrapping_mul(SPREAD).wrapping_add(row.before);
        hash = (hash ^ (hash >> 16)).wrapping_mul(FIRST).wrapping_add(row.between);
        hash = (hash ^ (hash >> 15)).wrapping_mul(SECOND);
        if hash < row.threshold { 0.0 } else { row.scale }
    }

    pub(crate) fn is_off(&self) -> bool {
        self.rate <= 0.0
    }

    /// # Panics
    /// The rate is not below 1.
    #[inline]
    pub(crate) fn row(&self, row: u64) -> RowDropout {
        assert!(self.rate < 1.0, "dropout rate {} is not below 1", self.rate);
        let key = mix(self.key ^ mix(row));
        RowDropout {
            before: key as u32,
            between: (key >> 32) as u32,
            threshold: (f64::from(self.rate) * 4_294_967_296.0) as u32,
            scale: if self.is_off() { 1.0 } else { 1.0 / (1.0 - self.rate) },
        }
    }
}

const SPREAD: u32 = 0x9e37_79b1;
const FIRST: u32 = 0x7feb_352d;
const SECOND: u32 = 0x846c_a68b;

/// Dropout of one row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowDropout {
    before: u32,
    between: u32,
    /// Hashes below it are dropped.
    threshold: u32,
    scale: f32,
}

impl RowDropout {
    /// The factors of the columns from `column` on.
    #[inline(always)]
    pub(crate) fn factors<S: Simd>(self, s: S, column: usize) -> S::Float {
        if self.threshold == 0 {
            return s.splat(self.scale);
        }
        let columns = s.add_bits(s.counting(), s.splat_bits(column as u32));
        let hash = s.add_bits(s.mul_bits(columns, s.splat_bits(SPREAD)), s.splat_bits(self.before));
        let hash = s.mul_bits(s.xor_bits(hash, s.shift_right::<16>(hash)), s.splat_bits(FIRST));
        let hash = s.add_bits(hash, s.splat_bits(self.between));
        let hash = s.mul_bits(s.xor_bits(hash, s.shift_right::<15>(hash)), s.splat_bits(SECOND));
        s.select(s.less_bits(hash, s.splat_bits(self.threshold)), s.splat(0.0), s.splat(self.scale))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::MOST_LANES;
    use crate::simd::{Kernel, Level};

    struct Factors<'a>(RowDropout, &'a mut [f32]);

    impl Kernel for Factors<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for (vector, chunk) in self.1.chunks_exact_mut(S::LANES).enumerate() {
                s.store(self.0.factors(s, vector * S::LANES), chunk);
            }
        }
    }

    #[test]
    fn every_level_draws_the_same() {
        for (rate, key) in [(0.0, 1), (0.1, 2), (0.5, 3), (0.999, u64::MAX)] {
            let dropout = Dropout { rate, key };
            for level in Level::available() {
                for row in [0, 1, 77, u64::MAX] {
                    let mut factors = [0.0; 20 * MOST_LANES];
                    level.run(Factors(dropout.row(row), &mut factors));
                    let expected: Vec<f32> = (0..factors.len()).map(|c| dropout.factor(row, c as u32)).collect();
                    assert_eq!(factors.as_slice(), expected, "{level:?}");
                }
            }
        }
    }

    /// 1 for a dropped element.
    fn dropped(dropout: Dropout, row: u64, column: u32) -> f64 {
        f64::from(u8::from(dropout.factor(row, column) == 0.0))
    }

    #[test]
    fn the_rate_is_kept_and_neighbours_are_independent() {
        let (rows, columns) = (500_u64, 768_u32);
        for rate in [0.1_f32, 0.5] {
            let share = f64::from(rate);
            let here = Dropout { rate, key: 41 };
            let next = Dropout { rate, key: 42 };
            let mut sums = [0.0; 5];
            for row in 0..rows {
                for column in 0..columns {
                    let centre = dropped(here, row, column) - share;
                    let others = [
                        1.0,
                        dropped(here, row, column + 1) - share,
                        dropped(here, row, column + 16) - share,
                        dropped(here, row + 1, column) - share,
                        dropped(next, row, column) - share,
                    ];
                    for (sum, other) in sums.iter_mut().zip(others) {
                        *sum += centre * other;
                    }
                }
            }
            let count = rows as f64 * f64::from(columns);
            let variance = share * (1.0 - share);
            // each sum is normal around 0 if draws are independent; 4.5 standard deviations
            assert!(sums[0].abs() < 4.5 * (count * variance).sqrt(), "rate {rate}: {sums:?}");
            for sum in &sums[1..] {
                assert!(sum.abs() < 4.5 * count.sqrt() * variance, "rate {rate}: {sums:?}");
            }
        }
    }

    #[test]
    fn counts_in_a_row_vary_as_draws_do() {
        let (dropout, columns) = (Dropout { rate: 0.1, key: 9 }, 768_u32);
        let rows = 4_000_u64;
        let expected = 0.1 * f64::from(columns);
        let square = |row| {
            let count: f64 = (0..columns).map(|column| dropped(dropout, row, column)).sum();
            (count - expected).powi(2)
        };
        let variance = (0..rows).map(square).sum::<f64>() / rows as f64 / (0.09 * f64::from(columns));
        // the standard deviation of a variance over 4,000 rows is sqrt(2 / 4000) = 0.022
        assert!((variance - 1.0).abs() < 0.1, "{variance}");
    }
}
