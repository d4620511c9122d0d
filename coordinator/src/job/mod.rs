//! The state of one job. `Job` has no clock, network or disk: what it needs of them comes in, and goes out, as values. The
//! clock is in `actor` and `turn`, the disk in `turn`, `saved` and `history`, all beneath.
//!
//! Input: what workers and the operator say, and the time since the coordinator started. Output: directives, records to
//! journal, ledgers to store, the status and the summary. Around the membership and the books it adds what a person
//! wants to know of the job. Invariant: a message of another generation, or of a worker that has left, changes nothing.

pub mod actor;
mod attendance;
mod books;
mod commits;
mod error;
mod figures;
mod gone;
mod history;
mod operator;
mod reunion;
mod saved;
mod status;
mod summary;
mod turn;
mod vigil;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub use books::BooksError;
use books::{Books, Entry};
pub use error::JobError;
pub use history::{History, LedgerFile, ResumeError, Trained, forget_beyond, prune_ledgers};
use learn_domain::ledger::Ledger;
use learn_domain::membership::{
    Departure, Directive, Effect, Event, Membership, MembershipSettings, Outcome, Refusal, State, StopCause,
};
use learn_domain::plan::Plan;
use learn_domain::report::{DatasetFacts, Evaluation, StepRecord, Task};
use learn_domain::{Config, Generation, Phase, Rank, Step, UserIndex, WorkerId};
use learn_proto::convert::{Applicant, Beginning, Heartbeat, StepReport};
pub use operator::Asked;
pub use saved::TakeOverError;
use saved::{Changed, Unsaved};
pub use turn::Keeping;
use vigil::Vigil;
use worker::Worker;

/// What a job is made from.
#[derive(Debug)]
pub struct JobSettings {
    pub config: Config,
    pub task: Task,
    pub dataset: DatasetFacts,
    pub plan: Plan,
    pub total_steps: u64,
    /// Times that a scheduler has started the job again.
    pub restarts: u32,
    /// Most workers that whoever starts them can start; none if there is no such limit.
    pub most_workers: Option<u32>,
    pub history: History,
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
    /// Those of earlier processes, in front.
    inherited: usize,
    /// Lines of later steps are still in the run's files, of a past that is not gone on from.
    beyond: Option<Step>,
    /// Checkpoints whose ledger is still incomplete.
    commits: BTreeSet<Step>,
    /// Users and seconds of all finished steps, and seconds of everything that earlier processes have done.
    trained_users: u64,
    step_seconds: f64,
    earlier_seconds: f64,
    /// Grows whenever a directive, the state or who is there may have changed; a heartbeat changes none of them.
    revision: u64,
    /// Rank 0 of the present generation has said where it goes on from.
    begun: bool,
    formed: Option<Duration>,
    ended: Option<Duration>,
    outcome: Option<Outcome>,
    /// An operator has called for the end, however it comes.
    operator_stop: bool,
    /// Whoever asks before is answered even when the job has ended.
    answers_until: Duration,
    unsaved: Unsaved,
    vigil: Vigil,
    /// Faults of the ledger that have been noted.
    faults_told: usize,
}

/// Deadlines and size of the membership that a configuration asks for.
#[must_use]
pub fn membership_settings(config: &Config) -> MembershipSettings {
    let cluster = &config.cluster;
    MembershipSettings {
        workers: cluster.workers,
        min_workers: cluster.min_workers,
        max_recoveries: cluster.max_recoveries,
        heartbeat_timeout: cluster.heartbeat_timeout.0,
        coordinator_timeout: cluster.coordinator_timeout.0,
        join_timeout: cluster.join_timeout.0,
        stop_timeout: cluster.stop_within(),
    }
}

