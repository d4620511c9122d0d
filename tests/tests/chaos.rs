//! A short chaos run with a fixed seed; `cargo xtask chaos --minutes 30 --seed N` is the long one.

use std::process::Command;

use learn_tests::{succeeds, text};

#[test]
fn a_job_under_faults_loses_nothing() {
    let arguments = ["--minutes", "0.5", "--seed", "384", "--workers", "4"];
    let output = Command::new(env!("CARGO_BIN_EXE_learn-chaos")).args(arguments).output().unwrap();
    succeeds(&output);
    assert!(text(&output).contains("every assertion holds"), "{}", text(&output));
}
