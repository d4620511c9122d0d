//! `bench step`: seconds of a training step on synthetic data.
//!
//! Input: a model shape, a batch, and lengths. Output: users and tokens per second of each repetition; with several workers
//! also how much longer a step takes because gradients are summed over them.

use std::fmt;
use std::time::Instant;

use clap::Args;
use learn_collective::connect_tcp;
use learn_domain::config::Precision;
use learn_telemetry::WorkerMetrics;
use serde::Serialize;
use tch::Kind;

use super::arguments::ShapeArgs;
use super::ceiling::{self, Ceiling};
use super::crew::{Crew, Member};
use super::memory;
use super::statistics::Spread;
use super::synthetic::{BenchSettings, Seat, Sums, Varied, alone, exchange, group, tokens};
use crate::error::WorkerError;
use crate::feed::PreparedStep;
use crate::feed::assemble::MicroBatch;
use crate::train::Word;

pub const HELP: &str = "\
The default is the published model: 4 layers, hidden 768, content embeddings of 4096 dimensions, an item tower that \
sees each target alone. `--item-tower content --output-dim 4096` is the cheaper variant that the targets are their \
content embeddings. No network: rows are in memory, as after prefetching.

Examples:
  learn-launch bench step --precision bf16 --threads 2
  learn-launch bench step --item-tower content --output-dim 4096 --batch 128
  learn-launch bench step --workers 4 --threads 1
                        (what summing gradients adds)
  learn-launch bench step --workers 4 --threads 1 --sockets --json
                        (the same as between machines)";

/// Flags of `bench step`.
#[derive(Clone, Debug, Args)]
pub struct StepArgs {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Ranks, each a process on this machine, which share the batch; on the CPU
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Let the ranks sum gradients by sockets, as between machines, and not by memory that they share
    #[arg(long)]
    sockets: bool,
    #[command(flatten)]
    member: Member,
    #[arg(long)]
    pub json: bool,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct StepResult {
    pub device: String,
    pub precision: Precision,
    pub users: u32,
    /// Of a step, in the mean over the batches; with several workers of the first one's share.
    pub tokens: f64,
    pub parameters: i64,
    /// Seconds of each repetition after a warm-up.
    pub seconds: Vec<f64>,
    pub median_users_per_second: f64,
    /// With one worker.
    #[serde(flatten)]
    pub products: Option<Products>,
    pub loss: f64,
    /// Of this process, in host memory; none where the machine does not tell.
    pub memory: Option<Memory>,
    /// With several workers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduction: Option<Reduction>,
}

/// What a row of steps came to.
struct Timed {
    seconds: Vec<f64>,
    loss: f64,
    parameters: i64,
}

impl StepResult {
    fn new(settings: &BenchSettings, steps: &[PreparedStep], Timed { seconds, loss, parameters }: Timed) -> Self {
        let training = &settings.config.training;
        Self {
            device: format!("{:?}", settings.device),
            precision: training.precision,
            users: training.global_batch,
            tokens: steps.iter().map(tokens).sum::<u64>() as f64 / steps.len() as f64,
            parameters,
            median_users_per_second: f64::from(training.global_batch) / Spread::of(&seconds).median,
            seconds,
            products: None,
            loss,
            memory: None,
            reduction: None,
        }
    }
}

/// What of a step is matrix products, which are timed alone in turns with the steps.
#[derive(Clone, Debug, Serialize)]
pub struct Products {
    /// Operations of a step's products by its seconds, in the median of the steps.
    pub gflops_per_second: f64,
    /// Of the same products alone, in the median of the turns.
    pub ceiling_gflops_per_second: f64,
    /// Users of a step by the seconds of its products alone, in the median of the turns.
    pub ceiling_users_per_second: f64,
    /// The seconds of a step's products alone by those of the step, in the median of the turns.
    pub ceiling_share: f64,
    /// Of each turn.
    pub ceiling_shares: Vec<f64>,
}

impl Products {
    /// Those of steps of so many users and seconds, each with what its products took right after it.
    fn of(users: u32, turns: &[(f64, Ceiling)]) -> Self {
        let median = |of: fn(&(f64, Ceiling)) -> f64| Spread::of(&turns.iter().map(of).collect::<Vec<_>>()).median;
        let ceiling_shares: Vec<f64> = turns.iter().map(|(seconds, alone)| alone.seconds / seconds).collect();
        Self {
            gflops_per_second: median(|(seconds, alone)| alone.flops / seconds) / 1e9,
            ceiling_gflops_per_second: median(|(_, alone)| alone.flops / alone.seconds) / 1e9,
            ceiling_users_per_second: f64::from(users) * median(|(_, alone)| 1.0 / alone.seconds),
            ceiling_share: Spread::of(&ceiling_shares).median,
            ceiling_shares,
        }
    }
}

/// Times the products of one step alone.
fn products_alone(settings: &BenchSettings, step: &PreparedStep) -> Ceiling {
    let kind = learn_torch::product_kind(settings.config.training.precision).unwrap_or(Kind::Float);
    let kind = learn_model::multiplied_kind(kind, settings.device);
    let model = (&settings.config.model, i64::from(settings.input_dim));
    let batches: Vec<&MicroBatch> = step.micro_batches.iter().map(|(batch, _)| batch).collect();
    ceiling::measure(model, &batches, (kind, settings.device))
}

/// What a process holds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Before there is a model: libtorch and the program.
    pub loaded_bytes: u64,
    /// Weights, gradients and two moments, in f32.
    pub state_bytes: u64,
    /// The most that was resident.
    pub peak_bytes: u64,
}

