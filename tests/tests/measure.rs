//! Measurements for docs/reliability.md: how long a job pauses when its workers change. They are ignored, because their
//! result is a number: `cargo nextest run --release -p learn-tests --test measure --run-ignored only --no-capture`.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use learn_tests::{SMALL, Site, signal, succeeds};
use serde_json::Value;

const REPETITIONS: usize = 10;

/// The steps of a run as they come.
struct Steps {
    tail: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Steps {
    fn follow(site: &Site, run: &str) -> Self {
        let mut tail = Command::new("tail")
            .args(["-s", "0.01", "--retry", "-n", "0", "-F"])
            .arg(site.run_dir(run).join("metrics.jsonl"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("tail starts");
        let lines = BufReader::new(tail.stdout.take().expect("it is piped")).lines();
        Self { tail, lines }
    }

    /// The generation of the next step, and when it was there.
    fn next(&mut self) -> (u64, Instant) {
        let line = self.lines.next().expect("the job goes on").expect("it can be read");
        let record: Value = serde_json::from_str(&line).expect("it is JSON");
        (record["generation"].as_u64().expect("it is there"), Instant::now())
    }

    /// Waits for the first step of a generation after `old`: when it came, and how long after the step before.
    fn of_a_generation_after(&mut self, old: u64) -> (Instant, Duration) {
        let mut before = Instant::now();
        loop {
            let (generation, now) = self.next();
            if generation > old {
                return (now, now - before);
            }
            before = now;
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        let _ended = self.tail.kill().and_then(|()| self.tail.wait());
    }
}

fn start(site: &Site, workers: &str) -> Child {
    let settings =
        ["job.name=run", "training.epochs=1000000", "checkpoint.every_epochs=0", "evaluation.every_epochs=0"];
    let more = [workers, "cluster.max_restarts=100", "optimizer.learning_rate=1e-4"];
    let child = site.start(&site.train(&[&settings[..], &more].concat()));
    learn_tests::follow(site, "run", 50);
    child
}

fn stop(site: &Site, mut child: Child) {
    succeeds(&site.launch(&["stop", "runs/run"]));
    child.wait().expect("it ends");
}

fn print(what: &str, mut seconds: Vec<f64>) {
    seconds.sort_by(f64::total_cmp);
    let median = (seconds[(seconds.len() - 1) / 2] + seconds[seconds.len() / 2]) / 2.0;
    println!(
        "{what}: median {median:.3} s of {}, from {:.3} to {:.3}",
        seconds.len(),
        seconds[0],
        seconds[seconds.len() - 1]
    );
}

/// A rank's process and the generation, once `workers` take part.
fn complete(site: &Site, workers: u64, rank: u64) -> (u64, u64) {
    loop {
        let status = site.status("run");
        let pid = status["workers"].as_array().expect("it is there").iter().find(|worker| worker["rank"] == rank);
        if let (true, "running", Some(pid)) =
            (status["world_size"] == workers, status["state"].as_str().unwrap_or(""), pid)
        {
            return (pid["pid"].as_u64().expect("it is there"), status["generation"].as_u64().expect("it is there"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
#[ignore = "a measurement: see the head of this file"]
fn from_a_kill_to_the_next_finished_step() {
    let site = Site::new(SMALL);
    let child = start(&site, "cluster.workers=4");
    let mut seconds = Vec::new();
    let mut pauses = Vec::new();
    for repetition in 0..REPETITIONS {
        let (pid, generation) = complete(&site, 4, repetition as u64 % 4);
        std::thread::sleep(Duration::from_secs(1));
        let mut steps = Steps::follow(&site, "run");
        steps.next();
        let killed = Instant::now();
        signal("KILL", pid);
        let (survivors, _) = steps.of_a_generation_after(generation);
        seconds.push((survivors - killed).as_secs_f64());
        let (_, pause) = steps.of_a_generation_after(generation + 1);
        pauses.push(pause.as_secs_f64());
    }
    print("kill -9 of one of 4 workers to the next finished step", seconds);
    print("a replacement joins: between two finished steps", pauses);
    let status = site.status("run");
    assert_eq!(status["ledger"]["exact"], true, "{status}");
    stop(&site, child);
}

#[test]
#[ignore = "a measurement: see the head of this file"]
fn the_pause_when_a_worker_joins() {
    let site = Site::new(SMALL);
    let child = start(&site, "cluster.workers=2");
    let mut pauses = Vec::new();
    let mut usual = Vec::new();
    for _ in 0..REPETITIONS {
        let (_, generation) = complete(&site, 2, 0);
        let mut steps = Steps::follow(&site, "run");
        let (_, mut before) = steps.next();
        for _ in 0..20 {
            let (_, now) = steps.next();
            usual.push((now - before).as_secs_f64());
            before = now;
        }
        succeeds(&site.launch(&["scale", "runs/run", "--workers", "3", "--no-wait"]));
        let (_, pause) = steps.of_a_generation_after(generation);
        pauses.push(pause.as_secs_f64());
        drop(steps);
        succeeds(&site.launch(&["scale", "runs/run", "--workers", "2"]));
    }
    print("a third worker joins two: between two finished steps", pauses);
    print("between two finished steps otherwise", usual);
    stop(&site, child);
}

/// Median seconds of a step of two workers with a heartbeat at each `interval`.
fn step_with_heartbeats(site: &Site, run: &str, interval: &str) -> f64 {
    let (job, interval) = (format!("job.name={run}"), format!("cluster.heartbeat_interval={interval}"));
    let shape = ["model.layers=2", "model.hidden=128", "model.heads=4", "training.global_batch=32"];
    let more = ["cluster.workers=2", "training.epochs=1000000", "training.max_steps=300", "evaluation.every_epochs=0"];
    succeeds(&site.launch(&site.train(&[&[job.as_str(), &interval][..], &shape, &more].concat())));
    let steps = site.steps(run);
    let mut seconds: Vec<f64> = steps[50..].iter().map(|step| step["seconds"].as_f64().expect("a number")).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

#[test]
#[ignore = "a measurement: see the head of this file"]
fn what_heartbeats_cost_a_step() {
    let site = Site::new(SMALL);
    let (mut usual, mut frequent) = (Vec::new(), Vec::new());
    for round in 0..4 {
        usual.push(step_with_heartbeats(&site, &format!("usual-{round}"), "1s"));
        frequent.push(step_with_heartbeats(&site, &format!("frequent-{round}"), "10ms"));
        let (a, b) = (usual[round], frequent[round]);
        println!("{round}: a step takes {:.3} ms with a heartbeat a second, {:.3} ms with a hundred", 1e3 * a, 1e3 * b);
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (a, b) = (mean(&usual), mean(&frequent));
    println!(
        "a heartbeat a second costs {:.4} % of a step, if a hundred cost a hundred times as much",
        100.0 * (b - a) / a / 99.0
    );
}
