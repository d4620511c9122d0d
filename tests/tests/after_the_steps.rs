//! Workers that are lost when no step is left to train: in the final test, in an evaluation of its own, while the last
//! checkpoint of a stop is written. Nothing is lost with them, and nothing is there twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use learn_tests::{SMALL, Site, f32_values, follow, follow_file, is_alive, signal, succeeds, text};
use serde_json::Value;

/// So many resamples keep a test at work for seconds, in which its workers can be hit.
const SLOW_TEST: &str = "evaluation.resamples=300000";
/// Longest wait for something that is sure to come.
const LIMIT: Duration = Duration::from_secs(120);

/// Looks again and again until there is something to see, which no file's lines tell.
fn hunt<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < LIMIT, "never seen: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn train(site: &Site, name: &str, more: &[&str]) -> Child {
    let job = format!("job.name={name}");
    let own = [job.as_str(), "training.max_steps=20", "optimizer.learning_rate=1e-4", "evaluation.every_epochs=0"];
    site.start(&site.train(&[&own[..], more].concat()))
}

fn pid_of(status: &Value, rank: u64) -> u64 {
    let workers = status["workers"].as_array().expect("it is there");
    let worker = workers.iter().find(|worker| worker["rank"] == rank);
    worker.unwrap_or_else(|| panic!("rank {rank} in {status}"))["pid"].as_u64().expect("it is a number")
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

fn lost(events: &[Value]) -> Vec<&Value> {
    events.iter().filter(|event| event["event"] == "worker_lost").collect()
}

/// The metrics of an evaluation by name, within rounding of those of another.
fn same_metrics(one: &Value, other: &Value) {
    let (one, other) = (one.as_object().expect("metrics"), other.as_object().expect("metrics"));
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, value) in one {
        let (a, b) = (value.as_f64().expect("a number"), other[name].as_f64().expect("a number"));
        assert!((a - b).abs() < 1e-5, "{name}: {a} and {b}");
    }
}

#[test]
fn a_worker_that_is_lost_in_the_final_test_costs_nothing() {
    let site = Site::new(SMALL);
    let calm = train(&site, "calm", &[]).wait_with_output().expect("it ends");
    succeeds(&calm);
    for (name, rank) in [("first", 0), ("other", 1)] {
        let child = train(&site, name, &["cluster.workers=2", SLOW_TEST]);
        // the last evaluation between the steps; the test comes next
        let evaluations = site.run_dir(name).join("evaluations.jsonl");
        follow_file(&evaluations, "\"valid\"", 1);
        follow_file(&site.run_dir(name).join("logs/coordinator.log"), "checkpoint committed step=20", 1);
        signal("KILL", pid_of(&site.status(name), rank));
        assert_eq!(lines(&evaluations).len(), 1, "the test was not over yet");
        let output = child.wait_with_output().expect("it ends");
        succeeds(&output);

        let events = site.events(name);
        assert_eq!(lost(&events).len(), 1, "{events:?}");
        let status = site.status(name);
        assert_eq!((&status["state"], &status["ledger"]["exact"]), (&"finished".into(), &true.into()), "{status}");
        assert_eq!((&status["last_step"]["step"], &status["last_checkpoint"]), (&20.into(), &20.into()));
        let (calm, tested) = (site.status("calm")["evaluations"].clone(), status["evaluations"].clone());
        for (calm, tested) in calm.as_array().expect("a list").iter().zip(tested.as_array().expect("a list")) {
            assert_eq!(calm["split"], tested["split"]);
            same_metrics(&calm["metrics"], &tested["metrics"]);
        }
        let splits: Vec<Value> = lines(&evaluations).iter().map(|line| line["split"].clone()).collect();
        assert_eq!(splits, ["valid", "test"], "each is there once");
        assert!(site.run_dir(name).join("summary.json").exists());
    }
}

