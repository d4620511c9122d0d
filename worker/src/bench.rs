//! `learn-worker bench-step`: seconds of a training step on synthetic data, one rank, no network.
//!
//! Input: a model shape, a batch, and lengths. Output: users and tokens per second of each repetition.

use std::sync::Arc;
use std::time::Instant;

use half::f16;
use learn_collective::{Aborter, Group, MemoryRendezvous, connect_tcp};
use learn_domain::UserIndex;
use learn_domain::config::{Config, ObjectiveKind, Precision};
use learn_domain::random::Draws;
use learn_domain::report::DatasetFacts;
use learn_domain::sampling::{SampleKey, SamplingShape, uniform_items};
use learn_model::{AdamW, Forward, Parameters, Pch};
use learn_proto::flight::BatchMeta;
use learn_telemetry::WorkerMetrics;
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::ceiling;
use crate::control::Progress;
use crate::error::WorkerError;
use crate::feed::PreparedStep;
use crate::feed::assemble::{Layout, MicroBatch, Seen, UserShare, assemble};
use crate::train::{Exchange, FullSoftmax, InBatch, Objective, PhaseClock, Stepper, Word, shape};

/// What is measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchSettings {
    pub config: Config,
    pub input_dim: u32,
    pub items: u32,
    /// History lengths, which users take in turn; if there are none they are uniform.
    #[serde(skip)]
    pub lengths: Vec<u32>,
    pub repetitions: u32,
    #[serde(skip)]
    pub device: tch::Device,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct BenchResult {
    pub device: String,
    pub precision: Precision,
    pub users: u32,
    pub tokens: u64,
    pub parameters: i64,
    /// Seconds of each repetition after one warm-up.
    pub seconds: Vec<f64>,
    pub median_users_per_second: f64,
    pub median_tokens_per_second: f64,
    /// Operations of the step's matrix products by its median seconds.
    pub gflops_per_second: f64,
    /// Of the same products, each timed alone after the steps.
    pub ceiling_gflops_per_second: f64,
    /// The former by the latter.
    pub ceiling_share: f64,
    pub loss: f64,
}

