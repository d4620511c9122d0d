//! The training task: steps, evaluations and checkpoints until the job's last step or a stop, through any number of
//! generations.
//!
//! Input: the feed's prepared steps. Output: step reports, evaluations, checkpoints. The [`Trainer`] is what a worker
//! holds for as long as it lives; a [`Turn`] is its place in one generation. Invariants: every rank runs the
//! same sequence of collectives, because each decision (stop, regroup, evaluate, save, best) follows from values that all
//! ranks share; only rank 0 writes and speaks for the whole batch; an error of the collective leaves the state that of the
//! last finished step.

mod begin;
mod best;
mod device_rows;
mod exchange;
mod measure;
mod meet;
mod non_finite;
mod objective;
mod passes;
mod save;
mod step;

use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

pub use device_rows::DeviceRows;
pub use exchange::Exchange;
use learn_domain::config::{Config, ItemInput};
use learn_domain::plan::{Plan, PlanKey};
use learn_domain::progress::Work;
use learn_domain::report::{DatasetFacts, Evaluation, Split, StepRecord};
use learn_domain::schedule::learning_rate;
use learn_domain::{Phase, Step, UserIndex};
use learn_model::objective::cvr;
use learn_model::{AdamW, Forward, Parameters, Pch, PchShape};
use meet::{FOREVER, one_says};
pub use objective::{Conversion, FullSoftmax, InBatch, Objective};
pub use passes::{rows_tensor, sequences};
pub(crate) use save::snapshot;
use save::{Need, Speaker, on_cpu};
pub use step::{PhaseClock, StepEnd, StepOutcome, Stepper, Word};
use tch::{Device, Kind};

use crate::checkpoint::{self, Best, Superseding, Writer};
use crate::control::{FinishedStep, Member, Place, REPORT_QUEUE};
use crate::error::WorkerError;
use crate::evaluate::{Catalogue, Evaluator, Request};
use crate::feed::assemble::Layout;
use crate::feed::cache::CachePlace;
use crate::feed::flight::DataClient;
use crate::feed::neighbours::Neighbours;
use crate::feed::{Feed, FeedSettings, RowSettings, UniformNegatives};
use crate::init::Origin;
use crate::session::{Ended, Session, Turn};

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

/// Shape and budgets of the content embeddings' rows.
fn row_settings(config: &Config, dataset: &DatasetFacts, device: Device) -> RowSettings {
    RowSettings {
        dim: dataset.embedding_dim as usize,
        cache_bytes: config.cluster.row_cache.0,
        device_bytes: config.cluster.device_row_cache.0,
        items: dataset.items,
        streams: config.cluster.row_streams,
        device,
    }
}

/// The training of one worker.
pub struct Trainer<'a> {
    session: &'a Session,
    config: &'a Config,
    stepper: Stepper,
    evaluator: Evaluator,
    data: DataClient,
    /// Of the host's rows, from one generation to the next.
    cache: CachePlace,
    /// Training interactions of each item, if the objective corrects for them.
    popularity: Option<Vec<u32>>,
    /// On rank 0 only.
    writer: Option<Writer>,
    /// Through which the writer speaks.
    speaker: Speaker,
    /// Later checkpoints than the one that the job goes on from, until they are out of the way.
    superseding: Superseding,
    /// Checkpoint that the job starts with.
    resume_from: Option<&'a Path>,
    steps_per_epoch: u64,
    total_steps: u64,
    /// It has the job's state, not just initial values.
    has_state: bool,
    finished: Step,
    /// What follows the last finished step is done.
    followed_up: bool,
    /// Of the last finished steps, for a generation in which nobody is left who has reported them.
    last: VecDeque<StepRecord>,
    best: Option<Best>,
    /// The last evaluation could not tell the metric of the best.
    metric_missing: bool,
    init: Option<Origin>,
    saved: Option<Step>,
    /// Steps of the run whose loss or gradient was not finite.
    non_finite: u32,
    /// What a rollback goes back to, if `training.non_finite` may ask for one.
    held: Option<non_finite::Held>,
}

