//! `learn-launch simulate`: what one coordinator can carry.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use learn_domain::Config;
use learn_domain::config::{ItemInput, Span};
use learn_domain::report::{CoordinatorAddress, Task};
use learn_domain::run_dir::RunDir;
use learn_proto::connect::Pass;

use crate::failure::Failure;
use crate::load::{self, Load, Measured};
use crate::output::Output;
use crate::process::{self, Process};
use crate::{runs, system};

pub const HELP: &str = "\
Examples:
  learn-launch simulate --workers 10000 --minutes 10
  learn-launch simulate --workers 500 --minutes 0.5 --json

Starts the real coordinator on a tiny dataset in a temporary directory. Each worker has a connection of its own, \
joins, keeps its open call, is ready, becomes a rank of one generation and sends a heartbeat each second; none \
trains. Answer times are taken at the worker, so they hold what this process needs too. Both processes need a file a \
worker: the limit (`ulimit -n`) is raised if that is allowed.";

/// Files that a process holds besides its connections.
const FILES: u64 = 256;
/// The coordinator may take this long to serve.
const START: Duration = Duration::from_secs(30);

/// Arguments of `simulate`.
#[derive(Debug, Args)]
pub struct SimulateArgs {
    /// Simulated workers
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    workers: u32,
    /// How long to measure after all have joined
    #[arg(long, value_name = "MINUTES", default_value_t = 1.0)]
    minutes: f64,
}

/// # Errors
/// The limit on open files is too low, the coordinator cannot be started, or it loses a worker.
pub fn run(args: &SimulateArgs, output: &Output) -> Result<()> {
    if !(args.minutes > 0.0 && args.minutes <= 1440.0) {
        let message = format!("--minutes {} makes no sense; give a number above 0, and 1440 at most", args.minutes);
        return Err(Failure::Usage(message).into());
    }
    let files = u64::from(args.workers) + FILES;
    system::raise_open_file_limit(files).with_context(|| {
        format!("each of two processes must hold {files} files open; raise the limit with `ulimit -Hn`")
    })?;
    let folder = tempfile::tempdir().context("cannot make a temporary directory")?;
    let config = config(folder.path(), args.workers)?;
    config.validate()?;
    let run = runs::create(&folder.path().join("run"), &config)?;
    let mut coordinator = Command::new(process::sibling("learn-coordinator")?);
    let task = serde_json::to_string(&Task::Train { resume_from: None })?;
    coordinator.arg("--run-dir").arg(run.root()).args(["--task-json", &task]);
    let mut coordinator = Process::start("coordinator", &mut coordinator, &run.coordinator_log())?;
    let address = address(&run, &mut coordinator)?;

    output.note(&format!("{} workers join {}", args.workers, address.grpc));
    let load = Load {
        address: address.grpc,
        pass: Pass::read(&run.secret())?,
        workers: args.workers,
        time: Duration::from_secs_f64(args.minutes * 60.0),
        coordinator: coordinator.pid(),
    };
    let measured = load::run(&load, |text| output.note(text))
        .with_context(|| format!("the coordinator's last words:\n{}", coordinator.tail(5).join("\n")))?;
    output.result(&text(&measured), &measured)
}

/// A job of `workers` over a dataset that nobody will read.
fn config(folder: &Path, workers: u32) -> Result<Config> {
    let mut rows = String::from("user_id,item_id,timestamp\n");
    for user in 0..100 {
        for step in 0..8 {
            rows += &format!("u{user},i{},{}\n", (user * 7 + step * 3) % 37, 1000 + step);
        }
    }
    let file = folder.join("interactions.csv");
    fs::write(&file, rows)?;
    let mut config = Config::default();
    config.prepare.interactions.files = vec![file];
    let dataset = folder.join("dataset");
    learn_dataset::prepare(&config.prepare, "simulate", &dataset, &())?;
    config.data.dataset = dataset;
    config.job.name = "simulate".into();
    config.model.item_input = ItemInput::Id;
    config.cluster.workers = workers;
    config.training.global_batch = config.training.global_batch.max(workers);
    config.cluster.heartbeat_timeout = Span::from_secs(30);
    config.cluster.join_timeout = Span::from_secs(1800);
    Ok(config)
}

fn address(run: &RunDir, coordinator: &mut Process) -> Result<CoordinatorAddress> {
    let started = Instant::now();
    loop {
        if let Some(address) = runs::live(run) {
            return Ok(address);
        }
        if coordinator.ended().is_some() || started.elapsed() > START {
            bail!("the coordinator does not serve:\n{}", coordinator.tail(5).join("\n"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn text(measured: &Measured) -> String {
    let Measured { workers, seconds, heartbeats, late, p50_ms, p99_ms, max_ms, .. } = measured;
    let Measured { join_seconds, form_seconds, cores, rss_mib, own_cores, .. } = measured;
    format!(
        "{workers} workers joined in {join_seconds:.1} s and had their ranks {form_seconds:.2} s after the last was ready\n\
         {heartbeats} heartbeats in {seconds:.0} s: p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms, max {max_ms:.1} ms; {late} late\n\
         the coordinator used {cores:.2} cores and {rss_mib} MiB; the simulated workers {own_cores:.2} cores"
    )
}
