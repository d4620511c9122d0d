//! Splitting a global batch over ranks so that every rank has about the same number of tokens, and a catalogue so that
//! every rank has about the same number of items.
//!
//! Any split gives the same step (promise 2), so the split may serve speed alone: longest processing time first
//! (Graham, "Bounds on multiprocessing timing anomalies", 1969).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// Splits the batch places `0..tokens.len()` over `ranks`; each rank's places ascend. A rank may be empty when there
/// are fewer users than ranks.
#[must_use]
pub fn split_by_tokens(tokens: &[u32], ranks: usize) -> Vec<Vec<u32>> {
    let mut by_size: Vec<u32> = (0..tokens.len() as u32).collect();
    by_size.sort_by_key(|&place| (Reverse(tokens[place as usize]), place));
    // the least loaded rank, then the one with the fewest users, then the lowest number
    let mut loads: BinaryHeap<Reverse<(u64, usize, usize)>> = (0..ranks).map(|rank| Reverse((0, 0, rank))).collect();
    let mut shares = vec![Vec::new(); ranks];
    for place in by_size {
        let Some(Reverse((load, users, rank))) = loads.pop() else { break };
        shares[rank].push(place);
        loads.push(Reverse((load + u64::from(tokens[place as usize]), users + 1, rank)));
    }
    for share in &mut shares {
        share.sort_unstable();
    }
    shares
}

/// The contiguous part of `0..count` that belongs to `rank`; parts differ by one at most.
#[must_use]
pub fn contiguous_part(count: usize, rank: usize, ranks: usize) -> Range<usize> {
    // as u128, so that no count times rank is too large
    let bound = |rank: usize| (count as u128 * rank as u128 / ranks.max(1) as u128) as usize;
    bound(rank)..bound(rank + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_place_goes_to_one_rank(tokens in prop::collection::vec(1_u32..60, 0..300), ranks in 1_usize..20) {
            let shares = split_by_tokens(&tokens, ranks);
            prop_assert_eq!(shares.len(), ranks);
            let mut all: Vec<u32> = shares.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..tokens.len() as u32).collect::<Vec<_>>());
        }

        #[test]
        fn the_largest_rank_is_within_two_percent_at_64_users(tokens in prop::collection::vec(5_u32..51, 256..=256)) {
            let shares = split_by_tokens(&tokens, 4);
            let load = |share: &Vec<u32>| share.iter().map(|&place| f64::from(tokens[place as usize])).sum::<f64>();
            let mean = tokens.iter().map(|&t| f64::from(t)).sum::<f64>() / 4.0;
            let largest = shares.iter().map(load).fold(0.0, f64::max);
            prop_assert!(largest <= 1.02 * mean, "{largest} against {mean}");
        }
    }

    proptest! {
        #[test]
        fn contiguous_parts_follow_each_other(count in 0_usize..1_000, ranks in 1_usize..20) {
            let parts: Vec<_> = (0..ranks).map(|rank| contiguous_part(count, rank, ranks)).collect();
            prop_assert_eq!(parts.iter().cloned().flatten().collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
            let lengths = || parts.iter().map(ExactSizeIterator::len);
            prop_assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1);
        }
    }

    #[test]
    fn fewer_users_than_ranks_leaves_ranks_empty() {
        assert_eq!(split_by_tokens(&[3, 5], 3), vec![vec![1], vec![0], vec![]]);
    }
}
