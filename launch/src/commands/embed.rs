//! `learn-launch embed`: content embeddings for a dataset, in one or several processes.
//!
//! Each process makes its share of the shards; a killed `embed` goes on where it was. Only when all shards are there
//! does the dataset get them, in one step.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use learn_dataset::Dataset;
use learn_domain::Config;
use serde::Deserialize;

use crate::cli::{SettingsArgs, anchor};
use crate::failure::Failure;
use crate::output::{Output, Unit};
use crate::process::{self, Process};
use crate::system::{self, End};
use crate::{job, render};

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

What the model reads of an item is the prompt: [embed.prompt] sets its sentences, --show prints the finished ones.
A killed or stopped `embed` continues where it was when it is run again. Another prompt, model or server starts anew;
the dataset keeps the embeddings that it has until the new ones are all there. docs/embeddings.md says more.";

/// Pause between two looks at the processes.
const POLL: Duration = Duration::from_millis(100);
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
    let binary = process::sibling("learn-embed")?;
    let folder = tempfile::tempdir()?;
    let resolved = folder.path().join("config.json");
    std::fs::File::create(&resolved)?.write_all(&serde_json::to_vec(&config)?)?;
    if let Some(count) = args.show {
        let mut command = Command::new(&binary);
        command.arg("--config").arg(&resolved).args(["--show", &count.to_string()]);
        system::end_with_parent(&mut command);
        return finished("learn-embed --show", command.status()?, &[]);
    }
    drop(dataset);
    let start = Instant::now();
    let work = Work { binary: &binary, config: &config, resolved: &resolved, folder: folder.path() };
    work.make_shards(output)?;
    work.commit()?;
    report(&config, start.elapsed(), output)
}

/// What a part says on its stdout.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Done {
    done: u64,
    total: u64,
}

struct Work<'a> {
    binary: &'a Path,
    config: &'a Config,
    resolved: &'a Path,
    folder: &'a Path,
}

impl Work<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(self.binary);
        command.arg("--config").arg(self.resolved);
        command
    }

    fn make_shards(&self, output: &Output) -> Result<()> {
        system::catch_stop_signals();
        let parts = self.config.embed.processes as usize;
        let threads = (job::cores() / parts).max(1).to_string();
        let (sender, lines) = mpsc::channel::<(usize, Done)>();
        let mut processes = Vec::new();
        for part in 0..parts {
            let mut command = self.command();
            command.args(["--part", &format!("{part}/{parts}"), "--threads", &threads, "--progress-json"]);
            command.env("OMP_NUM_THREADS", &threads);
            let log = self.folder.join(format!("part-{part}.log"));
            let (process, pipe) = Process::start_with_pipe(format!("learn-embed part {part}"), &mut command, &log)?;
            processes.push(process);
            let sender = sender.clone();
            // Ends when the pipe closes, which it does at the latest with the process.
            std::thread::spawn(move || {
                let Some(pipe) = pipe else { return };
                process::each_line(pipe, |line| {
                    if let Ok(done) = serde_json::from_str(line) {
                        // Nobody listens any more once another part has failed.
                        let _gone = sender.send((part, done));
                    }
                });
            });
        }
        drop(sender);
        let mut progress = output.progress(Unit::Count);
        progress.stage("embed", None);
        let mut done = vec![Done::default(); parts];
        loop {
            match lines.recv_timeout(POLL) {
                Ok((part, now)) => {
                    done[part] = now;
                    let (sum, total) =
                        done.iter().fold((0, 0), |(sum, total), part| (sum + part.done, total + part.total));
                    progress.at(sum, total, String::new());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let stopped = system::stop_requests() > 0;
            let failed = processes.iter_mut().position(Process::failed);
            if stopped || failed.is_some() {
                end_all(&mut processes);
            }
            if stopped {
                return Err(Failure::Stopped("stopped; `learn-launch embed` continues where it was".into()).into());
            }
            if let Some(failed) = failed {
                // It goes first: the others were ended because of it.
                processes.swap(0, failed);
                break;
            }
        }
        progress.finish();
        for process in &mut processes {
            let Some(status) = process.wait(LEAVE) else {
                bail!("{} closed its output but does not end", process.name)
            };
            finished(&process.name, status, &process::tail(&process.log, TAIL))?;
        }
        Ok(())
    }

    /// Makes the finished shards the dataset's embeddings.
    fn commit(&self) -> Result<()> {
        let log = self.folder.join("commit.log");
        let mut process = Process::start("learn-embed --commit", self.command().arg("--commit"), &log)?;
        loop {
            if let Some(status) = process.wait(LEAVE) {
                return finished(&process.name, status, &process::tail(&log, TAIL));
            }
        }
    }
}

fn end_all(processes: &mut [Process]) {
    for process in &mut *processes {
        process.ask_to_end(End::Gracefully);
    }
    for process in processes {
        process.wait(LEAVE);
    }
}

fn finished(name: &str, status: std::process::ExitStatus, said: &[String]) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let mut message = format!("{name} ended with {}", process::describe(status));
    for line in said {
        message += &format!("\n  | {line}");
    }
    let code = status.code().unwrap_or(learn_domain::report::exit::FAILED);
    Err(Failure::Child { code, message }.into())
}

fn report(config: &Config, elapsed: Duration, output: &Output) -> Result<()> {
    let dataset = Dataset::open(&config.data.dataset)?;
    let Some(info) = &dataset.manifest().embeddings else {
        bail!("learn-embed ended well, but {} has no embeddings", config.data.dataset.display());
    };
    let items = dataset.manifest().counts.items;
    let text = format!(
        "{}: {} items embedded in {} ({} dimensions, {})\nnext: learn-launch train",
        super::shown(&config.data.dataset),
        render::count(items.into()),
        render::duration(elapsed.as_secs_f64()),
        info.dim,
        info.model,
    );
    output.result(&text, info)
}
