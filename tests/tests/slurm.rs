//! A job on a real Slurm cluster: submitted, requeued, stopped, deprived of a machine, and equal to a local run.

use std::fs;
use std::process::{Command, Stdio};

use learn_tests::slurm::{Cluster, PLAIN_FILES, URGENT, variable_of};
use learn_tests::{SMALL, Site, f32_values, follow, follow_file, get, is_alive, signal, succeeds, text};
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

    fs::create_dir_all(site.run_dir("learn")).expect("the folder is writable");
    fs::write(site.run_dir("learn").join("mine"), "").expect("the folder is writable");
    let force = on_two_nodes(&["--partition", "none", "--force"]);
    let refused = cluster.launch(&site, &[&["slurm", "job.toml"][..], &force].concat());
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(site.run_dir("learn").join("mine").exists(), "what --force has moved aside is back: {}", text(&refused));
    assert_eq!(fs::read_dir(site.path("runs")).expect("it is there").count(), 1);
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
    let watch = cluster
        .command(&site, &["status", "runs/cluster", "--watch"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("learn-launch starts");
    // what Slurm sends before the time limit
    succeeds(&cluster.slurm("scancel", &["--batch", "--signal=USR1", &job]));
    follow_file(&events(&site, "cluster"), "\"restarted\"", 1);
    follow(&site, "cluster", 300);
    let metrics = get(&format!("{}/metrics", coordinator(&site, "cluster")["http"].as_str().expect("it is text")), "");
    assert!(metrics.contains("learn_job_restarts_total 1"), "{metrics}");
    let logs = cluster.follow_to_the_end(&site, "runs/cluster");
    assert!(logs.contains("is back in the queue") && logs.contains("slurm ") && logs.contains("worker-3 "), "{logs}");
    assert_eq!((cluster.field(&job, "JobState"), cluster.field(&job, "Restarts")), ("COMPLETED".into(), "1".into()));
    let status = equals_a_local_run(&cluster, &site, "cluster", (STEPS, 1e-6));
    assert_eq!(status["restarts"], 1);
    let watched = text(&watch.wait_with_output().expect("it ends"));
    assert!(watched.contains("waits in the queue") && watched.contains("finished"), "{watched}");
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
    // its run is not to be taken away from under it
    for command in [&["slurm", "job.toml", "--name", "waiting"][..], &["train", "job.toml", "--name", "waiting"]] {
        let refused = cluster.launch(&site, &[command, &["--force"]].concat());
        assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
        assert!(text(&refused).contains(&format!("job {waiting} is PENDING")), "{}", text(&refused));
    }
    succeeds(&cluster.launch(&site, &["stop", "runs/waiting"]));
    assert_eq!(cluster.field(&waiting, "JobState"), "CANCELLED");
    let watched = cluster.launch(&site, &["status", "runs/waiting", "--watch"]);
    succeeds(&watched);
    assert!(text(&watched).contains("is CANCELLED"), "nobody waits for it: {}", text(&watched));
    let more = cluster.launch(&site, &["scale", "runs/job", "--workers", "5"]);
    assert_eq!(more.status.code(), Some(2), "{}", text(&more));
    assert!(text(&more).contains("--resubmit runs/job --nodes"), "{}", text(&more));
    let refused = cluster.launch(&site, &["slurm", "--resubmit", "runs/job"]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));

    let output = cluster.launch(&site, &["stop", "runs/job", "--json"]);
    succeeds(&output);
    let _logs = cluster.follow_to_the_end(&site, "runs/job");
    assert_eq!(cluster.field(&first, "ExitCode"), "3:0");
    let status = cluster.status(&site, "runs/job");
    let stopped = status["last_step"]["step"].as_u64().expect("it has trained");
    assert_eq!((&status["state"], &status["last_checkpoint"]), (&"stopped".into(), &stopped.into()), "{status}");
    nobody_is_left(&status);

    let before = fs::read(site.run_dir("job").join("config.json")).expect("it is there");
    let tls = ["--set", "cluster.tls.mode=auto", "--set", "cluster.min_workers=4"];
    let again = |more: &[&'static str]| [&["slurm", "--resubmit", "runs/job"][..], &tls, more].concat();
    for (more, reason) in
        [(["--partition", "none"], "invalid partition"), (["--nodes", "1"], "at most cluster.workers")]
    {
        let refused = cluster.launch(&site, &again(&more));
        assert!(!refused.status.success() && text(&refused).contains(reason), "{}", text(&refused));
        let now = fs::read(site.run_dir("job").join("config.json")).expect("it is there");
        assert_eq!(now, before, "a refused submission changes nothing");
    }
    let second = cluster.submit(&site, &again(&[]));
    assert_ne!(first, second);
    follow_file(&site.run_dir("job").join("coordinator.json"), r#""grpc": "https://"#, 1);
    // so that whoever has joined has done so with the certificates of the run
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
    let told = fs::read_to_string(events(&site, "needy")).expect("it is there");
    let before = told.split("\"restarted\"").next().map_or(0, |before| before.matches("\"formed\"").count());
    follow_file(&events(&site, "needy"), "\"formed\"", before + 1);
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
    // its steps of before are written again
    follow_file(&site.run_dir("outside").join("metrics.jsonl"), &format!("\"step\":{},", kept + 20), 1);

    // as another machine sees a job on one node: its coordinator listens there alone
    let slow = first_worker(&cluster.status(&site, "runs/outside"));
    signal("STOP", slow);
    let file = site.run_dir("outside").join("coordinator.json");
    let address = fs::read(&file).expect("it is there");
    let mut elsewhere: Value = serde_json::from_slice(&address).expect("it is JSON");
    elsewhere["host"] = "elsewhere".into();
    fs::write(&file, elsewhere.to_string()).expect("it can be written");
    let scaled = cluster.launch(&site, &["scale", "runs/outside", "--workers", "1"]);
    assert!(text(&scaled).contains(&format!("srun --jobid {again} --overlap")), "{}", text(&scaled));
    for said in ["stops after its current step", "was asked to stop already"] {
        let stopped = cluster.launch(&site, &["stop", "runs/outside", "--no-wait"]);
        succeeds(&stopped);
        assert!(text(&stopped).contains(said), "{}", text(&stopped));
    }
    fs::write(&file, address).expect("it can be written");
    signal("CONT", slow);
    let logs = cluster.follow_to_the_end(&site, "runs/outside");
    assert_eq!(cluster.field(&again, "ExitCode"), "3:0", "{logs}");
    let status = cluster.status(&site, "runs/outside");
    assert_eq!(status["last_checkpoint"], status["last_step"]["step"], "asking twice costs no checkpoint: {status}");
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn each_worker_sees_one_gpu_and_plain_files_are_told_of() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    // the devices are not real, so tensors stay on the CPU, which --gpus-per-node would contradict
    let gpus = ["--tasks-per-node", "2", "--sbatch=--gpus-per-node=2", "--srun=--gpus-per-node=2"];
    let elsewhere = ["--nodes", "2", "--sbatch=--exclude=node3", "--set", "cluster.device=cpu"];
    let on_gpus = [&gpus[..], &elsewhere[..]].concat();
    let _job = submit(&cluster, &site, "gpus", 100_000, &on_gpus);
    follow(&site, "gpus", 20);
    let status = cluster.status(&site, "runs/gpus");
    let mut seen: Vec<(String, Option<String>)> = status["workers"]
        .as_array()
        .expect("it is there")
        .iter()
        .map(|worker| {
            let pid = worker["pid"].as_u64().expect("it is a number");
            let of_step = variable_of(pid, "SLURM_STEP_GPUS");
            assert_eq!(
                of_step.as_deref(),
                Some("0,1"),
                "its task has those of its neighbours as well, which NCCL needs"
            );
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
    let (targets, node) = (site.path("targets"), "--coordinator-sbatch=--nodelist=node2");
    fs::create_dir(&targets).expect("the folder is writable");
    let request = ["--separate-coordinator", node, "--cpus-per-task", "2", "--sbatch=--exclusive"];
    let folder = ["--prometheus-targets", targets.to_str().expect("it is text")];
    let job = submit(&cluster, &site, "apart", STEPS, &[&on_two_nodes(&request)[..], &folder].concat());
    follow(&site, "apart", 100);
    follow_file(&targets.join(format!("{job}.json")), r#""role":"worker""#, 1);
    let address = coordinator(&site, "apart");
    assert_eq!(address["host"], "node2");
    let status = cluster.status(&site, "runs/apart");
    let own = coordinator(&site, "apart")["host"].as_str().expect("it is text").to_owned();
    let hosts = hosts(&status);
    assert!(hosts.len() == 4 && !hosts.contains(&own), "{own} and {hosts:?}");
    succeeds(&cluster.slurm("scancel", &["--batch", "--signal=USR1", &job]));
    follow_file(&events(&site, "apart"), "\"restarted\"", 1);
    let logs = cluster.follow_to_the_end(&site, "runs/apart");
    assert_eq!(cluster.field(&job, "Restarts"), "1", "{logs}");
    assert_eq!(
        fs::read_dir(&targets).expect("it is there").count(),
        0,
        "Prometheus is not left with targets that are gone"
    );
    equals_a_local_run(&cluster, &site, "apart", (STEPS, 1e-6));
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn a_job_on_one_machine_is_scraped_where_others_reach_it_whatever_machine_its_bind_is_of() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let targets = site.path("targets");
    fs::create_dir(&targets).expect("the folder is writable");
    // the controller's
    let bind = format!("cluster.bind={}", cluster.node_address(100));
    let folder = ["--prometheus-targets", targets.to_str().expect("it is text")];
    let request = ["--nodes", "1", "--tasks-per-node", "2", "--set", bind.as_str()];
    let job = submit(&cluster, &site, "scraped", 100_000, &[&request[..], &folder].concat());
    let file = targets.join(format!("{job}.json"));
    follow_file(&file, r#""role":"worker""#, 1);
    let host = coordinator(&site, "scraped")["host"].as_str().expect("it is text").to_owned();
    let node = host.strip_prefix("node").and_then(|number| number.parse::<usize>().ok()).expect("it is a node");
    let said = fs::read_to_string(&file).expect("it is there");
    let groups: Value = serde_json::from_str(&said).expect("it is JSON");
    let groups = groups.as_array().expect("it is a list");
    let own = format!("{}:", cluster.node_address(node));
    for group in groups {
        assert!(group["targets"][0].as_str().is_some_and(|target| target.starts_with(&own)), "{own} in {said}");
    }
    assert!(groups.len() >= 2, "{said}");
    succeeds(&cluster.launch(&site, &["stop", "runs/scraped"]));
    let logs = cluster.follow_to_the_end(&site, "runs/scraped");
    assert!(logs.contains(&format!("{host} cannot listen on {bind}")), "{logs}");
}

/// Submits a script of `configs/slurm` after some `changes` of its text, with `arguments`, from the site's folder; the job's number.
fn submit_script(cluster: &Cluster, site: &Site, name: &str, changes: &[(&str, &str)], arguments: &[&str]) -> String {
    let ready = format!("{}/../configs/slurm/{name}", env!("CARGO_MANIFEST_DIR"));
    let mut script = fs::read_to_string(ready).expect("it is there");
    for (old, new) in changes {
        assert!(script.contains(old), "{old} is in {name}");
        script = script.replace(old, new);
    }
    let copy = site.path(name);
    fs::write(&copy, script).expect("the folder is writable");
    let programs = learn_tests::binary("learn-launch");
    let programs = programs.parent().expect("it lies in a folder").display();
    let submitted = Command::new("sbatch")
        .arg("--parsable")
        .arg(&copy)
        .args(arguments)
        .current_dir(site.path("."))
        .env("PATH", format!("{programs}:/usr/sbin:/usr/bin:/bin"))
        .env("SLURM_CONF", cluster.slurm_conf())
        .output()
        .expect("sbatch is installed");
    succeeds(&submitted);
    String::from_utf8_lossy(&submitted.stdout).trim().to_owned()
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn the_scripts_of_the_repository_train() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    // machines of this cluster are small, its GPUs are not real, and those of one machine are not even devices
    let small = ("#SBATCH --time=12:00:00", "#SBATCH --time=10");
    let cpu = [small, ("--cpus-per-task=8", "--cpus-per-task=1")];
    let gpus = [
        small,
        ("--ntasks-per-node=8", "--ntasks-per-node=2"),
        ("--gpus-per-node=8", "--gpus-per-node=2\n#SBATCH --exclude=node3"),
        ("--cpus-per-task=12", "--cpus-per-task=1"),
    ];
    let first_part = "#SBATCH --nodes=1 --ntasks=1";
    let apart = [&gpus[..], &[(first_part, "#SBATCH --nodes=1 --ntasks=1 --nodelist=node3")]].concat();
    for (script, changes) in
        [("cpu.sbatch", &cpu[..]), ("gpu.sbatch", &gpus), ("separate-coordinator.sbatch", &apart[..])]
    {
        let name = script.split_once('.').expect("it has an end").0;
        let set = format!("job.name={name}");
        let sets = ["job.toml", "--set", &set, "--set", "training.epochs=2", "--set", "cluster.device=cpu"];
        let job = submit_script(&cluster, &site, script, changes, &sets);
        follow(&site, name, 2);
        let logs = cluster.follow_to_the_end(&site, &format!("runs/{name}"));
        assert_eq!(cluster.field(&job, "JobState"), "COMPLETED", "{script}: {logs}");
        assert_eq!(cluster.status(&site, &format!("runs/{name}"))["world_size"], 4, "{script}");
    }
    let hosts = hosts(&cluster.status(&site, "runs/separate-coordinator"));
    assert!(!hosts.contains(&"node3".to_owned()), "the coordinator has that machine for itself: {hosts:?}");

    // submitted again with another --set: it counts, or is refused
    let name = ["job.toml", "--set", "job.name=cpu", "--set", "cluster.device=cpu", "--set"];
    let job = submit_script(&cluster, &site, "cpu.sbatch", &cpu, &[&name[..], &["job.seed=77"]].concat());
    let _logs = cluster.follow_to_the_end(&site, "runs/cpu");
    ended(&cluster, &job);
    assert_eq!(cluster.field(&job, "ExitCode"), "2:0");
    let said = fs::read_to_string(site.path(&format!("learn-{job}.log"))).expect("it has a log");
    assert!(said.contains("job.seed cannot change"), "{said}");
}

/// Waits until Slurm has done with a job: another one that depends on it runs then.
fn ended(cluster: &Cluster, job: &str) {
    succeeds(&cluster.slurm("srun", &["--ntasks=1", &format!("--dependency=afterany:{job}"), "true"]));
}

/// The number of a worker process whose rank is 0.
fn first_worker(status: &Value) -> u64 {
    pids(status)[0]
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn a_job_that_is_slower_than_the_notice_goes_back_into_the_queue_at_a_real_time_limit() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let changes = [
        ("--ntasks-per-node=2", "--ntasks-per-node=1"),
        ("--cpus-per-task=8", "--cpus-per-task=1"),
        ("--time=12:00:00", "--time=1"),
        // which comes half a minute before the limit, or later
        ("USR1@195", "USR1@1"),
    ];
    let mut settings = settings("limit", 100_000);
    // nobody is given up while it stands still
    settings.extend(
        ["heartbeat_timeout", "progress_timeout", "collective_timeout"].map(|key| format!("cluster.{key}=300s")),
    );
    settings.push("cluster.tls.mode=auto".into());
    let job = submit_script(&cluster, &site, "cpu.sbatch", &changes, &arguments(&["job.toml"], &settings, &[]));
    follow(&site, "limit", 50);
    let log = site.path(&format!("learn-{job}.log"));
    let slow = first_worker(&cluster.status(&site, "runs/limit"));
    signal("STOP", slow);
    follow_file(&log, "stopping after the current step", 1);
    follow_file(&log, "DUE TO TIME LIMIT", 1);
    signal("CONT", slow);
    follow_file(&events(&site, "limit"), "\"restarted\"", 1);
    let kept = cluster.status(&site, "runs/limit");
    assert_eq!(kept["restarts"], 1, "{kept}");
    let from = kept["last_checkpoint"].as_u64().expect("it was saved after the limit");
    assert!(from >= 49, "{kept}");
    follow(&site, "limit", from as usize + 20);
    assert_eq!(cluster.field(&job, "Restarts"), "1");
    succeeds(&cluster.launch(&site, &["stop", "runs/limit"]));
    let _logs = cluster.follow_to_the_end(&site, "runs/limit");
    assert_eq!(cluster.field(&job, "ExitCode"), "3:0");
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn an_operators_stop_during_the_notice_is_final_and_preemption_asks_for_a_new_submission() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let job = submit(&cluster, &site, "stopped", 100_000, &on_two_nodes(&[]));
    follow(&site, "stopped", 20);
    let slow = first_worker(&cluster.status(&site, "runs/stopped"));
    signal("STOP", slow);
    succeeds(&cluster.slurm("scancel", &["--batch", "--signal=USR1", &job]));
    follow_file(&site.run_dir("stopped").join("logs/slurm.log"), "stopping after the current step", 1);
    succeeds(&cluster.launch(&site, &["stop", "runs/stopped", "--no-wait"]));
    signal("CONT", slow);
    let logs = cluster.follow_to_the_end(&site, "runs/stopped");
    assert_eq!(
        (cluster.field(&job, "ExitCode"), cluster.field(&job, "Restarts")),
        ("3:0".into(), "0".into()),
        "{logs}"
    );

    let job = submit(&cluster, &site, "robbed", 100_000, &on_two_nodes(&[]));
    follow(&site, "robbed", 20);
    let urgent = ["--partition", URGENT, "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "true"];
    succeeds(&cluster.slurm("sbatch", &urgent));
    let logs = cluster.follow_to_the_end(&site, "runs/robbed");
    assert!(logs.contains("DUE TO PREEMPTION") && logs.contains("slurm --resubmit"), "{logs}");
    assert_eq!((cluster.field(&job, "JobState"), cluster.field(&job, "Restarts")), ("PREEMPTED".into(), "0".into()));
    let status = cluster.status(&site, "runs/robbed");
    assert_eq!(status["last_checkpoint"], status["last_step"]["step"], "{status}\n{logs}");
    let again = cluster.launch(&site, &["slurm", "--resubmit", "runs/robbed", "--dry-run"]);
    succeeds(&again);
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn a_notice_before_training_has_begun_is_not_lost_and_counts() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let changes = [
        ("--cpus-per-task=8", "--cpus-per-task=1"),
        ("--max-fruitless=3", "--max-fruitless=1"),
        // while checkpoints are checked, or the coordinator starts
        ("\nexec learn-launch", "\n(sleep 0.3; kill -USR1 $$) &\nexec learn-launch"),
    ];
    let settings = settings("early", 100_000);
    let job = submit_script(&cluster, &site, "cpu.sbatch", &changes, &arguments(&["job.toml"], &settings, &[]));
    let log = site.path(&format!("learn-{job}.log"));
    follow_file(&log, "is back in the queue", 1);
    follow_file(&log, "1 starts in a row have brought no new checkpoint", 1);
    ended(&cluster, &job);
    assert_eq!((cluster.field(&job, "ExitCode"), cluster.field(&job, "Restarts")), ("9:0".into(), "1".into()));
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn a_job_outlives_a_machine_that_slurm_has_given_up() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let job = submit(&cluster, &site, "outlives", 1_000_000, &on_two_nodes(&["--set", "cluster.max_restarts=0"]));
    follow(&site, "outlives", 20);
    cluster.kill_machine("node2");
    follow_file(&cluster.controller_log(), "node2 not responding, setting DOWN", 1);
    let reached = cluster.status(&site, "runs/outlives")["last_step"]["step"].as_u64().expect("it trains");
    follow(&site, "outlives", reached as usize + 100);
    let status = cluster.status(&site, "runs/outlives");
    assert_eq!((&status["world_size"], &status["restarts"]), (&2.into(), &0.into()), "{status}");
    succeeds(&cluster.launch(&site, &["stop", "runs/outlives"]));
    let _logs = cluster.follow_to_the_end(&site, "runs/outlives");
    assert_eq!(cluster.field(&job, "ExitCode"), "3:0");
}

#[test]
#[ignore = "needs Slurm: cargo xtask system slurm"]
fn misuse_is_named() {
    let (cluster, site) = (Cluster::start(), Site::new(SMALL));
    let launch = learn_tests::binary("learn-launch").display().to_string();
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
