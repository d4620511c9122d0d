//! The one owner of a job's state: takes commands one by one, and ticks.
//!
//! Input: [`Command`]s through a [`JobHandle`], the clock. Output: answers, journal entries, metrics, log lines. Invariant:
//! nothing here waits for a worker or the disk, besides a full journal queue; a wait of a caller (a rendezvous key, a
//! durable ledger) is a reply that is kept.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use learn_domain::event::{Happening, JobEvent};
use learn_domain::membership::{Departure, Directive, Effect, Loss, Outcome, StopCause};
use learn_domain::report::{Evaluation, JobState, JobStatus, StepRecord, Task};
use learn_domain::{Generation, Step, WorkerId};
use learn_proto::convert::{Applicant, Beginning, StepReport};
use learn_telemetry::CoordinatorMetrics;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::attendance::Attendances;
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
pub const STATES: &[&str] = &["gathering", "running", "regrouping", "stopping", "finished", "stopped", "failed"];

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
    /// The answer is the number of the attendance, which [`Command::Disconnected`] names, and what to do each time that
    /// it changes.
    Attend(WorkerId, Reply<(u64, watch::Receiver<Directive>)>),
    Disconnected(WorkerId, u64),
    Ready {
        worker: WorkerId,
        generation: Generation,
        broken: Option<String>,
        reply: Reply<Result<(), JobError>>,
    },
    Begin(Beginning, Reply<Result<(), JobError>>),
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
    /// The answer is the number of workers that are wanted now.
    Scale(u32, Reply<u32>),
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

    /// A worker's attendance has ended. Never waits: should the queue be full, the heartbeats tell the same later.
    pub fn disconnected(&self, worker: WorkerId, attendance: u64) {
        if self.0.try_send(Command::Disconnected(worker, attendance)).is_err() {
            tracing::debug!(%worker, "nobody takes note of a broken connection");
        }
    }
}

