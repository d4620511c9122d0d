//! `learn-launch embed`: content embeddings for a dataset, in one or several processes.
//!
//! A coordinator leases the shards to `learn-embed` processes, those of this machine and whoever else joins; the range of
//! one that is lost goes to another. A killed `embed` goes on where it was. Only when all shards are there does the
//! dataset get them, in one step.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use learn_dataset::Dataset;
use learn_domain::report::{CoordinatorAddress, exit};
use learn_domain::run_dir::RunDir;
use learn_domain::{Config, Rank};

use crate::api::Api;
use crate::cli::{SettingsArgs, anchor};
use crate::failure::Failure;
use crate::output::{Output, Unit};
use crate::process::{self, Process};
use crate::system::{self, End};
use crate::{crew, encoder, render, runs};

pub const HELP: &str = "\
Examples:
  learn-launch embed configs/quickstart.toml
  learn-launch embed configs/quickstart.toml --processes 2
  learn-launch embed configs/quickstart.toml --show 3      (the prompts of the first items, nothing is written)
  learn-launch embed configs/quickstart.toml --from vectors.npy
  EMBED_KEY=… learn-launch embed shop.toml --endpoint https://gpu-7:8000/v1 \\
      --set embed.endpoint.model=Qwen/Qwen3-Embedding-4B --set embed.endpoint.key_variable=EMBED_KEY

The vectors come from one of three places:
  embed.model         an encoder on this machine, a directory in Hugging Face layout
  embed.endpoint.url  a server with the OpenAI-compatible /v1/embeddings (vLLM, TEI, SGLang)
  embed.from          a file with one vector per item

With --processes N (one per GPU) a coordinator leases ranges of items to N processes; one that is lost loses no finished
range, and others take over. Processes on other machines that share the dataset join with
  learn-embed --coordinator URL --secret-file DATASET/embeddings/job/secret
where URL is `grpc` in DATASET/embeddings/job/coordinator.json; set cluster.bind to an address that they reach.

What the model reads of an item is the prompt: [embed.prompt] sets its sentences, --show prints the finished ones.
A killed or stopped `embed` continues where it was when it is run again. Another prompt, model or server starts anew;
the dataset keeps the embeddings that it has until the new ones are all there. docs/embeddings.md says more.";

/// Pause between two looks at the processes.
const POLL: Duration = Duration::from_millis(100);
/// Pause between two looks at the status.
const STATUS_INTERVAL: Duration = Duration::from_millis(500);
/// How long stopped processes may take to end.
const LEAVE: Duration = Duration::from_secs(10);
/// Lines of a failed process that are shown.
const TAIL: usize = 10;

/// Arguments of `embed`.
#[derive(Debug, Args)]
pub struct EmbedArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Take over vectors made elsewhere: .npy or .parquet, one row per item (embed.from)
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Take the vectors from a server: the base URL of its /v1/embeddings (embed.endpoint.url)
    #[arg(long, value_name = "URL", conflicts_with = "from")]
    endpoint: Option<String>,
    /// Directory of the encoder (embed.model)
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Processes that share the work (embed.processes)
    #[arg(long, value_name = "N")]
    processes: Option<u32>,
    /// Where the encoder runs (embed.device)
    #[arg(long, value_parser = ["auto", "cpu", "cuda"])]
    device: Option<String>,
    /// Only print the prompts of the first N items
    #[arg(long, value_name = "N")]
    show: Option<u32>,
}

/// # Errors
/// The configuration or the dataset is not ready, or a process fails.
pub fn run(args: &EmbedArgs, output: &Output) -> Result<()> {
    super::refuse_tasks("embed")?;
    let mut config = args
        .settings
        .resolver()?
        .flag("--from", "embed.from", args.from.as_ref())?
        .flag("--endpoint", "embed.endpoint.url", args.endpoint.as_ref())?
        .flag("--model", "embed.model", args.model.as_ref())?
        .flag("--processes", "embed.processes", args.processes)?
        .flag("--device", "embed.device", args.device.as_ref())?
        .finish()?;
    anchor(&mut config)?;
    let dataset = Dataset::open(&config.data.dataset)?;
    drop(dataset);
    if let Some(count) = args.show {
        return show(&config, count);
    }
    encoder::find(&config.embed).map_err(|error| Failure::Usage(error.to_string()))?;
    let start = Instant::now();
    system::catch_stop_signals();
    let _lock = lock(&config.data.dataset)?;
    let run = make_directory(&config)?;
    EmbedJob { run: &run, config: &config, output }.make_shards()?;
    commit(&run, output)?;
    std::fs::remove_dir_all(run.root()).with_context(|| format!("cannot remove {}", run.root().display()))?;
    report(args, &config, start.elapsed(), output)
}

