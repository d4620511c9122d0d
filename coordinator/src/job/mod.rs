//! The state of one job, without clock, network or disk.
//!
//! Input: what workers and the operator say, and the time since the coordinator started. Output: directives, records to
//! journal, ledgers to store, the status and the summary. Around the membership and the books it adds what a person
//! wants to know of the job. Invariant: a message of another generation, or of a worker that has left, changes nothing.

pub mod actor;
mod books;
mod history;
mod summary;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub use books::BooksError;
use books::{Books, Entry};
pub use history::{History, LedgerFile, ResumeError, prune_ledgers};
use learn_domain::ledger::Ledger;
use learn_domain::membership::{
    Departure, Directive, Effect, Event, Membership, MembershipSettings, Outcome, Refusal, State, StopCause,
};
use learn_domain::report::{DatasetFacts, Evaluation, JobState, JobStatus, Split, StepRecord, Task, WorkerStatus};
use learn_domain::{Config, Generation, Rank, Step, WorkerId};
use learn_proto::convert::{Applicant, StepReport};

/// Why a message changes nothing.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum JobError {
    #[error("{0}")]
    Refused(Refusal),
    #[error("worker {0} does not belong to this job; it must join first")]
    UnknownWorker(WorkerId),
    #[error("generation {theirs} is not the one that runs (that is {ours}); ask the next heartbeat what to do")]
    StaleGeneration { theirs: Generation, ours: Generation },
    #[error("the job is stopping: {0}")]
    Stopping(StopCause),
    #[error("only rank 0 may do this; worker {worker} has rank {rank}")]
    NotRankZero { worker: WorkerId, rank: Rank },
    #[error(
        "the {what} of step {step} is not a finite number: training has diverged; lower optimizer.learning_rate or raise \
         optimizer.warmup_steps, and resume from an earlier checkpoint"
    )]
    Diverged { what: String, step: Step },
    #[error(transparent)]
    Books(#[from] BooksError),
}

/// What a job is made from.
#[derive(Debug)]
pub struct JobSettings {
    pub config: Config,
    pub task: Task,
    pub dataset: DatasetFacts,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
    pub history: History,
}

#[derive(Debug)]
struct Worker {
    applicant: Applicant,
    rank: Option<Rank>,
    step: Step,
    phase: String,
    seen: Duration,
    /// It has said that it leaves.
    left: bool,
    /// It knows that the job stops.
    told: bool,
}

/// The job.
#[derive(Debug)]
pub struct Job {
    settings: JobSettings,
    membership: Membership,
    books: Books,
    workers: BTreeMap<WorkerId, Worker>,
    last_step: Option<StepRecord>,
    last_checkpoint: Option<Step>,
    evaluations: Vec<Evaluation>,
    /// Checkpoints whose ledger is still incomplete.
    commits: BTreeSet<Step>,
    /// Users and seconds of all finished steps, and seconds of everything that earlier processes have done.
    trained_users: u64,
    step_seconds: f64,
    earlier_seconds: f64,
    formed: Option<Duration>,
    ended: Option<Duration>,
    outcome: Option<Outcome>,
}

/// Deadlines and size of the membership that a configuration asks for.
#[must_use]
pub fn membership_settings(config: &Config) -> MembershipSettings {
    let cluster = &config.cluster;
    MembershipSettings {
        world_size: cluster.workers,
        heartbeat_timeout: cluster.heartbeat_timeout.0,
        join_timeout: cluster.join_timeout.0,
        stop_timeout: cluster.stop_within(),
    }
}

impl Job {
    #[must_use]
    pub fn new(mut settings: JobSettings) -> Self {
        let history = std::mem::take(&mut settings.history);
        let step_seconds = history.steps.iter().map(|record| record.seconds).sum();
        let evaluation_seconds: f64 = history.evaluations.iter().map(|evaluation| evaluation.seconds).sum();
        let ledger =
            history.ledger.unwrap_or_else(|| Ledger::new(settings.dataset.train_users, settings.steps_per_epoch));
        Self {
            membership: Membership::new(membership_settings(&settings.config)),
            books: Books::new(settings.config.cluster.workers, history.step, ledger),
            workers: BTreeMap::new(),
            trained_users: history.steps.iter().map(|record| u64::from(record.users)).sum(),
            step_seconds,
            earlier_seconds: step_seconds + evaluation_seconds,
            last_step: history.steps.into_iter().next_back(),
            last_checkpoint: (history.step > Step(0)).then_some(history.step),
            evaluations: history.evaluations,
            commits: BTreeSet::new(),
            formed: None,
            ended: None,
            outcome: None,
            settings,
        }
    }

