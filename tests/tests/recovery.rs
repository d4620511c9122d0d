//! Promise 3: workers may be lost, paused, added and taken away, and the job does not lose a finished step: losses, batches
//! and parameters are those of the undisturbed run.

use std::io::{BufRead as _, BufReader};
use std::process::Child;
use std::time::Duration;

use learn_proto::connect::KEEP_ALIVE;
use learn_tests::{SMALL, Site, f32_values, follow, follow_file, is_alive, signal, succeeds, text};
use serde_json::Value;

const STEPS: u64 = 1500;

fn overrides(name: &str, more: &[&str]) -> Vec<String> {
    let own = [format!("job.name={name}"), format!("training.max_steps={STEPS}")];
    // slow learning: where gradients vanish, AdamW makes steps out of rounding
    let fixed = [
        "training.epochs=1000",
        "optimizer.learning_rate=1e-4",
        "evaluation.every_epochs=50",
        "checkpoint.every_epochs=50",
    ];
    own.into_iter().chain(fixed.iter().chain(more).map(|&text| text.to_owned())).collect()
}

fn start(site: &Site, name: &str, more: &[&str]) -> Child {
    let overrides = overrides(name, more);
    site.start(&site.train(&overrides.iter().map(String::as_str).collect::<Vec<_>>()))
}

/// The process of a rank, as the status has it now.
fn pid_of(site: &Site, name: &str, rank: u64) -> u64 {
    let status = site.status(name);
    let workers = status["workers"].as_array().expect("it is there");
    let worker = workers.iter().find(|worker| worker["rank"] == rank);
    worker.unwrap_or_else(|| panic!("rank {rank} in {status}"))["pid"].as_u64().expect("it is a number")
}

fn events(site: &Site, name: &str, kind: &str) -> Vec<Value> {
    site.events(name).into_iter().filter(|event| event["event"] == kind).collect()
}

/// The run has finished like the one that nobody disturbed.
fn finished_undisturbed(site: &Site, name: &str, child: Child) {
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    if !site.run_dir("calm").exists() {
        let calm = overrides("calm", &[]);
        succeeds(&site.launch(&site.train(&calm.iter().map(String::as_str).collect::<Vec<_>>())));
    }
    let status = site.status(name);
    assert_eq!((&status["state"], &status["ledger"]["exact"]), (&"finished".into(), &true.into()), "{status}");
    let steps: Vec<u64> = site.steps(name).iter().map(|record| record["step"].as_u64().unwrap_or(0)).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "no step is missing or there twice");
    for (step, (calm, disturbed)) in (1..).zip(site.losses("calm").iter().zip(site.losses(name))) {
        assert!((calm - disturbed).abs() < 1e-5, "{name}, step {step}: loss {disturbed} instead of {calm}");
    }
    let parameters = |run: &str| f32_values(&site.checkpoint_file(run, STEPS, "model.safetensors"));
    let pairs = parameters("calm").into_iter().zip(parameters(name));
    let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest < 1e-5, "{name}: parameters differ by {largest}");
    let (calm, evaluated) = (site.status("calm")["evaluations"].clone(), status["evaluations"].clone());
    let places = |evaluations: &Value| -> Vec<(Value, Value)> {
        let all = evaluations.as_array().expect("it is there").iter();
        all.map(|one| (one["split"].clone(), one["step"].clone())).collect()
    };
    assert_eq!(places(&evaluated), places(&calm), "each evaluation is there once");
    for worker in status["workers"].as_array().expect("it is there") {
        assert!(!is_alive(worker["pid"].as_u64().unwrap_or(0)), "no worker outlives its job: {worker}");
    }
}

#[test]
fn a_killed_worker_is_replaced_and_costs_no_step() {
    let site = Site::new(SMALL);
    for (name, rank) in [("last", 3), ("first", 0)] {
        let child = start(&site, name, &["cluster.workers=4"]);
        follow(&site, name, 40);
        signal("KILL", pid_of(&site, name, rank));
        finished_undisturbed(&site, name, child);
        let lost = events(&site, name, "worker_lost");
        assert_eq!((lost.len(), &lost[0]["cause"], &lost[0]["rank"]), (1, &"Disconnected".into(), &rank.into()));
        let sizes: Vec<u64> =
            events(&site, name, "formed").iter().map(|event| event["world_size"].as_u64().unwrap_or(0)).collect();
        assert_eq!(sizes, [4, 3, 4], "survivors go on at once, and a newcomer joins them");
    }
}

