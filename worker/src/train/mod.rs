//! The training task of a member: steps, evaluations and checkpoints until the job's last step or a stop.
//!
//! Input: the feed's prepared steps. Output: step reports, evaluations, checkpoints. Invariants: every rank runs the
//! same sequence of collectives, because each decision (stop, evaluate, save, best) follows from values that all ranks
//! share; only rank 0 writes and speaks for the whole batch.

mod exchange;
mod non_finite;
mod objective;
mod passes;
mod save;
mod step;

use std::path::Path;
use std::time::Instant;

pub use exchange::Exchange;
use learn_domain::config::{Config, ItemInput, ObjectiveKind};
use learn_domain::plan::{Plan, PlanKey};
use learn_domain::report::{DatasetFacts, Evaluation, Split, StepRecord};
use learn_domain::schedule::learning_rate;
use learn_domain::{Step, UserIndex};
use learn_model::objective::cvr;
use learn_model::{AdamW, Forward, Parameters, Pch, PchShape};
use learn_telemetry::Phase;
pub use objective::{Conversion, FullSoftmax, InBatch, Objective};
pub use passes::{rows_tensor, sequences};
use save::{Need, on_cpu, signature, start_writer};
use step::agree_on_start;
pub use step::{PhaseClock, StepEnd, Stepper, Word};

use crate::checkpoint::{self, Best, Snapshot, Writer};
use crate::control::FinishedStep;
use crate::error::WorkerError;
use crate::evaluate::{Catalogue, Evaluator, Request};
use crate::feed::assemble::Layout;
use crate::feed::flight::DataClient;
use crate::feed::{Feed, FeedSettings, UniformNegatives};
use crate::init::{Origin, Weights};
use crate::session::{Ended, Membership};

/// Most items of the catalogue that a fresh start measures.
const INIT_SAMPLE: usize = 16_384;

/// The shape of the model that a configuration and a dataset make.
#[must_use]
pub fn shape(config: &Config, dataset: &DatasetFacts) -> PchShape {
    PchShape {
        input_dim: dataset.embedding_dim.into(),
        items: dataset.items.into(),
        model: config.model.clone(),
        max_history: i64::from(config.sampling.history),
        cvr_hidden: config.objective.cvr_head().map(i64::from),
    }
}

/// Trains, from a checkpoint directory if one is given.
///
/// # Errors
/// Anything that keeps the job from going on; what is already durable stays.
pub fn run(membership: &Membership, exchange: Exchange, resume_from: Option<&str>) -> Result<Ended, WorkerError> {
    let mut trainer = Trainer::new(membership, exchange)?;
    match resume_from {
        Some(path) => trainer.restore(Path::new(path))?,
        None => trainer.initialize()?,
    }
    agree_on_start(&trainer.stepper.parameters, &mut trainer.exchange)?;
    if membership.member.is_first() {
        trainer.writer = Some(start_writer(membership));
    }
    trainer.hold();
    let ended = trainer.train()?;
    // every checkpoint is durable before any rank reads one; one that could not be written is told of when all is done
    let saved = trainer.finish();
    if ended == Ended::Done {
        trainer.test()?;
    }
    saved?;
    Ok(ended)
}

struct Trainer<'a> {
    membership: &'a Membership,
    config: &'a Config,
    exchange: Exchange,
    stepper: Stepper,
    evaluator: Evaluator,
    data: DataClient,
    /// On rank 0 only.
    writer: Option<Writer>,
    steps_per_epoch: u64,
    total_steps: u64,
    finished: Step,
    best: Option<Best>,
    init: Option<Origin>,
    saved: Option<Step>,
    /// Steps of the run whose loss or gradient was not finite.
    non_finite: u32,
    /// What a rollback goes back to, if `training.non_finite` may ask for one.
    held: Option<non_finite::Held>,
}

