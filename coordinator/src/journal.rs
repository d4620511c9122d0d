//! The run directory's files, written by one thread in the order of their events.
//!
//! Input: [`Entry`] values from the job's owner, through a bounded queue. Output: files. Invariant: an acknowledgement
//! is sent when the file is durable; the first failure ends the journal, and with it the job.

use learn_domain::Step;
use learn_domain::event::JobEvent;
use learn_domain::ledger::Ledger;
use learn_domain::report::{Evaluation, JobStatus, StepRecord, Summary};
use learn_domain::run_dir::RunDir;
use tokio::sync::{mpsc, oneshot};

use crate::files::{FileError, JsonLines, write_json};
use crate::job::{LedgerFile, prune_ledgers};

/// Entries that may wait for the disk before the job's owner waits too.
const QUEUE: usize = 256;

/// Something to be kept.
#[derive(Debug)]
pub enum Entry {
    Step(StepRecord),
    Evaluation(Evaluation),
    Event(Box<JobEvent>),
    Status(Box<JobStatus>),
    Summary(Box<Summary>),
    /// Those who wait are told when it is durable.
    Ledger {
        step: Step,
        ledger: Box<Ledger>,
        done: Vec<oneshot::Sender<()>>,
    },
}

/// The journal of one run.
#[derive(Debug)]
pub struct Journal {
    run_dir: RunDir,
    fingerprint: String,
    steps: JsonLines,
    evaluations: JsonLines,
    events: JsonLines,
    entries: mpsc::Receiver<Entry>,
}

impl Journal {
    /// Opens the files of a run; the sender is for the job's owner.
    ///
    /// # Errors
    /// If the run directory is not writable.
    pub fn open(run_dir: RunDir, fingerprint: String) -> Result<(mpsc::Sender<Entry>, Self), FileError> {
        let (sender, entries) = mpsc::channel(QUEUE);
        let steps = JsonLines::open(run_dir.metrics())?;
        let evaluations = JsonLines::open(run_dir.evaluations())?;
        let events = JsonLines::open(run_dir.events())?;
        Ok((sender, Self { run_dir, fingerprint, steps, evaluations, events, entries }))
    }

    /// Writes until every sender is gone. Blocks: for a thread of its own.
    ///
    /// # Errors
    /// The first file that could not be written.
    pub fn write_all(mut self) -> Result<(), FileError> {
        while let Some(entry) = self.entries.blocking_recv() {
            match entry {
                Entry::Step(record) => self.steps.append(&record)?,
                Entry::Evaluation(evaluation) => self.evaluations.append(&evaluation)?,
                Entry::Event(event) => self.events.append(&event)?,
                Entry::Status(status) => write_json(&self.run_dir.status(), &status)?,
                Entry::Summary(summary) => write_json(&self.run_dir.summary(), &summary)?,
                Entry::Ledger { step, ledger, done } => {
                    LedgerFile::write(&self.run_dir, step, &self.fingerprint, *ledger)?;
                    for reply in done {
                        // a worker that has given up waiting will ask again
                        let _ = reply.send(());
                    }
                    if let Err(error) = prune_ledgers(&self.run_dir, step) {
                        tracing::warn!(%error, "old ledgers could not be removed");
                    }
                }
            }
        }
        Ok(())
    }
}
