//! Promise 3: a stopped run that is resumed ends where an undisturbed one does.

use std::fs;
use std::path::Path;

use learn_tests::{SMALL, Site, follow, signal, succeeds, text};
use serde_json::{Value, json};

const STEPS: &str = "training.max_steps=24";

/// Starts a run and stops it gracefully as soon as its metrics show `step`.
fn stop_after(site: &Site, run: &str, step: usize, overrides: &[&str]) -> (Option<i32>, String) {
    let job = format!("job.name={run}");
    let mut all = vec![job.as_str()];
    all.extend(overrides);
    let child = site.start(&site.train(&all));
    follow(site, run, step);
    signal("TERM", child.id().into());
    let output = child.wait_with_output().expect("the job ends");
    (output.status.code(), text(&output))
}

#[test]
fn a_run_stopped_by_sigterm_and_resumed_equals_an_undisturbed_one_bitwise() {
    let site = Site::new(SMALL);
    // dropout on: its draws must continue too; long enough for the signal to arrive in the middle
    let slow = [
        "model.dropout=0.1",
        "model.layers=8",
        "training.epochs=100",
        "evaluation.every_epochs=20",
        "checkpoint.every_epochs=20",
    ];
    let mut undisturbed = vec!["job.name=whole"];
    undisturbed.extend(slow);
    succeeds(&site.launch(&site.train(&undisturbed)));

    let (code, output) = stop_after(&site, "cut", 8, &slow);
    assert_eq!(code, Some(3), "{output}");
    let stopped = site.status("cut");
    assert_eq!(stopped["state"], "stopped", "{stopped}");
    let at = stopped["last_step"]["step"].as_u64().unwrap();
    assert!((8..600).contains(&at), "stopped at {at}");
    assert_eq!(stopped["last_checkpoint"].as_u64(), Some(at));

    succeeds(&site.launch(&["resume", "runs/cut"]));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(site.checkpoint_file("whole", 600, file) == site.checkpoint_file("cut", 600, file), "{file} differs");
    }
    let numbers = |run: &str| -> Vec<u64> { site.steps(run).iter().map(|r| r["step"].as_u64().unwrap()).collect() };
    assert_eq!(numbers("cut"), (1..=600).collect::<Vec<_>>(), "no step is missing or there twice");
    assert_eq!(site.losses("whole"), site.losses("cut"));
    let ledger = &site.status("cut")["ledger"];
    assert_eq!(ledger["exact"], true, "{ledger}");
    let epochs = ledger["epochs"].as_array().unwrap();
    assert_eq!(epochs.len(), 100);
    assert!(epochs.iter().all(|epoch| epoch["seen"] == epoch["users"] && epoch["repeated"] == 0), "{ledger}");
}

#[test]
fn a_damaged_checkpoint_is_refused_and_the_one_before_is_offered() {
    let site = Site::new(SMALL);
    let arguments = ["job.name=run", STEPS, "checkpoint.every_steps=6"];
    succeeds(&site.launch(&site.train(&arguments)));
    let model = site.run_dir("run").join("checkpoints").join("step-0000000024").join("model.safetensors");
    let mut bytes = fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    fs::write(&model, bytes).unwrap();

    let refused = site.launch(&["resume", "runs/run", "--set", "training.max_steps=30", "--set", "training.epochs=6"]);
    let message = text(&refused);
    assert_eq!(refused.status.code(), Some(1), "{message}");
    assert!(message.contains("model.safetensors is damaged"), "{message}");
    assert!(message.contains("--checkpoint step-0000000018"), "{message}");

    let resumed = ["resume", "runs/run", "--checkpoint", "step-0000000018"];
    let dry = site.launch(&[&resumed[..], &["--dry-run"]].concat());
    assert!(dry.status.success() && text(&dry).contains("would resume from step 18"), "{}", text(&dry));
    succeeds(&site.launch(&resumed));
    assert_eq!(site.status("run")["last_step"]["step"], 24);
}

#[test]
fn a_job_of_two_workers_that_is_stopped_from_outside_ends_with_a_checkpoint() {
    let site = Site::new(SMALL);
    let overrides = ["job.name=stopped", "cluster.workers=2", "training.epochs=2000", "model.layers=2"];
    let child = site.start(&site.train(&overrides));
    follow(&site, "stopped", 3);
    succeeds(&site.launch(&["stop", "runs/stopped"]));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let status = site.status("stopped");
    assert_eq!(status["state"], "stopped", "{status}");
    assert_eq!(status["last_checkpoint"], status["last_step"]["step"]);

    // and two workers go on from it as if nothing had happened
    let step = status["last_step"]["step"].as_u64().unwrap();
    let more = format!("training.max_steps={}", step + 3);
    succeeds(&site.launch(&["resume", "runs/stopped", "--set", &more]));
    let status = site.status("stopped");
    assert_eq!(status["last_step"]["step"].as_u64(), Some(step + 3));
    assert_eq!(status["ledger"]["exact"], true, "{status}");
    // one of them has read the checkpoint, and given the other one what it holds
    let logs = fs::read_dir(site.run_dir("stopped").join("logs")).unwrap().map(|entry| entry.unwrap());
    let workers = logs.filter(|log| log.file_name().to_string_lossy().starts_with("worker-"));
    let read: usize = workers.map(|log| fs::read_to_string(log.path()).unwrap().matches(" resumed ").count()).sum();
    assert_eq!(read, 1);
}

#[test]
fn a_best_checkpoint_that_is_gone_is_no_bar_for_what_a_resume_trains() {
    let site = Site::new(SMALL);
    succeeds(&site.launch(&site.train(&["job.name=run", STEPS, "checkpoint.every_steps=6"])));
    let folder = site.run_dir("run").join("checkpoints");
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    // as if a very good one had been the best then, and been removed since
    let path = folder.join("step-0000000018").join("state.json");
    let mut state = read(&path);
    state["best"] = json!({ "step": 3, "metric": "ndcg@10", "value": 2.0 });
    fs::write(&path, state.to_string()).unwrap();
    succeeds(&site.launch(&["resume", "runs/run", "--checkpoint", "step-0000000018"]));
    let best = read(&folder.join("best"))["step"].as_u64().unwrap();
    // the real best of then, or one that came later
    assert!(best != 3 && folder.join(format!("step-{best:010}")).exists(), "the best is step {best}");
}