/// Measures steps.
///
/// # Errors
/// If the device or the step fails.
pub fn bench_step(settings: &BenchSettings) -> Result<BenchResult, WorkerError> {
    let config = &settings.config;
    let metrics = WorkerMetrics::new();
    let facts = DatasetFacts { embedding_dim: settings.input_dim, items: settings.items, ..DatasetFacts::default() };
    let model = Pch::new(shape(config, &facts))?;
    let parameters = Parameters::init(model.shape(), config.job.seed, settings.device);
    let mut stepper = Stepper {
        optimizer: AdamW::new(&parameters, &config.optimizer),
        model,
        parameters,
        optimizer_config: config.optimizer.clone(),
        forward: Forward { train: true, precision: config.training.precision },
        device: settings.device,
        input_dim: settings.input_dim as usize,
        objective: synthetic_objective(settings),
        conversion: None,
        draw_seed: config.job.seed,
        clock: PhaseClock::new(metrics.clone(), Arc::new(Progress::default())),
    };
    let group = Group {
        rank: 0,
        world_size: 1,
        generation: 1,
        secret: b"a world of one has no peers".to_vec(),
        bind: "127.0.0.1".into(),
        advertise: "127.0.0.1".into(),
        timeout: config.cluster.collective_timeout.0,
        aborter: Aborter::default(),
    };
    let mut exchange = Exchange::new(connect_tcp(group, &MemoryRendezvous::default())?, metrics, Arc::default());
    let step = synthetic_step(settings);
    let tokens: u64 = step.micro_batches.iter().map(|(batch, _)| batch.tokens).sum();
    let mut seconds = Vec::new();
    let mut loss = 0.0;
    for repetition in 0..=settings.repetitions {
        learn_torch::synchronize(settings.device);
        let started = Instant::now();
        let end = stepper.step(&step, &mut exchange, config.optimizer.learning_rate, Word::default())?;
        learn_torch::synchronize(settings.device);
        loss = end.finished().map_or(loss, |outcome| outcome.loss);
        if repetition > 0 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
    let kind = learn_torch::product_kind(config.training.precision).unwrap_or(Kind::Float);
    let batches: Vec<&MicroBatch> = step.micro_batches.iter().map(|(batch, _)| batch).collect();
    let model = (&config.model, i64::from(settings.input_dim));
    let ceiling = ceiling::measure(model, &batches, (kind, settings.device), settings.repetitions);
    let giga = |seconds: f64| ceiling.flops / seconds / 1e9;
    Ok(BenchResult {
        device: format!("{:?}", settings.device),
        precision: config.training.precision,
        users: config.training.global_batch,
        tokens,
        parameters: stepper.parameters.count(),
        seconds,
        median_users_per_second: f64::from(config.training.global_batch) / median,
        median_tokens_per_second: tokens as f64 / median,
        gflops_per_second: giga(median),
        ceiling_gflops_per_second: giga(ceiling.seconds),
        ceiling_share: ceiling.seconds / median,
        loss,
    })
}

fn synthetic_objective(settings: &BenchSettings) -> Objective {
    let objective = &settings.config.objective;
    match objective.kind {
        ObjectiveKind::DenseAllAction | ObjectiveKind::NextItem => {
            Objective::InBatch(InBatch::new(objective, None, settings.device))
        }
        ObjectiveKind::FullSoftmax => {
            let shape = [i64::from(settings.items), i64::from(settings.input_dim)];
            let rows = Tensor::randn(shape, (Kind::Float, settings.device)) / f64::from(settings.input_dim).sqrt();
            Objective::FullSoftmax(FullSoftmax::new(objective, (rows.to_kind(Kind::Half), 0)))
        }
    }
}

/// A user whose last items are the targets, at the newest positions of both; and its pairs.
fn uncut(user: u32, items: &[u32], sampling: &SamplingShape) -> (UserShare, u64) {
    let (history, targets) = items.split_at(items.len() - sampling.targets as usize);
    let newest = |length: usize, most: u32| {
        let length = length as u32;
        (length.saturating_sub(most)..length).collect::<Vec<_>>()
    };
    let share = UserShare {
        user,
        place: user,
        user_positions: newest(history.len(), sampling.user_positions),
        item_positions: newest(targets.len(), sampling.item_positions),
        history: history.to_vec(),
        targets: targets.to_vec(),
        ..UserShare::default()
    };
    let pairs = (share.user_positions.len() * share.item_positions.len()) as u64;
    (share, pairs)
}

fn synthetic_step(settings: &BenchSettings) -> PreparedStep {
    let config = &settings.config;
    let sampling = config.sample_shape();
    let users = config.training.global_batch;
    let mut draws = Draws::new(&[config.job.seed]);
    let drawn = (0..users).filter_map(|user| {
        let given = settings.lengths.get(user as usize % settings.lengths.len().max(1));
        let length = match given {
            Some(&history) => history.min(sampling.history) + sampling.targets,
            None => 2 + draws.below(u64::from(sampling.history + sampling.targets - 1)) as u32,
        };
        let items: Vec<u32> = (0..length).map(|_| draws.below(u64::from(settings.items)) as u32).collect();
        if given.is_some() {
            return Some(uncut(user, &items, &sampling));
        }
        let key = SampleKey { seed: 1, epoch: 0, user: UserIndex(user) };
        UserShare::draw(Seen { items: &items, times: &[] }, key, &sampling)
    });
    let (share, pairs): (Vec<UserShare>, Vec<u64>) = drawn.unzip();
    let dim = settings.input_dim as usize;
    let scale = 1.0 / (dim as f64).sqrt();
    let layout = Layout::new(&config.objective, config.training.micro_batch);
    let further = uniform_items(config.job.seed, 0, settings.items, config.objective.uniform_negatives);
    let micro_batches = assemble(&share, &further, layout)
        .into_iter()
        .map(|batch| {
            let values = batch.unique_items.len() * dim;
            let rows = (0..values).map(|_| f16::from_f64((2.0 * draws.unit() - 1.0) * 1.7 * scale)).collect();
            (batch, rows)
        })
        .collect();
    let meta =
        BatchMeta { step: 1, epoch: 0, global_users: users, global_pairs: pairs.iter().sum(), part: 0, parts: 1 };
    let places = share.iter().map(|user| user.place).collect();
    PreparedStep { meta, users: share.iter().map(|user| user.user).collect(), places, micro_batches }
}
