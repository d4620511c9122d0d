//! What recommending the most popular training items to everybody would reach on the test users.
//!
//! Input: training interactions per item, the held-out rows. Output: the same metrics as an evaluation of the model. The
//! candidates are the whole catalogue; with `evaluation.exclude_history` without the user's history (a target that the
//! user knows already stays).

use learn_domain::ranking::{RankTotals, rank};
use learn_domain::report::Popularity;

/// One held-out user.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    pub history: &'a [u32],
    pub targets: &'a [u32],
}

/// How to rank.
#[derive(Clone, Copy, Debug)]
pub struct Ranking<'a> {
    pub cutoffs: &'a [u32],
    pub exclude_history: bool,
}

/// Ranks each row's targets by `popularity`, one count per item.
#[must_use]
pub fn evaluate<'a>(popularity: &[u64], rows: impl Iterator<Item = Row<'a>>, ranking: Ranking) -> Popularity {
    let mut ascending = popularity.to_vec();
    ascending.sort_unstable();
    let mut totals = RankTotals::new(ranking.cutoffs);
    for row in rows {
        let mut left_out = if ranking.exclude_history { row.history.to_vec() } else { Vec::new() };
        left_out.sort_unstable();
        left_out.dedup();
        left_out.retain(|item| !row.targets.contains(item));
        let left_out = |wanted: &dyn Fn(u64) -> bool| {
            left_out.iter().filter(|&&item| wanted(popularity[item as usize])).count() as u64
        };
        let rank_of = |&target: &u32| {
            let score = popularity[target as usize];
            let not_higher = ascending.partition_point(|&other| other <= score);
            let lower = ascending.partition_point(|&other| other < score);
            let higher = (ascending.len() - not_higher) as u64 - left_out(&|other| other > score);
            let others_equal = (not_higher - lower - 1) as u64 - left_out(&|other| other == score);
            rank(higher, others_equal)
        };
        totals.add(&row.targets.iter().map(rank_of).collect::<Vec<_>>());
    }
    totals.metrics()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POPULARITY: [u64; 6] = [5, 9, 9, 1, 7, 1];

    fn mrr(row: Row, exclude_history: bool) -> f64 {
        evaluate(&POPULARITY, [row].into_iter(), Ranking { cutoffs: &[1], exclude_history })["mrr"]
    }

    #[test]
    fn ranks_by_hand() {
        let row = Row { history: &[1, 4, 1], targets: &[0] };
        assert!((mrr(row, false) - 1.0 / 4.0).abs() < 1e-12, "1, 2 and 4 are more popular");
        assert!((mrr(row, true) - 1.0 / 2.0).abs() < 1e-12, "only 2 is left before it");
        let tie = Row { history: &[], targets: &[3] };
        assert!((mrr(tie, false) - 1.0 / 5.0).abs() < 1e-12, "4 higher, 1 equal: half of it counts, rounded down");
    }

    #[test]
    fn a_known_target_stays_in_the_ranking() {
        let row = Row { history: &[1, 2], targets: &[2] };
        assert!((mrr(row, true) - 1.0).abs() < 1e-12);
    }
}
