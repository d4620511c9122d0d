//! Ends that are asked for, and processes that lose the one that started them.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use learn_tests::{SMALL, Site, follow, is_alive, signal, succeeds, text};
use serde_json::Value;

struct Running {
    child: Child,
    coordinator: u64,
    workers: Vec<u64>,
}

/// A job of two workers that has done some steps.
fn start(site: &Site, name: &str, more: &[&str]) -> Running {
    let job = format!("job.name={name}");
    let overrides = [job.as_str(), "cluster.workers=2", "training.epochs=2000", "model.layers=2"];
    let child = site.start(&site.train(&[&overrides[..], more].concat()));
    follow(site, name, 3);
    let status = site.status(name);
    assert_eq!(status["state"], "running", "{status}");
    let workers = status["workers"]
        .as_array()
        .expect("it is there")
        .iter()
        .map(|worker| worker["pid"].as_u64().expect("it is there"))
        .collect();
    let address: Value =
        serde_json::from_reader(File::open(site.run_dir(name).join("coordinator.json")).expect("it is there"))
            .expect("it is there");
    Running { child, coordinator: address["pid"].as_u64().expect("it is there"), workers }
}

/// Waits until a process that is not this one's child has ended, as `tail --pid` does it.
fn wait_for_end(pid: u64) {
    let waited = Command::new("tail").args([&format!("--pid={pid}"), "-s", "0.1", "-f", "/dev/null"]).status();
    assert!(waited.expect("tail starts").success());
    assert!(!is_alive(pid));
}

fn stopped_with_a_checkpoint(site: &Site, name: &str) {
    let status = site.status(name);
    assert_eq!(status["state"], "stopped", "{status}");
    assert_eq!(status["last_checkpoint"], status["last_step"]["step"], "{status}");
    assert_eq!(status["ledger"]["exact"], true);
}

#[test]
fn a_notice_to_any_process_stops_the_job_with_a_checkpoint() {
    let site = Site::new(SMALL);
    for name in ["launcher", "coordinator", "worker"] {
        let running = start(&site, name, &["cluster.stop_timeout=20s"]);
        let pid = match name {
            "launcher" => running.child.id().into(),
            "coordinator" => running.coordinator,
            _ => running.workers[1],
        };
        signal("USR1", pid);
        if name == "launcher" {
            // what a scheduler sends after its notice is not yet a reason to kill
            signal("TERM", pid);
        }
        let output = running.child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{name}: {}", text(&output));
        stopped_with_a_checkpoint(&site, name);
        assert!(!running.workers.iter().any(|&pid| is_alive(pid)));
    }
    succeeds(&site.launch(&["resume", "runs/worker", "--dry-run"]));
}

#[test]
fn a_killed_launcher_leaves_no_process_and_a_checkpoint() {
    let site = Site::new(SMALL);
    let mut running = start(&site, "run", &["cluster.stop_timeout=20s"]);
    let killed = Instant::now();
    signal("KILL", running.child.id().into());
    assert_eq!(running.child.wait().unwrap().signal(), Some(9));
    for pid in running.workers.iter().chain([&running.coordinator]) {
        wait_for_end(*pid);
    }
    assert!(killed.elapsed() < Duration::from_secs(20), "they end by themselves, not by a deadline");
    stopped_with_a_checkpoint(&site, "run");
}

#[test]
fn a_worker_that_is_stuck_when_it_is_asked_to_stop_ends_all_the_same() {
    let site = Site::new(SMALL);
    let mut running = start(&site, "run", &["cluster.heartbeat_timeout=10s", "cluster.stop_timeout=2s"]);
    // its partner does not come to the collective any more, and nobody has noticed yet
    signal("STOP", running.workers[0]);
    signal("TERM", running.workers[1]);
    wait_for_end(running.workers[1]);
    let log = |number: usize| {
        std::fs::read_to_string(site.run_dir("run").join("logs").join(format!("worker-{number}.log"))).unwrap()
    };
    assert!((0..2).any(|number| log(number).contains("cluster.stop_timeout")), "it says why");
    // without its launcher, whose death the stopped one hears of too
    signal("KILL", running.child.id().into());
    running.child.wait().unwrap();
    wait_for_end(running.workers[0]);
    wait_for_end(running.coordinator);
}
