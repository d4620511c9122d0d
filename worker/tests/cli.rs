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

#[test]
fn a_step_can_be_measured() {
    let shape = ["--layers", "1", "--hidden", "16", "--heads", "2", "--input-dim", "8", "--output-dim", "8"];
    let batch = ["--batch", "6", "--items", "50", "--repetitions", "2", "--device", "cpu", "--threads", "1", "--json"];
    for bf16 in [&[][..], &["--bf16"]] {
        let output = worker(&[&["bench-step"], &shape[..], &batch, bf16].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(result["seconds"].as_array().unwrap().len(), 2);
        assert!(result["loss"].as_f64().unwrap() > 0.0, "{result}");
    }
}

#[test]
fn a_run_that_is_not_there_is_named() {
    let output = worker(&["export", "--run", "nowhere", "--out", "out"]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("nowhere") && message.contains("run directory"), "{message}");
}
