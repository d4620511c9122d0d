//! How well predicted conversion probabilities tell and price the exposures that converted.
//!
//! An exposure is an item that a user was shown, with a label and the logit x that a model gives it; p = 1 / (1 + e^-x).
//! - AUC: the share of (converted, not converted) pairs of exposures whose converted one has the higher logit, half of
//!   the pairs of equal logits included. UAUC is the mean of the AUCs of single users, over the users with both labels;
//!   WUAUC weighs each of them by its number of exposures.
//! - Log-loss: the mean of -log(p) over conversions and -log(1 - p) over the rest.
//! - Calibration: mean p / mean label; above 1 = too many conversions are predicted.
//! - Expected calibration error (Guo et al., ICML 2017): with 10 bins of equal width over p, the mean of
//!   |mean p - mean label| of the bins, weighed by their exposures. The last bin includes 1.
//!
//! What needs both labels is absent without them.

use serde::{Deserialize, Serialize};

/// Bins of the expected calibration error.
const BINS: usize = 10;

/// An exposure with its prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exposure {
    pub user: u64,
    pub logit: f64,
    pub converted: bool,
}

impl Exposure {
    /// The predicted probability that it converts.
    #[must_use]
    pub fn probability(&self) -> f64 {
        1.0 / (1.0 + (-self.logit).exp())
    }

    /// -log of the probability of what happened, without overflow for large logits.
    fn log_loss(&self) -> f64 {
        let surprise = if self.converted { -self.logit } else { self.logit };
        surprise.max(0.0) + (-surprise.abs()).exp().ln_1p()
    }
}

/// The quality of predictions over exposures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ConversionQuality {
    pub exposures: u64,
    pub conversions: u64,
    /// Users with exposures of both labels: those of UAUC and WUAUC.
    pub users: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uauc: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wuauc: Option<f64>,
    /// In nats.
    pub log_loss: f64,
    /// Absent without conversions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<f64>,
    pub ece: f64,
}

impl ConversionQuality {
    /// All metrics of some exposures, in any order; `None` of none.
    #[must_use]
    pub fn of(exposures: &[Exposure]) -> Option<Self> {
        if exposures.is_empty() {
            return None;
        }
        let count = exposures.len() as f64;
        let conversions = exposures.iter().filter(|exposure| exposure.converted).count();
        let predicted: f64 = exposures.iter().map(Exposure::probability).sum();
        let mut by_user = exposures.to_vec();
        by_user.sort_by_key(|exposure| exposure.user);
        let users: Vec<(f64, f64)> = by_user
            .chunk_by(|a, b| a.user == b.user)
            .filter_map(|exposures| Some((auc(exposures)?, exposures.len() as f64)))
            .collect();
        let weights: f64 = users.iter().map(|user| user.1).sum();
        let some = !users.is_empty();
        Some(Self {
            exposures: exposures.len() as u64,
            conversions: conversions as u64,
            users: users.len() as u64,
            auc: auc(exposures),
            uauc: some.then(|| users.iter().map(|user| user.0).sum::<f64>() / users.len() as f64),
            wuauc: some.then(|| users.iter().map(|user| user.0 * user.1).sum::<f64>() / weights),
            log_loss: exposures.iter().map(Exposure::log_loss).sum::<f64>() / count,
            calibration: (conversions > 0).then(|| predicted / conversions as f64),
            ece: expected_calibration_error(exposures),
        })
    }

