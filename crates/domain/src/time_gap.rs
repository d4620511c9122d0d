//! How long after the item before it each item of a sequence came, in buckets that double in width.
//!
//! Input: the times of a sequence as a tower sees it, oldest first. Output: a bucket per item. The logarithm makes seconds
//! and years fit into one table (as HSTU's time buckets do: Zhai et al., ICML 2024), and the unit of the times shifts the
//! buckets without changing which gaps share one beyond rounding. Invariants: a bucket depends on two neighbours alone, and
//! on no later time. So the gap is the one to the *earlier* item: that to the next one is unknown when a user is
//! embedded, and in an evaluation it would tell when the target happened.

/// Buckets that an item with an earlier one can have: 1 to this.
pub const BUCKETS: u32 = 64;

/// The bucket of a gap: 1 if there is none (or a negative one), 2 + floor(log2(gap)) else.
#[must_use]
pub fn bucket(gap: i64) -> u32 {
    if gap < 1 { 1 } else { 2 + gap.ilog2() }
}

/// The bucket of each item's gap to the item before it; 0 for the first, which has none.
pub fn buckets(times: &[i64]) -> impl Iterator<Item = u32> {
    let first = times.first().map(|_| 0);
    first.into_iter().chain(times.windows(2).map(|pair| bucket(pair[1].saturating_sub(pair[0]))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_double_in_width() {
        assert_eq!([i64::MIN, -5, 0, 1, 2, 3, 4, 7, 8].map(bucket), [1, 1, 1, 2, 3, 3, 4, 4, 5]);
        let (day, week, year) = (86_400, 7 * 86_400, 365 * 86_400);
        assert_eq!([day, week, year].map(bucket), [18, 21, 26]);
        assert_eq!(bucket(i64::MAX), BUCKETS);
        let of = |times: &[i64]| buckets(times).collect::<Vec<_>>();
        assert_eq!(of(&[]), [0_u32; 0]);
        assert_eq!(of(&[9]), [0]);
        assert_eq!(of(&[-3, -3, 1, 1_000_001]), [0, 1, 4, 21]);
        assert_eq!(of(&[i64::MIN, i64::MAX]), [0, BUCKETS]);
    }

    proptest! {
        #[test]
        fn a_longer_gap_never_has_a_smaller_bucket(one: i64, other: i64) {
            let (short, long) = (one.min(other), one.max(other));
            prop_assert!(bucket(short) <= bucket(long));
            prop_assert!((1..=BUCKETS).contains(&bucket(one)));
        }

        #[test]
        fn gaps_that_share_a_bucket_differ_by_less_than_twice(gap in 1_i64..i64::MAX / 2, more in 0.0_f64..1.0) {
            let other = gap + (gap as f64 * more) as i64;
            prop_assert!(bucket(other) <= bucket(gap) + 1);
            prop_assert_eq!(bucket(2 * gap), bucket(gap) + 1);
        }

        #[test]
        fn what_comes_later_or_when_it_all_began_does_not_matter(
            times in prop::collection::vec(0_i64..1 << 40, 1..40), keep in 1_usize..40, shift in -(1_i64 << 40)..1 << 40,
        ) {
            let mut times = times;
            times.sort_unstable();
            let all: Vec<u32> = buckets(&times).collect();
            prop_assert_eq!(all.len(), times.len());
            let keep = keep.min(times.len());
            prop_assert_eq!(&buckets(&times[..keep]).collect::<Vec<_>>()[..], &all[..keep]);
            let shifted: Vec<i64> = times.iter().map(|time| time + shift).collect();
            prop_assert_eq!(buckets(&shifted).collect::<Vec<_>>(), all);
        }
    }
}