impl<'a> Trainer<'a> {
    fn new(membership: &'a Membership, exchange: Exchange) -> Result<Self, WorkerError> {
        let admission = &membership.admission;
        let (config, dataset) = (&admission.config, &admission.dataset);
        let plan = Plan::new(PlanKey {
            fingerprint: dataset.fingerprint.clone(),
            seed: config.job.seed,
            users: dataset.train_users,
            global_batch: config.training.global_batch,
        })?;
        let model = Pch::new(shape(config, dataset))?;
        let mut parameters = Parameters::init(model.shape(), config.job.seed, membership.device);
        let mut optimizer = AdamW::new(&parameters, &config.optimizer);
        if config.training.freeze_towers {
            optimizer.spare(&parameters, |name| !cvr::owns(name));
        }
        let handle = membership.member.handle();
        let patience = membership.member.patience();
        let data = handle.block_on(DataClient::new(&admission.data_locations, &membership.secret, patience))?;
        let mut evaluator = Evaluator::new(membership, data.clone())?;
        let counted = config.objective.logq_correction || config.model.item_input == ItemInput::ContentId;
        let popularity = if counted { Some(handle.block_on(data.popularity())?) } else { None };
        if config.model.item_input == ItemInput::ContentId
            && let Some(counts) = &popularity
        {
            let unseen: Vec<bool> = counts.iter().map(|&count| count == 0).collect();
            parameters.freeze_item_vectors(&tch::Tensor::from_slice(&unseen));
        }
        let objective = match config.objective.kind {
            _ if config.training.freeze_towers => Objective::Frozen,
            ObjectiveKind::DenseAllAction | ObjectiveKind::NextItem => {
                let popularity = popularity.filter(|_| config.objective.logq_correction);
                Objective::InBatch(InBatch::new(&config.objective, popularity.as_deref(), membership.device))
            }
            ObjectiveKind::FullSoftmax => {
                Objective::FullSoftmax(FullSoftmax::new(&config.objective, evaluator.own_items(&exchange)?))
            }
        };
        let weight = config.objective.cvr_weight;
        let stepper = Stepper {
            model,
            parameters,
            optimizer,
            optimizer_config: config.optimizer.clone(),
            forward: Forward { train: !config.training.freeze_towers, precision: config.training.precision },
            device: membership.device,
            input_dim: dataset.embedding_dim as usize,
            objective,
            conversion: config.objective.cvr_head().map(|_| Conversion { weight }),
            draw_seed: plan.draw_seed(),
            clock: PhaseClock::new(membership.metrics.clone(), membership.progress.clone()),
        };
        let steps_per_epoch = plan.steps_per_epoch();
        Ok(Self {
            membership,
            config,
            exchange,
            stepper,
            evaluator,
            data,
            writer: None,
            steps_per_epoch,
            total_steps: config.training.total_steps(steps_per_epoch),
            finished: Step(0),
            best: None,
            init: None,
            saved: None,
            non_finite: 0,
            held: None,
        })
    }

    /// What a fresh start does beyond random weights: takes those of `training.init`, measures what is not among them.
    fn initialize(&mut self) -> Result<(), WorkerError> {
        let Stepper { model, parameters, .. } = &mut self.stepper;
        let mut measured = model.measured();
        // the other ranks take them over from the first one, so only its host needs the files
        if let Some(path) = &self.config.training.init
            && self.membership.member.is_first()
        {
            let weights = Weights::open(path)?;
            self.init = Some(weights.origin.clone());
            let dataset = &self.membership.admission.dataset.fingerprint;
            let used = weights.apply(parameters, (model.shape(), dataset), self.config.training.init_partial)?;
            tracing::info!(path = %path.display(), "{used}");
            measured.retain(|name| used.fresh.iter().any(|fresh| fresh == name));
        }
        if !measured.is_empty() {
            let sample = self.evaluator.sample_items(INIT_SAMPLE)?;
            model.measure(parameters, &sample, &measured);
        }
        Ok(())
    }