    /// Name and value of the metrics that are there, in the order of tables.
    #[must_use]
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let all = [
            ("auc", self.auc),
            ("uauc", self.uauc),
            ("wuauc", self.wuauc),
            ("log_loss", Some(self.log_loss)),
            ("calibration", self.calibration),
            ("ece", Some(self.ece)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

/// The area under the ROC curve, exact with ties; `None` if all labels are the same.
#[must_use]
pub fn auc(exposures: &[Exposure]) -> Option<f64> {
    let mut sorted = exposures.to_vec();
    sorted.sort_unstable_by(|a, b| a.logit.total_cmp(&b.logit));
    // twice the pairs that are in order, so that half pairs are whole numbers
    let (mut positives, mut negatives, mut twice_ordered) = (0_u128, 0_u128, 0_u128);
    for tied in sorted.chunk_by(|a, b| a.logit == b.logit) {
        let converted = tied.iter().filter(|exposure| exposure.converted).count() as u128;
        let others = tied.len() as u128 - converted;
        twice_ordered += converted * (2 * negatives + others);
        positives += converted;
        negatives += others;
    }
    (positives > 0 && negatives > 0).then(|| twice_ordered as f64 / (2 * positives * negatives) as f64)
}

fn expected_calibration_error(exposures: &[Exposure]) -> f64 {
    // per bin: sum of predictions minus sum of labels
    let mut gaps = [0.0; BINS];
    for exposure in exposures {
        let probability = exposure.probability();
        let bin = ((probability * BINS as f64) as usize).min(BINS - 1);
        gaps[bin] += probability - f64::from(u8::from(exposure.converted));
    }
    gaps.iter().map(|gap| gap.abs()).sum::<f64>() / exposures.len() as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exposures(rows: &[(u64, f64, u8)]) -> Vec<Exposure> {
        rows.iter().map(|&(user, logit, label)| Exposure { user, logit, converted: label == 1 }).collect()
    }

    fn close(found: f64, wanted: f64) {
        assert!((found - wanted).abs() < 1e-12, "{found} instead of {wanted}");
    }

    #[test]
    fn pairs_by_hand() {
        // user 1: the conversion above one of two others, equal to the other; user 2: in the wrong order; user 3: one label
        let rows = [(1, 0.5, 1), (1, 0.5, 0), (1, -2.0, 0), (2, 1.0, 0), (2, -1.0, 1), (3, 9.0, 1)];
        let quality = ConversionQuality::of(&exposures(&rows)).unwrap();
        close(quality.uauc.unwrap(), (0.75 + 0.0) / 2.0);
        close(quality.wuauc.unwrap(), (0.75 * 3.0 + 0.0 * 2.0) / 5.0);
        // conversions 0.5, -1, 9 against 0.5, -2, 1: 1.5 + 1 + 3 of 9
        close(quality.auc.unwrap(), 5.5 / 9.0);
        assert_eq!((quality.exposures, quality.conversions, quality.users), (6, 3, 2));
    }

    #[test]
    fn a_constant_prediction_by_hand() {
        // p = 0.5 for all, one of four converts
        let quality =
            ConversionQuality::of(&exposures(&[(1, 0.0, 1), (1, -0.0, 0), (2, 0.0, 0), (2, 0.0, 0)])).unwrap();
        close(quality.auc.unwrap(), 0.5);
        close(quality.log_loss, std::f64::consts::LN_2);
        close(quality.calibration.unwrap(), 2.0);
        close(quality.ece, 0.25);
        assert_eq!(quality.users, 1);
    }

    #[test]
    fn what_needs_both_labels_is_absent_without_them() {
        assert_eq!(ConversionQuality::of(&[]), None);
        let none = ConversionQuality::of(&exposures(&[(1, -800.0, 0), (1, 2.0, 0)])).unwrap();
        assert_eq!((none.auc, none.uauc, none.wuauc, none.calibration), (None, None, None, None));
        assert_eq!(none.metrics().iter().map(|metric| metric.0).collect::<Vec<_>>(), ["log_loss", "ece"]);
        let sure = ConversionQuality::of(&exposures(&[(1, 800.0, 1), (1, 800.0, 0)])).unwrap();
        close(sure.log_loss, 400.0);
        close(sure.ece, 0.5);
    }

    proptest! {
        #[test]
        fn the_order_of_exposures_and_a_monotone_change_are_no_matter_for_auc(
            rows in prop::collection::vec((0_u64..4, -3_i32..3, 0_u8..2), 1..60),
        ) {
            let rows: Vec<(u64, f64, u8)> = rows.into_iter().map(|(user, x, label)| (user, f64::from(x), label)).collect();
            let mut given = exposures(&rows);
            let before = ConversionQuality::of(&given).unwrap();
            given.reverse();
            given.iter_mut().for_each(|exposure| exposure.logit = exposure.logit.exp());
            let after = ConversionQuality::of(&given).unwrap();
            prop_assert_eq!(before.auc, after.auc);
            prop_assert!(before.uauc.is_some() == after.uauc.is_some());
            if let (Some(before), Some(after)) = (before.uauc, after.uauc) {
                prop_assert!((before - after).abs() < 1e-12);
            }
            prop_assert!(before.auc.is_none_or(|auc| (0.0..=1.0).contains(&auc)));
        }
    }
}
