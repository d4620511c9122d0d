//! Means over users with bootstrap intervals, in exact sums that can be added up over ranks.
//!
//! Input: the value of each metric for each user, in batches, on any rank. Output: means, and their 95 % intervals by the
//! percentile method. A resample gives each user a weight from Poisson(1) in place of drawing as many users with
//! replacement (Hanley and MacGibbon 2006; Chamandy, Muralidharan, Najmi and Naidu, "Estimating uncertainty for massive data
//! streams", Google 2012): users are then independent of each other, so nobody has to hold them all.
//!
//! Invariants: weights are a pure function of (user's row, number of the resample), the same for every scorer and run, so
//! that differences between two of them are not blurred by the draw. Values are multiples of 2^-31 and sums are integers,
//! so the order of the users, their batches and their ranks change no bit. Memory does not grow with users.

use rayon::prelude::*;

use crate::random::Draws;
use crate::report::{Estimate, Interval};

/// Resamples that are worked on at once; the sums of so many stay in a core's cache.
const BLOCK: usize = 50;
/// 1.0 as an integer.
const ONE: f64 = (1_u64 << 31) as f64;
/// Tells these draws from all others.
const STREAM: u64 = 0x626f_6f74_7374_7261;

/// Sums of one scorer: `groups` of `metrics` values each. A user may belong to any groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    metrics: usize,
    resamples: usize,
    /// `[groups][users, targets, metrics..]`, then `[blocks][groups][users, targets, metrics..][BLOCK]`.
    sums: Vec<i64>,
    /// Length of the first part.
    keys: usize,
}

/// One user's part in one group.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// The user's row in the split.
    pub row: u64,
    pub group: usize,
    /// Targets that these values are about.
    pub targets: u32,
    /// In `[0, 1]`.
    pub values: Vec<f64>,
}

impl Totals {
    #[must_use]
    pub fn new(groups: usize, metrics: usize, resamples: u32) -> Self {
        let (keys, resamples) = (groups * (2 + metrics), resamples as usize);
        Self { metrics, resamples, keys, sums: vec![0; keys * (1 + resamples.div_ceil(BLOCK) * BLOCK)] }
    }

    /// Adds the shares of some users.
    pub fn add(&mut self, shares: &[Share]) {
        let mut terms = Vec::new();
        for share in shares {
            let key = share.group * (2 + self.metrics);
            let scaled = share.values.iter().map(|value| {
                // only rounding may lead out of [0, 1]
                debug_assert!((-1e-9..=1.0 + 1e-9).contains(value), "a metric of {value}");
                (value * ONE).round() as u32
            });
            let all = [1, share.targets].into_iter().chain(scaled).enumerate();
            // most users hit nothing, and a zero adds nothing
            let kept = all.filter(|(_, value)| *value > 0).map(|(place, value)| (key + place, value));
            terms.push((share.row, kept.collect::<Vec<_>>()));
        }
        let (whole, blocks) = self.sums.split_at_mut(self.keys);
        for &(key, value) in terms.iter().flat_map(|(_, terms)| terms) {
            whole[key] += i64::from(value);
        }
        blocks.par_chunks_exact_mut(self.keys.max(1) * BLOCK).enumerate().for_each(|(block, sums)| {
            let mut weights = [0; BLOCK];
            let mut drawn = None;
            for (row, terms) in &terms {
                if drawn != Some(row) {
                    poisson(*row, block as u64, &mut weights);
                    drawn = Some(row);
                }
                for &(key, value) in terms {
                    for (sum, &weight) in sums[key * BLOCK..][..BLOCK].iter_mut().zip(&weights) {
                        // below 2^63 for 2^28 users of the largest weight; unchecked, so that it is vectorised
                        *sum = sum.wrapping_add(i64::from(weight).wrapping_mul(i64::from(value)));
                    }
                }
            }
        });
    }

    /// The sums, to be added up over ranks element by element.
    pub fn sums_mut(&mut self) -> &mut [i64] {
        &mut self.sums
    }

    #[must_use]
    pub fn users(&self, group: usize) -> u64 {
        self.sums[group * (2 + self.metrics)].unsigned_abs()
    }

    /// Targets of these users.
    #[must_use]
    pub fn targets(&self, group: usize) -> u64 {
        self.sums[group * (2 + self.metrics) + 1].unsigned_abs()
    }

    /// The mean of one metric over the users of a group, 0 without users, and the 2.5 % and 97.5 % percentiles over the
    /// resamples.
    #[must_use]
    pub fn mean(&self, group: usize, metric: usize) -> Estimate {
        let users = group * (2 + self.metrics);
        let key = users + 2 + metric;
        let ratio = |sum: i64, users: i64| sum as f64 / ONE / users as f64;
        if self.sums[users] == 0 {
            return Estimate { value: 0.0, interval: None };
        }
        let value = ratio(self.sums[key], self.sums[users]);
        let resampled = |key: usize, resample: usize| {
            self.sums[self.keys + (resample / BLOCK * self.keys + key) * BLOCK + resample % BLOCK]
        };
        // a resample without any user has no mean
        let with_users = (0..self.resamples).filter(|&resample| resampled(users, resample) > 0);
        let mut means: Vec<f64> =
            with_users.map(|resample| ratio(resampled(key, resample), resampled(users, resample))).collect();
        means.sort_unstable_by(f64::total_cmp);
        let ends = percentile(&means, 0.025).zip(percentile(&means, 0.975));
        Estimate { value, interval: ends.map(|(low, high)| Interval { low, high }) }
    }
}