/// The owner of a job.
pub struct JobOwner {
    job: Job,
    task: Task,
    store: Store,
    commits: BTreeMap<Step, Vec<Reply<()>>>,
    attendances: Attendances,
    /// When the last generation broke, until a step is finished.
    recovering: Option<Instant>,
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
        let owner = Self {
            job,
            task,
            store: Store::default(),
            commits: BTreeMap::new(),
            attendances: Attendances::default(),
            recovering: None,
            commands,
            journal,
            metrics,
            started: Instant::now(),
        };
        (JobHandle(sender), owner)
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
                _ = ticks.tick() => self.apply(Job::tick).await?,
            }
            self.enter_commits().await?;
            self.attendances.tell(&self.job);
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
                let answer = match self.job.join(self.now(), applicant) {
                    Ok((worker, effects)) => {
                        self.carry_out(effects).await?;
                        Ok(worker)
                    }
                    Err(error) => Err(error),
                };
                let _ = reply.send(answer);
            }
            Command::Heartbeat(beat, reply) => {
                self.metrics.heartbeats_total.inc();
                let (directive, effects) = self.job.heartbeat(self.now(), beat);
                self.carry_out(effects).await?;
                let _ = reply.send(directive);
            }
            Command::Attend(worker, reply) => {
                let _ = reply.send(self.attendances.begin(worker, self.job.directive(worker)));
            }
            Command::Disconnected(worker, attendance) => {
                // a worker that has come back by another connection is not lost
                if self.attendances.end(worker, attendance) {
                    self.apply(|job, now| job.disconnected(now, worker)).await?;
                }
            }
            Command::Ready { worker, generation, broken, reply } => {
                let answer = match self.job.ready(self.now(), worker, (generation, broken)) {
                    Ok(effects) => {
                        self.carry_out(effects).await?;
                        Ok(())
                    }
                    Err(error) => Err(error),
                };
                let _ = reply.send(answer);
            }
            Command::Begin(beginning, reply) => {
                let answer = self.job.begin(self.now(), beginning);
                for record in answer.iter().flatten() {
                    self.enter_step(record).await?;
                }
                let _ = reply.send(answer.map(drop));
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
                let answer = self.job.report(self.now(), report);
                if let Ok(Some(record)) = &answer {
                    self.enter_step(record).await?;
                    if let Some(since) = self.recovering.take() {
                        self.metrics.recovery_seconds.observe(since.elapsed().as_secs_f64());
                    }
                }
                let _ = reply.send(answer.map(drop));
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
                let answer = match self.job.leave(self.now(), worker, departure) {
                    Ok(effects) => {
                        self.carry_out(effects).await?;
                        Ok(())
                    }
                    Err(error) => Err(error),
                };
                let _ = reply.send(answer);
            }
            Command::OperatorStop(reply) => {
                self.apply(Job::operator_stop).await?;
                let _ = reply.send(());
            }
            Command::Scale(workers, reply) => {
                self.apply(|job, now| job.scale(now, workers)).await?;
                tracing::info!(workers = self.job.wanted(), "workers are wanted");
                let _ = reply.send(self.job.wanted());
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
            Happening::WorkerLost { cause, .. } => {
                self.metrics.worker_lost_total.with_label_values(&[cause.label()]).inc();
            }
            Happening::Regrouping { .. } | Happening::Formed { .. } | Happening::WorkerDismissed { .. } => {}
        }
        // for people alone: nothing is decided by it
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        self.enter(Entry::Event(Box::new(JobEvent { time, generation, happening }))).await
    }

    async fn enter_step(&self, record: &StepRecord) -> Result<(), OwnerError> {
        self.metrics.steps_total.inc();
        self.metrics.loss.set(record.loss);
        self.metrics.epoch.set(i64::from(record.epoch));
        self.enter(Entry::Step(record.clone())).await
    }

    async fn apply(&mut self, event: impl FnOnce(&mut Job, Duration) -> Vec<Effect>) -> Result<(), OwnerError> {
        let now = self.now();
        let effects = event(&mut self.job, now);
        self.carry_out(effects).await
    }

    async fn carry_out(&mut self, effects: Vec<Effect>) -> Result<(), OwnerError> {
        let generation = self.job.generation();
        for effect in effects {
            match effect {
                Effect::Admitted(worker) => tracing::info!(%worker, "worker joined"),
                Effect::Refused(refusal) => tracing::warn!(%refusal, "worker refused"),
                Effect::Lost(loss) => {
                    let Loss { worker, rank, cause } = loss;
                    self.note(generation, Happening::WorkerLost { worker, rank, cause }).await?;
                }
                Effect::Regrouping(cause) => {
                    // whoever waits for a key of this generation waits in vain
                    self.store.clear();
                    self.recovering.get_or_insert_with(Instant::now);
                    self.note(generation, Happening::Regrouping { reason: cause.to_string() }).await?;
                }
                Effect::Dismissed(worker) => {
                    self.note(generation, Happening::WorkerDismissed { worker }).await?;
                }
                Effect::Formed { generation, members } => {
                    self.store.clear();
                    let world_size = members.len() as u32;
                    self.note(generation, Happening::Formed { world_size }).await?;
                }
                Effect::Stop(cause) => {
                    tracing::warn!(%cause, "stopping");
                    self.count_stop(&cause);
                    if self.job.stops_at_once() {
                        self.store.clear();
                    }
                }
                Effect::Ended(outcome) => {
                    self.store.clear();
                    match &outcome {
                        Outcome::Finished => tracing::info!("job finished"),
                        Outcome::Stopped(cause) => tracing::warn!(%cause, "job stopped"),
                    }
                }
            }
        }
        Ok(())
    }

    /// What stops the job without a loss that was counted already.
    fn count_stop(&self, cause: &StopCause) {
        let label = match cause {
            StopCause::Failed { .. } => "failed",
            _ => return,
        };
        self.metrics.worker_lost_total.with_label_values(&[label]).inc();
    }

    fn show(&self) {
        self.metrics.set_state(match self.job.state() {
            JobState::Gathering => "gathering",
            JobState::Running => "running",
            JobState::Regrouping => "regrouping",
            JobState::Stopping => "stopping",
            JobState::Finished => "finished",
            JobState::Stopped => "stopped",
            JobState::Failed => "failed",
        });
        self.metrics.generation.set(self.job.generation().0 as i64);
        self.metrics.workers.set(self.job.present() as i64);
    }
}
