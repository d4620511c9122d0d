//! The one owner of a job's state: takes commands one by one, and ticks.
//!
//! Input: [`Command`]s through a [`JobHandle`], the clock. Output: answers, journal entries, metrics, log lines. Invariant:
//! nothing here waits for a worker or the disk, besides a full journal queue; a wait of a caller (a rendezvous key, a
//! durable ledger) is a reply that is kept.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use learn_domain::event::{Happening, JobEvent};
use learn_domain::membership::{Departure, Directive, Effect, Outcome, StopCause};
use learn_domain::report::{Evaluation, JobState, JobStatus, Task};
use learn_domain::{Generation, Step, WorkerId};
use learn_proto::convert::{Applicant, StepReport};
use learn_telemetry::CoordinatorMetrics;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

use super::{Heartbeat, Job, JobError};
use crate::journal::Entry;
use crate::store::{Store, StoreFull};

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(200);
/// How often the status is written.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Commands that may wait.
const QUEUE: usize = 1024;

/// States of the job as metrics name them.
pub const STATES: &[&str] = &["gathering", "running", "stopping", "finished", "stopped", "failed"];

/// Why the owner of the job gave no answer, or no good one.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Full(#[from] StoreFull),
    #[error("the coordinator is ending")]
    Gone,
}

type Reply<T> = oneshot::Sender<T>;

/// A key of a generation's rendezvous store, and who asks.
#[derive(Clone, Debug)]
pub struct Key {
    pub worker: WorkerId,
    pub generation: Generation,
    pub key: String,
}

/// What can be asked of a job.
#[derive(Debug)]
pub enum Command {
    Join(Applicant, Reply<Result<WorkerId, JobError>>),
    Heartbeat(Heartbeat, Reply<Directive>),
    Put(Key, Vec<u8>, Reply<Result<(), AskError>>),
    /// The inner reply ends without a value when the generation does.
    Get(Key, Reply<Result<oneshot::Receiver<Vec<u8>>, JobError>>),
    Report(StepReport, Reply<Result<(), JobError>>),
    /// The inner reply comes when the ledger is durable.
    Commit(WorkerId, Generation, Step, Reply<Result<oneshot::Receiver<()>, JobError>>),
    Evaluation(WorkerId, Generation, Evaluation, Reply<Result<(), JobError>>),
    Event(WorkerId, Generation, Happening, Reply<Result<(), JobError>>),
    Leave(WorkerId, Departure, Reply<Result<(), JobError>>),
    OperatorStop(Reply<()>),
    Status(Reply<JobStatus>),
}

/// Sends commands to the owner of a job.
#[derive(Clone, Debug)]
pub struct JobHandle(mpsc::Sender<Command>);

impl JobHandle {
    /// # Errors
    /// [`AskError::Gone`] when the job has ended and nobody answers any more.
    pub async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, AskError> {
        let (reply, answer) = oneshot::channel();
        self.0.send(command(reply)).await.map_err(|_| AskError::Gone)?;
        answer.await.map_err(|_| AskError::Gone)
    }
}

/// The owner of a job.
pub struct JobOwner {
    job: Job,
    task: Task,
    store: Store,
    commits: BTreeMap<Step, Vec<Reply<()>>>,
    commands: mpsc::Receiver<Command>,
    journal: mpsc::Sender<Entry>,
    metrics: CoordinatorMetrics,
    started: Instant,
}

/// What a job's owner needs besides the job.
pub struct OwnerParts {
    pub task: Task,
    pub journal: mpsc::Sender<Entry>,
    pub metrics: CoordinatorMetrics,
}

/// The journal has ended before the job.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    #[error("the run's files cannot be written any more")]
    JournalEnded,
}

impl JobOwner {
    #[must_use]
    pub fn new(job: Job, parts: OwnerParts) -> (JobHandle, Self) {
        let (sender, commands) = mpsc::channel(QUEUE);
        let OwnerParts { task, journal, metrics } = parts;
        let (store, commits, started) = (Store::default(), BTreeMap::new(), Instant::now());
        (JobHandle(sender), Self { job, task, store, commits, commands, journal, metrics, started })
    }

