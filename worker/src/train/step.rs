//! One training step: prepared arrays in, updated parameters out.
//!
//! forward -> objective (gather, loss of the own rows, item gradients to their owners) -> CVR head, if any -> backward,
//! with the all-reduce of what is whole beside it -> clip -> update. With frozen towers only the head learns.
//! Invariants: the loss and the gradient are those of the whole global batch whatever
//! the number of ranks (promise 2); on an error nothing of the step has been applied, because the update comes last; a step that
//! is not finite is not applied on any rank.
//!
//! The learned logit scale is seen in full by every rank: each rank's part of its gradient comes from its own rows,
//! so the all-reduce of the flat gradient sums it up like any other parameter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use learn_domain::config::OptimizerConfig;
use learn_domain::random;
use learn_model::optimizer::{self, Pace};
use learn_model::{AdamW, Forward, Parameters, Pch};
use learn_proto::convert::AfterStep;
use learn_telemetry::{Phase, WorkerMetrics};
use tch::Device;

use super::device_rows::DeviceRows;
use super::exchange::{Announcement, Exchange};
use super::measure::{self, Geometry, GlobalRows};
use super::non_finite::{self, NonFiniteStep};
use super::objective::{Contribution, Conversion, Objective, Towers};
use super::passes::{self, Seeds, Share};
use crate::control::Progress;
use crate::error::WorkerError;
use crate::feed::PreparedStep;

/// The trainable state and what a step needs besides it.
pub struct Stepper {
    pub model: Pch,
    pub parameters: Parameters,
    pub optimizer: AdamW,
    pub optimizer_config: OptimizerConfig,
    pub forward: Forward,
    pub activation_checkpointing: bool,
    pub device: Device,
    pub rows: DeviceRows,
    pub objective: Objective,
    /// The CVR head, if the model has one.
    pub conversion: Option<Conversion>,
    /// Seed of dropout; the step and the rank are mixed in.
    pub draw_seed: u64,
    pub clock: PhaseClock,
}

/// Numbers of a finished step over the whole global batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutcome {
    pub loss: f64,
    pub accuracy: f64,
    /// The CVR head's part of the loss before its weight, if there is a head.
    pub cvr_loss: Option<f64>,
    pub gradient_norm: f64,
    pub tokens: u64,
    pub padding_share: f64,
    /// Operations that the model needed for this rank's share.
    pub flops: f64,
    /// Of a sample of this rank's embeddings, in some of the steps.
    pub geometry: Option<Geometry>,
}

/// What a rank has to say before a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Word {
    /// What it was asked to do before this step.
    pub after: AfterStep,
    /// Steps of the run whose loss or gradient was not finite, as it has counted them.
    pub non_finite: u32,
}

/// How a step ended, the same on every rank.
#[derive(Debug)]
pub enum StepEnd {
    Finished(StepOutcome),
    /// A rank was asked to stop before it: nothing was done on any rank.
    Stopped,
    /// A rank was asked to end the generation before it: nothing was done on any rank.
    Regroup,
    /// Loss or gradient was not finite: parameters and moments are as they were.
    NonFinite(NonFiniteStep),
}

impl StepEnd {
    /// The numbers of a finished step.
    #[must_use]
    pub fn finished(self) -> Option<StepOutcome> {
        match self {
            Self::Finished(outcome) => Some(outcome),
            Self::Stopped | Self::Regroup | Self::NonFinite(_) => None,
        }
    }
}

/// Measures the phases of steps on the host; on a GPU a phase ends when its work is enqueued.
pub struct PhaseClock {
    metrics: WorkerMetrics,
    progress: Arc<Progress>,
    current: Option<(Phase, Instant)>,
}

impl PhaseClock {
    #[must_use]
    pub fn new(metrics: WorkerMetrics, progress: Arc<Progress>) -> Self {
        Self { metrics, progress, current: None }
    }

    /// Ends the running phase and starts `phase`.
    pub fn enter(&mut self, phase: Phase) {
        self.stop();
        self.progress.enter(phase.as_str());
        self.current = Some((phase, Instant::now()));
    }

    /// Ends the running phase.
    pub fn stop(&mut self) -> Option<Duration> {
        let (phase, started) = self.current.take()?;
        let duration = started.elapsed();
        self.metrics.observe(phase, duration);
        Some(duration)
    }
}