    /// Takes over parameters, moments and counters of a checkpoint.
    fn restore(&mut self, path: &Path) -> Result<(), WorkerError> {
        let signature = signature(&self.stepper.parameters);
        let dataset = &self.membership.admission.dataset;
        let expected = checkpoint::Expected { dataset, signature: Some(&signature) };
        let Snapshot { state, model, optimizer } = checkpoint::read(path, Some(&expected))?;
        // no rank may still read a checkpoint that the first one moves
        self.exchange.barrier()?;
        if self.membership.member.is_first() {
            checkpoint::supersede_later(&self.membership.run_dir(), &state)?;
        }
        self.stepper.parameters.assign(model)?;
        self.stepper.optimizer.load_state(&self.stepper.parameters, optimizer, state.optimizer_step)?;
        self.finished = state.step;
        self.saved = Some(state.step);
        self.best = state.best;
        self.init = state.init;
        self.non_finite = state.non_finite;
        self.membership.progress.finished(self.finished);
        tracing::info!(step = %self.finished, checkpoint = %path.display(), "resumed");
        Ok(())
    }

    fn train(&mut self) -> Result<Ended, WorkerError> {
        if self.finished.0 >= self.total_steps {
            return Ok(Ended::Done);
        }
        let mut feed = self.start_feed();
        let mut last_finished = Instant::now();
        while self.finished.0 < self.total_steps {
            self.stepper.clock.enter(Phase::DataWait);
            let prepared = feed.next_step()?;
            let rate = learning_rate(&self.config.optimizer, self.finished, self.total_steps);
            let word = Word { stop: self.membership.stops.requested(), non_finite: self.non_finite };
            let outcome = match self.stepper.step(&prepared, &mut self.exchange, rate, word)? {
                StepEnd::Finished(outcome) => outcome,
                StepEnd::Stopped => {
                    self.save(Need::Kept)?;
                    return Ok(Ended::Stopped);
                }
                StepEnd::NonFinite(step) => {
                    self.not_finite(prepared, step)?;
                    last_finished = Instant::now();
                    continue;
                }
            };
            self.finished.0 += 1;
            let seconds = last_finished.elapsed().as_secs_f64();
            last_finished = Instant::now();
            let record = StepRecord {
                step: self.finished,
                epoch: prepared.meta.epoch,
                generation: self.membership.member.place.generation,
                loss: outcome.loss,
                accuracy: outcome.accuracy,
                learning_rate: rate,
                gradient_norm: outcome.gradient_norm,
                users: prepared.meta.global_users,
                tokens: outcome.tokens,
                padding_share: outcome.padding_share,
                seconds,
                cvr_loss: outcome.cvr_loss,
            };
            let tokens = prepared.micro_batches.iter().map(|(batch, _)| batch.tokens).sum();
            self.report(record, tokens, prepared.users)?;
            self.after_step()?;
            // evaluating and saving are not part of the next step
            if self.finished.0.is_multiple_of(self.steps_per_epoch) {
                last_finished = Instant::now();
            }
        }
        Ok(Ended::Done)
    }

    fn start_feed(&self) -> Feed {
        let place = self.membership.member.place;
        let settings = FeedSettings {
            rank: place.rank.0,
            world_size: place.world_size,
            from_step: self.finished.0,
            layout: Layout::new(&self.config.objective, self.config.training.micro_batch),
            uniform: UniformNegatives {
                seed: self.stepper.draw_seed,
                items: self.membership.admission.dataset.items,
                count: self.config.objective.uniform_negatives,
            },
            prefetch_steps: self.config.cluster.prefetch_steps,
            dim: self.stepper.input_dim,
            cache_bytes: self.config.cluster.row_cache.0,
            times: self.config.model.reads_times(),
        };
        let handle = self.membership.member.handle().clone();
        Feed::start(handle, self.data.clone(), settings, self.membership.metrics.clone())
    }

    /// `tokens` and `users` are this rank's share of the step.
    fn report(&self, record: StepRecord, tokens: u64, users: Vec<u32>) -> Result<(), WorkerError> {
        let metrics = &self.membership.metrics;
        self.membership.progress.finished(record.step);
        metrics.step.set(record.step.0 as i64);
        metrics.loss.set(record.loss);
        metrics.accuracy.set(record.accuracy);
        metrics.learning_rate.set(record.learning_rate);
        metrics.gradient_norm.set(record.gradient_norm);
        metrics.padding_share.set(record.padding_share);
        metrics.users_total.inc_by(users.len() as u64);
        metrics.tokens_total.inc_by(tokens);
        metrics.samples_per_second.set(users.len() as f64 / record.seconds);
        metrics.tokens_per_second.set(tokens as f64 / record.seconds);
        self.membership.member.report_step(FinishedStep {
            step: record.step,
            epoch: record.epoch,
            users: users.into_iter().map(UserIndex).collect(),
            record: self.membership.member.is_first().then_some(record),
        })?;
        Ok(())
    }