/// Linear between the two nearest of ascending values.
fn percentile(ascending: &[f64], share: f64) -> Option<f64> {
    let place = share * ascending.len().checked_sub(1)? as f64;
    let (below, above) = (ascending[place.floor() as usize], ascending[place.ceil() as usize]);
    Some(below + (above - below) * place.fract())
}

/// Weights from Poisson(1) by inversion, each from 32 random bits.
fn poisson(row: u64, block: u64, weights: &mut [u32; BLOCK]) {
    let mut draws = Draws::new(&[STREAM, row, block]);
    let mut bits = 0;
    for (place, weight) in weights.iter_mut().enumerate() {
        bits = if place % 2 == 0 { draws.next_u64() } else { bits >> 32 };
        let uniform = bits as u32;
        *weight = THRESHOLDS.iter().map(|&threshold| u32::from(uniform >= threshold)).sum();
    }
}

/// `P(weight <= n) * 2^32` for n = 0, 1, …; beyond the last, a weight has less than one chance in 2^32.
const THRESHOLDS: [u32; 12] = thresholds();

const fn thresholds() -> [u32; 12] {
    let mut all = [0; 12];
    // e^-1
    let mut term = 0.367_879_441_171_442_33_f64;
    let mut sum = 0.0;
    let mut n = 0;
    while n < 12 {
        sum += term;
        all[n] = (sum * 4_294_967_296.0) as u32;
        n += 1;
        term /= n as f64;
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn share(row: u64, value: f64) -> Share {
        Share { row, group: 0, targets: 1, values: vec![value] }
    }

    #[test]
    fn weights_are_poisson_of_mean_one() {
        let (mut counts, mut weights) = ([0_u32; 14], [0; BLOCK]);
        for row in 0..4000 {
            poisson(row, row % 7, &mut weights);
            weights.iter().for_each(|&weight| counts[weight as usize] += 1);
        }
        // of 200,000 draws: expected +- five standard deviations
        for (weight, expected, spread) in [(0, 73_576, 1080), (1, 73_576, 1080), (2, 36_788, 870), (5, 613, 125)] {
            assert!(counts[weight].abs_diff(expected) < spread, "{weight}: {}", counts[weight]);
        }
    }

    #[test]
    fn the_interval_is_that_of_the_mean_of_a_coin() {
        // 1000 users, 200 hits: the standard error of the mean is sqrt(.2 * .8 / 1000) = .01265
        let shares: Vec<Share> = (0..1000).map(|row| share(row, f64::from(u8::from(row % 5 == 0)))).collect();
        let mut totals = Totals::new(1, 1, 2000);
        totals.add(&shares);
        let Estimate { value, interval } = totals.mean(0, 0);
        let Interval { low, high } = interval.unwrap();
        assert!((value - 0.2).abs() < 1e-9);
        assert!((low - (0.2 - 1.96 * 0.01265)).abs() < 0.002, "{low}");
        assert!((high - (0.2 + 1.96 * 0.01265)).abs() < 0.002, "{high}");
        assert_eq!((totals.users(0), totals.targets(0)), (1000, 1000));
    }

    #[test]
    fn groups_without_users_or_resamples_have_no_interval() {
        let mut totals = Totals::new(2, 1, 0);
        totals.add(&[share(7, 0.25)]);
        assert_eq!(totals.mean(0, 0), Estimate { value: 0.25, interval: None });
        assert_eq!(totals.mean(1, 0), Estimate { value: 0.0, interval: None });
    }

    #[test]
    fn percentiles_by_hand() {
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(percentile(&[3.0], 0.025), Some(3.0));
        assert!((percentile(&[0.0, 1.0, 2.0, 4.0], 0.75).unwrap() - 2.5).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn any_division_over_ranks_and_batches_gives_the_same_bits(
            values in prop::collection::vec(0.0..=1.0_f64, 1..40),
            ranks in 1_usize..5,
            batch in 1_usize..9,
        ) {
            let all: Vec<Share> = (0..).zip(&values).map(|(row, &value)| share(row, value)).collect();
            let mut whole = Totals::new(1, 1, 120);
            whole.add(&all);
            let mut sum = Totals::new(1, 1, 120);
            for rank in 0..ranks {
                let mine: Vec<Share> = all.iter().skip(rank).step_by(ranks).cloned().collect();
                let mut part = Totals::new(1, 1, 120);
                mine.chunks(batch).for_each(|chunk| part.add(chunk));
                sum.sums_mut().iter_mut().zip(part.sums_mut()).for_each(|(sum, part)| *sum += *part);
            }
            prop_assert_eq!(sum, whole);
        }
    }
}
