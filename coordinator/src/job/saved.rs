//! What of a job outlives its coordinator: written as changes of a turn, read by the coordinator that takes over.
//!
//! Input: the job, or the state that a coordinator left. Output: a [`Turn`]'s values and entries, or the job as it was. The
//! large part, the books, is written whole now and then, at checkpoints at least, and as changes in between; workers one by
//! one; the rest when it has changed.
//! Invariant: time goes on where it was, so that no stored time lies in the future; and nobody is blamed for the time
//! when nobody could be heard.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use learn_domain::ledger::Ledger;
use learn_domain::membership::{Effect, Event, Member, Membership, Outcome};
use learn_domain::report::{Evaluation, StepRecord};
use learn_domain::{Step, WorkerId};
use serde::{Deserialize, Serialize};

use super::books::{BooksError, Change, SavedBooks};
use super::vigil::Vigil;
use super::{Job, JobSettings, Worker, planned};
use crate::state::{StateError, StateFile, Turn};

/// How long a coordinator that took over answers at least: a worker may not know yet that it has left.
const LINGER: Duration = Duration::from_secs(1);

/// Weight of changes that are kept one by one; then the books are kept as a whole, so that taking them over stays fast.
const MOST_CHANGES: usize = 1 << 20;

/// Names of the values.
const BOOKS: &str = "books";
const JOB: &str = "job";
const PROGRESS: &str = "progress";
const CLOCK: &str = "clock";

#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("the state of the run has no `{0}`: its coordinator was killed before it served; start the job again")]
    Incomplete(&'static str),
    #[error(
        "{0} is not the dataset that the run has begun with, or has changed; bring that one back, or start a new run"
    )]
    Dataset(PathBuf),
    #[error(
        "{dataset} has the content embeddings {now}, the run has begun with {before}; bring those back (`learn-launch \
         embed` with the encoder of then), or start a new run"
    )]
    Embeddings { dataset: PathBuf, before: String, now: String },
    #[error(
        "the books of the run contradict themselves ({0}); `learn-launch resume` continues from the last checkpoint"
    )]
    Books(#[from] BooksError),
}

/// What changes seldom: with who comes and goes, with checkpoints and evaluations.
#[derive(Serialize, Deserialize)]
struct Saved {
    /// Without its members.
    membership: Membership,
    last_checkpoint: Option<Step>,
    commits: BTreeSet<Step>,
    evaluations: Vec<Evaluation>,
    inherited: usize,
    #[serde(default)]
    beyond: Option<Step>,
    earlier_seconds: f64,
    begun: bool,
    formed: Option<Duration>,
    ended: Option<Duration>,
    outcome: Option<Outcome>,
    #[serde(default)]
    operator_stop: bool,
}

/// A worker, in a row of its own.
#[derive(Serialize, Deserialize)]
struct Row {
    worker: Worker,
    /// None for one that has left.
    member: Option<Member>,
}

/// What changes with every step.
#[derive(Serialize, Deserialize)]
struct Progress {
    last_step: Option<StepRecord>,
    trained_users: u64,
    step_seconds: f64,
}

/// Workers that have changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Changed {
    These(BTreeSet<WorkerId>),
    All,
}

impl Default for Changed {
    fn default() -> Self {
        Self::These(BTreeSet::new())
    }
}

impl Changed {
    /// An event changes the worker that it names, as an effect on a newcomer does; other effects may change any.
    pub fn add(&mut self, event: &Event, effects: &[Effect]) {
        let worker = match event {
            Event::Ready { worker, .. }
            | Event::Disconnected(worker)
            | Event::Stalled { worker, .. }
            | Event::Leave(worker, _) => Some(*worker),
            // whether one was seen is not kept
            Event::Heartbeat(_) | Event::Join(_) | Event::Progress(_) | Event::Tick => None,
            Event::Scale(_) | Event::OperatorStop | Event::NeverJoined(_) => None,
        };
        let newcomer = |effect: &Effect| match effect {
            Effect::Admitted(worker) | Effect::NewcomerLost(worker, _) => Some(*worker),
            _ => None,
        };
        if effects.iter().any(|effect| newcomer(effect).is_none() && !matches!(effect, Effect::Refused(_))) {
            *self = Self::All;
        } else if let Self::These(workers) = self {
            workers.extend(worker.into_iter().chain(effects.iter().filter_map(newcomer)));
        }
    }
}

/// What has changed since it was written last.
#[derive(Clone, Debug, Default)]
pub struct Unsaved {
    pub job: bool,
    pub workers: Changed,
    /// Workers whose rows go.
    pub forgotten: BTreeSet<WorkerId>,
    pub progress: bool,
    /// The books as a whole, because a ledger was committed.
    pub books: bool,
    /// Of the changes of the books that are kept one by one.
    pub weight: usize,
}

