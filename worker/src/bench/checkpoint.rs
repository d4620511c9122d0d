//! `bench checkpoint`: what a step loses while a checkpoint is written.
//!
//! Input: a model shape, a directory. Output: seconds of steps while the writer works, and of steps over the same batches
//! while it is held between two pieces of a file, in turns; so a machine that is slower for a while is slower for both.

use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use learn_domain::Step;
use learn_domain::run_dir::RunDir;
use learn_telemetry::WorkerMetrics;
use serde::Serialize;

use super::arguments::ShapeArgs;
use super::statistics::Spread;
use super::synthetic::{BenchSettings, Seat, alone};
use crate::checkpoint::{self, Pace, State, Writer, Written};
use crate::error::WorkerError;
use crate::feed::PreparedStep;
use crate::train::{Exchange, Stepper, Word, snapshot};

pub const HELP: &str = "\
The state is handed over between two steps and written by a thread of its own, which gives way to the steps and, on a \
CPU, rests between the pieces of a file. Each step while it writes is set against one over the same batch while it is \
held.

Examples:
  learn-launch bench checkpoint --threads 2
  learn-launch bench checkpoint --layers 12 --folder /scratch --json";

/// How long a step waits for the writer, which rests between pieces, to be held; longer, and the writer waits for the disk.
const HOLD_WITHIN: Duration = Duration::from_millis(250);

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
    /// Seconds from the copy to a durable checkpoint, of each, without the steps for which the writer was held.
    pub writing: Vec<f64>,
    /// Processor time that the writer takes, of each checkpoint, divided by these seconds.
    pub writer_share: Vec<f64>,
    /// Steps while one was written.
    pub steps_meanwhile: Vec<f64>,
    /// Steps over the same batches while the writer was held.
    pub steps_without: Vec<f64>,
    /// How much longer steps take while a checkpoint is written, in the mean, as a share of those without; the copy of the
    /// state is part of it.
    pub lost_share: f64,
    /// The standard error of `lost_share`, from the differences within pairs.
    pub lost_share_error: f64,
    /// The same in the middle half of the pairs: without those in which one step fell into a slow moment of the machine.
    pub lost_share_middle: f64,
}

impl fmt::Display for CheckpointResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (without, over) = (Spread::of(&self.steps_without).median, Spread::of(&self.handing_over).median);
        write!(
            f,
            "checkpoints of {} MiB: {:.0} ms to hand one over, {:.1} s until it is durable, in which \
             the writer takes {:.2} % of a processor\na step of {} users takes {:.0} ms; while one is written {:.2} % longer \
             (standard error {:.2} %), in the middle half of {} pairs {:.2} %",
            self.bytes >> 20,
            1e3 * over,
            Spread::of(&self.writing).median,
            100.0 * Spread::of(&self.writer_share).median,
            self.users,
            1e3 * without,
            100.0 * self.lost_share,
            100.0 * self.lost_share_error,
            self.steps_without.len(),
            100.0 * self.lost_share_middle,
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

/// Pairs of steps that say anything.
const FEWEST_PAIRS: usize = 2;

/// A training that only steps.
struct Training<'a> {
    settings: &'a BenchSettings,
    stepper: Stepper,
    exchange: Exchange,
    steps: Vec<PreparedStep>,
    done: usize,
}

