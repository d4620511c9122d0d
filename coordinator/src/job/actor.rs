//! The one owner of a job's state: takes commands one by one, and ticks.
//!
//! Input: [`Command`]s through a [`JobHandle`], the clock. Output: answers, journal entries, metrics, log lines. Invariants:
//! nothing here waits for a worker, nor for a file to be synced, besides a full journal queue; a wait of a caller (a
//! rendezvous key, a durable ledger) is a reply that is kept. Commands that are there already are taken in one turn. What each
//! of them does is in `take`.

mod take;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use learn_domain::event::{Happening, JobEvent};
use learn_domain::membership::{Departure, Directive, Effect, Loss, Outcome, StopCause};
use learn_domain::report::{Evaluation, JobState, JobStatus, StepRecord, Task, Timed};
use learn_domain::{Generation, Step, WorkerId};
use learn_proto::convert::{Applicant, Beginning, Heartbeat, StepReport};
use learn_telemetry::CoordinatorMetrics;
use learn_telemetry::place::{self, Field};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::attendance::Attendances;
use super::reunion::Reunion;
use super::turn::{Keeping, Turns};
use super::{Asked, Job, JobError, figures};
use crate::journal::{Entry, LineFile};
use crate::state::StateError;
use crate::store::{Store, StoreFull};

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(200);
/// Ticks that are so far apart say that this process stood still.
const STOOD_STILL: Duration = Duration::from_secs(2);
/// How often the status is written.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Commands that may wait.
const QUEUE: usize = 1024;
/// Commands that are taken in one turn.
const COMMANDS_A_TURN: usize = 256;

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
    Stop(Asked, Reply<()>),
    /// A worker has ended before all had joined, and why.
    NeverJoined(String, Reply<()>),
    /// The answer is the number of workers that are wanted now.
    Scale(u32, Reply<Result<u32, JobError>>),
    Status(Reply<JobStatus>),
}

/// Sends commands to the owner of a job.
#[derive(Clone, Debug)]
pub struct JobHandle(mpsc::Sender<Command>);

impl JobHandle {
    /// A handle whose commands a test takes.
    #[cfg(test)]
    pub(crate) fn channel() -> (Self, mpsc::Receiver<Command>) {
        let (sender, commands) = mpsc::channel(QUEUE);
        (Self(sender), commands)
    }

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

/// Seconds since the Unix epoch, for people alone: nothing is decided by it.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The owner of a job.
pub struct JobOwner {
    job: Job,
    task: Task,
    store: Store,
    commits: BTreeMap<Step, Vec<Reply<()>>>,
    attendances: Attendances,
    /// Revision of the job that the metrics show.
    shown: Option<u64>,
    /// When the last generation broke, until a step is finished.
    recovering: Option<Instant>,
    commands: mpsc::Receiver<Command>,
    turn: Turns,
    metrics: CoordinatorMetrics,
    started: Instant,
    /// Time of the job before `started`.
    earlier: Duration,
    /// If this coordinator was away, until it is clear who is still there.
    reunion: Option<Reunion>,
}

/// What a job's owner needs besides the job.
pub struct OwnerParts {
    pub task: Task,
    pub keeping: Keeping,
    pub metrics: CoordinatorMetrics,
    /// Keys of the generation that runs, and time of the job so far, from a coordinator that was killed.
    pub store: Store,
    pub earlier: Duration,
    pub taken_over: bool,
}

/// What happens cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    #[error("the run's files cannot be written any more")]
    JournalEnded,
    #[error(transparent)]
    State(#[from] StateError),
}

impl JobOwner {
    /// # Errors
    /// If the first turn cannot be kept.
    pub async fn new(job: Job, parts: OwnerParts) -> Result<(JobHandle, Self), OwnerError> {
        let (sender, commands) = mpsc::channel(QUEUE);
        let OwnerParts { task, keeping, metrics, store, earlier, taken_over } = parts;
        let mut owner = Self {
            job,
            task,
            store,
            commits: BTreeMap::new(),
            attendances: Attendances::default(),
            shown: None,
            recovering: None,
            commands,
            turn: Turns::new(keeping, metrics.clone()),
            metrics,
            started: Instant::now(),
            earlier,
            reunion: taken_over.then(|| Reunion::new(earlier, 0)),
        };
        figures::begin(&owner.metrics, &owner.job);
        if let Some(last) = &owner.job.last_step {
            place::set(Field::Step, last.step.0);
        }
        if taken_over {
            place::set(Field::Generation, owner.job.generation().0);
        }
        let restarts = owner.job.restarts();
        let happening = match (taken_over, restarts) {
            (true, _) => Some(Happening::TakenOver),
            (false, 0) => None,
            (false, restarts) => Some(Happening::Restarted { restarts }),
        };
        if let Some(happening) = happening {
            owner.note(owner.job.generation(), happening)?;
        }
        owner.close_turn().await?;
        Ok((JobHandle(sender), owner))
    }