/// Prints prompts.
fn show(config: &Config, count: u32) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let resolved = folder.path().join("config.json");
    runs::write_config(&resolved, config)?;
    let mut command = Command::new(process::sibling("learn-embed")?);
    command.arg("--config").arg(&resolved).args(["--show", &count.to_string()]);
    system::end_with_parent(&mut command);
    finished("learn-embed --show", command.status()?, &[])
}

/// One `embed` a dataset; the system drops the lock with the process.
fn lock(dataset: &Path) -> Result<File> {
    let path = RunDir::embedding_lock(dataset);
    let open = || {
        path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        File::options().create(true).append(true).open(&path)
    };
    let locked = open().map_err(TryLockError::Error).and_then(|file| file.try_lock().map(|()| file));
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => {
            let shown = super::shown(dataset);
            Failure::Usage(format!(
                "{shown} is being embedded now by another `learn-launch embed`; wait for it, or stop it"
            ))
            .into()
        }
        TryLockError::Error(error) => anyhow::Error::from(error).context(format!("cannot lock {}", path.display())),
    })
}

/// The job's directory, anew: what an earlier job has finished are its shards.
fn make_directory(config: &Config) -> Result<RunDir> {
    let run = RunDir::of_embedding(&config.data.dataset);
    if let Some(address) = runs::live(&run) {
        let (shown, pid) = (super::shown(&config.data.dataset), address.pid);
        let message =
            format!("{shown} is being embedded now (coordinator pid {pid}); wait for it, or stop that `embed`");
        return Err(Failure::Usage(message).into());
    }
    if run.root().exists() {
        std::fs::remove_dir_all(run.root()).with_context(|| format!("cannot remove {}", run.root().display()))?;
    }
    runs::create(run.root(), config)
}

/// Makes the finished shards the dataset's embeddings. Stopped on the way, the dataset is as it was.
fn commit(run: &RunDir, output: &Output) -> Result<()> {
    refuse_stops(system::stop_requests())?;
    output.note("all shards are there; making them the dataset's embeddings");
    let log = run.logs().join("commit.log");
    let mut command = Command::new(process::sibling("learn-embed")?);
    command.arg("--config").arg(run.config()).arg("--commit");
    let mut process = Process::start("learn-embed --commit", &mut command, &log)?;
    let status = loop {
        if let Some(status) = process.ended() {
            break status;
        }
        if system::stop_requests() > 0 {
            end_all(std::slice::from_mut(&mut process));
        }
        std::thread::sleep(POLL);
    };
    if !status.success() {
        refuse_stops(system::stop_requests())?;
    }
    finished(&process.name, status, &process.tail(TAIL))
}

/// # Errors
/// There was a request to stop.
fn refuse_stops(requests: usize) -> Result<()> {
    let failure = Failure::of_stops(requests, "the embed job", "`learn-launch embed` goes on where it was");
    failure.map_or(Ok(()), |failure| Err(failure.into()))
}

/// The coordinator of an embed job and its workers on this machine; workers of others may join.
struct EmbedJob<'a> {
    run: &'a RunDir,
    config: &'a Config,
    output: &'a Output,
}

