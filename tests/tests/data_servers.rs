//! Data servers beside the coordinator: a job reads from them, survives them, and is not changed by them.

use std::path::Path;
use std::process::{Command, Stdio};

use learn_tests::{SMALL, Shape, Site, binary, follow, follow_file, get, is_alive, signal, succeeds, text};
use serde_json::Value;

/// Rows that the data service of the process with these metrics has sent.
fn served_rows(metrics_url: &str) -> f64 {
    metric(metrics_url, "learn_flight_served_rows_total")
}

/// Bytes of content embeddings among them.
fn row_bytes(metrics_url: &str) -> f64 {
    metric(metrics_url, "learn_flight_served_bytes_total{kind=\"rows\"}")
}

fn metric(metrics_url: &str, name: &str) -> f64 {
    let answer = body(metrics_url);
    let line = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no such metric in {answer}")).parse().expect("a number")
}

/// The body of what this URL answers.
fn body(url: &str) -> String {
    get(url, "").split_once("\r\n\r\n").expect("a head and a body").1.to_owned()
}

/// Pids and metrics of the live data servers.
fn servers(site: &Site, name: &str) -> Vec<(u64, String)> {
    let status = site.status(name);
    let servers = status["data_servers"].as_array().cloned().unwrap_or_default();
    let one = |server: &Value| {
        let metrics = server["metrics_url"].as_str().expect("it is text").to_owned();
        (server["pid"].as_u64().expect("it is a number"), metrics)
    };
    servers.iter().map(one).collect()
}

fn coordinator_metrics(site: &Site, name: &str) -> String {
    let file = std::fs::File::open(site.run_dir(name).join("coordinator.json")).expect("the job is served");
    let address: Value = serde_json::from_reader(file).expect("it is JSON");
    format!("{}/metrics", address["http"].as_str().expect("it is text"))
}

/// The sum of a metric over the job's workers.
fn workers_sum(site: &Site, name: &str, metric: &str) -> f64 {
    let discovery = coordinator_metrics(site, name).replace("/metrics", "/sd");
    let groups: Value = serde_json::from_str(&body(&discovery)).expect("it is JSON");
    let groups = groups.as_array().cloned().unwrap_or_default();
    let workers = groups.iter().filter(|group| group["labels"]["role"] == "worker");
    let targets = workers.flat_map(|group| group["targets"].as_array().cloned().unwrap_or_default());
    let url = |target: Value| format!("http://{}/metrics", target.as_str().expect("it is text"));
    let value = |metrics: String| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(metric));
        let value = line.and_then(|line| line.split_whitespace().next_back()).expect("the metric is there");
        value.parse().expect("a number")
    };
    targets.map(|target| value(body(&url(target)))).sum()
}

fn start(site: &Site, name: &str, more: &[&str]) -> std::process::Child {
    let job = format!("job.name={name}");
    let overrides = [job.as_str(), "cluster.workers=2", "evaluation.every_epochs=40"];
    site.start(&site.train(&[&overrides[..], more].concat()))
}

