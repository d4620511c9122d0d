//! Which of a user's interactions are history and which are targets.
//!
//! Leave-one-out, of `n` interactions: train is the first `n - 2`; valid predicts the one before the last from them;
//! test predicts the last from all before it.
//!
//! By time: two thresholds hold for all users. Test is every interaction from `test_from` on, valid those from
//! `valid_from` until then, train those before. `test_from` is the time of the interaction with the number
//! `ceil(N (1 - test_share))` when all `N` are ordered by time (from 0), so that test is at most its share, but for ties:
//! interactions of equal time are never divided; they go to the later part.

use std::ops::Range;

use learn_domain::config::SplitPolicy;
use rayon::prelude::*;

use super::error::PrepareError;
use super::partition::History;
use super::store::Store;
use crate::manifest::ByTime;
use crate::progress::{Progress, Unit};

/// Buckets of one pass of the search for a threshold; four passes narrow 64 bits to one value.
const BUCKETS: u128 = 1 << 16;

/// How to divide.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Rule {
    LeaveOneOut,
    ByTime(ByTime),
}

/// Places in a user's interactions: history is `..start` of the targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    /// Length of the training sequence.
    pub(crate) train: usize,
    /// Targets; empty = the user has no row in the split.
    pub(crate) valid: Range<usize>,
    pub(crate) test: Range<usize>,
}

impl Rule {
    pub(crate) fn policy(&self) -> SplitPolicy {
        match self {
            Self::LeaveOneOut => SplitPolicy::LeaveOneOut,
            Self::ByTime(_) => SplitPolicy::ByTime,
        }
    }

    /// Divides one user's interactions, which are in order of time.
    pub(crate) fn divide(&self, history: History) -> Parts {
        let n = history.len();
        match self {
            Self::LeaveOneOut => {
                let (valid, test) = (n.saturating_sub(2), n.saturating_sub(1));
                Parts { train: valid, valid: valid..test, test: test..n }
            }
            Self::ByTime(by_time) => {
                let valid = history.times.partition_point(|&time| time < by_time.valid_from);
                let test = history.times.partition_point(|&time| time < by_time.test_from);
                Parts { train: valid, valid: valid..test, test: test..n }
            }
        }
    }
}

/// The thresholds of a by-time split over all interactions that are left.
pub(crate) fn by_time(
    store: &Store,
    interactions: u64,
    shares: (f64, f64),
    progress: &dyn Progress,
) -> Result<ByTime, PrepareError> {
    let (valid_share, test_share) = shares;
    let place = |share: f64| (interactions as f64 * (1.0 - share)).ceil() as u64;
    let last = interactions.saturating_sub(1);
    let valid_from = time_at(store, place(valid_share + test_share).min(last), progress)?;
    let test_from = time_at(store, place(test_share).min(last), progress)?;
    Ok(ByTime { valid_share, test_share, valid_from, test_from })
}

/// The time of interaction `place` when all are ordered by time, found by counting ever narrower buckets.
fn time_at(store: &Store, mut place: u64, progress: &dyn Progress) -> Result<i64, PrepareError> {
    let (mut low, mut high) = (i128::from(i64::MIN), i128::from(i64::MAX));
    while low < high {
        progress.stage("find the split times", Some(store.records()), Unit::Rows);
        let width = (high - low + 1).unsigned_abs().div_ceil(BUCKETS) as i128;
        let counts = store
            .partitions
            .par_iter()
            .try_fold(Vec::new, |mut counts, partition| {
                super::refuse_stop(progress)?;
                counts.resize(BUCKETS as usize, 0_u64);
                let mut seen = 0;
                store.for_each_user(partition, |_, history| {
                    seen += history.len() as u64;
                    for time in history.times.iter().map(|&time| i128::from(time)) {
                        if (low..=high).contains(&time) {
                            counts[((time - low) / width) as usize] += 1;
                        }
                    }
                })?;
                progress.advance(seen);
                Ok::<_, PrepareError>(counts)
            })
            .try_reduce(Vec::new, |mut a, b| {
                a.resize(a.len().max(b.len()), 0);
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                Ok(a)
            })?;
        for (bucket, count) in (0_i128..).zip(counts) {
            if place < count {
                low += bucket * width;
                high = high.min(low + width - 1);
                break;
            }
            place -= count;
        }
    }
    // `low` lies between two 64-bit bounds.
    Ok(low as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divide(rule: &Rule, times: &[i64]) -> Parts {
        let (items, labels) = (vec![0; times.len()], vec![0; times.len()]);
        rule.divide(History { items: &items, times, labels: &labels })
    }

    #[test]
    fn leave_one_out_holds_out_the_last_two() {
        let parts = divide(&Rule::LeaveOneOut, &[1, 2, 3, 3, 3]);
        assert_eq!(parts, Parts { train: 3, valid: 3..4, test: 4..5 });
        let shortest = divide(&Rule::LeaveOneOut, &[1, 2, 3]);
        assert_eq!(shortest, Parts { train: 1, valid: 1..2, test: 2..3 });
    }

    #[test]
    fn by_time_never_divides_equal_times() {
        let rule = Rule::ByTime(ByTime { valid_share: 0.1, test_share: 0.1, valid_from: 10, test_from: 20 });
        assert_eq!(divide(&rule, &[1, 9, 10, 10, 20, 20]), Parts { train: 2, valid: 2..4, test: 4..6 });
        assert_eq!(divide(&rule, &[25]), Parts { train: 0, valid: 0..0, test: 0..1 });
        assert_eq!(divide(&rule, &[3]), Parts { train: 1, valid: 1..1, test: 1..1 });
    }
}