impl Memory {
    fn of(loaded: Option<u64>, parameters: i64) -> Option<Self> {
        let state_bytes = 16 * parameters.max(0) as u64;
        Some(Self { loaded_bytes: loaded?, state_bytes, peak_bytes: memory::resident("VmHWM:")? })
    }
}

/// What summing gradients adds to a step.
#[derive(Clone, Debug, Serialize)]
pub struct Reduction {
    pub workers: u32,
    /// By memory that the ranks share, or by sockets.
    pub by: &'static str,
    /// Seconds of steps that leave the sum of the gradients out, in turns with the others.
    pub seconds_without: Vec<f64>,
    /// How much longer the median step takes with it, as a share of the step without.
    pub added_share: f64,
    /// By sockets also steps that begin with the sum when the backward has ended, in turns with the others.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub afterwards: Option<Afterwards>,
}

/// What summing gradients adds to a step if it waits for the end of the backward.
#[derive(Clone, Debug, Serialize)]
pub struct Afterwards {
    pub seconds_afterwards: Vec<f64>,
    pub added_share_afterwards: f64,
}

impl fmt::Display for StepResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spread = Spread::of(&self.seconds);
        write!(
            f,
            "{} users, {:.0} tokens{} and {} parameters on {} ({:?} products)\n{:.1} users/s in the median of {} steps \
             ({:.1} to {:.1}); a step takes {:.1} ms; loss {:.4}",
            self.users,
            self.tokens,
            if self.reduction.is_some() { " of the first worker's share" } else { "" },
            self.parameters,
            self.device,
            self.precision,
            self.median_users_per_second,
            self.seconds.len(),
            f64::from(self.users) / spread.max,
            f64::from(self.users) / spread.min,
            1e3 * spread.median,
            self.loss
        )?;
        if let Some(products) = &self.products {
            write!(
                f,
                "\n{:.0} GFLOP/s in matrix products, {:.1} % of what they reach alone ({:.1} users/s)",
                products.gflops_per_second,
                100.0 * products.ceiling_share,
                products.ceiling_users_per_second
            )?;
        }
        if let Some(reduction) = &self.reduction {
            write!(
                f,
                "\nsumming the gradients of {} workers by {} adds {:.1} % to a step",
                reduction.workers,
                reduction.by,
                100.0 * reduction.added_share
            )?;
            if let Some(afterwards) = &reduction.afterwards {
                write!(f, ", {:.1} % if it begins after the backward", 100.0 * afterwards.added_share_afterwards)?;
            }
        }
        Ok(())
    }
}

/// Measures as the flags say; nothing comes from a rank but the first.
///
/// # Errors
/// If the flags make no sense, or the device or a step fails.
pub fn run(args: &StepArgs) -> Result<Option<StepResult>, WorkerError> {
    if args.sockets && args.workers == 1 {
        return Err(WorkerError::Usage("--sockets is between several ranks: add --workers 4".into()));
    }
    let mut settings = args.shape.settings()?;
    settings.config.cluster.shared_memory &= !args.sockets;
    if args.workers == 1 {
        return bench_step(&settings).map(Some);
    }
    if settings.device != tch::Device::Cpu {
        return Err(WorkerError::Usage("several workers are measured on the CPU only: add --device cpu".into()));
    }
    let crew = Crew::start(args.workers, &args.member)?;
    let measured = bench_ranks(&settings, &crew)?;
    crew.end()?;
    Ok(measured)
}