    #[must_use]
    pub fn generation(&self) -> Generation {
        self.membership.generation()
    }

    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// Lets a worker in.
    ///
    /// # Errors
    /// [`JobError::Refused`].
    pub fn join(&mut self, now: Duration, applicant: Applicant) -> Result<(WorkerId, Vec<Effect>), JobError> {
        let effects = self.take(now, Event::Join(applicant.incarnation.clone()));
        for effect in &effects {
            match effect {
                Effect::Admitted(worker) => {
                    let (phase, step) = ("joining".into(), self.books.complete());
                    let fresh = Worker {
                        applicant,
                        rank: self.rank(*worker),
                        step,
                        phase,
                        seen: now,
                        left: false,
                        told: false,
                    };
                    let worker = *worker;
                    self.workers.insert(worker, fresh);
                    return Ok((worker, effects));
                }
                Effect::Refused(refusal) => return Err(JobError::Refused(*refusal)),
                Effect::Formed { .. } | Effect::Stop(_) | Effect::Ended(_) => {}
            }
        }
        Err(JobError::Refused(Refusal::Over))
    }

    /// Takes a sign of life and says what to do.
    pub fn heartbeat(&mut self, now: Duration, beat: Heartbeat) -> (Directive, Vec<Effect>) {
        let effects = self.take(now, Event::Heartbeat(beat.worker));
        let directive = self.membership.directive(beat.worker);
        let rank = self.rank(beat.worker);
        if let Some(worker) = self.workers.get_mut(&beat.worker) {
            worker.seen = now;
            worker.step = beat.step;
            worker.phase = beat.phase;
            worker.rank = rank.or(worker.rank);
            worker.told = matches!(directive, Directive::Stop(_) | Directive::Unknown);
        }
        (directive, effects)
    }

    /// Takes the report of one rank's share of a step; gives the record that is to be journaled, if it is rank 0's.
    ///
    /// # Errors
    /// If it is stale, or its numbers show that training has diverged.
    pub fn report(&mut self, report: StepReport) -> Result<Option<StepRecord>, JobError> {
        let StepReport { worker, generation, step, epoch, users, record } = report;
        let rank = self.member(worker, generation)?;
        if let Some(record) = &record {
            finite(record)?;
        }
        if !self.books.report(Entry { rank, step, epoch, users })? {
            return Ok(None);
        }
        let Some(record) = record.filter(|_| rank == Rank(0)) else { return Ok(None) };
        self.trained_users += u64::from(record.users);
        self.step_seconds += record.seconds;
        self.last_step = Some(record.clone());
        Ok(Some(record))
    }

    /// Takes note that rank 0 has made the checkpoint of `step` durable; its ledger comes from
    /// [`Job::complete_commits`].
    ///
    /// # Errors
    /// If the message is stale, not from rank 0, or a later checkpoint was committed before.
    pub fn commit(&mut self, worker: WorkerId, generation: Generation, step: Step) -> Result<(), JobError> {
        self.rank_zero(worker, generation)?;
        self.books.commit(step)?;
        self.commits.insert(step);
        Ok(())
    }

    /// Ledgers of commits that are complete now, oldest first. When the job stops at once, nobody waits for reports any
    /// more.
    pub fn complete_commits(&mut self) -> Vec<(Step, Ledger)> {
        let mut complete = Vec::new();
        while let Some(&step) = self.commits.first() {
            if self.no_more_reports() {
                self.books.give_up_waiting(step);
            }
            // cannot be too old: the set is taken from its front
            let Ok(Some(ledger)) = self.books.commit(step) else { break };
            self.commits.pop_first();
            self.last_checkpoint = Some(step);
            complete.push((step, ledger));
        }
        complete
    }

