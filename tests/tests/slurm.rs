//! A job on a real Slurm cluster: submitted, requeued, stopped, deprived of a machine, and equal to a local run.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;

use learn_tests::slurm::{Cluster, PLAIN_FILES, variable_of};
use learn_tests::{SMALL, Site, f32_values, follow, follow_file, is_alive, succeeds, text};
use serde_json::Value;

const STEPS: u64 = 600;

/// Overrides that give a job `steps` steps, and learn so slowly that rounding does not grow.
fn settings(name: &str, steps: u64) -> Vec<String> {
    [
        format!("job.name={name}"),
        format!("training.max_steps={steps}"),
        "training.epochs=100000".into(),
        "optimizer.learning_rate=1e-4".into(),
        "evaluation.every_epochs=50".into(),
        "checkpoint.every_epochs=50".into(),
    ]
    .into_iter()
    .collect()
}

fn arguments<'a>(command: &[&'a str], settings: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    let sets = settings.iter().flat_map(|one| ["--set", one.as_str()]);
    command.iter().copied().chain(sets).chain(more.iter().copied()).collect()
}

/// Submits a job of `steps` steps; its number.
fn submit(cluster: &Cluster, site: &Site, name: &str, steps: u64, more: &[&str]) -> String {
    let settings = settings(name, steps);
    cluster.submit(site, &arguments(&["slurm", "job.toml"], &settings, more))
}

fn on_two_nodes<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["--nodes", "2", "--tasks-per-node", "2"][..], more].concat()
}

fn parameters(site: &Site, run: &str, step: u64) -> Vec<f32> {
    f32_values(&site.checkpoint_file(run, step, "model.safetensors"))
}

/// A run has finished with the parameters of a local one that nobody has disturbed.
fn equals_a_local_run(cluster: &Cluster, site: &Site, name: &str, (steps, within): (u64, f32)) -> Value {
    let status = cluster.status(site, &format!("runs/{name}"));
    assert_eq!((&status["state"], &status["ledger"]["exact"]), (&"finished".into(), &true.into()), "{status}");
    let finished: Vec<u64> = site.steps(name).iter().map(|record| record["step"].as_u64().unwrap_or(0)).collect();
    assert_eq!(finished, (1..=steps).collect::<Vec<_>>(), "no step is missing or there twice");
    let local = settings("local", steps);
    succeeds(&site.launch(&arguments(&["train", "job.toml"], &local, &["--workers", "4"])));
    let pairs = parameters(site, "local", steps).into_iter().zip(parameters(site, name, steps));
    let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest <= within, "parameters differ by {largest}");
    println!("{name}: parameters differ by {largest:e} from those of the local run");
    for (local, own) in site.losses("local").iter().zip(site.losses(name)) {
        assert!((local - own).abs() < 1e-5, "loss {own} instead of {local}");
    }
    nobody_is_left(&status);
    status
}

fn pids(status: &Value) -> Vec<u64> {
    let workers = status["workers"].as_array().expect("it is there");
    workers.iter().map(|worker| worker["pid"].as_u64().expect("it is a number")).collect()
}

fn nobody_is_left(status: &Value) {
    for pid in pids(status) {
        assert!(!is_alive(pid), "worker {pid} outlives its job");
    }
}

/// The machines of the workers, sorted.
fn hosts(status: &Value) -> Vec<String> {
    let workers = status["workers"].as_array().expect("it is there");
    let mut hosts: Vec<String> =
        workers.iter().map(|worker| worker["host"].as_str().expect("it is text").to_owned()).collect();
    hosts.sort();
    hosts
}

/// The address file of the live coordinator.
fn coordinator(site: &Site, run: &str) -> Value {
    let bytes = fs::read(site.run_dir(run).join("coordinator.json")).expect("a coordinator serves");
    serde_json::from_slice(&bytes).expect("it is JSON")
}

