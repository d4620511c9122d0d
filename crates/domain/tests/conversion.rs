//! Conversion metrics against scikit-learn's (`conversion/make_cases.py` writes the cases).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use learn_domain::conversion::{ConversionQuality, Exposure};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    exposures: Vec<(u64, f64, u8)>,
    users: u64,
    auc: f64,
    uauc: f64,
    wuauc: f64,
    log_loss: f64,
    calibration: f64,
    ece: f64,
}

#[test]
fn metrics_are_those_of_scikit_learn() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("conversion/cases.json")).unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let exposures: Vec<Exposure> = case
            .exposures
            .iter()
            .map(|&(user, logit, label)| Exposure { user, logit, converted: label == 1 })
            .collect();
        let found = ConversionQuality::of(&exposures).unwrap();
        assert_eq!(found.users, case.users);
        let wanted = [case.auc, case.uauc, case.wuauc, case.log_loss, case.calibration, case.ece];
        for ((name, found), wanted) in found.metrics().into_iter().zip(wanted) {
            assert!((found - wanted).abs() < 1e-9, "{name}: {found} instead of {wanted}");
        }
        assert_eq!(found.metrics().len(), wanted.len());
    }
}