    /// Works until the job has ended and everybody knows, or has gone silent.
    ///
    /// # Errors
    /// If what happened cannot be kept.
    pub async fn run(mut self) -> Result<Outcome, OwnerError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut written: Option<(Instant, JobState)> = None;
        let mut looked = Instant::now();
        loop {
            let command = tokio::select! {
                command = self.commands.recv() => Some(command),
                _ = ticks.tick() => None,
            };
            // who has stood still has not heard what was said meanwhile
            if looked.elapsed() > STOOD_STILL {
                tracing::warn!(stood_still = ?looked.elapsed(), "this coordinator was stopped or held up");
                self.stood_still();
                looked = Instant::now();
            }
            match command {
                Some(Some(command)) => self.take_waiting(command)?,
                // nobody can ask any more: the servers have failed
                Some(None) => break,
                None => {
                    looked = Instant::now();
                    self.apply(Job::tick)?;
                    self.miss_absent()?;
                }
            }
            self.note_notices()?;
            self.close_turn().await?;
            self.show();
            if self.job.outcome().is_some() {
                if self.job.everybody_knows(self.now()) {
                    break;
                }
                continue;
            }
            let state = self.job.state();
            if written.as_ref().is_none_or(|(at, known)| at.elapsed() >= STATUS_INTERVAL || *known != state) {
                figures::work(&self.metrics, &self.job);
                self.enter_status();
                self.close_turn().await?;
                written = Some((Instant::now(), state));
            }
        }
        self.finish().await
    }

    async fn close_turn(&mut self) -> Result<(), OwnerError> {
        self.enter_commits();
        let now = self.now();
        self.turn.close(&mut self.job, now).await?;
        self.attendances.tell(&self.job);
        Ok(())
    }

    /// The summary, if there is one, is there before the final status says so.
    async fn finish(mut self) -> Result<Outcome, OwnerError> {
        let outcome = self.job.outcome().cloned().unwrap_or(Outcome::Stopped(StopCause::Operator));
        if outcome == Outcome::Finished && matches!(self.task, Task::Train { .. }) {
            let summary = Box::new(self.job.summary());
            self.turn.entry(Entry::Summary(summary));
        }
        self.enter_status();
        self.close_turn().await?;
        Ok(outcome)
    }

    fn now(&self) -> Duration {
        self.earlier + self.started.elapsed()
    }

    fn enter_status(&mut self) {
        let status = Box::new(self.job.status(self.now()));
        self.turn.entry(Entry::Status(status));
    }

    fn enter_commits(&mut self) {
        for (step, ledger) in self.job.complete_commits() {
            self.metrics.checkpoints_total.inc();
            self.metrics.checkpoint_age_seconds.mark();
            self.metrics.last_checkpoint_step.set(step.0 as i64);
            let done = self.commits.remove(&step).unwrap_or_default();
            self.turn.entry(Entry::Ledger { step, ledger: Box::new(ledger), done });
        }
        // whoever waits for one that is lost asks again, and is told
        self.commits.retain(|step, _| self.job.awaits(*step));
    }

    fn heard_of_one(&mut self) {
        let now = self.now();
        if let Some(reunion) = &mut self.reunion {
            reunion.heard(now);
        }
    }

    /// Nobody was heard meanwhile, and connections may have broken because of it.
    fn stood_still(&mut self) {
        let now = self.now();
        self.job.restart_clock(now);
        let next = self.attendances.next();
        self.reunion = Some(match self.reunion.take() {
            Some(reunion) => reunion.again(now, next),
            None => Reunion::new(now, next),
        });
    }

    /// A connection that was gone when this coordinator came, or came back, cannot break any more.
    fn miss_absent(&mut self) -> Result<(), OwnerError> {
        let now = self.now();
        let Some(reunion) = self.reunion.take_if(|reunion| reunion.is_over(now)) else { return Ok(()) };
        let unheard = self.job.unheard_since(reunion.since);
        for worker in reunion.missing(unheard) {
            if !self.attendances.attends(worker) {
                self.apply(|job, now| job.disconnected(now, worker))?;
            }
        }
        Ok(())
    }