/// Measures steps of one rank.
///
/// # Errors
/// If the device or the step fails.
pub fn bench_step(settings: &BenchSettings) -> Result<StepResult, WorkerError> {
    let config = &settings.config;
    let loaded = memory::resident("VmRSS:");
    let metrics = WorkerMetrics::new();
    let mut stepper = settings.stepper(&metrics)?;
    let mut exchange = alone(config, metrics)?;
    let steps = settings.steps(Seat::ALONE)?;
    let mut turns = Vec::new();
    let mut loss = 0.0;
    for repetition in 0..=settings.repetitions {
        let step = &steps[repetition as usize % steps.len()];
        learn_torch::synchronize(settings.device);
        let started = Instant::now();
        // as the feed does when it hands out a step
        steps[(repetition as usize + 1) % steps.len()].begin_copies(settings.device);
        let end = stepper.step(step, &mut exchange, config.optimizer.learning_rate, Word::default())?;
        learn_torch::synchronize(settings.device);
        let seconds = started.elapsed().as_secs_f64();
        loss = end.finished().map_or(loss, |outcome| outcome.loss);
        if repetition > 0 {
            // between steps, when their activations are gone: the peak of memory stays theirs
            turns.push((seconds, products_alone(settings, step)));
        }
    }
    let seconds = turns.iter().map(|&(seconds, _)| seconds).collect();
    let mut result = StepResult::new(settings, &steps, Timed { seconds, loss, parameters: stepper.parameters.count() });
    result.memory = Memory::of(loaded, result.parameters);
    result.products = Some(Products::of(result.users, &turns));
    Ok(result)
}

/// Measures steps of one rank among several, in turns with and without the sum of the gradients, and by sockets also with
/// one that begins when the backward has ended.
fn bench_ranks(settings: &BenchSettings, crew: &Crew) -> Result<Option<StepResult>, WorkerError> {
    let (config, seat) = (&settings.config, crew.seat());
    let loaded = memory::resident("VmRSS:");
    let metrics = WorkerMetrics::new();
    let mut stepper = settings.stepper(&metrics)?;
    let steps = settings.steps(seat)?;
    let ring = |name: &str| connect_tcp(group(seat, config), &crew.rendezvous(name));
    let mut with = exchange(ring("with")?, metrics.clone());
    let varied = |name, sums| -> Result<_, WorkerError> {
        Ok(exchange(Box::new(Varied { ring: ring(name)?, sums }), metrics.clone()))
    };
    let mut without = varied("without", Sums::LeftOut)?;
    let mut afterwards = match config.cluster.shared_memory {
        true => None,
        false => Some(varied("afterwards", Sums::Afterwards)?),
    };
    with.share_gradient_memory(&mut stepper.parameters)?;
    let (mut seconds, mut seconds_without, mut seconds_afterwards, mut loss) =
        (Vec::new(), Vec::new(), Vec::new(), 0.0);
    // all kinds of step see every batch once for nothing, and then in the same order
    for repetition in 0..=settings.repetitions {
        let step = &steps[repetition as usize % steps.len()];
        let kinds = [(&mut with, &mut seconds), (&mut without, &mut seconds_without)];
        let third = afterwards.as_mut().map(|exchange| (exchange, &mut seconds_afterwards));
        for (exchange, seconds) in kinds.into_iter().chain(third) {
            exchange.barrier()?;
            let started = Instant::now();
            let end = stepper.step(step, exchange, config.optimizer.learning_rate, Word::default())?;
            // a step is over when the last rank has done it
            exchange.barrier()?;
            loss = end.finished().map_or(loss, |outcome| outcome.loss);
            if repetition > 0 {
                seconds.push(started.elapsed().as_secs_f64());
            }
        }
    }
    if seat.rank > 0 {
        return Ok(None);
    }
    let mut result = StepResult::new(settings, &steps, Timed { seconds, loss, parameters: stepper.parameters.count() });
    result.memory = Memory::of(loaded, result.parameters);
    let added = |seconds: &[f64]| Spread::of(seconds).median / Spread::of(&seconds_without).median - 1.0;
    result.reduction = Some(Reduction {
        workers: seat.world_size as u32,
        by: if config.cluster.shared_memory { "shared memory" } else { "sockets" },
        added_share: added(&result.seconds),
        afterwards: afterwards
            .map(|_| Afterwards { added_share_afterwards: added(&seconds_afterwards), seconds_afterwards }),
        seconds_without,
    });
    Ok(Some(result))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_held_against_the_products_of_its_own_turn() {
        // the machine was half as fast in the second turn, for both
        let turns = [
            (0.4, Ceiling { flops: 3e9, seconds: 0.3 }),
            (0.8, Ceiling { flops: 3e9, seconds: 0.6 }),
            (0.4, Ceiling { flops: 3e9, seconds: 0.3 }),
        ];
        let products = Products::of(60, &turns);
        assert!(products.ceiling_shares.iter().all(|share| (share - 0.75).abs() < 1e-12), "{products:?}");
        assert!((products.ceiling_share - 0.75).abs() < 1e-12);
        assert!((products.gflops_per_second - 7.5).abs() < 1e-9);
        assert!((products.ceiling_gflops_per_second - 10.0).abs() < 1e-9);
        assert!((products.ceiling_users_per_second - 200.0).abs() < 1e-9);
    }
}