impl Training<'_> {
    /// The seconds of a step over one of the batches.
    fn step(&mut self, batch: usize) -> Result<f64, WorkerError> {
        let rate = self.settings.config.optimizer.learning_rate;
        let step = &self.steps[batch % self.steps.len()];
        let started = Instant::now();
        self.stepper.step(step, &mut self.exchange, rate, Word::default())?;
        learn_torch::synchronize(self.settings.device);
        self.done += 1;
        Ok(started.elapsed().as_secs_f64())
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

/// What the writer passes before each piece of a file.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    /// Whether the writer stands before it.
    holds: bool,
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.closed {
            state.holds = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.holds = false;
    }

    fn open(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = false;
        self.changed.notify_all();
    }

    /// Closes it; whether the writer stands before it soon.
    fn close(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        let waits = |state: &mut GateState| !state.holds;
        let waited = self.changed.wait_timeout_while(state, HOLD_WITHIN, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.holds
    }
}

/// A step without the writer, and the steps over the same batch beside it.
#[derive(Default)]
struct Pair {
    without: f64,
    meanwhile: Vec<f64>,
}

/// A checkpoint that is written while steps go on.
struct Trial {
    handing_over: f64,
    /// No step ran, until the writer was held.
    waiting: Duration,
    /// Processor time of the writer.
    processor: Duration,
    path: PathBuf,
    pairs: Vec<Pair>,
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
    for batch in 0..training.steps.len() {
        training.step(batch)?;
    }
    let (gate, (told, durable)) = (Arc::new(Gate::default()), channel());
    let passed = gate.clone();
    let mut writer = Writer::start(
        run.clone(),
        1,
        Pace::beside(settings.device),
        move || passed.pass(),
        move |written| {
            let Written::Committed { path, processor, .. } = written else { return false };
            // nobody listens any more when a step has failed
            let _ = told.send((path, processor));
            true
        },
    );
    let mut trials = Vec::new();
    for _ in 0..checkpoints {
        let trial = write_beside(&mut training, &mut writer, &gate, &durable);
        // the writer's thread is waited for when it is dropped
        gate.open();
        trials.push(trial?);
    }
    drop(writer);
    let pairs: usize = trials.iter().map(|trial| trial.pairs.len()).sum();
    if pairs < FEWEST_PAIRS {
        let text =
            format!("{pairs} steps began while checkpoints were written, too few to compare: take more --checkpoints");
        return Err(WorkerError::Usage(text));
    }
    let newest = trials.last().map(|trial| checkpoint::check(&trial.path)).transpose()?;
    let bytes = newest.map_or(0, |state| state.files.values().map(|file| file.bytes).sum());
    Ok(summarize(settings, training.stepper.parameters.count(), bytes, &trials))
}

fn write_beside(
    training: &mut Training<'_>,
    writer: &mut Writer,
    gate: &Gate,
    durable: &Receiver<(PathBuf, Duration)>,
) -> Result<Trial, WorkerError> {
    let (mut pairs, mut waiting) = (Vec::<Pair>::new(), Duration::ZERO);
    let mut close = || {
        let started = Instant::now();
        let held = gate.close();
        waiting += started.elapsed();
        held
    };
    let started = Instant::now();
    writer.save(snapshot(training.state(), &training.stepper))?;
    let handing_over = started.elapsed().as_secs_f64();
    // the first step after the copy counts, however soon the rest was written
    while pairs.is_empty() || !writer.is_idle() {
        let (batch, mut pair) = (pairs.len(), Pair::default());
        // each kind comes first in every other pair; a writer that waits for the disk is not held
        let mut held = false;
        if !batch.is_multiple_of(2) && close() {
            (held, pair.without) = (true, training.step(batch)?);
        }
        gate.open();
        pair.meanwhile.push(training.step(batch)?);
        while !held {
            if close() || writer.is_idle() {
                (held, pair.without) = (true, training.step(batch)?);
            } else {
                gate.open();
                pair.meanwhile.push(training.step(batch)?);
            }
        }
        gate.open();
        pairs.push(pair);
    }
    writer.settle()?;
    let (path, processor) = durable.recv().map_err(|_| checkpoint::CheckpointError::WriterGone)?;
    Ok(Trial { handing_over, waiting, processor, path, pairs })
}

fn summarize(settings: &BenchSettings, parameters: i64, bytes: u64, trials: &[Trial]) -> CheckpointResult {
    let of = |value: fn(&Trial) -> f64| trials.iter().map(value).collect::<Vec<f64>>();
    let writing = of(|trial| {
        let steps = trial.pairs.iter().flat_map(|pair| &pair.meanwhile);
        steps.sum::<f64>() + trial.waiting.as_secs_f64()
    });
    let handing_over = of(|trial| trial.handing_over);
    let pairs = || trials.iter().flat_map(|trial| &trial.pairs);
    let differences: Vec<f64> =
        pairs().map(|pair| pair.meanwhile.iter().map(|seconds| seconds - pair.without).sum()).collect();
    let base: f64 = pairs().map(|pair| pair.without * pair.meanwhile.len() as f64).sum();
    let longer = pairs().map(|pair| {
        let meanwhile = pair.meanwhile.iter().sum::<f64>() / pair.meanwhile.len() as f64;
        (meanwhile / pair.without).ln()
    });
    let copying = handing_over.iter().sum::<f64>() / base;
    let count = differences.len() as f64;
    let mean = differences.iter().sum::<f64>() / count;
    let variance = differences.iter().map(|one| (one - mean).powi(2)).sum::<f64>() / (count - 1.0);
    CheckpointResult {
        device: format!("{:?}", settings.device),
        users: settings.config.training.global_batch,
        parameters,
        bytes,
        writer_share: trials
            .iter()
            .zip(&writing)
            .map(|(trial, seconds)| trial.processor.as_secs_f64() / seconds)
            .collect(),
        lost_share: count * mean / base + copying,
        lost_share_error: (count * variance).sqrt() / base,
        lost_share_middle: middle_half(longer.collect()).exp_m1() + copying,
        steps_meanwhile: pairs().flat_map(|pair| pair.meanwhile.clone()).collect(),
        steps_without: pairs().map(|pair| pair.without).collect(),
        handing_over,
        writing,
    }
}

/// The mean of the values between the quartiles; NaN if there are none.
fn middle_half(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let outside = values.len() / 4;
    let inside = &values[outside..values.len() - outside];
    inside.iter().sum::<f64>() / inside.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_half_knows_nothing_of_what_is_far_out() {
        assert_eq!(middle_half(vec![900.0, 2.0, 1.0, 4.0, -70.0, 3.0, 80.0, -8.0]), 2.5);
        assert_eq!(middle_half(vec![1.0, 5.0]), 3.0);
        assert!(middle_half(Vec::new()).is_nan());
    }

    #[test]
    fn a_held_writer_stands_before_the_gate_until_it_is_opened() {
        let gate = Arc::new(Gate::default());
        assert!(!gate.close(), "nobody is there");
        let (passed, passes) = channel();
        let writer = std::thread::spawn({
            let gate = gate.clone();
            move || {
                gate.pass();
                passed.send(()).unwrap();
            }
        });
        while !gate.close() {}
        assert!(passes.try_recv().is_err());
        gate.open();
        passes.recv().unwrap();
        writer.join().unwrap();
        assert!(!gate.close(), "it has gone on");
    }
}
