//! One turn of the job's owner: what it decides is kept first, and only then told to anybody.
//!
//! Input: answers, lines and entries, as they come up while commands are taken. Output: one transaction of the state, then
//! the answers, then the journal. Invariant: nobody hears of anything that a kill could undo, but of a rendezvous key,
//! which its rank puts again until it is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use learn_domain::Step;
use learn_telemetry::CoordinatorMetrics;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::Job;
use super::actor::OwnerError;
use crate::journal::{Entry, Kept, Line, LineFile};
use crate::state::{StateError, StateFile, Turn};

/// Where a turn is kept.
pub struct Keeping {
    pub state: StateFile,
    pub journal: mpsc::Sender<Entry>,
    /// Lines below this number are in their files.
    pub written: Arc<AtomicU64>,
}

/// What has come up in this turn.
pub struct Turns {
    keeping: Keeping,
    turn: Turn,
    next_line: u64,
    entries: Vec<Entry>,
    answers: Vec<Box<dyn FnOnce() + Send>>,
    metrics: CoordinatorMetrics,
}

impl Turns {
    pub fn new(keeping: Keeping, metrics: CoordinatorMetrics) -> Self {
        let next_line = keeping.state.next_line();
        Self { keeping, turn: Turn::default(), next_line, entries: Vec::new(), answers: Vec::new(), metrics }
    }

    /// Answers when the turn is kept; an answer whose asker has gone is dropped.
    pub fn answer<T: Send + 'static>(&mut self, reply: oneshot::Sender<T>, answer: T) {
        self.answers.push(Box::new(move || drop(reply.send(answer))));
    }

    /// Appends a line to a file of the run.
    ///
    /// # Errors
    /// If it is no JSON.
    pub fn line<T: Serialize>(&mut self, file: LineFile, value: &T) -> Result<(), StateError> {
        let encode = |source| StateError::Encode { what: "a line".into(), source };
        let line = Line { file, text: serde_json::to_string(value).map_err(encode)? };
        self.turn.line(&line)?;
        self.entries.push(Entry::Line(self.next_line, line));
        self.next_line += 1;
        Ok(())
    }

    /// Lines of steps beyond `step` go from the files of the run, before any line that comes after this.
    ///
    /// # Errors
    /// If it is no JSON.
    pub fn forget_beyond(&mut self, step: Step) -> Result<(), StateError> {
        self.turn.line(&Kept::Beyond { beyond: step })?;
        self.entries.push(Entry::Beyond(self.next_line, step));
        self.next_line += 1;
        Ok(())
    }

    /// An entry of the journal that is not kept here: it can be made again.
    pub fn entry(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// A key was put into the rendezvous store.
    pub fn key(&mut self, key: String, value: Vec<u8>) {
        self.turn.key(key, value);
    }

    /// The rendezvous store was cleared.
    pub fn clear_keys(&mut self) {
        self.turn.clear_keys();
    }

    /// Keeps the turn, then lets others know.
    ///
    /// # Errors
    /// If it cannot be kept.
    pub async fn close(&mut self, job: &mut Job, now: Duration) -> Result<(), OwnerError> {
        let mut turn = std::mem::take(&mut self.turn);
        job.save(now, &mut turn)?;
        if !turn.is_empty() {
            turn.lines_are_written(self.keeping.written.load(Ordering::Acquire));
            let started = Instant::now();
            self.keeping.state.write(turn)?;
            self.metrics.state_write_seconds.observe(started.elapsed().as_secs_f64());
        }
        self.answers.drain(..).for_each(|answer| answer());
        for entry in self.entries.drain(..) {
            self.keeping.journal.send(entry).await.map_err(|_| OwnerError::JournalEnded)?;
        }
        Ok(())
    }
}
