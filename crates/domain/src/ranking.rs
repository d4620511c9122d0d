//! Where a target stands in the ranking of the whole catalogue, and the metrics made of it.
//!
//! **Ties.** The rank of a target is `1 + (items that score strictly higher) + floor(other items with the same score / 2)`:
//! a scorer that gives every item the same score gets the middle of the catalogue, not its top. Half of an odd number is
//! rounded down: of two items of one score both get the better place.
//!
//! With `n` different targets of a user at ranks `r_1..r_n`: Recall@k is the share of targets with `r <= k`; HR@k is 1 if
//! there is one, else 0; NDCG@k is `sum over r <= k of 1 / log2(1 + r)`, divided by the same sum for ranks `1..min(k, n)`,
//! but 1 where targets of one score, which share a rank, would bring it above; MRR is `1 / min r`. AUC of a target is the
//! share of its competitors that score lower, those of the same score counted half; a user's is the mean over the targets.
//! Each is averaged over users.

/// A target among the items it competes with: all of the catalogue, less what the evaluation leaves out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Items that score strictly higher.
    pub higher: u64,
    /// Other items of the same score.
    pub equal: u64,
    /// All items it is ranked against.
    pub competitors: u64,
}

impl Placement {
    /// The rank, from 1.
    #[must_use]
    pub fn rank(&self) -> u64 {
        1 + self.higher + self.equal / 2
    }

    /// Share of the competitors below it, half of the equal ones among them; 0.5 without competitors.
    #[must_use]
    pub fn auc(&self) -> f64 {
        if self.competitors == 0 {
            return 0.5;
        }
        1.0 - (self.higher as f64 + self.equal as f64 / 2.0) / self.competitors as f64
    }
}

/// The metrics of an evaluation, all in `[0, 1]`: `mrr`, `auc`, and `recall@k`, `ndcg@k`, `hr@k` for each cutoff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    cutoffs: Vec<u32>,
}

impl Metrics {
    #[must_use]
    pub fn new(cutoffs: &[u32]) -> Self {
        Self { cutoffs: cutoffs.to_vec() }
    }

    /// Their names, in the order of [`Metrics::of`].
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let at = |kind: &'static str| self.cutoffs.iter().map(move |k| format!("{kind}@{k}"));
        ["mrr", "auc"].map(str::to_owned).into_iter().chain(at("recall")).chain(at("ndcg")).chain(at("hr")).collect()
    }

    /// The values for one user with these targets, each item once; none without targets.
    #[must_use]
    pub fn of(&self, targets: &[Placement]) -> Vec<f64> {
        let ranks: Vec<u64> = targets.iter().map(Placement::rank).collect();
        let Some(&first) = ranks.iter().min() else { return Vec::new() };
        let count = ranks.len() as f64;
        let gain = |rank: u64| 1.0 / ((1 + rank) as f64).log2();
        let hits = |k: u32| ranks.iter().copied().filter(move |&rank| rank <= u64::from(k));
        let ideal = |k: u32| (1..=u64::from(k).min(ranks.len() as u64)).map(gain).sum::<f64>();
        let mut values = vec![1.0 / first as f64, targets.iter().map(Placement::auc).sum::<f64>() / count];
        values.extend(self.cutoffs.iter().map(|&k| hits(k).count() as f64 / count));
        // targets of one score share a rank, and an ideal ranking has no two items in one place
        values.extend(self.cutoffs.iter().map(|&k| (hits(k).map(gain).sum::<f64>() / ideal(k)).min(1.0)));
        values.extend(self.cutoffs.iter().map(|&k| f64::from(u8::from(first <= u64::from(k)))));
        values
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn at(rank: u64) -> Placement {
        Placement { higher: rank - 1, equal: 0, competitors: 100 }
    }

    fn metrics(cutoffs: &[u32], ranks: &[u64]) -> BTreeMap<String, f64> {
        let metrics = Metrics::new(cutoffs);
        let targets: Vec<Placement> = ranks.iter().copied().map(at).collect();
        metrics.names().into_iter().zip(metrics.of(&targets)).collect()
    }

    fn close(metrics: &BTreeMap<String, f64>, name: &str, value: f64) {
        assert!((metrics[name] - value).abs() < 1e-12, "{name} {}", metrics[name]);
    }

    #[test]
    fn one_target_by_hand() {
        let third = metrics(&[1, 10], &[3]);
        for (name, value) in [("recall@1", 0.0), ("recall@10", 1.0), ("ndcg@1", 0.0), ("ndcg@10", 0.5), ("hr@1", 0.0)] {
            close(&third, name, value);
        }
        close(&third, "hr@10", 1.0);
        close(&third, "mrr", 1.0 / 3.0);
        close(&third, "auc", 0.98);
        assert_eq!(Metrics::new(&[1]).of(&[]), Vec::<f64>::new());
    }

    #[test]
    fn several_targets_by_hand() {
        let several = metrics(&[2], &[2, 7, 1]);
        close(&several, "recall@2", 2.0 / 3.0);
        close(&several, "hr@2", 1.0);
        close(&several, "ndcg@2", 1.0);
        close(&several, "mrr", 1.0);
        close(&several, "auc", (0.99 + 0.94 + 1.0) / 3.0);
    }

    #[test]
    fn two_targets_of_one_score_get_the_better_place_and_no_more_than_an_ideal_ranking() {
        let both = Placement { higher: 0, equal: 1, competitors: 10 };
        assert_eq!(both.rank(), 1);
        // mrr, auc, then recall, ndcg and hr at 1 and 2
        assert_eq!(Metrics::new(&[1, 2]).of(&[both, both]), [1.0, 0.95, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn a_constant_score_gets_the_middle() {
        let constant = Placement { higher: 0, equal: 1681, competitors: 1681 };
        assert_eq!(constant.rank(), 841);
        assert!((constant.auc() - 0.5).abs() < 1e-12);
        assert!((Placement::default().auc() - 0.5).abs() < 1e-12, "nothing to be told from");
    }
}