#[test]
fn data_servers_change_nothing_and_their_deaths_cost_nothing() {
    // more than fits between server and worker, so that streams break in the middle
    let site = Site::new(Shape { users: 900, ..SMALL });
    // so long that both deaths come before its end, however late this test hears of them
    let long = ["training.epochs=250", "training.global_batch=160"];
    let calm = start(&site, "calm", &long).wait_with_output().expect("it ends");
    succeeds(&calm);

    let more = ["cluster.data_replicas=2", "cluster.max_restarts=0"];
    let child = start(&site, "served", &[&long[..], &more].concat());
    follow(&site, "served", 40);
    let both = servers(&site, "served");
    assert_eq!(both.len(), 2);
    for (pid, metrics) in &both {
        assert!(served_rows(metrics) > 0.0, "each worker reads from another one, {pid} too");
    }
    let coordinator = coordinator_metrics(&site, "served");
    let before = served_rows(&coordinator);
    assert!(before < 1.0, "nobody needs the coordinator's data service yet: {before} rows");
    for (kill, (pid, _)) in (1_usize..).zip(&both) {
        signal("KILL", *pid);
        follow_file(&site.run_dir("served").join("logs/coordinator.log"), "a data server has gone", kill);
        let steps = site.steps("served").len();
        follow(&site, "served", steps + 100);
        assert_eq!(servers(&site, "served").len(), 2 - kill);
    }
    // beyond the evaluation at step 480
    follow(&site, "served", 500);
    assert!(served_rows(&coordinator) > 0.0, "it serves again, as the last one");
    let output = child.wait_with_output().expect("it ends");
    succeeds(&output);
    assert_eq!(text(&output).matches("the job goes on without it").count(), 2, "{}", text(&output));

    let status = site.status("served");
    assert_eq!((&status["state"], &status["ledger"]["exact"]), (&"finished".into(), &true.into()), "{status}");
    let events = site.events("served");
    let harmed = |event: &&Value| event["event"] == "worker_lost" || event["event"] == "regrouping";
    assert_eq!(events.iter().find(harmed), None, "no worker has noticed");
    assert_eq!(site.losses("served"), site.losses("calm"));
    let last = site.losses("calm").len() as u64;
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let of = |name: &str| site.checkpoint_file(name, last, file);
        assert!(of("served") == of("calm"), "{file} differs");
    }
}

#[test]
fn a_dead_data_server_is_replaced_and_goes_with_the_job() {
    let site = Site::new(SMALL);
    let child = start(&site, "run", &["training.epochs=100000", "cluster.data_replicas=1"]);
    follow(&site, "run", 20);
    let [(first, _)] = servers(&site, "run")[..] else { panic!("there is one") };
    signal("KILL", first);
    follow_file(&site.run_dir("run").join("logs/coordinator.log"), "a data server has come", 2);
    let [(second, _)] = servers(&site, "run")[..] else { panic!("there is one again") };
    assert_ne!(first, second);
    // a data server that is told to end is not missed by anybody, and not replaced
    signal("TERM", second);
    follow_file(&site.run_dir("run").join("logs/coordinator.log"), "a data server has gone", 2);
    let steps = site.steps("run").len();
    follow(&site, "run", steps + 20);
    succeeds(&site.launch(&["stop", "runs/run"]));
    let output = child.wait_with_output().expect("it ends");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert_eq!(said.matches("another takes its place").count(), 1, "{said}");
    assert!(!is_alive(first) && !is_alive(second));
    assert_eq!(site.status("run")["ledger"]["exact"], true);
}

#[test]
fn a_data_server_may_come_at_any_time_with_a_copy_of_the_dataset_but_no_other() {
    let (site, other) = (Site::new(SMALL), Site::new(Shape { users: 91, ..SMALL }));
    let child = start(&site, "run", &["training.epochs=100000"]);
    follow(&site, "run", 3);
    let run = site.run_dir("run");
    let data = |dataset: &Path| {
        let mut command = Command::new(binary("learn-coordinator"));
        command.arg("data").arg("--run-dir").arg(&run).arg("--dataset").arg(dataset).stdin(Stdio::null());
        command
    };
    let refused = data(&other.path("dataset")).output().expect("it starts");
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains("this dataset is another one"), "{}", text(&refused));

    let copy = site.path("copy");
    let copied = Command::new("cp").arg("-r").arg(site.path("dataset")).arg(&copy).status().expect("cp starts");
    assert!(copied.success());
    let mut late = data(&copy).stderr(Stdio::null()).spawn().expect("it starts");
    // workers look around now and then
    follow_file(&run.join("logs/worker-0.log"), "data servers of the job", 2);
    let steps = site.steps("run").len();
    follow(&site, "run", steps + 40);
    let [(pid, ref metrics)] = servers(&site, "run")[..] else { panic!("there is one") };
    assert_eq!(pid, u64::from(late.id()));
    assert!(served_rows(metrics) > 0.0);
    succeeds(&site.launch(&["stop", "runs/run"]));
    assert_eq!(child.wait_with_output().expect("it ends").status.code(), Some(3));
    assert_eq!(late.wait().expect("it ends").code(), Some(0), "the coordinator has told it that the job is over");
    let too_late = data(&copy).output().expect("it starts");
    assert_eq!(too_late.status.code(), Some(1));
    assert!(text(&too_late).contains("has no live coordinator: its job has ended"), "{}", text(&too_late));
}