#[test]
fn an_evaluation_that_loses_a_worker_is_done_by_the_others() {
    let site = Site::new(SMALL);
    succeeds(&train(&site, "run", &[]).wait_with_output().expect("it ends"));
    let calm = site.launch(&["eval", "runs/run", "--json"]);
    succeeds(&calm);
    let calm: Value = serde_json::from_slice(&calm.stdout).expect("it is JSON");
    let folder = site.run_dir("run").join("eval");
    fs::remove_dir_all(&folder).expect("the evaluation has made it");
    for rank in [0, 1] {
        let child = site.start(&["eval", "runs/run", "--workers", "2", "--json", "--set", SLOW_TEST]);
        let own: PathBuf = hunt("the evaluation's directory", || {
            let mut folders = fs::read_dir(&folder).ok()?.flatten();
            folders.next().map(|entry| entry.path())
        });
        follow_file(&own.join("events.jsonl"), "\"formed\"", 1);
        let status = hunt("its status", || {
            let text = fs::read_to_string(own.join("status.json")).ok()?;
            let status: Value = serde_json::from_str(&text).ok()?;
            let placed = status["workers"].as_array()?.iter().filter(|worker| worker["rank"].is_u64()).count();
            (placed == 2).then_some(status)
        });
        signal("KILL", pid_of(&status, rank));
        assert_eq!(lines(&own.join("evaluations.jsonl")).len(), 0, "it was not over yet");
        let output = child.wait_with_output().expect("it ends");
        succeeds(&output);
        let result: Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
        same_metrics(&calm["metrics"], &result["metrics"]);
        let events = lines(&own.join("events.jsonl"));
        assert_eq!(lost(&events).len(), 1, "{events:?}");
        assert_eq!(lines(&own.join("evaluations.jsonl")).len(), 1);
        fs::remove_dir_all(&own).expect("the evaluation has ended");
    }
}

#[test]
fn a_stop_has_its_checkpoint_though_rank_0_is_killed_while_it_writes_it() {
    let site = Site::new(SMALL);
    // wide enough that the write takes a while
    let wide = ["model.hidden=768", "model.layers=2", "checkpoint.every_epochs=0", "evaluation.every_epochs=0"];
    let more = ["cluster.workers=2", "training.max_steps=100000", "training.epochs=100000"];
    let child = train(&site, "run", &[&wide[..], &more].concat());
    follow(&site, "run", 3);
    let first = pid_of(&site.status("run"), 0);
    succeeds(&site.launch(&["stop", "runs/run", "--no-wait"]));
    let folder = site.run_dir("run").join("checkpoints");
    let of_first = format!(".tmp-{first}-");
    let unfinished = hunt("the checkpoint that rank 0 writes", || {
        let mut entries = fs::read_dir(&folder).ok()?.flatten();
        entries.find(|entry| entry.file_name().to_string_lossy().contains(&of_first)).map(|entry| entry.path())
    });
    signal("KILL", first);
    let output = child.wait_with_output().expect("it ends");
    // it is the stop that was asked for; the loss is an event
    let said = text(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("stopped by its operator") && said.contains("continues from step"), "{said}");
    assert!(!is_alive(first));
    assert!(unfinished.exists(), "it was killed before the checkpoint was in its place");

    let events = site.events("run");
    let lost = lost(&events);
    assert_eq!((lost.len(), &lost[0]["rank"]), (1, &0.into()), "{events:?}");
    let status = site.status("run");
    assert_eq!(status["ledger"]["exact"], true, "{status}");
    let step = status["last_step"]["step"].as_u64().expect("there is one");
    assert_eq!(status["last_checkpoint"], step, "{status}");
    // and it is whole: the job goes on from it as from any other
    let more = format!("training.max_steps={}", step + 2);
    succeeds(&site.launch(&["resume", "runs/run", "--set", &more]));
    let status = site.status("run");
    assert_eq!((&status["state"], &status["ledger"]["exact"]), (&"finished".into(), &true.into()), "{status}");
    let parameters = f32_values(&site.checkpoint_file("run", step + 2, "model.safetensors"));
    assert!(parameters.iter().all(|value| value.is_finite()));
}