impl<'a> Trainer<'a> {
    /// Makes everything that needs no other rank.
    ///
    /// # Errors
    /// If model and dataset do not go together, or the data service refuses.
    pub fn prepare(session: &'a Session, resume_from: Option<&'a str>) -> Result<Self, WorkerError> {
        let admission = &session.admission;
        let (config, dataset) = (&admission.config, &admission.dataset);
        let plan = Plan::new(PlanKey::of(config, dataset))?;
        let model = Pch::new(shape(config, dataset))?;
        let mut parameters = Parameters::init(model.shape(), config.job.seed, session.device);
        let mut optimizer = AdamW::new(&parameters, &config.optimizer);
        if config.training.freeze_towers {
            optimizer.exclude_from_decay(&parameters, |name| !cvr::owns(name));
        }
        let handle = session.handle();
        let patience = session.control.patience();
        let data = handle.block_on(DataClient::of(admission, &session.pass, patience))?;
        let evaluator = Evaluator::new(session, data.clone(), config.cluster.evaluation_row_cache())?;
        let counted = config.objective.logq_correction || config.model.item_input == ItemInput::ContentId;
        let popularity = if counted { Some(handle.block_on(data.popularity())?) } else { None };
        if config.model.item_input == ItemInput::ContentId
            && let Some(counts) = &popularity
        {
            let unseen: Vec<bool> = counts.iter().map(|&count| count == 0).collect();
            parameters.freeze_item_vectors(&tch::Tensor::from_slice(&unseen));
        }
        let weight = config.objective.cvr_weight;
        let rows = row_settings(config, dataset, session.device);
        // on GPUs, too: whether the collective moves its data by memory is another question
        let shape = rows.shape().filter(|_| config.cluster.shared_memory);
        session.metrics.peak_flops_per_second.set(config.cluster.device_peak_tflops * 1e12);
        let stepper = Stepper {
            model,
            parameters,
            optimizer,
            optimizer_config: config.optimizer.clone(),
            forward: Forward { train: !config.training.freeze_towers, precision: config.training.precision },
            activation_checkpointing: config.training.activation_checkpointing,
            device: session.device,
            rows: DeviceRows::new((rows.device_rows(), rows.dim), session.device),
            // each generation sets its own
            objective: Objective::Frozen,
            conversion: config.objective.cvr_head().map(|_| Conversion { weight }),
            draw_seed: plan.draw_seed(),
            clock: PhaseClock::new(session.metrics.clone(), session.progress.clone()),
        };
        let steps_per_epoch = plan.steps_per_epoch();
        Ok(Self {
            session,
            config,
            stepper,
            evaluator,
            data,
            cache: shape.map_or_else(CachePlace::default, CachePlace::shared),
            popularity: popularity.filter(|_| config.objective.logq_correction),
            writer: None,
            speaker: Speaker::default(),
            superseding: Superseding::default(),
            resume_from: resume_from.map(Path::new),
            steps_per_epoch,
            total_steps: config.training.total_steps(steps_per_epoch),
            has_state: false,
            finished: Step(0),
            followed_up: true,
            last: VecDeque::new(),
            best: None,
            metric_missing: false,
            init: None,
            saved: None,
            non_finite: 0,
            held: None,
        })
    }

    /// It holds what others would miss.
    #[must_use]
    pub fn has_state(&self) -> bool {
        self.has_state
    }

    /// Takes part in one generation.
    ///
    /// # Errors
    /// Anything that keeps the generation, or the job, from going on; what is already durable stays.
    pub fn take_part(&mut self, turn: &mut Turn) -> Result<Ended, WorkerError> {
        self.begin(turn)?;
        let ended = self.train(turn)?;
        if ended == Ended::Regroup {
            return Ok(ended);
        }
        // every checkpoint is durable before any rank reads one; one that could not be written is told of when all is done
        let saved = self.finish(turn);
        if saved.as_ref().is_err_and(|error| error.reach().passes()) {
            return saved.map(|()| ended);
        }
        if ended == Ended::Done {
            self.test(turn)?;
        } else {
            // as long as the checkpoint is not there, nobody lets go of what could be written instead
            turn.exchange.barrier()?;
        }
        saved?;
        Ok(ended)
    }

