//! A checkpoint directory that cannot be written: training goes on, says so, and tries again.

use std::fs;
use std::process::{Command, Stdio};

use learn_tests::{SMALL, Site, binary, follow, follow_file, succeeds, text};

#[test]
fn training_goes_on_without_a_checkpoint_directory_and_uses_it_once_it_is_back() {
    let site = Site::new(SMALL);
    let overrides = [
        "job.name=run",
        "cluster.workers=2",
        "training.epochs=2000",
        "model.layers=2",
        "evaluation.every_epochs=0",
        "checkpoint.every_epochs=0",
        "checkpoint.every_steps=3",
    ];
    let child = site.start(&site.train(&overrides));
    follow(&site, "run", 8);
    // a file in the way refuses every user, root too
    let (there, away) = (site.run_dir("run").join("checkpoints"), site.path("away"));
    fs::rename(&there, &away).unwrap();
    fs::write(&there, "not a directory").unwrap();
    follow_file(&site.run_dir("run").join("events.jsonl"), "checkpoint_failed", 2);
    let before = site.status("run");
    assert_eq!(before["state"], "running", "{before}");
    let good = before["last_checkpoint"].as_u64().unwrap();
    assert!(away.join(format!("step-{good:010}")).join("state.json").exists(), "the last good one stays");
    fs::remove_file(&there).unwrap();
    fs::rename(&away, &there).unwrap();
    follow(&site, "run", before["last_step"]["step"].as_u64().unwrap() as usize + 20);
    succeeds(&site.launch(&["stop", "runs/run"]));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let events = site.events("run");
    let failed: Vec<_> = events.iter().filter(|event| event["event"] == "checkpoint_failed").collect();
    assert!(failed.len() >= 2 && failed[0]["reason"].as_str().unwrap().contains("checkpoints"), "{events:?}");
    let status = site.status("run");
    assert_eq!(status["last_checkpoint"], status["last_step"]["step"]);
    assert_eq!(status["ledger"]["exact"], true);
    succeeds(&site.launch(&["resume", "runs/run", "--dry-run"]));
}

#[test]
fn a_last_checkpoint_that_is_larger_than_the_disk_allows_ends_with_a_code_of_its_own() {
    let site = Site::new(SMALL);
    let settings = ["job.name=run", "training.max_steps=8", "checkpoint.every_steps=2", "model.hidden=768"];
    // shorter than the pauses before the last one is tried again, for which the other rank waits
    let timeout = "cluster.collective_timeout=4s";
    // no file may be longer than 8 MiB, which every file but a model's is; the signal for it is ignored, so that a
    // write fails as on a full disk
    let arguments = site.train(&[&settings[..], &["cluster.workers=2", timeout]].concat());
    let limited = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 16384; exec \"$0\" \"$@\""])
        .arg(binary("learn-launch"))
        .args(&arguments)
        .current_dir(site.path(""))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = text(&limited);
    assert_eq!(limited.status.code(), Some(6), "{said}");
    assert!(said.contains("the last checkpoint could not be written") && said.contains("File too large"), "{said}");
    let status = site.status("run");
    assert_eq!(status["last_step"]["step"], 8, "training went on: {status}");
    assert_eq!(status["last_checkpoint"], serde_json::Value::Null);
    let splits: Vec<_> = status["evaluations"].as_array().unwrap().iter().map(|one| one["split"].clone()).collect();
    assert_eq!(splits.last().unwrap(), "test", "and was tested: {splits:?}");
    let events = site.events("run");
    let failed = events.iter().filter(|event| event["event"] == "checkpoint_failed").count();
    assert!(failed >= 3, "the last one three times, others unless they were left out: {failed}");
    assert!(!events.iter().any(|event| event["event"] == "regrouping"), "nobody's patience ended: {events:?}");
    let left: Vec<_> = fs::read_dir(site.run_dir("run").join("checkpoints")).unwrap().collect();
    assert!(left.is_empty(), "nothing half written: {left:?}");
}