    fn no_more_reports(&self) -> bool {
        match self.membership.state() {
            State::Stopping { cause, .. } => !cause.graceful(),
            State::Ended(_) => true,
            State::Gathering { .. } | State::Running { .. } => false,
        }
    }

    /// Takes an evaluation; gives it back if it is new.
    ///
    /// # Errors
    /// If the message is stale, not from rank 0, or a metric is not a number.
    pub fn evaluation(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        evaluation: Evaluation,
    ) -> Result<Option<Evaluation>, JobError> {
        self.rank_zero(worker, generation)?;
        if let Some((what, _)) = evaluation.metrics.iter().find(|(_, value)| !value.is_finite()) {
            return Err(JobError::Diverged { what: what.clone(), step: evaluation.step });
        }
        if self.evaluations.contains(&evaluation) {
            return Ok(None);
        }
        self.evaluations.push(evaluation.clone());
        Ok(Some(evaluation))
    }

    /// A worker says that it leaves.
    ///
    /// # Errors
    /// If it is not known.
    pub fn leave(&mut self, now: Duration, id: WorkerId, departure: Departure) -> Result<Vec<Effect>, JobError> {
        let worker = self.workers.get_mut(&id).ok_or(JobError::UnknownWorker(id))?;
        worker.left = true;
        if let Some(rank) = worker.rank {
            self.books.leave(rank);
        }
        worker.phase = match departure {
            Departure::Done => "done".into(),
            Departure::Stopped => "stopped".into(),
            Departure::Failed(_) => "failed".into(),
            Departure::GaveUp(..) => "gave up".into(),
        };
        Ok(self.take(now, Event::Leave(id, departure)))
    }

    pub fn operator_stop(&mut self, now: Duration) -> Vec<Effect> {
        self.take(now, Event::OperatorStop)
    }

    pub fn tick(&mut self, now: Duration) -> Vec<Effect> {
        self.take(now, Event::Tick)
    }

    /// The rank of a worker that belongs to `generation`.
    ///
    /// # Errors
    /// If the generation is another one, or the worker is not its member (any more).
    pub fn member(&self, worker: WorkerId, generation: Generation) -> Result<Rank, JobError> {
        let ours = self.generation();
        if generation != ours || ours == Generation(0) {
            return Err(JobError::StaleGeneration { theirs: generation, ours });
        }
        let members = match self.membership.state() {
            State::Running { members } | State::Stopping { members, .. } => Some(members),
            State::Gathering { .. } | State::Ended(_) => None,
        };
        let member = members.and_then(|members| members.get(&worker)).ok_or(JobError::UnknownWorker(worker))?;
        Ok(member.rank)
    }

    /// As [`Job::member`], for those who want to start a collective: a job that stops forms none.
    ///
    /// # Errors
    /// If the worker is not a member, or the job stops.
    pub fn running_member(&self, worker: WorkerId, generation: Generation) -> Result<Rank, JobError> {
        match self.membership.directive(worker) {
            Directive::Stop(cause) => Err(JobError::Stopping(cause)),
            Directive::Wait | Directive::Run { .. } | Directive::Unknown => self.member(worker, generation),
        }
    }

    fn rank_zero(&self, worker: WorkerId, generation: Generation) -> Result<(), JobError> {
        match self.member(worker, generation)? {
            Rank(0) => Ok(()),
            rank => Err(JobError::NotRankZero { worker, rank }),
        }
    }

    fn rank(&self, worker: WorkerId) -> Option<Rank> {
        match self.membership.directive(worker) {
            Directive::Run { rank, .. } => Some(rank),
            Directive::Wait | Directive::Stop(_) | Directive::Unknown => None,
        }
    }

    fn take(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        let effects = self.membership.step(now, event);
        for effect in &effects {
            match effect {
                Effect::Formed { members, .. } => {
                    self.formed = Some(now);
                    for (rank, worker) in members.iter().enumerate() {
                        if let Some(worker) = self.workers.get_mut(worker) {
                            worker.rank = Some(Rank(rank as u32));
                        }
                    }
                }
                Effect::Stop(_) => self.workers.values_mut().for_each(|worker| worker.told = false),
                Effect::Ended(outcome) => {
                    self.ended = Some(now);
                    self.outcome = Some(outcome.clone());
                }
                Effect::Admitted(_) | Effect::Refused(_) => {}
            }
        }
        effects
    }