    fn train(&mut self, turn: &mut Turn) -> Result<Ended, WorkerError> {
        if self.finished.0 >= self.total_steps {
            return Ok(Ended::Done);
        }
        // of this generation; they go with the feed
        let neighbours = turn.exchange.meet_neighbours(self.cache.offer())?;
        tracing::debug!(neighbours = neighbours.len(), "row caches of other workers can be read here");
        let mut feed = self.start_feed(turn.member.place, neighbours.into());
        let mut last_finished = Instant::now();
        while self.finished.0 < self.total_steps {
            self.stepper.clock.enter(Phase::DataWait);
            let asked = Instant::now();
            let prepared = feed.next_step(|| self.session.signals.aborted().is_some())?;
            let (arrived, waited) = (Instant::now(), turn.exchange.waited());
            let rate = learning_rate(&self.config.optimizer, self.finished, self.total_steps);
            let word = Word { after: self.session.signals.after(), non_finite: self.non_finite };
            let outcome = match self.stepper.step(&prepared, &mut turn.exchange, rate, word)? {
                StepEnd::Finished(outcome) => outcome,
                StepEnd::Stopped => {
                    self.save(turn, Need::Kept)?;
                    return Ok(Ended::Stopped);
                }
                StepEnd::Regroup => return Ok(Ended::Regroup),
                StepEnd::NonFinite(step) => {
                    self.not_finite(turn, prepared, step)?;
                    last_finished = Instant::now();
                    continue;
                }
            };
            self.finished.0 += 1;
            self.followed_up = false;
            let seconds = last_finished.elapsed().as_secs_f64();
            last_finished = Instant::now();
            let record = StepRecord {
                step: self.finished,
                epoch: prepared.meta.epoch,
                generation: turn.member.place.generation,
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
            let inside = turn.exchange.waited() - waited;
            let work = Work {
                data_seconds: (arrived - asked).as_secs_f64(),
                compute_seconds: arrived.elapsed().saturating_sub(inside).as_secs_f64(),
            };
            let tokens = prepared.micro_batches.iter().map(|(batch, _)| batch.tokens).sum();
            // whatever the first rank has not brought to the coordinator is among these
            if self.last.len() > REPORT_QUEUE + 1 {
                self.last.pop_front();
            }
            self.last.push_back(record.clone());
            self.show(&outcome, &record, tokens, prepared.users.len());
            self.report(&turn.member, record, work, prepared.users)?;
            self.after_step(turn)?;
            // evaluating and saving are not part of the next step
            if self.finished.0.is_multiple_of(self.steps_per_epoch) {
                last_finished = Instant::now();
            }
        }
        Ok(Ended::Done)
    }

    fn start_feed(&self, place: Place, neighbours: Neighbours) -> Feed {
        let settings = FeedSettings {
            rank: place.rank.0,
            world_size: place.world_size,
            from_step: self.finished.0,
            layout: Layout::new(&self.config.objective, self.config.training.micro_batch),
            uniform: UniformNegatives {
                seed: self.stepper.draw_seed,
                items: self.session.admission.dataset.items,
                count: self.config.objective.uniform_negatives,
            },
            prefetch_steps: self.config.cluster.prefetch_steps,
            rows: row_settings(self.config, &self.session.admission.dataset, self.session.device),
            cache: self.cache.clone(),
            neighbours,
            times: self.config.model.reads_times(),
        };
        let handle = self.session.handle().clone();
        Feed::start(handle, self.data.clone(), settings, self.session.metrics.clone())
    }

    /// Brings a finished step to the metrics; `tokens` and `users` are this rank's share.
    fn show(&self, outcome: &StepOutcome, record: &StepRecord, tokens: u64, users: usize) {
        let metrics = &self.session.metrics;
        metrics.step.set(record.step.0 as i64);
        metrics.loss.set(record.loss);
        let cvr = record.cvr_loss.map(|loss| loss * self.config.objective.cvr_weight);
        if let Some(main) = self.main_part() {
            metrics.loss_parts.with_label_values(&[main]).set(record.loss - cvr.unwrap_or(0.0));
        }
        if let Some(cvr) = cvr {
            metrics.loss_parts.with_label_values(&["cvr"]).set(cvr);
        }
        metrics.accuracy.set(record.accuracy);
        metrics.learning_rate.set(record.learning_rate);
        metrics.gradient_norm.set(record.gradient_norm);
        metrics.padding_share.set(record.padding_share);
        metrics.users_total.inc_by(users as u64);
        metrics.tokens_total.inc_by(tokens);
        metrics.model_flops_total.inc_by(outcome.flops as u64);
        if measure::looks(record.step.0 - 1)
            && let Some(memory) = learn_torch::gpu_memory(self.stepper.device)
        {
            metrics.gpu_memory_bytes.with_label_values(&["used"]).set(memory.used as f64);
            metrics.gpu_memory_bytes.with_label_values(&["total"]).set(memory.total as f64);
        }
        let Some(geometry) = &outcome.geometry else { return };
        if let Some(alignment) = geometry.alignment {
            metrics.alignment.set(alignment);
        }
        for (tower, value) in [("user", geometry.user_uniformity), ("item", geometry.item_uniformity)] {
            if let Some(value) = value {
                metrics.uniformity.with_label_values(&[tower]).set(value);
            }
        }
    }

    /// What the loss beside the CVR head's is called.
    fn main_part(&self) -> Option<&'static str> {
        match self.stepper.objective {
            Objective::InBatch(_) => Some("infonce"),
            Objective::FullSoftmax(_) => Some("full_softmax"),
            Objective::Frozen => None,
        }
    }

