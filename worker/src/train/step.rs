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

use learn_domain::Phase;
use learn_domain::config::OptimizerConfig;
use learn_domain::random;
use learn_model::optimizer::{self, UpdateScale};
use learn_model::{AdamW, Forward, Parameters, Pch, RowGradient};
use learn_proto::convert::AfterStep;
use learn_telemetry::WorkerMetrics;
use tch::{Device, Tensor};

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

/// Measures the phases of steps on the host. On a GPU a phase ends when its work is enqueued, and the work counts in the
/// next phase that waits for the GPU, which are `gather` and `reduce`.
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
        self.progress.enter(phase);
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
        let announced = Announced(exchange.announce(announcement(&share, word))?);
        match announced.after() {
            AfterStep::Stop => return Ok(StepEnd::Stopped),
            AfterStep::Regroup => return Ok(StepEnd::Regroup),
            AfterStep::Continue => {}
        }

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
            row_counts: &announced.counts(|said| said.rows),
            item_counts: &announced.counts(|said| said.targets),
            seeds,
            pairs: prepared.meta.global_pairs as i64,
            exposures: announced.0.iter().map(|said| said.exposures).sum(),
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

        self.clock.enter(Phase::Optimizer);
        let gradient_norm = loss.is_finite().then(|| self.update(&flat, rows.as_ref(), learning_rate));
        self.clock.stop();
        let Some(gradient_norm) = gradient_norm.filter(|norm| norm.is_finite()) else {
            let suspects = non_finite::suspects(&share, &embeddings, prepared);
            return Ok(StepEnd::NonFinite(NonFiniteStep {
                loss,
                gradient_norm,
                before: announced.non_finite(),
                suspects,
            }));
        };
        let global =
            GlobalRows { users: announced.total(|said| said.rows), items: announced.total(|said| said.targets) };
        let (tokens, encoded) = (announced.total(|said| said.tokens), announced.total(|said| said.encoded_rows));
        let shape = self.model.shape();
        let output_dim = shape.model.output_dim.into();
        Ok(StepEnd::Finished(StepOutcome {
            loss,
            accuracy: correct / (prepared.meta.global_pairs.max(1)) as f64,
            cvr_loss: cvr.map(|_| cvr_loss),
            gradient_norm,
            tokens,
            padding_share: 1.0 - tokens as f64 / encoded.max(1) as f64,
            flops: measure::flops(shape, prepared, &self.objective, global),
            geometry: measure::geometry(prepared.meta.step, (&share, &embeddings), &self.objective, output_dim),
        }))
    }

    /// Clips the whole gradient and applies it; its norm before that. If this is not a finite number, nothing is applied.
    fn update(&mut self, flat: &[Tensor], rows: Option<&RowGradient>, learning_rate: f64) -> f64 {
        let norm = optimizer::norm(flat, rows.map(|gradient| &gradient.rows));
        if norm.is_finite() {
            let scale = UpdateScale::clipped(learning_rate, norm, self.optimizer_config.clip_norm);
            self.optimizer.step(&mut self.parameters, flat, scale);
            if let Some(rows) = rows {
                self.optimizer.step_rows(&mut self.parameters, rows, scale);
            }
        }
        norm
    }
}

fn announcement(share: &Share, word: Word) -> Announcement {
    Announcement {
        rows: share.row_user.size()[0],
        targets: share.item_id.size()[0],
        tokens: share.tokens as i64,
        encoded_rows: share.encoded_rows as i64,
        exposures: share.exposures.count(),
        after: word.after,
        non_finite: word.non_finite.into(),
    }
}

/// What the ranks have said before a step, in their order.
struct Announced(Vec<Announcement>);

impl Announced {
    /// What one of them was asked to do goes for all.
    fn after(&self) -> AfterStep {
        self.0.iter().map(|said| said.after).max().unwrap_or(AfterStep::Continue)
    }

    fn counts(&self, part: fn(&Announcement) -> i64) -> Vec<usize> {
        self.0.iter().map(|said| part(said) as usize).collect()
    }

    fn total(&self, part: fn(&Announcement) -> i64) -> u64 {
        self.0.iter().map(part).sum::<i64>().max(0) as u64
    }

    /// Steps whose loss or gradient was not finite, as the one that knows of most has counted.
    fn non_finite(&self) -> u32 {
        let most = self.0.iter().map(|said| said.non_finite).max().unwrap_or(0);
        u32::try_from(most).unwrap_or(u32::MAX)
    }
}
