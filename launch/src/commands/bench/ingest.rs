//! `learn-launch bench prepare` and `embed`: how fast a configuration's own files become a dataset, and its texts vectors.
//!
//! Input: a configuration. Output: rows or items a second, processor time and peak memory, as the operating system counts
//! them for the command and what it starts. Invariant: everything is written to a temporary folder, which goes.

use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::SettingsArgs;
use crate::failure::Failure;
use crate::output::Output;
use crate::system::{self, End, Used};
use crate::{process, render};

/// Pause between two looks at whether somebody wants it to stop.
const NAP: Duration = Duration::from_millis(50);

/// What is measured, and where it may write.
#[derive(Debug, Args)]
pub struct IngestArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Folder for what is made meanwhile [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    folder: Option<std::path::PathBuf>,
}

/// What a command came to.
#[derive(Debug, PartialEq, Serialize)]
struct Figures {
    part: &'static str,
    /// What is counted: rows read, or items embedded.
    count: u64,
    seconds: f64,
    per_second: f64,
    processor_seconds: f64,
    per_processor_second: f64,
    peak_memory_bytes: u64,
}

impl Figures {
    fn new(part: &'static str, count: u64, seconds: f64, used: Used) -> Self {
        let Used { processor_seconds, peak_memory_bytes } = used;
        let each = |seconds: f64| count as f64 / seconds.max(f64::MIN_POSITIVE);
        Self {
            part,
            count,
            seconds,
            per_second: each(seconds),
            processor_seconds,
            per_processor_second: each(processor_seconds),
            peak_memory_bytes,
        }
    }

    fn text(&self, what: &str) -> String {
        format!(
            "{} {what} in {}: {} a second, {} a second of a processor; at most {} of memory",
            render::count(self.count),
            render::duration(self.seconds),
            render::count(self.per_second as u64),
            render::count(self.per_processor_second as u64),
            render::bytes(self.peak_memory_bytes),
        )
    }
}

/// # Errors
/// `prepare` fails; its message stands above.
pub fn prepare(args: &IngestArgs, output: &Output) -> Result<()> {
    system::catch_stop_signals();
    let folder = args.folder()?;
    let (report, seconds, used) = args.measured("prepare", folder.path())?;
    let rows = number(&report, "/steps/0/interactions")?;
    let figures = Figures::new("prepare", rows, seconds, used);
    output.result(&figures.text("rows read and prepared"), &figures)
}

/// # Errors
/// `prepare` or `embed` fails; its message stands above.
pub fn embed(args: &IngestArgs, output: &Output) -> Result<()> {
    system::catch_stop_signals();
    let folder = args.folder()?;
    let (report, ..) = args.measured("prepare", folder.path())?;
    let items = number(&report, "/manifest/counts/items")?;
    let (_, seconds, used) = args.measured("embed", folder.path())?;
    let figures = Figures::new("embed", items, seconds, used);
    output.result(&figures.text("items embedded, start of the encoder included"), &figures)
}

fn number(report: &Value, place: &str) -> Result<u64> {
    report.pointer(place).and_then(Value::as_u64).with_context(|| format!("prepare has not said {place}"))
}

impl IngestArgs {
    fn folder(&self) -> Result<tempfile::TempDir> {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("learn-bench-");
        let made = self.folder.as_ref().map_or_else(|| builder.tempdir(), |folder| builder.tempdir_in(folder));
        made.context("cannot make a temporary folder; --folder names another place")
    }

    /// Runs this program's own command with these settings on a dataset in `folder`: what it said, seconds, and what it used.
    fn measured(&self, name: &'static str, folder: &Path) -> Result<(Value, f64, Used)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(name).args(&self.settings.file);
        for set in &self.settings.sets {
            command.args(["--set", set]);
        }
        let dataset = folder.join("dataset");
        command.args(["--json", "--set"]).arg(format!("data.dataset={}", Value::from(dataset.to_string_lossy())));
        system::end_with_parent(&mut command);
        let started = Instant::now();
        let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {name}"))?;
        let (pid, ended) = (child.id(), AtomicBool::new(false));
        let mut said = String::new();
        let (status, used) = thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) && system::stop_requests() == 0 {
                    thread::sleep(NAP);
                }
                if !ended.load(Ordering::Relaxed) {
                    system::end(pid, End::Gracefully);
                }
            });
            let read = child.stdout.as_mut().map_or(Ok(0), |stdout| stdout.read_to_string(&mut said));
            let waited = system::wait(&child);
            ended.store(true, Ordering::Relaxed);
            read.and(waited)
        })?;
        let seconds = started.elapsed().as_secs_f64();
        if let Some(stopped) = Failure::of_stops(system::stop_requests(), "the measurement", "nothing of it stays") {
            return Err(stopped.into());
        }
        if !status.success() {
            let message = format!("{name}: {}; its message stands above", process::describe(status));
            return Err(Failure::Child { code: status.code().unwrap_or(1), message }.into());
        }
        match serde_json::from_str(&said) {
            Ok(report) => Ok((report, seconds, used)),
            Err(error) => bail!("{name} has printed no JSON: {error}"),
        }
    }
}
