//! Every target for a moment: what once failed, the golden inputs, and some thousand mutated ones.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use learn_fuzz::{TARGETS, clean, drive};

#[test]
fn no_target_fails_within_a_second() {
    for target in TARGETS {
        let outcome = drive::run(target, Duration::from_secs(1), 1).unwrap();
        if let Some(finding) = outcome.finding {
            panic!("{}: {}: {:?}", target.name, finding.what, finding.input.escape_ascii().to_string());
        }
        assert!(outcome.inputs > 100, "{} had {} inputs only", target.name, outcome.inputs);
    }
    clean();
}

#[test]
fn every_target_has_golden_inputs_with_content() {
    for target in TARGETS {
        let seeds = (target.seeds)();
        assert!(seeds.len() >= if target.name == "checkpoint" { 1 } else { 2 }, "{}", target.name);
        assert!(seeds.iter().all(|seed| !seed.is_empty()), "{} has an empty golden input", target.name);
    }
    clean();
}

#[test]
fn the_driver_finds_a_target_that_panics_with_its_input() {
    fn fails(bytes: &[u8]) {
        assert!(!bytes.contains(&b'!'), "it has a bang");
    }
    let target =
        learn_fuzz::Target { name: "none", reads: "", run: fails, seeds: || vec![b"quiet".to_vec()], words: &["!"] };
    let finding = drive::run(&target, Duration::from_secs(5), 3).unwrap().finding.unwrap();
    assert!(finding.what.contains("it has a bang") && finding.input.contains(&b'!'), "{finding:?}");
}