#[test]
fn survivors_go_on_without_a_replacement_down_to_one() {
    let site = Site::new(SMALL);
    let child = start(&site, "shrinking", &["cluster.workers=3", "cluster.max_restarts=0"]);
    follow(&site, "shrinking", 40);
    signal("KILL", pid_of(&site, "shrinking", 0));
    follow_file(&site.run_dir("shrinking").join("events.jsonl"), "\"formed\"", 2);
    signal("KILL", pid_of(&site, "shrinking", 0));
    finished_undisturbed(&site, "shrinking", child);
    assert_eq!(site.status("shrinking")["world_size"], 1);
}

#[test]
fn a_paused_worker_is_lost_and_rejoins_when_it_wakes() {
    let site = Site::new(SMALL);
    let settings = ["cluster.workers=2", "cluster.heartbeat_timeout=1s", "training.max_steps=1000000"];
    let child = start(&site, "paused", &settings);
    follow(&site, "paused", 40);
    let pid = pid_of(&site, "paused", 0);
    signal("STOP", pid);
    let log = site.run_dir("paused").join("events.jsonl");
    follow_file(&log, "worker_lost", 1);
    follow(&site, "paused", 80);
    signal("CONT", pid);
    // with both again, and the one that woke behind the other
    follow_file(&log, "\"formed\"", 3);
    let formed = events(&site, "paused", "formed");
    assert_eq!(formed[2]["world_size"], 2, "{formed:?}");
    let steps = site.steps("paused").len();
    follow(&site, "paused", steps + 40);
    assert_eq!(pid_of(&site, "paused", 1), pid, "it is the same process, in another place");
    succeeds(&site.launch(&["stop", "runs/paused"]));
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let status = site.status("paused");
    assert_eq!(status["ledger"]["exact"], true, "{status}");
    assert_eq!(status["last_checkpoint"], status["last_step"]["step"], "{status}");
}

#[test]
fn a_coordinator_that_stood_still_loses_nobody() {
    let site = Site::new(SMALL);
    let child = start(&site, "frozen", &["cluster.workers=2", "training.max_steps=1000000"]);
    follow(&site, "frozen", 40);
    let address = std::fs::read(site.run_dir("frozen").join("coordinator.json")).expect("it is there");
    let address: Value = serde_json::from_slice(&address).expect("it is JSON");
    let pid = address["pid"].as_u64().expect("it is a number");
    signal("STOP", pid);
    // workers have asked whether it is there, and take the connection for broken
    std::thread::sleep(2 * KEEP_ALIVE + Duration::from_secs(3));
    signal("CONT", pid);
    // until long after who did not come back would have been given up
    let steps = site.steps("frozen").len();
    follow(&site, "frozen", steps + 3000);
    let status = site.status("frozen");
    assert!(events(&site, "frozen", "worker_lost").is_empty(), "{status}");
    assert_eq!((&status["generation"], &status["world_size"]), (&1.into(), &2.into()), "{status}");
    let log = std::fs::read_to_string(site.run_dir("frozen").join("logs/coordinator.log")).expect("it has a log");
    assert!(log.contains("was stopped or held up"), "{log}");
    succeeds(&site.launch(&["stop", "runs/frozen"]));
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert_eq!(site.status("frozen")["ledger"]["exact"], true);
}