#[test]
fn int8_rows_train_the_same_mapped_and_sent_and_are_half_the_bytes() {
    let site = Site::new(Shape { dim: 64, ..SMALL });
    let long = ["training.epochs=100", "evaluation.every_epochs=10"];
    let ran = |name: &str, more: &[&str]| {
        let child = start(&site, name, &[&long[..], more].concat());
        follow(&site, name, 300);
        let bytes = row_bytes(&coordinator_metrics(&site, name)) / site.steps(name).len() as f64;
        succeeds(&child.wait_with_output().expect("it ends"));
        bytes
    };
    // a cache of nothing, so that every step needs rows
    let all = ["data.map_rows=false", "cluster.row_cache=0B"];
    let int8 = "data.row_format=\"int8\"";
    let f16 = ran("f16", &all);
    let sent = ran("sent", &[&all[..], &[int8]].concat());
    let mapped = ran("mapped", &[int8]);
    // 64 + 4 bytes a row instead of 128, and what messages need besides
    assert!(sent < 0.75 * f16 && mapped < 0.1 * sent, "bytes a step: f16 {f16}, int8 {sent}, mapped {mapped}");
    let log = |name: &str| std::fs::read_to_string(site.run_dir(name).join("logs/worker-0.log")).expect("it has a log");
    assert!(log("mapped").contains("content embeddings are mapped here"));

    let last = site.losses("sent").len() as u64;
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let of = |name: &str| site.checkpoint_file(name, last, file);
        assert!(of("mapped") == of("sent"), "{file} differs");
        assert!(of("f16") != of("sent"), "{file} does not depend on the format");
    }
    assert_eq!(site.losses("mapped"), site.losses("sent"));

    // `export` reads the files, and rounds as the run did
    let exported = |name: &str, out: &str| {
        succeeds(&site.launch(&["export", &format!("runs/{name}"), "--out", out]));
        std::fs::read(site.path(out).join("items.npy")).expect("it is there")
    };
    let items = exported("sent", "sent-items");
    assert!(items == exported("mapped", "mapped-items"));
    let config = site.run_dir("mapped").join("config.json");
    let text = std::fs::read_to_string(&config).expect("it is text");
    std::fs::write(&config, text.replace("\"int8\"", "\"f16\"")).expect("it can be written");
    assert!(items != exported("mapped", "f16-items"), "the same weights on f16 rows");
}