impl Job {
    #[must_use]
    pub fn new(mut settings: JobSettings) -> Self {
        let history = std::mem::take(&mut settings.history);
        let trained = history.trained;
        let evaluation_seconds: f64 = history.evaluations.iter().map(|evaluation| evaluation.seconds).sum();
        let ledger = history
            .ledger
            .unwrap_or_else(|| Ledger::new(settings.dataset.train_users, settings.plan.steps_per_epoch()));
        let books = Books::new(history.step, ledger);
        Self {
            membership: Membership::new(membership_settings(&settings.config)),
            faults_told: books.faults().count(),
            books,
            workers: BTreeMap::new(),
            trained_users: trained.users,
            step_seconds: trained.seconds,
            earlier_seconds: trained.seconds + evaluation_seconds,
            last_step: trained.last,
            last_checkpoint: (history.step > Step(0)).then_some(history.step),
            inherited: history.evaluations.len(),
            evaluations: history.evaluations,
            beyond: history.beyond.then_some(history.step),
            commits: BTreeSet::new(),
            revision: 0,
            begun: false,
            formed: None,
            ended: None,
            outcome: None,
            operator_stop: false,
            answers_until: Duration::ZERO,
            unsaved: Unsaved {
                job: true,
                workers: Changed::All,
                forgotten: BTreeSet::new(),
                progress: true,
                books: true,
                weight: 0,
            },
            vigil: Vigil::default(),
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
                    let fresh = Worker {
                        applicant,
                        rank: self.rank(*worker),
                        step: self.books.complete(),
                        phase: Phase::Joining,
                        seen: now,
                        entered: 0,
                        inside: false,
                        since: Duration::ZERO,
                        left: false,
                        told: false,
                    };
                    let worker = *worker;
                    let again = self.workers.insert(worker, fresh).is_some();
                    // a repeated request lets nobody in
                    let effects = effects.into_iter().filter(|effect| !again || !matches!(effect, Effect::Admitted(_)));
                    return Ok((worker, effects.collect()));
                }
                Effect::Refused(refusal) => return Err(JobError::Refused(*refusal)),
                _ => {}
            }
        }
        Err(JobError::Refused(Refusal::Over))
    }

    /// Takes a sign of life and says what to do.
    pub fn heartbeat(&mut self, now: Duration, beat: Heartbeat) -> (Directive, Vec<Effect>) {
        let effects = self.take(now, Event::Heartbeat(beat.worker));
        let directive = self.membership.directive(beat.worker);
        let (rank, present) = (self.rank(beat.worker), beat.generation == self.generation());
        if let Some(worker) = self.workers.get_mut(&beat.worker) {
            worker.seen = now;
            worker.step = beat.step;
            worker.phase = beat.phase;
            // what was entered in another generation is nothing to the others of this one
            if present {
                (worker.entered, worker.inside) = (beat.entered, beat.inside);
            }
            worker.since = beat.since;
            worker.rank = rank.or(worker.rank);
            worker.told = matches!(directive, Directive::Stop(_) | Directive::Dismissed | Directive::Unknown);
        }
        (directive, effects)
    }

    /// Grows whenever a directive, the state or who is there may have changed.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// What `worker` is to do now.
    #[must_use]
    pub fn directive(&self, worker: WorkerId) -> Directive {
        self.membership.directive(worker)
    }

    /// A worker is out of `generation` and may take part in the next.
    ///
    /// # Errors
    /// If it is not known.
    pub fn ready(
        &mut self,
        now: Duration,
        worker: WorkerId,
        (generation, broken): (Generation, Option<String>),
    ) -> Result<Vec<Effect>, JobError> {
        if !self.membership.has_admitted(worker) {
            return Err(JobError::UnknownWorker(worker));
        }
        Ok(self.take(now, Event::Ready { worker, generation, broken }))
    }

    /// The connection by which a worker attends is gone.
    pub fn disconnected(&mut self, now: Duration, worker: WorkerId) -> Vec<Effect> {
        self.take(now, Event::Disconnected(worker))
    }

    /// The ranks of a generation agree on the finished step that they go on from. Gives the records that are to be
    /// journaled, because the rank that was to report them is lost.
    ///
    /// # Errors
    /// If the message is stale or not from rank 0, or the step cannot be.
    pub fn begin(&mut self, now: Duration, beginning: Beginning) -> Result<Vec<StepRecord>, JobError> {
        let Beginning { worker, generation, step, last } = beginning;
        self.rank_zero(worker, generation)?;
        // a retry, which may come when others have reported already
        if self.begun {
            return Ok(Vec::new());
        }
        last.iter().try_for_each(finite)?;
        let before = self.books.complete();
        let plan = &self.settings.plan;
        self.books.settle(step, |step| planned(plan, step))?;
        self.begun = true;
        self.unsaved.job = true;
        if self.books.complete() > before {
            self.take(now, Event::Progress(generation));
            self.vigil.moved(now);
        }
        Ok(last.into_iter().filter_map(|record| self.count(record)).collect())
    }

    /// Takes the report of one rank's share of a step; gives the record that is to be journaled, if it is rank 0's.
    ///
    /// # Errors
    /// If it is stale, or its numbers show that training has diverged.
    pub fn report(&mut self, now: Duration, report: StepReport) -> Result<Option<StepRecord>, JobError> {
        let StepReport { worker, generation, step, epoch, users, work, record } = report;
        let rank = self.member(worker, generation)?;
        if let Some(record) = &record {
            finite(record)?;
        }
        let before = self.books.complete();
        let plan = &self.settings.plan;
        if !self.books.report(Entry { rank, step, epoch, users }, |step| planned(plan, step))? {
            return Ok(None);
        }
        if self.books.complete() > before {
            self.take(now, Event::Progress(generation));
            self.vigil.moved(now);
        }
        self.vigil.worked(rank, work, self.workers.get(&worker).is_some_and(Worker::on_gpu));
        let record = record.filter(|_| rank == Rank(0));
        Ok(record.and_then(|record| self.count(record)))
    }

    /// Takes a finished step into account, once: a step that was trained again after a loss has the same numbers.
    fn count(&mut self, record: StepRecord) -> Option<StepRecord> {
        if self.last_step.as_ref().is_some_and(|last| record.step <= last.step) {
            return None;
        }
        self.trained_users += u64::from(record.users);
        self.step_seconds += record.seconds;
        self.vigil.paced(record.seconds);
        self.last_step = Some(record.clone());
        self.unsaved.progress = true;
        Some(record)
    }

    /// Nobody finishes a step any more.
    #[must_use]
    pub fn stops_at_once(&self) -> bool {
        matches!(self.membership.state(), State::Stopping { .. })
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
        // a retry, or another generation that evaluates again what one before had not brought to its end
        let same = |known: &Evaluation| (known.split, known.step) == (evaluation.split, evaluation.step);
        if self.evaluations[self.inherited..].iter().any(same) {
            return Ok(None);
        }
        self.evaluations.push(evaluation.clone());
        self.unsaved.job = true;
        Ok(Some(evaluation))
    }

    /// A worker says that it leaves.
    ///
    /// # Errors
    /// If it is not known.
    pub fn leave(&mut self, now: Duration, id: WorkerId, departure: Departure) -> Result<Vec<Effect>, JobError> {
        // one that waits for a generation has only the order to stop, and nothing to finish: it leaves as if it had failed
        let sent_away = matches!(self.membership.directive(id), Directive::Stop(StopCause::Operator));
        let Some(worker) = self.workers.get_mut(&id) else {
            // one that is forgotten has left before, or was lost
            return if self.membership.has_admitted(id) { Ok(Vec::new()) } else { Err(JobError::UnknownWorker(id)) };
        };
        worker.left = true;
        let in_peace = matches!(departure, Departure::Done | Departure::Stopped | Departure::GaveUp(..));
        // of one that breaks down, the plan says what it had finished: when the next generation begins, or the job ends
        if let Some(rank) = self.membership.members().and_then(|members| members.get(&id)?.rank).filter(|_| in_peace) {
            let plan = &self.settings.plan;
            self.books.leave(rank, |step| planned(plan, step));
        }
        // its last heartbeat may be older than its last steps
        if in_peace && let Some(last) = &self.last_step {
            worker.step = worker.step.max(last.step);
        }
        worker.phase = match departure {
            Departure::Done => Phase::Done,
            Departure::Stopped => Phase::Stopped,
            Departure::Crashed(_) | Departure::Failed(_) if sent_away => Phase::Stopped,
            Departure::Crashed(_) | Departure::Failed(_) => Phase::Failed,
            Departure::GaveUp(..) => Phase::GaveUp,
        };
        Ok(self.take(now, Event::Leave(id, departure)))
    }

    /// Nobody is to be blamed for the time before `now`.
    pub fn restart_clock(&mut self, now: Duration) {
        self.membership.restart_clock(now);
        self.vigil.moved(now);
    }

    pub fn tick(&mut self, now: Duration) -> Vec<Effect> {
        let mut effects = self.take(now, Event::Tick);
        effects.extend(self.watch_progress(now));
        effects
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
        let member = self.membership.members().and_then(|members| members.get(&worker));
        member.and_then(|member| member.rank).ok_or(JobError::UnknownWorker(worker))
    }

    /// As [`Job::member`], for those who want to start a collective: a job that stops forms none.
    ///
    /// # Errors
    /// If the worker is not a member, or the job stops.
    pub fn running_member(&self, worker: WorkerId, generation: Generation) -> Result<Rank, JobError> {
        match self.membership.directive(worker) {
            Directive::Stop(cause) => Err(JobError::Stopping(cause)),
            Directive::Regroup(ended) => Err(JobError::Regrouping(ended)),
            Directive::Wait | Directive::Run { .. } | Directive::Dismissed | Directive::Unknown => {
                self.member(worker, generation)
            }
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
            _ => None,
        }
    }

    fn take(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        let passive = matches!(event, Event::Heartbeat(_) | Event::Progress(_) | Event::Tick);
        // a sign of life alone need not outlive the coordinator
        let vital = !passive || (matches!(event, Event::Progress(_)) && self.membership.recoveries() > 0);
        let effects = self.membership.step(now, event.clone());
        self.unsaved.job |= vital || !effects.is_empty();
        self.unsaved.workers.add(&event, &effects);
        self.revision += u64::from(!passive || !effects.is_empty());
        for effect in &effects {
            match effect {
                Effect::Formed { members, .. } => {
                    self.formed.get_or_insert(now);
                    self.vigil.begin(now);
                    self.begun = false;
                    self.books.form(members.len() as u32);
                    for worker in self.workers.values_mut() {
                        (worker.rank, worker.entered, worker.inside) = (None, 0, false);
                    }
                    for (rank, worker) in members.iter().enumerate() {
                        if let Some(worker) = self.workers.get_mut(worker) {
                            worker.rank = Some(Rank(rank as u32));
                        }
                    }
                }
                Effect::Lost(loss) => {
                    if let Some(worker) = self.workers.get_mut(&loss.worker) {
                        worker.left = true;
                        worker.rank = None;
                        worker.phase = Phase::Lost;
                    }
                }
                Effect::NewcomerLost(worker, _) => {
                    if let Some(worker) = self.workers.get_mut(worker) {
                        worker.left = true;
                        worker.phase = Phase::Lost;
                    }
                }
                Effect::Dismissed(worker) => {
                    if let Some(worker) = self.workers.get_mut(worker) {
                        worker.phase = Phase::Dismissed;
                    }
                }
                Effect::Stop(_) => self.workers.values_mut().for_each(|worker| worker.told = false),
                Effect::Ended(outcome) => {
                    self.ended = Some(now);
                    self.outcome = Some(outcome.clone());
                }
                Effect::Admitted(_) | Effect::Refused(_) | Effect::Regrouping(_) => {}
            }
        }
        // ranks of the generation before are over
        let goes =
            |effect: &Effect| matches!(effect, Effect::Lost(_) | Effect::NewcomerLost(..) | Effect::Formed { .. });
        if matches!(event, Event::Leave(..)) || effects.iter().any(goes) {
            self.forget_gone();
        }
        effects
    }

    /// Members without a sign of life after `time`.
    #[must_use]
    pub fn unheard_since(&self, time: Duration) -> Vec<WorkerId> {
        let members = self.membership.members().into_iter().flatten();
        let unheard = members.filter(|(id, _)| self.workers.get(id).is_none_or(|worker| worker.seen <= time));
        unheard.map(|(&id, _)| id).collect()
    }

    /// How many workers have joined and not left.
    #[must_use]
    pub fn present_count(&self) -> usize {
        self.workers.values().filter(|worker| !worker.left).count()
    }

    /// Nobody is left who has to learn that the job has ended.
    #[must_use]
    pub fn everybody_knows(&self, now: Duration) -> bool {
        let patience = self.settings.config.cluster.heartbeat_timeout.0;
        self.outcome.is_some()
            && now >= self.answers_until
            && self
                .workers
                .values()
                .all(|worker| worker.left || worker.told || now.saturating_sub(worker.seen) > patience)
    }
}

/// Epoch and users of a step, by the plan.
fn planned(plan: &Plan, step: Step) -> (u32, Vec<UserIndex>) {
    let position = plan.position(Step(step.0 - 1));
    (position.epoch, plan.users(position))
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
pub(crate) mod tests;