    /// Evaluates and saves where the configuration says so.
    fn after_step(&mut self) -> Result<(), WorkerError> {
        let step = self.finished.0;
        let last = step == self.total_steps;
        let epochs = if step.is_multiple_of(self.steps_per_epoch) { (step / self.steps_per_epoch) as u32 } else { 0 };
        let due = |every: u32| every > 0 && epochs > 0 && epochs.is_multiple_of(every);
        let mut is_best = false;
        if due(self.config.evaluation.every_epochs) || last {
            let evaluation = self.evaluate(Split::Valid)?;
            is_best = self.note_best(&evaluation)?;
        }
        let every_steps = self.config.checkpoint.every_steps;
        let by_steps = every_steps > 0 && step.is_multiple_of(every_steps);
        if last || (is_best && self.config.checkpoint.keep_best) {
            self.save(Need::Kept)
        } else if by_steps || due(self.config.checkpoint.every_epochs) {
            self.save(Need::Due)
        } else {
            Ok(())
        }
    }

    /// Every rank comes to the same verdict, because the evaluation is summed over ranks.
    fn note_best(&mut self, evaluation: &Evaluation) -> Result<bool, WorkerError> {
        let metric = &self.config.checkpoint.metric;
        let Some(&value) = evaluation.metrics.get(metric) else {
            return Err(WorkerError::Usage(format!(
                "{metric} cannot be told on the {} split (no user has exposures of both kinds there?); choose another \
                 checkpoint.metric",
                evaluation.split
            )));
        };
        let better = self.best.as_ref().is_none_or(|best| value > best.value);
        if better && self.config.checkpoint.keep_best {
            self.best = Some(Best { step: self.finished, metric: metric.clone(), value });
        }
        Ok(better)
    }

    fn evaluate(&mut self, split: Split) -> Result<Evaluation, WorkerError> {
        self.membership.progress.enter("evaluation");
        // between the epochs the metrics alone are wanted
        let full = split == Split::Test;
        let request = Request { split, step: self.finished, epoch: self.epochs_done(), full };
        let catalogue = Catalogue { model: &self.stepper.model, parameters: &self.stepper.parameters };
        let evaluation = self.evaluator.evaluate(&catalogue, &mut self.exchange, &request)?;
        if self.membership.member.is_first() {
            self.membership.member.report_evaluation(&evaluation)?;
        }
        Ok(evaluation)
    }

    fn epochs_done(&self) -> u32 {
        (self.finished.0 / self.steps_per_epoch) as u32
    }

    /// Tests with the best checkpoint that is on disk, or with the last parameters if none is kept.
    fn test(&mut self) -> Result<(), WorkerError> {
        if let Some(best) = self.best.clone() {
            let found = self.best_on_disk()?;
            if found != Some(best.step) {
                tracing::warn!(best = %best.step, ?found, "the best checkpoint could not be kept");
            }
            if let Some(step) = found.filter(|step| *step != self.finished) {
                let snapshot = checkpoint::read(&self.membership.run_dir().checkpoint(step), None)?;
                self.stepper.parameters.assign(snapshot.model)?;
                self.finished = step;
            }
        }
        self.evaluate(Split::Test)?;
        Ok(())
    }

    /// The step of the best checkpoint on disk, which `eval` and `export` take too. The first rank looks and tells the
    /// others, so that all have the same parameters whatever a shared disk shows each of them.
    fn best_on_disk(&mut self) -> Result<Option<Step>, WorkerError> {
        let mut found = [0];
        if self.membership.member.is_first() {
            let run = self.membership.run_dir();
            let best = checkpoint::read_best(&run).filter(|best| run.checkpoint(best.step).exists());
            // no checkpoint is of step 0
            found[0] = best.map_or(0, |best| best.step.0 as i64);
        }
        self.exchange.sum_i64(&mut found)?;
        Ok((found[0] > 0).then_some(Step(found[0] as u64)))
    }
}
