//! `bench checkpoint`: what a step loses while a checkpoint is written.
//!
//! Input: a model shape, a directory. Output: seconds of steps while the writer works (the first of them hands the state over)
//! and of steps while it rests, in turns.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use learn_domain::Step;
use learn_domain::run_dir::RunDir;
use learn_telemetry::WorkerMetrics;
use serde::Serialize;

use super::arguments::ShapeArgs;
use super::statistics::Spread;
use super::synthetic::{BenchSettings, Seat, alone};
use crate::checkpoint::{self, State, Writer, Written};
use crate::error::WorkerError;
use crate::feed::PreparedStep;
use crate::train::{Exchange, Stepper, Word, snapshot};

pub const HELP: &str = "\
The state is handed over between two steps and written by a thread of its own, which gives way
to the steps. Steps while one is written are set against as many without, in turns.

Examples:
  learn-launch bench checkpoint --threads 2
  learn-launch bench checkpoint --layers 12 --folder /scratch --json";

/// Flags of `bench checkpoint`.
#[derive(Clone, Debug, Args)]
pub struct CheckpointArgs {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Checkpoints that are written
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    checkpoints: u32,
    /// Directory to write to, which must exist; what is written is removed [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    #[arg(long)]
    pub json: bool,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct CheckpointResult {
    pub device: String,
    pub users: u32,
    pub parameters: i64,
    /// Of one checkpoint.
    pub bytes: u64,
    /// Seconds that the training thread waits for the copy of the state, of each checkpoint.
    pub handing_over: Vec<f64>,
    /// Seconds from the copy to a durable checkpoint.
    pub writing: Vec<f64>,
    /// Processor time that the writer takes, of each checkpoint, by the seconds from the copy to a durable one.
    pub writer_share: Vec<f64>,
    /// Steps that began while one was written, the copy included in the first one.
    pub steps_meanwhile: Vec<f64>,
    pub steps_without: Vec<f64>,
    /// How much longer steps take while a checkpoint is written, in the mean, as a share of those without.
    pub lost_share: f64,
}

impl fmt::Display for CheckpointResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (without, over) = (Spread::of(&self.steps_without).median, Spread::of(&self.handing_over).median);
        write!(
            f,
            "checkpoints of {} MiB: {:.0} ms to hand one over, {:.1} s until it is durable, in which \
             the writer takes {:.2} % of a processor\na step of {} users takes {:.0} ms; while one is written {:.2} % longer",
            self.bytes >> 20,
            1e3 * over,
            Spread::of(&self.writing).median,
            100.0 * Spread::of(&self.writer_share).median,
            self.users,
            1e3 * without,
            100.0 * self.lost_share
        )
    }
}

/// # Errors
/// If the flags make no sense, or a step or the disk fails.
pub fn run(args: &CheckpointArgs) -> Result<CheckpointResult, WorkerError> {
    let settings = args.shape.settings()?;
    let parent = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    let folder = parent.join(format!("learn-bench-{}", std::process::id()));
    std::fs::create_dir(&folder)
        .map_err(|error| WorkerError::File { path: folder.display().to_string(), reason: error.to_string() })?;
    let result = measure(&settings, args.checkpoints, &RunDir::new(folder.clone()));
    // what could not be measured is the error to report
    let _ = std::fs::remove_dir_all(&folder);
    result
}

/// A training that only steps.
struct Training<'a> {
    settings: &'a BenchSettings,
    stepper: Stepper,
    exchange: Exchange,
    steps: Vec<PreparedStep>,
    done: usize,
}

impl Training<'_> {
    fn step(&mut self) -> Result<(), WorkerError> {
        let rate = self.settings.config.optimizer.learning_rate;
        let step = &self.steps[self.done % self.steps.len()];
        self.stepper.step(step, &mut self.exchange, rate, Word::default())?;
        learn_torch::synchronize(self.settings.device);
        self.done += 1;
        Ok(())
    }

    fn state(&self) -> State {
        let facts = self.settings.facts();
        State {
            version: checkpoint::VERSION,
            step: Step(self.done as u64),
            epoch: 0,
            fingerprint: facts.fingerprint,
            embeddings_fingerprint: facts.embeddings_fingerprint,
            input_dim: facts.embedding_dim,
            signature: String::new(),
            optimizer_step: self.stepper.optimizer.steps(),
            best: None,
            init: None,
            non_finite: 0,
            config: self.settings.config.clone(),
            files: std::collections::BTreeMap::new(),
        }
    }
}

fn measure(settings: &BenchSettings, checkpoints: u32, run: &RunDir) -> Result<CheckpointResult, WorkerError> {
    let metrics = WorkerMetrics::new();
    let mut training = Training {
        settings,
        stepper: settings.stepper(&metrics)?,
        exchange: alone(&settings.config, metrics)?,
        steps: settings.steps(Seat::ALONE)?,
        done: 0,
    };
    for _ in 0..training.steps.len() {
        training.step()?;
    }
    let (told, durable) = std::sync::mpsc::channel();
    let mut writer = Writer::start(run.clone(), 1, move |written| {
        let Written::Committed { path, duration, processor, .. } = written else { return false };
        // nobody listens any more when a step has failed
        let _ = told.send((path, duration, processor));
        true
    });
    let (mut handing_over, mut meanwhile, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..checkpoints {
        let before = meanwhile.len();
        let mut started = Instant::now();
        writer.save(snapshot(training.state(), &training.stepper))?;
        handing_over.push(started.elapsed().as_secs_f64());
        // whole rounds of the batches, so that both kinds of steps have the same ones
        while !writer.is_idle() || !(meanwhile.len() - before).is_multiple_of(training.steps.len()) {
            training.step()?;
            meanwhile.push(started.elapsed().as_secs_f64());
            started = Instant::now();
        }
        writer.settle()?;
        for _ in before..meanwhile.len() {
            let started = Instant::now();
            training.step()?;
            without.push(started.elapsed().as_secs_f64());
        }
    }
    drop(writer);
    let written: Vec<(PathBuf, Duration, Duration)> = durable.into_iter().collect();
    let newest = written.last().map(|(path, ..)| checkpoint::check(path)).transpose()?;
    let mean = |seconds: &[f64]| seconds.iter().sum::<f64>() / seconds.len().max(1) as f64;
    Ok(CheckpointResult {
        device: format!("{:?}", settings.device),
        users: settings.config.training.global_batch,
        parameters: training.stepper.parameters.count(),
        bytes: newest.map_or(0, |state| state.files.values().map(|file| file.bytes).sum()),
        handing_over,
        writing: written.iter().map(|(_, duration, _)| duration.as_secs_f64()).collect(),
        writer_share: written.iter().map(|(_, duration, processor)| processor.div_duration_f64(*duration)).collect(),
        lost_share: mean(&meanwhile) / mean(&without) - 1.0,
        steps_meanwhile: meanwhile,
        steps_without: without,
    })
}
