//! The binary starts without any variable set: libtorch is found by its rpath.

use std::process::Command;

fn worker(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_learn-worker")).args(arguments).env_clear().output().expect("the worker starts")
}

#[test]
fn it_says_what_the_machine_has() {
    let output = worker(&["doctor", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let facts: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(facts["version"], env!("CARGO_PKG_VERSION"));
    assert!(facts["libtorch"].is_object());
    assert!(facts["nccl"].is_string() != facts["nccl_reason"].is_string(), "one or the other: {facts}");
}

fn measured(arguments: &[&[&str]]) -> serde_json::Value {
    let output = worker(&[&["bench"], &arguments.concat()[..], &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("it prints JSON")
}

const SHAPE: [&str; 10] = ["--layers", "1", "--hidden", "16", "--heads", "2", "--input-dim", "8", "--output-dim", "8"];
const BATCH: [&str; 10] = ["--batch", "6", "--items", "50", "--repetitions", "2", "--device", "cpu", "--threads", "1"];

#[test]
fn a_step_can_be_measured() {
    for precision in ["f32", "bf16"] {
        let result = measured(&[&["step"], &SHAPE, &BATCH, &["--precision", precision]]);
        assert_eq!(result["seconds"].as_array().unwrap().len(), 2);
        assert!(result["loss"].as_f64().unwrap() > 0.0, "{result}");
        assert!(result["reduction"].is_null(), "{result}");
    }
}

#[test]
fn ranks_measure_what_their_sum_adds() {
    let one = measured(&[&["step"], &SHAPE, &BATCH]);
    let three = measured(&[&["step"], &SHAPE, &BATCH, &["--workers", "3"]]);
    assert_eq!(three["reduction"]["workers"], 3);
    assert_eq!(three["reduction"]["seconds_without"].as_array().unwrap().len(), 2);
    assert_eq!(three["users"], one["users"]);
    assert!(three["tokens"].as_f64().unwrap() < 0.5 * one["tokens"].as_f64().unwrap(), "{three}");
}

#[test]
fn the_loss_keeps_no_matrix_of_all_scores() {
    let result = measured(&[&["loss", "--users", "1000", "--dim", "8", "--repetitions", "1", "--device", "cpu"]]);
    assert_eq!((&result["rows"], &result["full_matrix_bytes"]), (&10_000.into(), &400_000_000.into()));
    assert!(result["loss"].as_f64().unwrap() > 0.0, "{result}");
    // a few tiles of 8 MiB, and not 400 MB
    assert!(result["share_of_full_matrix"].as_f64().unwrap() < 0.25, "{result}");
}

#[test]
fn collectives_between_processes_are_measured() {
    let result = measured(&[&["collective", "--workers", "3", "--mib", "1", "--repetitions", "2"]]);
    for operation in ["all_reduce", "all_gather", "reduce_scatter"] {
        assert_eq!(result["operations"][operation]["seconds"].as_array().unwrap().len(), 2, "{result}");
    }
}

#[test]
fn checkpoints_are_written_while_steps_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let result = measured(&[&["checkpoint", "--checkpoints", "2", "--folder", place], &SHAPE, &BATCH]);
    assert_eq!(result["writing"].as_array().unwrap().len(), 2);
    let steps = |name: &str| result[name].as_array().unwrap().len();
    assert!(steps("steps_without") >= 2 && steps("steps_meanwhile") >= steps("steps_without"), "{result}");
    assert!(result["bytes"].as_u64().unwrap() > 12 * result["parameters"].as_u64().unwrap(), "{result}");
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "what was written is removed");
}

#[test]
fn a_run_that_is_not_there_is_named() {
    let output = worker(&["export", "--run", "nowhere", "--out", "out"]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("nowhere") && message.contains("run directory"), "{message}");
}

#[test]
fn recommendations_are_for_somebody() {
    let output = worker(&["recommend", "--run", "nowhere"]);
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("--user <ID>") && !message.contains("nowhere"), "{message}");
}
