//! Ranks over the whole catalogue and the metrics made of them.
//!
//! **Ties.** The rank of a target is `1 + (items that score strictly higher) + floor(other items with the same score / 2)`:
//! a model that gives every item the same score gets the middle of the catalogue, not its top.
//!
//! With `n` targets of a user at ranks `r_1..r_n`: Recall@k is the share of targets with `r <= k`; NDCG@k is
//! `sum over r <= k of 1 / log2(1 + r)`, divided by the same sum for ranks `1..min(k, n)`; MRR is `1 / min r`. Each is
//! averaged over users.

use std::collections::BTreeMap;

/// The rank (from 1) of a target among the catalogue.
#[must_use]
pub fn rank(higher: u64, others_equal: u64) -> u64 {
    1 + higher + others_equal / 2
}

/// Sums over users, mergeable across ranks as a plain vector.
#[derive(Clone, Debug, PartialEq)]
pub struct RankTotals {
    cutoffs: Vec<u32>,
    /// `[users, mrr, recall@k.., ndcg@k..]`
    sums: Vec<f64>,
}

impl RankTotals {
    #[must_use]
    pub fn new(cutoffs: &[u32]) -> Self {
        Self { cutoffs: cutoffs.to_vec(), sums: vec![0.0; 2 + 2 * cutoffs.len()] }
    }

    /// Adds one user by the ranks of its targets; a user without targets is not counted.
    pub fn add(&mut self, ranks: &[u64]) {
        let Some(&first) = ranks.iter().min() else { return };
        self.sums[0] += 1.0;
        self.sums[1] += 1.0 / first as f64;
        let gain = |rank: u64| 1.0 / ((1 + rank) as f64).log2();
        let count = self.cutoffs.len();
        for (index, &k) in self.cutoffs.iter().enumerate() {
            let hits = || ranks.iter().copied().filter(|&rank| rank <= u64::from(k));
            self.sums[2 + index] += hits().count() as f64 / ranks.len() as f64;
            let ideal: f64 = (1..=u64::from(k).min(ranks.len() as u64)).map(gain).sum();
            self.sums[2 + count + index] += hits().map(gain).sum::<f64>() / ideal;
        }
    }

    /// The sums, to be added up over ranks element by element.
    pub fn sums_mut(&mut self) -> &mut [f64] {
        &mut self.sums
    }

    #[must_use]
    pub fn users(&self) -> u64 {
        self.sums[0] as u64
    }

    /// `recall@k`, `ndcg@k`, `mrr`; all 0 without users.
    #[must_use]
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let users = self.sums[0].max(1.0);
        let count = self.cutoffs.len();
        let mut metrics = BTreeMap::from([("mrr".to_owned(), self.sums[1] / users)]);
        for (index, k) in self.cutoffs.iter().enumerate() {
            metrics.insert(format!("recall@{k}"), self.sums[2 + index] / users);
            metrics.insert(format!("ndcg@{k}"), self.sums[2 + count + index] / users);
        }
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_target_by_hand() {
        let mut totals = RankTotals::new(&[1, 10]);
        totals.add(&[1]);
        totals.add(&[3]);
        totals.add(&[11]);
        totals.add(&[]);
        let metrics = totals.metrics();
        let close = |name: &str, value: f64| assert!((metrics[name] - value).abs() < 1e-12, "{name} {}", metrics[name]);
        assert_eq!(totals.users(), 3);
        close("recall@1", 1.0 / 3.0);
        close("recall@10", 2.0 / 3.0);
        close("ndcg@10", (1.0 + 0.5) / 3.0);
        close("mrr", (1.0 + 1.0 / 3.0 + 1.0 / 11.0) / 3.0);
    }

    #[test]
    fn several_targets_by_hand() {
        let mut totals = RankTotals::new(&[2]);
        totals.add(&[2, 7, 1]);
        let metrics = totals.metrics();
        assert!((metrics["recall@2"] - 2.0 / 3.0).abs() < 1e-12);
        assert!((metrics["ndcg@2"] - 1.0).abs() < 1e-12, "ranks 1 and 2 are the ideal for k = 2");
        assert!((metrics["mrr"] - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_constant_score_gets_the_middle_and_totals_add_up() {
        assert_eq!(rank(0, 1681), 841);
        let (mut a, mut b, mut both) = (RankTotals::new(&[5]), RankTotals::new(&[5]), RankTotals::new(&[5]));
        a.add(&[2]);
        b.add(&[9]);
        both.add(&[2]);
        both.add(&[9]);
        let other = b.sums_mut().to_vec();
        a.sums_mut().iter_mut().zip(other).for_each(|(sum, part)| *sum += part);
        assert_eq!(a, both);
    }
}