    /// `users` are this rank's share of the step.
    fn report(&self, member: &Member, record: StepRecord, work: Work, users: Vec<u32>) -> Result<(), WorkerError> {
        self.session.progress.finished(record.step);
        member.report_step(FinishedStep {
            step: record.step,
            epoch: record.epoch,
            users: users.into_iter().map(UserIndex).collect(),
            work,
            record: member.is_first().then_some(record),
        })?;
        Ok(())
    }

    /// Evaluates and saves where the configuration says so.
    fn after_step(&mut self, turn: &mut Turn) -> Result<(), WorkerError> {
        let step = self.finished.0;
        let last = step == self.total_steps;
        let epochs = if step.is_multiple_of(self.steps_per_epoch) { (step / self.steps_per_epoch) as u32 } else { 0 };
        let due = |every: u32| every > 0 && epochs > 0 && epochs.is_multiple_of(every);
        let mut is_best = false;
        let evaluates = due(self.config.evaluation.every_epochs) || last;
        if evaluates {
            let evaluation = self.evaluate(turn, Split::Valid)?;
            is_best = self.note_best(turn, &evaluation)?;
        }
        let every_steps = self.config.checkpoint.every_steps;
        let by_steps = every_steps > 0 && step.is_multiple_of(every_steps);
        if last || is_best {
            self.save(turn, Need::Kept)?;
        } else if by_steps || due(self.config.checkpoint.every_epochs) {
            self.save(turn, Need::Due)?;
        }
        if evaluates {
            // the best may have to wait for its place at the writer; whether it is one is not asked, as every rank comes here
            self.session.progress.enter(Phase::Checkpoint);
            let mine = turn.is_first().then(Vec::new);
            one_says(&turn.member, &format!("followed-up/{step}"), mine, FOREVER)?;
        }
        self.followed_up = true;
        Ok(())
    }

    /// Evaluates the state after the last finished step.
    fn evaluate(&mut self, turn: &mut Turn, split: Split) -> Result<Evaluation, WorkerError> {
        let request = self.request(split, self.finished);
        let catalogue = Catalogue { model: &self.stepper.model, parameters: &self.stepper.parameters };
        evaluate_at(self.session, (&mut self.evaluator, catalogue), turn, &request)
    }

    fn request(&self, split: Split, step: Step) -> Request {
        // between the epochs the metrics alone are wanted
        Request { split, step, epoch: (step.0 / self.steps_per_epoch) as u32, full: split == Split::Test }
    }

    /// Tests with the best checkpoint that is on disk, or with the last parameters if none is kept; the state stays that of
    /// the last step, for a generation that may have to do it again.
    fn test(&mut self, turn: &mut Turn) -> Result<(), WorkerError> {
        let Some(best) = self.best.clone() else { return self.evaluate(turn, Split::Test).map(drop) };
        let found = self.best_on_disk(turn)?;
        if found != Some(best.step) {
            tracing::warn!(best = %best.step, ?found, "the best checkpoint could not be kept");
        }
        let Some(step) = found.filter(|step| *step != self.finished) else {
            return self.evaluate(turn, Split::Test).map(drop);
        };
        let (_, weights) = checkpoint::read_model(&self.session.run_dir().checkpoint(step), None)?;
        let model = &self.stepper.model;
        let parameters = Parameters::load(model.shape(), weights, Kind::Float, self.session.device)?;
        let (catalogue, request) = (Catalogue { model, parameters: &parameters }, self.request(Split::Test, step));
        evaluate_at(self.session, (&mut self.evaluator, catalogue), turn, &request).map(drop)
    }

    /// The step of the best checkpoint on disk, which `eval` and `export` take too. The first rank looks and tells the
    /// others, so that all have the same parameters whatever a shared disk shows each of them.
    fn best_on_disk(&self, turn: &mut Turn) -> Result<Option<Step>, WorkerError> {
        let mut found = [0];
        if turn.is_first() {
            let best = checkpoint::best_there(&self.session.run_dir());
            // no checkpoint is of step 0
            found[0] = best.map_or(0, |best| best.step.0 as i64);
        }
        turn.exchange.sum_i64(&mut found)?;
        Ok((found[0] > 0).then_some(Step(found[0] as u64)))
    }
}

/// Evaluates on all ranks; the first one reports, and all go on when that has arrived.
fn evaluate_at(
    session: &Session,
    (evaluator, catalogue): (&mut Evaluator, Catalogue<'_>),
    turn: &mut Turn,
    request: &Request,
) -> Result<Evaluation, WorkerError> {
    session.progress.enter(Phase::Evaluation);
    let evaluation = evaluator.evaluate(&catalogue, &mut turn.exchange, request)?;
    if turn.is_first() {
        turn.member.report_evaluation(&evaluation)?;
        turn.member.flush()?;
    }
    turn.exchange.barrier()?;
    Ok(evaluation)
}