    /// Takes a command and those that wait behind it.
    fn take_waiting(&mut self, first: Command) -> Result<(), OwnerError> {
        self.take(first)?;
        for _ in 1..COMMANDS_A_TURN {
            match self.commands.try_recv() {
                Ok(command) => self.take(command)?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Brings what has happened to the log, the metrics and the events.
    fn note(&mut self, generation: Generation, happening: Happening) -> Result<(), OwnerError> {
        tracing::warn!("{happening}");
        figures::happening(&self.metrics, &happening);
        Ok(self.turn.line(LineFile::Events, &JobEvent { time: wall_time(), generation, happening })?)
    }

    fn note_notices(&mut self) -> Result<(), OwnerError> {
        let generation = self.job.generation();
        for happening in self.job.take_notices() {
            self.note(generation, happening)?;
        }
        Ok(())
    }

    /// What is not gone on from goes before the first line of this job.
    fn forget_beyond(&mut self) -> Result<(), OwnerError> {
        if let Some(step) = self.job.take_beyond() {
            self.turn.forget_beyond(step)?;
        }
        Ok(())
    }

    fn enter_step(&mut self, record: &StepRecord) -> Result<(), OwnerError> {
        figures::step(&self.metrics, record);
        place::set(Field::Step, record.step.0);
        Ok(self.turn.line(LineFile::Steps, &Timed { time: Some(wall_time()), value: record })?)
    }

    fn apply(&mut self, event: impl FnOnce(&mut Job, Duration) -> Vec<Effect>) -> Result<(), OwnerError> {
        self.apply_asked(|job, now| ((), event(job, now)))
    }

    /// As [`JobOwner::apply`], for an event that has an answer.
    fn apply_asked<T>(&mut self, event: impl FnOnce(&mut Job, Duration) -> (T, Vec<Effect>)) -> Result<T, OwnerError> {
        let now = self.now();
        let (answer, effects) = event(&mut self.job, now);
        self.carry_out(effects)?;
        Ok(answer)
    }

    /// As [`JobOwner::apply_asked`], for an event that the job may refuse: the inner result is its answer.
    fn apply_or_refuse<T>(
        &mut self,
        event: impl FnOnce(&mut Job, Duration) -> Result<(T, Vec<Effect>), JobError>,
    ) -> Result<Result<T, JobError>, OwnerError> {
        self.apply_asked(|job, now| match event(job, now) {
            Ok((answer, effects)) => (Ok(answer), effects),
            Err(error) => (Err(error), Vec::new()),
        })
    }

    fn carry_out(&mut self, effects: Vec<Effect>) -> Result<(), OwnerError> {
        let generation = self.job.generation();
        for effect in effects {
            match effect {
                Effect::Admitted(worker) => {
                    self.metrics.workers_joined_total.inc();
                    tracing::info!(%worker, "worker joined");
                }
                Effect::Refused(refusal) => tracing::warn!(%refusal, "worker refused"),
                Effect::Lost(loss) => {
                    let Loss { worker, rank, cause } = loss;
                    self.note(generation, Happening::WorkerLost { worker, rank, cause })?;
                }
                Effect::NewcomerLost(worker, cause) => {
                    self.note(generation, Happening::NewcomerLost { worker, cause })?;
                }
                Effect::Regrouping(cause) => {
                    // whoever waits for a key of this generation waits in vain
                    self.clear_store();
                    self.recovering.get_or_insert_with(Instant::now);
                    self.note(generation, Happening::Regrouping { reason: cause.to_string() })?;
                }
                Effect::Dismissed(worker) => {
                    self.note(generation, Happening::WorkerDismissed { worker })?;
                }
                Effect::Formed { generation, members } => {
                    place::set(Field::Generation, generation.0);
                    self.clear_store();
                    self.metrics.work_ratio.reset();
                    let world_size = members.len() as u32;
                    self.note(generation, Happening::Formed { world_size })?;
                }
                Effect::Stop(cause) => {
                    tracing::warn!(%cause, "stopping");
                    self.count_stop(&cause);
                    if self.job.stops_at_once() {
                        self.clear_store();
                    }
                }
                Effect::Ended(outcome) => {
                    self.clear_store();
                    match &outcome {
                        Outcome::Finished => tracing::info!("job finished"),
                        Outcome::Stopped(cause) => tracing::warn!(%cause, "job stopped"),
                    }
                }
            }
        }
        Ok(())
    }

    fn clear_store(&mut self) {
        self.store.clear();
        self.turn.clear_keys();
    }

    /// What stops the job without a loss that was counted already.
    fn count_stop(&self, cause: &StopCause) {
        let label = match cause {
            StopCause::Failed { .. } => figures::FAILED,
            _ => return,
        };
        self.metrics.worker_lost_total.with_label_values(&[label]).inc();
    }

    fn show(&mut self) {
        if self.shown.replace(self.job.revision()) == Some(self.job.revision()) {
            return;
        }
        figures::membership(&self.metrics, &self.job);
    }
}
