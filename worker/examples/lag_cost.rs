//! What it costs a step that the coordinator can name the rank that hangs or lags: `lag_cost CONFIG.json`.
//!
//! Input: a resolved configuration as JSON. Output: in turns, the seconds of one rank's step at this configuration (its share of
//! the global batch, synthetic data) and the seconds of all that a step does for the sake of these reports: phases and
//! collectives that are marked for the heartbeat, the clocks of its own work, and the coordinator's scores. The heartbeats
//! themselves are sent by another thread; `tests/tests/measure.rs` measures what they cost.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use learn_domain::progress::{Lag, Work};
use learn_domain::{Config, Phase, Rank, Step};
use learn_telemetry::WorkerMetrics;
use learn_worker::bench::step::bench_step;
use learn_worker::bench::synthetic::BenchSettings;
use learn_worker::control::Progress;
use learn_worker::train::PhaseClock;

/// Turns of step and reports.
const ROUNDS: usize = 4;
/// Steps of a turn.
const STEPS: u32 = 20;
/// Repetitions of a turn's reports.
const REPORTS: u32 = 100_000;
/// Shape of the content embeddings and the catalogue: those of MovieLens-100K with MiniLM.
const INPUT_DIM: u32 = 384;
const ITEMS: u32 = 1682;
/// Phases of a step with an in-batch objective, in their order, as the training thread enters them.
const PHASES: [Phase; 9] = [
    Phase::DataWait,
    Phase::Gather,
    Phase::Forward,
    Phase::Gather,
    Phase::Loss,
    Phase::Gather,
    Phase::Backward,
    Phase::Reduce,
    Phase::Optimizer,
];
/// Collectives of such a step: two announcements, two gathers, a scatter, two reductions.
const COLLECTIVES: u32 = 7;

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: lag_cost CONFIG.json")?;
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let mut config: Config = serde_json::from_str(&text).with_context(|| {
        format!("{path} is no resolved configuration: `learn-launch config show FILE --json` prints one")
    })?;
    let workers = config.cluster.workers.max(1);
    config.training.global_batch = (config.training.global_batch / workers).max(1);
    let settings = BenchSettings {
        config,
        input_dim: INPUT_DIM,
        items: ITEMS,
        lengths: Vec::new(),
        batches: 1,
        repetitions: STEPS,
        device: tch::Device::Cpu,
    };
    println!("{workers} ranks with {} users each", settings.config.training.global_batch);
    for round in 1..=ROUNDS {
        let mut steps = bench_step(&settings)?.seconds;
        steps.sort_by(f64::total_cmp);
        let step = steps[steps.len() / 2];
        let reports = reports().as_secs_f64();
        let scores = scores(workers).as_secs_f64();
        println!(
            "{round}: a step {:.3} ms; its reports {:.2} us on the worker, {:.2} us on the coordinator: {:.4} % of the step",
            1e3 * step,
            1e6 * reports,
            1e6 * scores,
            100.0 * (reports + scores) / step,
        );
    }
    Ok(())
}

/// What one step of a worker pays.
fn reports() -> Duration {
    let progress = Arc::new(Progress::default());
    let mut clock = PhaseClock::new(WorkerMetrics::new(), progress.clone());
    let mut waited = Duration::ZERO;
    let started = Instant::now();
    for step in 0..REPORTS {
        let (asked, before) = (Instant::now(), waited);
        for phase in PHASES {
            clock.enter(phase);
        }
        for _ in 0..COLLECTIVES {
            progress.enter_collective();
            let entered = Instant::now();
            waited += entered.elapsed();
            progress.leave_collective();
        }
        progress.finished(Step(step.into()));
        let arrived = Instant::now();
        black_box(Work {
            data_seconds: (arrived - asked).as_secs_f64(),
            compute_seconds: arrived.elapsed().saturating_sub(waited - before).as_secs_f64(),
        });
    }
    started.elapsed() / REPORTS
}

/// What the coordinator pays for the reports of one step.
fn scores(workers: u32) -> Duration {
    let mut lag = Lag::default();
    let started = Instant::now();
    for step in 0..REPORTS {
        for rank in 0..workers {
            let seconds = 0.1 + f64::from(step % 7) * 1e-3;
            black_box(lag.add(Rank(rank), Work { data_seconds: 0.0, compute_seconds: seconds }));
        }
    }
    started.elapsed() / REPORTS
}
