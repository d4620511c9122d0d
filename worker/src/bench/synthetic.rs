//! Models and batches from nothing.
//!
//! Input: a model shape, a batch, lengths. Output: what a step needs: a stepper, prepared steps, an exchange. Pure but for
//! the weights on the device: the same settings give the same batches on every rank.

use std::sync::Arc;

use half::f16;
use learn_collective::{Aborter, Buffer, Buffers, Collective, CollectiveError, Group, MemoryRendezvous, connect_tcp};
use learn_domain::UserIndex;
use learn_domain::config::{Config, ObjectiveKind};
use learn_domain::plan::split_by_tokens;
use learn_domain::random::Draws;
use learn_domain::report::DatasetFacts;
use learn_domain::sampling::{SampleKey, SamplingShape, uniform_items};
use learn_model::{AdamW, Forward, Parameters, Pch};
use learn_proto::flight::BatchMeta;
use learn_telemetry::WorkerMetrics;
use learn_torch::HostRows;
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::control::Progress;
use crate::error::WorkerError;
use crate::feed::assemble::{Layout, Seen, UserShare, assemble};
use crate::feed::{PassRows, PreparedStep};
use crate::train::{DeviceRows, Exchange, FullSoftmax, InBatch, Objective, PhaseClock, Stepper, shape};

/// What is measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchSettings {
    pub config: Config,
    pub input_dim: u32,
    pub items: u32,
    /// History lengths, which users take in turn; if there are none, sequences of uniform lengths are cut as in a training.
    #[serde(skip)]
    pub lengths: Vec<u32>,
    /// Different batches, which the steps take in turn.
    pub batches: u32,
    pub repetitions: u32,
    #[serde(skip)]
    pub device: tch::Device,
}

/// A rank among others.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    pub rank: usize,
    pub world_size: usize,
}

impl Seat {
    /// The only rank.
    pub const ALONE: Self = Self { rank: 0, world_size: 1 };
}

impl BenchSettings {
    /// What the model is told of its dataset.
    #[must_use]
    pub fn facts(&self) -> DatasetFacts {
        DatasetFacts { embedding_dim: self.input_dim, items: self.items, ..DatasetFacts::default() }
    }

    /// A model with random weights and all that trains it.
    ///
    /// # Errors
    /// If the shape makes no model.
    pub fn stepper(&self, metrics: &WorkerMetrics) -> Result<Stepper, WorkerError> {
        let config = &self.config;
        let model = Pch::new(shape(config, &self.facts()))?;
        let parameters = Parameters::init(model.shape(), config.job.seed, self.device);
        Ok(Stepper {
            optimizer: AdamW::new(&parameters, &config.optimizer),
            model,
            parameters,
            optimizer_config: config.optimizer.clone(),
            forward: Forward { train: true, precision: config.training.precision },
            activation_checkpointing: config.training.activation_checkpointing,
            device: self.device,
            rows: DeviceRows::new((0, self.input_dim as usize), self.device),
            objective: self.objective(),
            conversion: None,
            draw_seed: config.job.seed,
            clock: PhaseClock::new(metrics.clone(), Arc::new(Progress::default())),
        })
    }

    fn objective(&self) -> Objective {
        let objective = &self.config.objective;
        match objective.kind {
            ObjectiveKind::DenseAllAction | ObjectiveKind::NextItem => {
                Objective::InBatch(InBatch::new(objective, None, self.device))
            }
            ObjectiveKind::FullSoftmax => {
                let shape = [i64::from(self.items), i64::from(self.input_dim)];
                let rows = Tensor::randn(shape, (Kind::Float, self.device)) / f64::from(self.input_dim).sqrt();
                Objective::FullSoftmax(FullSoftmax::new(objective, (rows.to_kind(Kind::Half), 0)))
            }
        }
    }

    /// The batches, a rank's share of each.
    ///
    /// # Errors
    /// If there is too little memory for a GPU's rows.
    pub fn steps(&self, seat: Seat) -> Result<Vec<PreparedStep>, WorkerError> {
        (0..self.batches.max(1)).map(|number| self.step(number, seat)).collect()
    }