impl Stepper {
    /// Does one step, unless a rank was asked to stop before it.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn step(
        &mut self,
        prepared: &PreparedStep,
        exchange: &mut Exchange,
        learning_rate: f64,
        word: Word,
    ) -> Result<StepEnd, WorkerError> {
        let seeds = Seeds {
            dropout: random::key(&[self.draw_seed, prepared.meta.step, exchange.rank() as u64]),
            items: random::key(&[self.draw_seed, prepared.meta.step]),
        };
        let share = Share::load(&prepared.micro_batches, &mut self.rows, seeds);
        self.clock.enter(Phase::Gather);
        let announced = exchange.announce(Announcement {
            rows: share.row_user.size()[0],
            targets: share.item_id.size()[0],
            tokens: share.tokens as i64,
            encoded_rows: share.encoded_rows as i64,
            exposures: share.exposures.count(),
            after: word.after,
            non_finite: word.non_finite.into(),
        })?;
        match announced.iter().map(|said| said.after).max() {
            Some(AfterStep::Stop) => return Ok(StepEnd::Stopped),
            Some(AfterStep::Regroup) => return Ok(StepEnd::Regroup),
            Some(AfterStep::Continue) | None => {}
        }
        let counts = |part: fn(&Announcement) -> i64| announced.iter().map(|said| part(said) as usize).collect();
        let (row_counts, item_counts): (Vec<usize>, Vec<usize>) =
            (counts(|said| said.rows), counts(|said| said.targets));

        self.clock.enter(Phase::Forward);
        let towers = Towers {
            model: &self.model,
            parameters: &self.parameters,
            forward: &self.forward,
            activation_checkpointing: self.activation_checkpointing,
        };
        let trains_towers = self.objective.trains_towers();
        let forwarded = if trains_towers {
            passes::forward(&share, towers)
        } else {
            tch::no_grad(|| passes::forward(&share, towers))
        };
        let embeddings = forwarded.detached();
        let mine = Contribution {
            share: &share,
            embeddings: &embeddings,
            row_counts: &row_counts,
            item_counts: &item_counts,
            seeds,
            pairs: prepared.meta.global_pairs as i64,
            exposures: announced.iter().map(|said| said.exposures).sum(),
        };
        let mut loss = self.objective.loss(&mine, towers, exchange, &mut self.clock)?;

        let cvr = self.conversion.map(|head| {
            self.clock.enter(Phase::Loss);
            head.add(&mut loss, &mine, towers)
        });

        self.clock.enter(Phase::Backward);
        let flat = exchange.sum_gradient(&self.parameters, &mut self.clock, |passed| {
            if trains_towers {
                passes::backward(&share, forwarded, &loss.gradient, towers, passed);
                self.parameters.add_logit_scale_gradient(&loss.d_log_scale);
            }
        })?;
        let rows = match self.parameters.row_gradient() {
            Some(mine) => Some(exchange.merge_rows(mine)?),
            None => None,
        };
        let own_cvr = cvr.as_ref().map_or(0.0, |cvr| cvr.double_value(&[]));
        let mut sums = [loss.loss.double_value(&[]), loss.correct.double_value(&[]), own_cvr];
        exchange.sum(&mut sums)?;
        let [loss, correct, cvr_loss] = sums;
        let not_finite = |gradient_norm| {
            let before = announced.iter().map(|said| said.non_finite).max().unwrap_or(0);
            let suspects = non_finite::suspects(&share, &embeddings, prepared);
            let before = u32::try_from(before).unwrap_or(u32::MAX);
            Ok(StepEnd::NonFinite(NonFiniteStep { loss, gradient_norm, before, suspects }))
        };
        if !loss.is_finite() {
            return not_finite(None);
        }

        self.clock.enter(Phase::Optimizer);
        let gradient_norm = optimizer::norm(&flat, rows.as_ref().map(|gradient| &gradient.rows));
        if !gradient_norm.is_finite() {
            return not_finite(Some(gradient_norm));
        }
        let pace = Pace::clipped(learning_rate, gradient_norm, self.optimizer_config.clip_norm);
        self.optimizer.step(&mut self.parameters, &flat, pace);
        if let Some(rows) = &rows {
            self.optimizer.step_rows(&mut self.parameters, rows, pace);
        }
        self.clock.stop();

        let total = |part: fn(&Announcement) -> i64| announced.iter().map(part).sum::<i64>().max(0) as u64;
        let global = GlobalRows { users: total(|said| said.rows), items: total(|said| said.targets) };
        let (tokens, rows) = (total(|said| said.tokens), total(|said| said.encoded_rows));
        Ok(StepEnd::Finished(StepOutcome {
            loss,
            accuracy: correct / (prepared.meta.global_pairs.max(1)) as f64,
            cvr_loss: cvr.map(|_| cvr_loss),
            gradient_norm,
            tokens,
            padding_share: 1.0 - tokens as f64 / rows.max(1) as f64,
            flops: measure::flops(self.model.shape(), prepared, &self.objective, global),
            geometry: measure::geometry(
                prepared.meta.step,
                (&share, &embeddings),
                &self.objective,
                self.model.shape().model.output_dim.into(),
            ),
        }))
    }
}