impl EmbedJob<'_> {
    fn make_shards(&self) -> Result<()> {
        let mut coordinator = self.start_coordinator()?;
        let mut workers = Vec::new();
        let mut progress = self.output.progress(Unit::Count);
        progress.stage("embed", None);
        let mut api = None;
        let mut asked: Option<Instant> = None;
        let mut lost: Vec<usize> = Vec::new();
        while coordinator.ended().is_none() {
            match &api {
                None => {
                    if let Some(address) = runs::live(self.run) {
                        workers = self.start_workers(&address)?;
                        api = Some(Api::new(self.run, &address));
                    }
                }
                Some(api) if asked.is_none_or(|at| at.elapsed() >= STATUS_INTERVAL) => {
                    if let Ok(status) = api.embedding() {
                        progress.at(status.items_done, status.items, render::workers(status.workers.len()));
                    }
                    asked = Some(Instant::now());
                }
                Some(_) => {}
            }
            if system::stop_requests() > 0 {
                end_all(&mut workers);
                end_all(std::slice::from_mut(&mut coordinator));
                return refuse_stops(system::stop_requests());
            }
            let before = lost.len();
            for (number, worker) in workers.iter_mut().enumerate() {
                if worker.failed() && !lost.contains(&number) {
                    lost.push(number);
                }
            }
            let nobody_left = lost.len() == workers.len();
            for number in lost[before..].iter().filter(|_| !nobody_left) {
                let worker = &mut workers[*number];
                let how = worker.ended().map_or(String::new(), process::describe);
                progress.line(&format!("{} ended with {how}; its range is taken over", worker.name));
            }
            if let Some(first) = lost.first().filter(|_| nobody_left) {
                // Nobody is left here: the first one's reason counts.
                end_all(std::slice::from_mut(&mut coordinator));
                progress.finish();
                return self.judge(&mut workers[*first]);
            }
            std::thread::sleep(POLL);
        }
        progress.finish();
        self.judge(&mut coordinator)?;
        for worker in &mut workers {
            // What a lost worker has left undone, others have done.
            worker.wait(LEAVE);
        }
        Ok(())
    }

    fn start_coordinator(&self) -> Result<Process> {
        let mut command = Command::new(process::sibling("learn-coordinator")?);
        command.arg("--run-dir").arg(self.run.root()).arg("--embed");
        Ok(Process::start("learn-coordinator", &mut command, &self.run.coordinator_log())?)
    }

    fn start_workers(&self, address: &CoordinatorAddress) -> Result<Vec<Process>> {
        let binary = process::sibling("learn-embed")?;
        let count = self.config.embed.processes;
        let threads = match self.config.embed.threads {
            0 => (crew::cores() / count as usize).max(1),
            threads => threads as usize,
        };
        let threads = threads.to_string();
        let start = |number: u32| -> Result<Process> {
            let mut command = Command::new(&binary);
            command.args(["--coordinator", &address.grpc]).arg("--secret-file").arg(self.run.secret());
            command.args(["--slot", &number.to_string(), "--threads", &threads]).env("OMP_NUM_THREADS", &threads);
            let log = self.run.worker_log(Rank(number));
            Ok(Process::start(format!("learn-embed process {number}"), &mut command, &log)?)
        };
        (0..count).map(start).collect()
    }

    fn judge(&self, process: &mut Process) -> Result<()> {
        let Some(status) = process.wait(LEAVE) else { bail!("{} does not end", process.name) };
        if status.code() == Some(exit::STOPPED) {
            // by `learn-launch stop`
            return refuse_stops(1);
        }
        finished(&process.name, status, &process.tail(TAIL))
    }
}

/// Asks processes to end and waits for them; a second request to stop kills them.
fn end_all(processes: &mut [Process]) {
    processes.iter_mut().for_each(|process| process.ask_to_end(End::Gracefully));
    let start = Instant::now();
    while processes.iter_mut().any(|process| process.ended().is_none()) && start.elapsed() < LEAVE {
        if system::stop_requests() > 1 {
            processes.iter_mut().for_each(|process| process.ask_to_end(End::AtOnce));
        }
        std::thread::sleep(POLL);
    }
}

fn finished(name: &str, status: std::process::ExitStatus, said: &[String]) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let mut message = format!("{name} ended with {}", process::describe(status));
    // its own last words say why; a study shows only this first line
    let why = said.iter().rposition(|line| line.starts_with("learn-embed: "));
    if let Some(why) = why {
        message += &said[why].replacen("learn-embed", "", 1);
    }
    for (_, line) in said.iter().enumerate().filter(|(place, _)| Some(*place) != why) {
        message += &format!("\n  | {line}");
    }
    let code = status.code().unwrap_or(exit::FAILED);
    Err(Failure::Child { code, message }.into())
}

fn report(args: &EmbedArgs, config: &Config, elapsed: Duration, output: &Output) -> Result<()> {
    let dataset = Dataset::open(&config.data.dataset)?;
    let Some(info) = &dataset.manifest().embeddings else {
        bail!("learn-embed ended well, but {} has no embeddings", config.data.dataset.display());
    };
    let items = dataset.manifest().counts.items;
    let text = format!(
        "{}: {} items embedded in {} ({} dimensions, {})\nnext: {}",
        super::shown(&config.data.dataset),
        render::count(items.into()),
        render::duration(elapsed.as_secs_f64()),
        info.dim,
        info.model,
        args.settings.command("train"),
    );
    output.result(&text, info)
}