    fn step(&self, number: u32, seat: Seat) -> Result<PreparedStep, WorkerError> {
        let config = &self.config;
        let sampling = config.sample_shape();
        let users = config.training.global_batch;
        let mut draws = Draws::new(&[config.job.seed, number.into()]);
        let drawn = (0..users).filter_map(|user| {
            let lengths = self.lengths.len().max(1);
            let given = self.lengths.get((number as usize * users as usize + user as usize) % lengths);
            let length = match given {
                Some(&history) => history.min(sampling.history) + sampling.targets,
                None => 2 + draws.below(u64::from(sampling.history + sampling.targets - 1)) as u32,
            };
            let items: Vec<u32> = (0..length).map(|_| draws.below(u64::from(self.items)) as u32).collect();
            if given.is_some() {
                return Some(uncut(user, &items, &sampling));
            }
            let key = SampleKey { seed: 1, epoch: 0, user: UserIndex(user) };
            UserShare::draw(Seen { items: &items, times: &[] }, key, &sampling)
        });
        let (all, pairs): (Vec<UserShare>, Vec<u64>) = drawn.unzip();
        let tokens: Vec<u32> = all.iter().map(|user| (user.history.len() + user.targets.len()) as u32).collect();
        let places = split_by_tokens(&tokens, seat.world_size).swap_remove(seat.rank);
        let share: Vec<UserShare> = places.iter().map(|&place| all[place as usize].clone()).collect();

        let dim = self.input_dim as usize;
        let scale = 1.0 / (dim as f64).sqrt();
        let layout = Layout::new(&config.objective, config.training.micro_batch);
        let further = uniform_items(config.job.seed, 0, self.items, config.objective.uniform_negatives);
        let micro_batches = assemble(&share, &further, layout)
            .into_iter()
            .map(|batch| {
                let values = batch.unique_items.len() * dim;
                let mut rows = HostRows::new(values, self.device)?;
                rows.fill_with(|| f16::from_f64((2.0 * draws.unit() - 1.0) * 1.7 * scale));
                Ok((batch, PassRows::from(rows)))
            })
            .collect::<Result<_, WorkerError>>()?;
        let meta =
            BatchMeta { step: 1, epoch: 0, global_users: users, global_pairs: pairs.iter().sum(), part: 0, parts: 1 };
        let places = share.iter().map(|user| user.place).collect();
        Ok(PreparedStep { meta, users: share.iter().map(|user| user.user).collect(), places, micro_batches })
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

/// Tokens of a rank's share of a step.
#[must_use]
pub fn tokens(step: &PreparedStep) -> u64 {
    step.micro_batches.iter().map(|(batch, _)| batch.tokens).sum()
}

/// This rank's place in a group on this machine.
#[must_use]
pub fn group(seat: Seat, config: &Config) -> Group {
    Group {
        rank: seat.rank,
        world_size: seat.world_size,
        generation: 1,
        secret: b"a benchmark on one machine".to_vec(),
        bind: "127.0.0.1".into(),
        advertise: "127.0.0.1".into(),
        timeout: config.cluster.collective_timeout.0,
        shares_memory: config.cluster.shared_memory,
        aborter: Aborter::default(),
    }
}

/// An exchange over a collective that nobody looks at.
#[must_use]
pub fn exchange(collective: Box<dyn Collective>, metrics: WorkerMetrics) -> Exchange {
    Exchange::new(collective, metrics, Arc::default())
}

/// The exchange of a world of one.
///
/// # Errors
/// None that is known.
pub fn alone(config: &Config, metrics: WorkerMetrics) -> Result<Exchange, WorkerError> {
    Ok(exchange(connect_tcp(group(Seat::ALONE, config), &MemoryRendezvous::default())?, metrics))
}

/// How a [`Varied`] collective treats sums of gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// Each rank keeps its own. Everything small (losses, counts) is summed.
    LeftOut,
    /// No part is summed before all of them are there.
    Afterwards,
}

/// A collective to compare with one that sums gradients while the backward goes on.
pub struct Varied {
    pub ring: Box<dyn Collective>,
    pub sums: Sums,
}

/// Sums of fewer elements are not those of gradients.
const SMALL: usize = 1024;

impl Collective for Varied {
    fn rank(&self) -> usize {
        self.ring.rank()
    }

    fn world_size(&self) -> usize {
        self.ring.world_size()
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn all_reduce_sum(&mut self, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError> {
        match self.sums {
            Sums::LeftOut if buffer.len() >= SMALL => Ok(()),
            Sums::LeftOut | Sums::Afterwards => self.ring.all_reduce_sum(buffer),
        }
    }

    fn all_reduce_sums(&mut self, buffers: &mut Buffers<'_, '_>) -> Result<(), CollectiveError> {
        let all: Vec<Buffer<'_>> = buffers.flatten().collect();
        all.into_iter().try_for_each(|mut buffer| self.all_reduce_sum(&mut buffer))
    }

    fn all_gather(
        &mut self,
        counts: &[usize],
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
    ) -> Result<(), CollectiveError> {
        self.ring.all_gather(counts, send, recv)
    }

    fn reduce_scatter_sum(
        &mut self,
        counts: &[usize],
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
    ) -> Result<(), CollectiveError> {
        self.ring.reduce_scatter_sum(counts, send, recv)
    }

    fn broadcast(&mut self, root: usize, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError> {
        self.ring.broadcast(root, buffer)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.ring.barrier()
    }

    fn bytes_moved(&self) -> u64 {
        self.ring.bytes_moved()
    }

    fn aborter(&self) -> Aborter {
        self.ring.aborter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(lengths: Vec<u32>) -> BenchSettings {
        let mut config = Config::default();
        config.training.global_batch = 13;
        BenchSettings { config, input_dim: 4, items: 50, lengths, batches: 3, repetitions: 1, device: tch::Device::Cpu }
    }

    #[test]
    fn ranks_share_the_batch_that_one_would_have() {
        for lengths in [Vec::new(), vec![3, 9, 1, 40, 2]] {
            let settings = settings(lengths);
            let whole = settings.steps(Seat::ALONE).unwrap();
            let shares: Vec<_> = (0..3).map(|rank| settings.steps(Seat { rank, world_size: 3 }).unwrap()).collect();
            assert_eq!(whole.len(), 3);
            for (number, step) in whole.iter().enumerate() {
                let mut users: Vec<u32> = shares.iter().flat_map(|share| share[number].users.clone()).collect();
                users.sort_unstable();
                assert_eq!(users, step.users);
                assert_eq!(shares.iter().map(|share| tokens(&share[number])).sum::<u64>(), tokens(step));
                assert!(shares.iter().all(|share| share[number].meta.global_pairs == step.meta.global_pairs));
            }
            assert_ne!(tokens(&whole[0]), tokens(&whole[1]), "batches differ");
        }
    }

    #[test]
    fn users_take_the_lengths_in_turn() {
        let lengths = [3, 9, 1, 40, 2];
        let config = settings(lengths.to_vec());
        let targets = u64::from(config.config.sampling.targets);
        let mut turn = lengths.iter().cycle();
        for step in config.steps(Seat::ALONE).unwrap() {
            let histories: u64 = turn.by_ref().take(13).map(|&length: &u32| u64::from(length)).sum();
            assert_eq!(tokens(&step), histories + 13 * targets);
        }
    }
}