#[test]
fn a_worker_that_hangs_is_named_and_then_lost() {
    let site = Site::new(SMALL);
    let settings = ["cluster.workers=3", "cluster.progress_timeout=1s", "cluster.stop_timeout=3s"];
    let more = ["cluster.max_restarts=0", "training.max_steps=1000000", "cluster.heartbeat_timeout=60s"];
    let child = start(&site, "hanging", &[&settings[..], &more].concat());
    follow(&site, "hanging", 40);
    let pid = pid_of(&site, "hanging", 1);
    signal("STOP", pid);
    let log = site.run_dir("hanging").join("events.jsonl");
    follow_file(&log, "\"formed\"", 2);
    let stalled = events(&site, "hanging", "stalled");
    assert_eq!((&stalled[0]["stall"]["guilty"][1], &stalled[0]["stall"]["cause"]), (&1.into(), &"host".into()));
    let lost = events(&site, "hanging", "worker_lost");
    assert!(lost.len() == 1 && lost[0]["rank"] == 1 && !lost[0]["cause"]["Stalled"].is_null(), "{lost:?}");
    let steps = site.steps("hanging").len();
    follow(&site, "hanging", steps + 20);
    // it wakes up to find that it is not wanted in that generation any more, and comes back
    signal("CONT", pid);
    follow_file(&log, "\"formed\"", 3);
    succeeds(&site.launch(&["stop", "runs/hanging"]));
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert_eq!(site.status("hanging")["ledger"]["exact"], true);
}

#[test]
fn a_running_job_is_scaled_up_and_down() {
    let site = Site::new(SMALL);
    let child = start(&site, "scaled", &["cluster.workers=1"]);
    follow(&site, "scaled", 40);
    let up = site.launch(&["scale", "runs/scaled", "--workers", "3"]);
    succeeds(&up);
    let down = site.launch(&["scale", "runs/scaled", "--workers", "2", "--json"]);
    succeeds(&down);
    let status: Value = serde_json::from_slice(&down.stdout).expect("it is JSON");
    assert_eq!((&status["world_size"], &status["wanted_workers"]), (&2.into(), &2.into()), "{status}");
    finished_undisturbed(&site, "scaled", child);
    assert!(events(&site, "scaled", "worker_lost").is_empty());
    let refused = site.launch(&["scale", "runs/scaled", "--workers", "2"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
}

#[test]
fn who_wants_more_workers_than_anybody_starts_hears_how_they_come() {
    let site = Site::new(SMALL);
    let train = site.train(&["job.name=open", "cluster.workers=1"]);
    let mut child = site.start(&[&train[..], &["--no-workers"]].concat());
    let mut said = BufReader::new(child.stderr.take().expect("it is piped")).lines().map_while(Result::ok);
    assert!(said.any(|line| line.contains("waiting for 1 worker: learn-worker join")), "it serves nobody");
    let scaled = site.launch(&["scale", "runs/open", "--workers", "3", "--timeout", "1"]);
    assert_eq!(scaled.status.code(), Some(1), "{}", text(&scaled));
    let words = "0 of 3 workers after 1 s; the job starts no workers itself; if nothing else starts them, start 3 workers \
                 more: learn-worker join";
    assert!(text(&scaled).contains(words), "{}", text(&scaled));
    signal("TERM", child.id().into());
    assert_eq!(child.wait().expect("it ends").code(), Some(3));
}

#[test]
fn losing_all_workers_at_once_costs_what_no_checkpoint_holds() {
    let site = Site::new(SMALL);
    let settings = ["cluster.workers=2", "training.max_steps=1000000", "checkpoint.every_steps=10"];
    let child = start(&site, "alone", &settings);
    follow(&site, "alone", 40);
    let pids = [pid_of(&site, "alone", 0), pid_of(&site, "alone", 1)];
    pids.iter().for_each(|&pid| signal("KILL", pid));
    let output = child.wait_with_output().expect("it ends");
    let printed = text(&output);
    assert_eq!(output.status.code(), Some(4), "{printed}");
    assert!(printed.contains("was lost") && printed.contains("continues from step"), "{printed}");
    assert_eq!(site.status("alone")["state"], "failed");
    let from = site.status("alone")["last_checkpoint"].as_u64().expect("there is one");
    let more = format!("training.max_steps={}", from + 20);
    succeeds(&site.launch(&["resume", "runs/alone", "--set", &more]));
    let status = site.status("alone");
    assert_eq!((&status["state"], &status["ledger"]["exact"]), (&"finished".into(), &true.into()), "{status}");
}