impl Job {
    /// The ledger of the last checkpoint, if it was asked for.
    #[must_use]
    pub fn committed(&self) -> Option<(Step, &Ledger)> {
        let (step, ledger) = self.books.committed();
        (self.last_checkpoint == Some(step)).then_some((step, ledger))
    }

    /// Adds to `turn` what has changed since the last call.
    ///
    /// # Errors
    /// If something is no JSON.
    pub fn save(&mut self, now: Duration, turn: &mut Turn) -> Result<(), StateError> {
        let Unsaved { job, workers, forgotten, progress, books, weight } = std::mem::take(&mut self.unsaved);
        let changes = self.books.take_changes();
        self.unsaved.weight = weight + changes.iter().map(Change::weight).sum::<usize>();
        if books || self.unsaved.weight > MOST_CHANGES {
            turn.value(BOOKS, &self.books)?;
            turn.forget_entries();
            self.unsaved.weight = 0;
        } else {
            changes.iter().try_for_each(|change| turn.entry(change))?;
        }
        if job {
            turn.value(
                JOB,
                &Saved {
                    membership: self.membership.without_members(),
                    last_checkpoint: self.last_checkpoint,
                    commits: self.commits.clone(),
                    evaluations: self.evaluations.clone(),
                    inherited: self.inherited,
                    beyond: self.beyond,
                    earlier_seconds: self.earlier_seconds,
                    begun: self.begun,
                    formed: self.formed,
                    ended: self.ended,
                    outcome: self.outcome.clone(),
                    operator_stop: self.operator_stop,
                },
            )?;
        }
        match workers {
            Changed::These(ids) => ids.into_iter().try_for_each(|id| self.save_worker(id, turn))?,
            Changed::All => self.workers.keys().try_for_each(|&id| self.save_worker(id, turn))?,
        }
        forgotten.into_iter().for_each(|id| turn.forget_row(u64::from(id.0)));
        if progress {
            let Self { last_step, trained_users, step_seconds, .. } = self;
            let (last_step, trained_users, step_seconds) = (last_step.clone(), *trained_users, *step_seconds);
            turn.value(PROGRESS, &Progress { last_step, trained_users, step_seconds })?;
        }
        if !turn.is_empty() {
            turn.value(CLOCK, &now)?;
        }
        Ok(())
    }

    fn save_worker(&self, id: WorkerId, turn: &mut Turn) -> Result<(), StateError> {
        let Some(worker) = self.workers.get(&id) else { return Ok(()) };
        let member = self.membership.members().and_then(|members| members.get(&id)).cloned();
        turn.row(u64::from(id.0), &Row { worker: worker.clone(), member })
    }

    /// The job as the coordinator that was killed has left it, and its time.
    ///
    /// # Errors
    /// If the state is damaged or incomplete.
    pub fn take_over(settings: JobSettings, state: &StateFile) -> Result<(Self, Duration), TakeOverError> {
        let saved: Saved = state.value(JOB)?.ok_or(TakeOverError::Incomplete(JOB))?;
        let books: SavedBooks = state.value(BOOKS)?.ok_or(TakeOverError::Incomplete(BOOKS))?;
        let progress: Progress = state.value(PROGRESS)?.ok_or(TakeOverError::Incomplete(PROGRESS))?;
        let now: Duration = state.value(CLOCK)?.ok_or(TakeOverError::Incomplete(CLOCK))?;
        let mut books = books.open(|step| planned(&settings.plan, step));
        for change in state.entries::<Change>()? {
            books.replay(change, |step| planned(&settings.plan, step))?;
        }
        let (mut workers, mut members) = (BTreeMap::new(), BTreeMap::new());
        for (number, Row { worker, member }) in state.rows()? {
            // it was written as a worker's number
            let id = WorkerId(number as u32);
            workers.insert(id, Worker { seen: now, ..worker });
            members.extend(member.map(|member| (id, member)));
        }
        let mut membership = saved.membership;
        membership.set_members(members);
        membership.restart_clock(now);
        let mut job = Self {
            faults_told: books.faults().count(),
            settings,
            membership,
            books,
            workers,
            last_step: progress.last_step,
            last_checkpoint: saved.last_checkpoint,
            evaluations: saved.evaluations,
            inherited: saved.inherited,
            beyond: saved.beyond,
            commits: saved.commits,
            trained_users: progress.trained_users,
            step_seconds: progress.step_seconds,
            earlier_seconds: saved.earlier_seconds,
            revision: 0,
            begun: saved.begun,
            formed: saved.formed,
            ended: saved.ended,
            outcome: saved.outcome,
            operator_stop: saved.operator_stop,
            answers_until: now + LINGER,
            unsaved: Unsaved::default(),
            vigil: Vigil::default(),
        };
        job.vigil.begin(now);
        // earlier versions kept all
        job.forget_gone();
        Ok((job, now))
    }
}