fn page(server: &str, path: &str) -> String {
    let host = server.strip_prefix("http://").expect("it is an address");
    let mut stream = TcpStream::connect(host).expect("the server listens");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

fn events(site: &Site, run: &str) -> std::path::PathBuf {
    site.run_dir(run).join("events.jsonl")
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn a_dry_run_prints_a_script_that_slurm_takes_and_leaves_nothing() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let request = on_two_nodes(&["--cpus-per-task", "2", "--time", "30", "--partition", "debug", "--dry-run"]);
    let output = cluster.launch(&site, &[&["slurm", "job.toml"][..], &request].concat());
    succeeds(&output);
    assert!(!site.path("runs").exists(), "nothing is made");
    let script = site.path("printed.sbatch");
    fs::write(&script, &output.stdout).expect("the folder is writable");
    let test = cluster.slurm("sbatch", &["--test-only", script.to_str().expect("it is text")]);
    succeeds(&test);
    assert!(text(&test).contains("using 8 processors on nodes node[1-2]"), "{}", text(&test));
    let refused =
        cluster.launch(&site, &[&["slurm", "job.toml"][..], &on_two_nodes(&["--partition", "none"])].concat());
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(text(&refused).contains("invalid partition"), "{}", text(&refused));
    assert!(!site.run_dir("learn").exists(), "a refused job leaves no run");
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn a_job_that_is_requeued_midway_ends_like_a_local_run() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let job = submit(&cluster, &site, "cluster", STEPS, &on_two_nodes(&[]));
    follow(&site, "cluster", 200);
    let status = cluster.status(&site, "runs/cluster");
    assert_eq!((&status["freshness"], &status["slurm"]["state"]), (&"live".into(), &"RUNNING".into()), "{status}");
    assert_eq!(
        (hosts(&status), &status["restarts"]),
        (["node1", "node1", "node2", "node2"].map(String::from).to_vec(), &0.into())
    );
    let address = coordinator(&site, "cluster");
    assert_eq!(address["host"], "node1");
    let own = format!("http://{}:", cluster.node_address(1));
    assert!(address["grpc"].as_str().expect("it is text").starts_with(&own), "{address}");
    for worker in status["workers"].as_array().expect("it is there") {
        let node: usize = worker["host"].as_str().expect("it is text")[4..].parse().expect("it is a number");
        let url = worker["metrics_url"].as_str().expect("it is text");
        assert!(url.starts_with(&format!("http://{}:", cluster.node_address(node))), "{worker}");
    }
    // what Slurm sends before the time limit
    succeeds(&cluster.slurm("scancel", &["--batch", "--signal=USR1", &job]));
    follow_file(&events(&site, "cluster"), "\"restarted\"", 1);
    follow(&site, "cluster", 300);
    let metrics = page(coordinator(&site, "cluster")["http"].as_str().expect("it is text"), "/metrics");
    assert!(metrics.contains("learn_job_restarts_total 1"), "{metrics}");
    let logs = cluster.follow_to_the_end(&site, "runs/cluster");
    assert!(logs.contains("is back in the queue") && logs.contains("slurm ") && logs.contains("worker-3 "), "{logs}");
    assert_eq!((cluster.field(&job, "JobState"), cluster.field(&job, "Restarts")), ("COMPLETED".into(), "1".into()));
    let status = equals_a_local_run(&cluster, &site, "cluster", (STEPS, 1e-6));
    assert_eq!(status["restarts"], 1);
    let again = cluster.launch(&site, &["slurm", "--resubmit", "runs/cluster"]);
    assert_eq!(again.status.code(), Some(2), "{}", text(&again));
    assert!(text(&again).contains("has finished"), "{}", text(&again));
    for rank in 0..4 {
        let output = cluster.launch(&site, &["logs", "runs/cluster", "--rank", &rank.to_string()]);
        succeeds(&output);
        assert!(!output.stdout.is_empty());
    }
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn stop_and_cancel_keep_what_was_trained_and_a_new_submission_goes_on() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let first = submit(&cluster, &site, "job", 100_000, &on_two_nodes(&[]));
    follow(&site, "job", 50);
    // a second one has to wait for machines
    let waiting = submit(&cluster, &site, "waiting", 100, &["--nodes", "3"]);
    let status = cluster.status(&site, "runs/waiting");
    assert_eq!((&status["freshness"], &status["slurm"]["state"]), (&"queued".into(), &"PENDING".into()), "{status}");
    succeeds(&cluster.launch(&site, &["stop", "runs/waiting"]));
    assert_eq!(cluster.field(&waiting, "JobState"), "CANCELLED");
    let refused = cluster.launch(&site, &["slurm", "--resubmit", "runs/job"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));

    let output = cluster.launch(&site, &["stop", "runs/job", "--json"]);
    succeeds(&output);
    let _logs = cluster.follow_to_the_end(&site, "runs/job");
    assert_eq!(cluster.field(&first, "ExitCode"), "3:0");
    let status = cluster.status(&site, "runs/job");
    let stopped = status["last_step"]["step"].as_u64().expect("it has trained");
    assert_eq!((&status["state"], &status["last_checkpoint"]), (&"stopped".into(), &stopped.into()), "{status}");
    nobody_is_left(&status);

    let second = cluster.submit(&site, &["slurm", "--resubmit", "runs/job"]);
    assert_ne!(first, second);
    follow(&site, "job", stopped as usize + 20);
    succeeds(&cluster.slurm("scancel", &[&second]));
    let logs = cluster.follow_to_the_end(&site, "runs/job");
    assert_eq!(cluster.field(&second, "JobState"), "CANCELLED", "{logs}");
    let status = cluster.status(&site, "runs/job");
    assert_eq!(
        status["last_checkpoint"], status["last_step"]["step"],
        "scancel leaves time for a checkpoint: {status}\n{logs}"
    );
    assert_eq!((&status["state"], &status["restarts"]), (&"stopped".into(), &1.into()));
    nobody_is_left(&status);
    succeeds(&cluster.launch(&site, &["resume", "runs/job", "--dry-run"]));
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn the_loss_of_a_machine_costs_no_step() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    const LONG: u64 = 2500;
    let job = submit(&cluster, &site, "lossy", LONG, &on_two_nodes(&["--set", "cluster.max_restarts=0"]));
    follow(&site, "lossy", 100);
    cluster.kill_machine("node2");
    let logs = cluster.follow_to_the_end(&site, "runs/lossy");
    assert_eq!(
        (cluster.field(&job, "JobState"), cluster.field(&job, "Restarts")),
        ("COMPLETED".into(), "0".into()),
        "{logs}"
    );
    let status = equals_a_local_run(&cluster, &site, "lossy", (LONG, 1e-5));
    assert_eq!((&status["world_size"], &status["restarts"]), (&2.into(), &0.into()));
    let nodes = text(&cluster.slurm("sinfo", &["--noheader", "--nodes=node2", "--format=%T"]));
    // "mixed*" does not answer, "down*" was given up
    assert!(nodes.contains('*'), "Slurm misses the machine: {nodes}");
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn a_job_that_cannot_go_on_without_a_machine_goes_back_into_the_queue() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let needs_all =
        ["--set", "cluster.min_workers=4", "--set", "cluster.join_timeout=20s", "--set", "checkpoint.every_steps=50"];
    let job = submit(&cluster, &site, "needy", STEPS, &on_two_nodes(&needs_all));
    follow(&site, "needy", 100);
    cluster.kill_machine("node2");
    follow_file(&events(&site, "needy"), "\"restarted\"", 1);
    follow(&site, "needy", 150);
    assert_eq!(hosts(&cluster.status(&site, "runs/needy")), ["node1", "node1", "node3", "node3"]);
    let logs = cluster.follow_to_the_end(&site, "runs/needy");
    assert_eq!(cluster.field(&job, "JobState"), "COMPLETED", "{logs}");
    equals_a_local_run(&cluster, &site, "needy", (STEPS, 1e-6));
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn budgets_and_a_site_without_scontrol_have_exit_codes_of_their_own() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let job = submit(&cluster, &site, "budget", 100_000, &on_two_nodes(&["--max-restarts", "0"]));
    follow(&site, "budget", 20);
    succeeds(&cluster.slurm("scancel", &["--batch", "--signal=USR1", &job]));
    let logs = cluster.follow_to_the_end(&site, "runs/budget");
    assert_eq!(cluster.field(&job, "ExitCode"), "9:0", "{logs}");
    assert!(logs.contains("--max-restarts"), "{logs}");

    // what compute nodes of such a site have
    let programs = site.path("programs");
    fs::create_dir(&programs).expect("the folder is writable");
    for program in ["srun", "sbatch", "squeue", "scancel"] {
        std::os::unix::fs::symlink(format!("/usr/bin/{program}"), programs.join(program))
            .expect("the folder is writable");
    }
    let settings = settings("outside", 100_000);
    // on one machine: without scontrol the others are found by DNS alone, which knows nothing of them here
    let one = ["--nodes", "1", "--tasks-per-node", "2", "--json"];
    let arguments = arguments(&["slurm", "job.toml"], &settings, &one);
    let output = cluster.command(&site, &arguments).env("PATH", &programs).output().expect("learn-launch starts");
    succeeds(&output);
    let answer: Value = serde_json::from_slice(&output.stdout).expect("it prints JSON");
    let job = answer["job_id"].to_string();
    follow(&site, "outside", 20);
    succeeds(&cluster.slurm("scancel", &["--batch", "--signal=USR1", &job]));
    let logs = cluster.follow_to_the_end(&site, "runs/outside");
    assert_eq!(cluster.field(&job, "ExitCode"), "8:0", "{logs}");
    assert!(logs.contains("scontrol is not on the PATH") && logs.contains("slurm --resubmit"), "{logs}");
    let kept = cluster.status(&site, "runs/outside")["last_checkpoint"].as_u64().expect("it has a checkpoint");
    let again = cluster.submit(&site, &["slurm", "--resubmit", "runs/outside"]);
    follow(&site, "outside", kept as usize + 20);
    succeeds(&cluster.launch(&site, &["stop", "runs/outside"]));
    let _logs = cluster.follow_to_the_end(&site, "runs/outside");
    assert_eq!(cluster.field(&again, "ExitCode"), "3:0");
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn each_worker_sees_one_gpu_and_plain_files_are_told_of() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    // the devices are not real, so tensors stay on the CPU
    let on_gpus = ["--nodes", "2", "--gpus-per-node", "2", "--sbatch=--exclude=node3", "--set", "cluster.device=cpu"];
    let _job = submit(&cluster, &site, "gpus", 100_000, &on_gpus);
    follow(&site, "gpus", 20);
    let status = cluster.status(&site, "runs/gpus");
    let mut seen: Vec<(String, Option<String>)> = status["workers"]
        .as_array()
        .expect("it is there")
        .iter()
        .map(|worker| {
            let pid = worker["pid"].as_u64().expect("it is a number");
            (worker["host"].as_str().expect("it is text").to_owned(), variable_of(pid, "CUDA_VISIBLE_DEVICES"))
        })
        .collect();
    seen.sort();
    let expected = [("node1", "0"), ("node1", "1"), ("node2", "0"), ("node2", "1")];
    assert_eq!(seen, expected.map(|(host, gpu)| (host.to_owned(), Some(gpu.to_owned()))));
    succeeds(&cluster.launch(&site, &["stop", "runs/gpus"]));

    let plain = ["--nodes", "1", "--gpus-per-node", "2", "--set", "cluster.device=cuda"];
    let only = format!("--sbatch=--nodelist={PLAIN_FILES}");
    let job = submit(&cluster, &site, "plain", 100, &[&plain[..], &[only.as_str()]].concat());
    let logs = cluster.follow_to_the_end(&site, "runs/plain");
    assert_eq!(cluster.field(&job, "ExitCode"), "4:0", "it is not put back into the queue: {logs}");
    assert!(logs.contains("sees no GPU") && logs.contains("plain files"), "{logs}");
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn the_coordinator_may_have_a_machine_of_its_own() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let request = on_two_nodes(&["--separate-coordinator", "--cpus-per-task", "2", "--sbatch=--exclusive"]);
    let job = submit(&cluster, &site, "apart", STEPS, &request);
    follow(&site, "apart", 100);
    let status = cluster.status(&site, "runs/apart");
    let own = coordinator(&site, "apart")["host"].as_str().expect("it is text").to_owned();
    let hosts = hosts(&status);
    assert!(hosts.len() == 4 && !hosts.contains(&own), "{own} and {hosts:?}");
    succeeds(&cluster.slurm("scancel", &["--batch", "--signal=USR1", &job]));
    follow_file(&events(&site, "apart"), "\"restarted\"", 1);
    let logs = cluster.follow_to_the_end(&site, "runs/apart");
    assert_eq!(cluster.field(&job, "Restarts"), "1", "{logs}");
    equals_a_local_run(&cluster, &site, "apart", (STEPS, 1e-6));
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn a_script_of_the_repository_trains_and_misuse_is_named() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let ready = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/slurm/cpu.sbatch");
    let programs = learn_tests::binary("learn-launch");
    let programs = programs.parent().expect("it lies in a folder").display().to_string();
    let submitted = Command::new("sbatch")
        .args(["--parsable", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10", ready, "job.toml"])
        .args(["--set", "training.epochs=2", "--set", "job.name=copied"])
        .current_dir(site.path("."))
        .env("PATH", format!("{programs}:/usr/sbin:/usr/bin:/bin"))
        .env("SLURM_CONF", cluster.slurm_conf())
        .output()
        .expect("sbatch is installed");
    succeeds(&submitted);
    follow(&site, "copied", 2);
    let logs = cluster.follow_to_the_end(&site, "runs/copied");
    assert_eq!(cluster.field(text(&submitted).trim(), "JobState"), "COMPLETED", "{logs}");
    assert_eq!(cluster.status(&site, "runs/copied")["world_size"], 4);

    let launch = format!("{programs}/learn-launch");
    let many = cluster.slurm(
        "srun",
        &["--ntasks=2", "--chdir", site.path(".").to_str().expect("text"), &launch, "train", "job.toml"],
    );
    assert!(text(&many).contains("SLURM_STEP_NUM_TASKS=2"), "{}", text(&many));
    assert!(!site.run_dir("learn").exists());
    let outside = cluster.launch(&site, &["slurm-job", "job.toml", "--", "srun"]);
    assert_eq!(outside.status.code(), Some(2), "{}", text(&outside));
    assert!(text(&outside).contains("SLURM_JOB_ID is not set"), "{}", text(&outside));
}