#[test]
fn a_worker_that_can_open_the_files_is_sent_no_rows_and_trains_the_same() {
    let site = Site::new(SMALL);
    let long = ["training.epochs=100", "evaluation.every_epochs=10"];
    // a cache of nothing, so that every step needs rows from somewhere
    let sent = start(&site, "sent", &[&long[..], &["data.map_rows=false", "cluster.row_cache=0B"]].concat());
    follow(&site, "sent", 300);
    let a_step = |name: &str| row_bytes(&coordinator_metrics(&site, name)) / site.steps(name).len() as f64;
    let (all, each) = (row_bytes(&coordinator_metrics(&site, "sent")), a_step("sent"));
    succeeds(&sent.wait_with_output().expect("it ends"));

    let mapped = start(&site, "mapped", &long);
    follow(&site, "mapped", 300);
    // those that each worker compares with its files
    let compared = row_bytes(&coordinator_metrics(&site, "mapped"));
    assert!(compared > 0.0 && compared < all / 10.0, "{compared} instead of {all} bytes of rows");
    succeeds(&mapped.wait_with_output().expect("it ends"));
    follow_file(&site.run_dir("mapped").join("logs/worker-0.log"), "content embeddings are mapped here", 1);

    // caches that hold some of the rows, on the host and on the device, and activations that are computed again
    let few = ["data.map_rows=false", "cluster.row_cache=480B", "cluster.device_row_cache=480B"];
    let kept = start(&site, "kept", &[&long[..], &few, &["training.activation_checkpointing=true"]].concat());
    follow(&site, "kept", 300);
    let (fewer, hits) = (a_step("kept"), workers_sum(&site, "kept", "learn_worker_device_cache_hit_rows_total"));
    assert!(fewer > 0.0 && fewer < 0.9 * each, "{fewer} instead of {each} bytes of rows a step");
    assert!(hits > 0.0, "no row was found on the device");
    succeeds(&kept.wait_with_output().expect("it ends"));

    let last = site.losses("sent").len() as u64;
    for other in ["mapped", "kept"] {
        assert_eq!(site.losses(other), site.losses("sent"), "{other}");
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let of = |name: &str| site.checkpoint_file(name, last, file);
            assert!(of(other) == of("sent"), "{other}: {file} differs");
        }
    }
}

#[test]
fn workers_of_a_machine_are_sent_a_row_once() {
    // a step needs few of the items, so that the workers seldom need the same ones in the same moment
    let site = Site::new(Shape { users: 800, items: 1000, ..SMALL });
    // 700 rows: the two caches hold every row together, and neither does alone
    let few = ["data.map_rows=false", "cluster.row_cache=22400B"];
    let long = ["training.epochs=100000", "evaluation.every_epochs=100000"];
    let ran = |name: &str, shared: &str| {
        let child = start(&site, name, &[&few[..], &long, &[shared]].concat());
        // each of them has seen every item
        follow(&site, name, 300);
        let rows = |which: &str| workers_sum(&site, name, &format!("learn_worker_cache_{which}_rows_total"));
        let (sent, found) = (rows("miss"), rows("neighbour"));
        succeeds(&site.launch(&["stop", &format!("runs/{name}")]));
        assert_eq!(child.wait_with_output().expect("it ends").status.code(), Some(3));
        (sent / 1000.0, found)
    };
    let (apart, none) = ran("apart", "cluster.shared_memory=false");
    let (together, found) = ran("together", "cluster.shared_memory=true");
    assert!(apart > 1.8 && together < 1.5, "{apart} and {together} times the rows");
    assert!(none < 1.0 && found > 1000.0, "rows of neighbours: {none} and {found}");
    assert_eq!(site.losses("together")[..300], site.losses("apart")[..300]);
}

#[test]
fn evaluations_are_sent_the_rows_of_histories_once() {
    let site = Site::new(Shape { dim: 64, ..SMALL });
    // an evaluation every few steps, in batches that have most items in common
    let often = ["training.epochs=100000", "evaluation.every_epochs=1", "evaluation.batch_users=8"];
    let child = start(&site, "run", &[&often[..], &["data.map_rows=false"]].concat());
    let lines = site.run_dir("run").join("evaluations.jsonl");
    follow_file(&lines, "", 20);
    let sent = row_bytes(&coordinator_metrics(&site, "run"));
    let evaluations = std::fs::read_to_string(&lines).expect("it is text").lines().count();
    succeeds(&site.launch(&["stop", "runs/run"]));
    assert_eq!(child.wait_with_output().expect("it ends").status.code(), Some(3));
    // the catalogue for each of them and for one that runs, and every row once for each of two workers' two caches
    let catalogues = (evaluations + 1 + 4) as f64;
    let rows = sent / (SMALL.items * 64 * 2) as f64;
    // messages need something besides
    assert!(rows < 2.0 * catalogues, "{rows} times the catalogue for {evaluations} evaluations");
}
