//! The run directory's files, written by one thread in the order of their events.
//!
//! Input: [`Entry`] values from the job's owner, through a bounded queue. Output: files. Invariants: an acknowledgement
//! is sent when the file is durable; a line is forgotten by [`crate::state`] only when it is in its file, so that each is
//! there once whenever this process is killed; the first failure ends the journal, and with it the job. TensorBoard's files
//! are made of these lines, so they may fail without harm, and the next coordinator makes them anew.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use learn_domain::ledger::Ledger;
use learn_domain::report::{JobStatus, Summary};
use learn_domain::run_dir::RunDir;
use learn_domain::{Config, Step};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::files::{FileError, JsonLines, mend_lines, write_json};
use crate::job::{LedgerFile, prune_ledgers};
use crate::tensorboard::{TensorBoard, TensorBoardError};

/// Entries that may wait for the disk before the job's owner waits too.
const QUEUE: usize = 256;

/// The files that grow line by line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LineFile {
    Steps,
    Evaluations,
    Events,
}

impl LineFile {
    const ALL: [Self; 3] = [Self::Steps, Self::Evaluations, Self::Events];

    fn path(self, run_dir: &RunDir) -> PathBuf {
        match self {
            Self::Steps => run_dir.metrics(),
            Self::Evaluations => run_dir.evaluations(),
            Self::Events => run_dir.events(),
        }
    }
}

/// A line as it stands in its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    pub file: LineFile,
    /// JSON, without a line break.
    pub text: String,
}

/// Something to be kept.
#[derive(Debug)]
pub enum Entry {
    /// A line by its number.
    Line(u64, Line),
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
    /// By [`LineFile`].
    lines: [JsonLines; 3],
    /// Lines with smaller numbers are in their files.
    written: Arc<AtomicU64>,
    entries: mpsc::Receiver<Entry>,
    config: Box<Config>,
}

/// Adds the lines to their files that a coordinator kept and, when it was killed, had not written yet.
///
/// # Errors
/// If a file cannot be read or extended.
pub fn mend(run_dir: &RunDir, kept: &[(u64, Line)]) -> Result<(), FileError> {
    for file in LineFile::ALL {
        let lines: Vec<&str> =
            kept.iter().filter(|(_, line)| line.file == file).map(|(_, line)| line.text.as_str()).collect();
        mend_lines(&file.path(run_dir), &lines)?;
    }
    Ok(())
}

impl Journal {
    /// Opens the files of a run; the sender is for the job's owner.
    ///
    /// # Errors
    /// If the run directory is not writable.
    pub fn open(
        run_dir: RunDir,
        fingerprint: String,
        config: &Config,
    ) -> Result<(mpsc::Sender<Entry>, Self), FileError> {
        let (sender, entries) = mpsc::channel(QUEUE);
        let [steps, evaluations, events] = LineFile::ALL.map(|file| JsonLines::open(file.path(&run_dir)));
        let lines = [steps?, evaluations?, events?];
        Ok((
            sender,
            Self { run_dir, fingerprint, lines, written: Arc::default(), entries, config: Box::new(config.clone()) },
        ))
    }

    /// Lines below this number are in their files; it grows.
    #[must_use]
    pub fn written(&self) -> Arc<AtomicU64> {
        self.written.clone()
    }

    /// Writes until every sender is gone. Blocks: for a thread of its own.
    ///
    /// # Errors
    /// The first file that could not be written.
    pub fn write_all(mut self) -> Result<(), FileError> {
        let mut tensorboard = TensorBoard::open(&self.run_dir, &self.config).inspect_err(TensorBoardError::tell).ok();
        while let Some(entry) = self.entries.blocking_recv() {
            match entry {
                Entry::Line(number, line) => {
                    self.lines[line.file as usize].append_line(&line.text)?;
                    let shown = tensorboard.as_mut().map(|tensorboard| tensorboard.add(&line));
                    if let Some(Err(error)) = shown {
                        error.tell();
                        tensorboard = None;
                    }
                    self.written.store(number + 1, Ordering::Release);
                }
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