    /// Workers that have joined and not left.
    #[must_use]
    pub fn present(&self) -> usize {
        self.workers.values().filter(|worker| !worker.left).count()
    }

    /// Nobody is left who has to learn that the job has ended.
    #[must_use]
    pub fn everybody_knows(&self, now: Duration) -> bool {
        let patience = self.settings.config.cluster.heartbeat_timeout.0;
        self.outcome.is_some()
            && self
                .workers
                .values()
                .all(|worker| worker.left || worker.told || now.saturating_sub(worker.seen) > patience)
    }

    #[must_use]
    pub fn state(&self) -> JobState {
        match self.membership.state() {
            State::Gathering { .. } => JobState::Gathering,
            State::Running { .. } => JobState::Running,
            State::Stopping { .. } => JobState::Stopping,
            State::Ended(Outcome::Finished) => JobState::Finished,
            State::Ended(Outcome::Stopped(StopCause::Operator)) => JobState::Stopped,
            State::Ended(Outcome::Stopped(_)) => JobState::Failed,
        }
    }

    /// The best evaluation on valid by `checkpoint.metric`.
    #[must_use]
    pub fn best(&self) -> Option<&Evaluation> {
        let metric = |evaluation: &Evaluation| evaluation.metrics.get(&self.settings.config.checkpoint.metric).copied();
        let valid = self.evaluations.iter().filter(|evaluation| evaluation.split == Split::Valid);
        // of equals the first: it needed fewer steps
        valid
            .filter(|evaluation| metric(evaluation).is_some())
            .reduce(|best, other| if metric(other) > metric(best) { other } else { best })
    }

    /// Everything there is to know now.
    #[must_use]
    pub fn status(&self, now: Duration) -> JobStatus {
        let cause = match self.membership.state() {
            State::Stopping { cause, .. } | State::Ended(Outcome::Stopped(cause)) => Some(cause.to_string()),
            State::Gathering { .. } | State::Running { .. } | State::Ended(Outcome::Finished) => None,
        };
        let workers = self.workers.iter().map(|(&id, worker)| WorkerStatus {
            worker: id,
            rank: worker.rank,
            host: worker.applicant.host.clone(),
            pid: worker.applicant.pid,
            device: worker.applicant.device.clone(),
            step: worker.step,
            phase: worker.phase.clone(),
            metrics_url: worker.applicant.metrics_url.clone(),
            seconds_since_heartbeat: now.saturating_sub(worker.seen).as_secs_f64(),
        });
        JobStatus {
            name: self.settings.config.job.name.clone(),
            task: self.settings.task.clone(),
            state: self.state(),
            cause,
            generation: self.generation(),
            world_size: self.settings.config.cluster.workers,
            dataset: self.settings.dataset.clone(),
            steps_per_epoch: self.settings.steps_per_epoch,
            total_steps: self.settings.total_steps,
            last_step: self.last_step.clone(),
            last_checkpoint: self.last_checkpoint,
            best: self.best().cloned(),
            evaluations: self.evaluations.clone(),
            workers: workers.collect(),
            ledger: self.books.summary(),
            seconds: now.as_secs_f64(),
        }
    }
}

/// A worker's sign of life.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    pub worker: WorkerId,
    /// Finished steps.
    pub step: Step,
    /// What it is doing.
    pub phase: String,
}

fn finite(record: &StepRecord) -> Result<(), JobError> {
    let numbers = [
        ("loss", record.loss),
        ("accuracy", record.accuracy),
        ("learning rate", record.learning_rate),
        ("gradient norm", record.gradient_norm),
        ("padding share", record.padding_share),
        ("duration", record.seconds),
    ];
    match numbers.iter().find(|(_, number)| !number.is_finite()) {
        Some((what, _)) => Err(JobError::Diverged { what: (*what).to_owned(), step: record.step }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