    /// Works until the job has ended and everybody knows, or has gone silent.
    ///
    /// # Errors
    /// If what happened cannot be kept.
    pub async fn run(mut self) -> Result<Outcome, OwnerError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut written: Option<(Instant, JobState)> = None;
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.take(command).await?,
                    // nobody can ask any more: the servers have failed
                    None => break,
                },
                _ = ticks.tick() => { self.apply(|job, now| job.tick(now)); }
            }
            self.enter_commits().await?;
            self.show();
            if self.job.outcome().is_some() {
                if self.job.everybody_knows(self.now()) {
                    break;
                }
                continue;
            }
            let state = self.job.state();
            if written.as_ref().is_none_or(|(at, known)| at.elapsed() >= STATUS_INTERVAL || *known != state) {
                self.enter_status().await?;
                written = Some((Instant::now(), state));
            }
        }
        self.finish().await
    }

    /// The summary, if there is one, is there before the final status says so.
    async fn finish(self) -> Result<Outcome, OwnerError> {
        let outcome = self.job.outcome().cloned().unwrap_or(Outcome::Stopped(StopCause::Operator));
        if outcome == Outcome::Finished && matches!(self.task, Task::Train { .. }) {
            self.enter(Entry::Summary(Box::new(self.job.summary()))).await?;
        }
        self.enter_status().await?;
        Ok(outcome)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    async fn enter(&self, entry: Entry) -> Result<(), OwnerError> {
        self.journal.send(entry).await.map_err(|_| OwnerError::JournalEnded)
    }

    async fn enter_status(&self) -> Result<(), OwnerError> {
        self.enter(Entry::Status(Box::new(self.job.status(self.now())))).await
    }

    async fn enter_commits(&mut self) -> Result<(), OwnerError> {
        for (step, ledger) in self.job.complete_commits() {
            self.metrics.checkpoints_total.inc();
            self.metrics.last_checkpoint_step.set(step.0 as i64);
            let done = self.commits.remove(&step).unwrap_or_default();
            self.enter(Entry::Ledger { step, ledger: Box::new(ledger), done }).await?;
        }
        Ok(())
    }

    // an answer whose asker has gone is dropped: every `let _ = reply.send(…)` below
    async fn take(&mut self, command: Command) -> Result<(), OwnerError> {
        match command {
            Command::Join(applicant, reply) => {
                let now = self.now();
                let answer = self.job.join(now, applicant).map(|(worker, effects)| {
                    self.carry_out(&effects);
                    worker
                });
                let _ = reply.send(answer);
            }
            Command::Heartbeat(beat, reply) => {
                self.metrics.heartbeats_total.inc();
                let (directive, effects) = self.job.heartbeat(self.now(), beat);
                self.carry_out(&effects);
                let _ = reply.send(directive);
            }
            Command::Put(key, value, reply) => {
                let member = self.job.running_member(key.worker, key.generation).map_err(AskError::from);
                let _ = reply.send(member.and_then(|_| Ok(self.store.put(key.key, value)?)));
            }
            Command::Get(key, reply) => {
                let answer = self.job.running_member(key.worker, key.generation).map(|_| {
                    let (value, answer) = oneshot::channel();
                    self.store.get(key.key, value);
                    answer
                });
                let _ = reply.send(answer);
            }
            Command::Report(report, reply) => {
                let answer = self.job.report(report);
                if let Ok(Some(record)) = &answer {
                    self.metrics.steps_total.inc();
                    self.metrics.loss.set(record.loss);
                    self.metrics.epoch.set(i64::from(record.epoch));
                    self.enter(Entry::Step(record.clone())).await?;
                }
                let _ = reply.send(answer.map(|_| ()));
            }
            Command::Commit(worker, generation, step, reply) => {
                let answer = self.job.commit(worker, generation, step).map(|()| {
                    let (done, durable) = oneshot::channel();
                    self.commits.entry(step).or_default().push(done);
                    durable
                });
                let _ = reply.send(answer);
            }
            Command::Evaluation(worker, generation, evaluation, reply) => {
                let answer = self.job.evaluation(worker, generation, evaluation);
                if let Ok(Some(evaluation)) = &answer {
                    tracing::info!(split = %evaluation.split, step = %evaluation.step, metrics = ?evaluation.metrics, "evaluated");
                    self.enter(Entry::Evaluation(evaluation.clone())).await?;
                }
                let _ = reply.send(answer.map(|_| ()));
            }
            Command::Event(worker, generation, happening, reply) => {
                let answer = self.job.member(worker, generation).map(drop);
                if answer.is_ok() {
                    self.note(generation, happening).await?;
                }
                let _ = reply.send(answer);
            }
            Command::Leave(worker, departure, reply) => {
                tracing::info!(%worker, ?departure, "worker leaves");
                let answer = self.job.leave(self.now(), worker, departure).map(|effects| self.carry_out(&effects));
                let _ = reply.send(answer);
            }
            Command::OperatorStop(reply) => {
                self.apply(|job, now| job.operator_stop(now));
                let _ = reply.send(());
            }
            Command::Status(reply) => {
                let _ = reply.send(self.job.status(self.now()));
            }
        }
        Ok(())
    }

    /// Brings what has happened to the log, the metrics and the events.
    async fn note(&self, generation: Generation, happening: Happening) -> Result<(), OwnerError> {
        tracing::warn!(%generation, "{happening}");
        match &happening {
            Happening::NonFinite { action, .. } => {
                self.metrics.non_finite_total.with_label_values(&[&action.to_string()]).inc();
            }
            Happening::CheckpointFailed { .. } => self.metrics.checkpoint_failures_total.inc(),
            Happening::CheckpointSkipped { .. } => self.metrics.checkpoints_skipped_total.inc(),
        }
        // for people alone: nothing is decided by it
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        self.enter(Entry::Event(Box::new(JobEvent { time, generation, happening }))).await
    }

    fn apply(&mut self, event: impl FnOnce(&mut Job, Duration) -> Vec<Effect>) {
        let now = self.now();
        let effects = event(&mut self.job, now);
        self.carry_out(&effects);
    }

    fn carry_out(&mut self, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Admitted(worker) => tracing::info!(%worker, "worker joined"),
                Effect::Refused(refusal) => tracing::warn!(%refusal, "worker refused"),
                Effect::Formed { generation, members } => {
                    self.store.clear();
                    tracing::info!(%generation, world_size = members.len(), "generation formed");
                }
                Effect::Stop(cause) => {
                    tracing::warn!(%cause, graceful = cause.graceful(), "stopping");
                    self.count_loss(cause);
                    if !cause.graceful() {
                        self.store.clear();
                    }
                }
                Effect::Ended(outcome) => {
                    self.store.clear();
                    match outcome {
                        Outcome::Finished => tracing::info!("job finished"),
                        Outcome::Stopped(cause) => tracing::warn!(%cause, "job stopped"),
                    }
                    if let Outcome::Stopped(cause @ StopCause::JoinDeadline { .. }) = outcome {
                        self.count_loss(cause);
                    }
                }
            }
        }
    }

    fn count_loss(&self, cause: &StopCause) {
        let label = match cause {
            StopCause::Operator | StopCause::GaveUp { .. } => return,
            StopCause::Silent { .. } => "silent",
            StopCause::Failed { .. } => "failed",
            StopCause::JoinDeadline { .. } => "join_deadline",
        };
        self.metrics.worker_lost_total.with_label_values(&[label]).inc();
    }

    fn show(&self) {
        self.metrics.set_state(match self.job.state() {
            JobState::Gathering => "gathering",
            JobState::Running => "running",
            JobState::Stopping => "stopping",
            JobState::Finished => "finished",
            JobState::Stopped => "stopped",
            JobState::Failed => "failed",
        });
        self.metrics.generation.set(self.job.generation().0 as i64);
        self.metrics.workers.set(self.job.present() as i64);
    }
}
