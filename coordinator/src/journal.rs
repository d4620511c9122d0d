//! The run directory's files, written by one thread in the order of their events.
//!
//! Input: [`Entry`] values from the job's owner, through a bounded queue. Output: files. Invariants: an acknowledgement
//! is sent when the file is durable; a line is forgotten by [`crate::state`] only when it is in its file, so that each is
//! there once whenever this process is killed; the first failure ends the journal, and with it the job. TensorBoard's files
//! are made of these lines, by another thread, so they may fail without harm, and the next coordinator makes them anew.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use learn_domain::ledger::Ledger;
use learn_domain::report::{JobStatus, Summary};
use learn_domain::run_dir::RunDir;
use learn_domain::{Config, Step};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::files::{FileError, JsonLines, mend_lines, write_json};
use crate::job::{LedgerFile, forget_beyond, prune_ledgers};
use crate::tensorboard::{RunLines, Told, follow};

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

/// What is to be done to the files that grow line by line, as [`crate::state`] keeps it until it is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Kept {
    Line(Line),
    /// Lines of later steps go.
    Beyond {
        beyond: Step,
    },
}

/// Something to be kept.
#[derive(Debug)]
pub enum Entry {
    /// A line by its number.
    Line(u64, Line),
    /// Lines of steps beyond this one go; the number is the next of the lines'.
    Beyond(u64, Step),
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

/// Does to the files what a coordinator kept and, when it was killed, had not done yet. A last line that was cut goes.
///
/// # Errors
/// If a file cannot be read, replaced or extended.
pub fn mend(run_dir: &RunDir, kept: &[(u64, Kept)]) -> Result<(), FileError> {
    let beyond = kept.iter().rev().find_map(|(_, kept)| match kept {
        Kept::Beyond { beyond } => Some(*beyond),
        Kept::Line(_) => None,
    });
    // if it was done before, it takes away only what was written since, which is kept
    if let Some(step) = beyond {
        forget_beyond(run_dir, step)?;
    }
    for file in LineFile::ALL {
        let lines = kept.iter().filter_map(|(_, kept)| match kept {
            Kept::Line(line) if line.file == file => Some(line.text.as_str()),
            Kept::Line(_) | Kept::Beyond { .. } => None,
        });
        mend_lines(&file.path(run_dir), &lines.collect::<Vec<_>>())?;
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

    fn forget_beyond(&mut self, step: Step) -> Result<(), FileError> {
        forget_beyond(&self.run_dir, step)?;
        // others have taken the place of those that were open
        for file in [LineFile::Steps, LineFile::Evaluations] {
            self.lines[file as usize] = JsonLines::open(file.path(&self.run_dir))?;
        }
        Ok(())
    }

    /// Writes until every sender is gone. Blocks: for a thread of its own.
    ///
    /// # Errors
    /// The first file that could not be written.
    pub fn write_all(self) -> Result<(), FileError> {
        let (run_dir, config) = (self.run_dir.clone(), self.config.clone());
        // without a bound: while the file is made anew, what the job comes to meanwhile waits here
        let (points, told) = std::sync::mpsc::channel();
        let show = || follow(&run_dir, &config, told);
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("tensorboard".into());
            if let Err(error) = thread.spawn_scoped(scope, show) {
                tracing::warn!(%error, "no points for TensorBoard until the job is resumed: no thread can be started");
            }
            // `show` ends when it has all that was written
            self.write_entries(points)
        })
    }

    fn write_entries(mut self, points: Sender<Told>) -> Result<(), FileError> {
        let tell = |told| {
            // nobody listens if the thread could not be started
            let _ = points.send(told);
        };
        tell(Told::Anew(RunLines::now(&self.run_dir)));
        while let Some(entry) = self.entries.blocking_recv() {
            match entry {
                Entry::Line(number, line) => {
                    self.lines[line.file as usize].append_line(&line.text)?;
                    tell(Told::Line(line));
                    self.written.store(number + 1, Ordering::Release);
                }
                Entry::Beyond(number, step) => {
                    self.forget_beyond(step)?;
                    tell(Told::Anew(RunLines::now(&self.run_dir)));
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

#[cfg(test)]
mod tests {
    use learn_domain::report::StepRecord;

    use super::*;
    use crate::files::read_lines;

    fn line(step: u64, loss: f64) -> Line {
        let record = StepRecord { step: Step(step), loss, ..StepRecord::default() };
        Line { file: LineFile::Steps, text: serde_json::to_string(&record).unwrap() }
    }

    #[test]
    fn lines_beyond_a_step_go_before_those_that_come_after() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let mut steps = JsonLines::open(run_dir.metrics()).unwrap();
        (1..=4).for_each(|step| steps.append_line(&line(step, 0.5).text).unwrap());
        let before = std::fs::read(run_dir.metrics()).unwrap();
        let lines = || -> Vec<(u64, f64)> {
            let steps: Vec<StepRecord> = read_lines(&run_dir.metrics()).unwrap();
            steps.iter().map(|record| (record.step.0, record.loss)).collect()
        };
        let wanted = [(1, 0.5), (2, 0.5), (3, 0.25)];

        let (entries, journal) = Journal::open(run_dir.clone(), "f".into(), &Config::default()).unwrap();
        let written = journal.written();
        entries.blocking_send(Entry::Beyond(7, Step(2))).unwrap();
        entries.blocking_send(Entry::Line(8, line(3, 0.25))).unwrap();
        drop(entries);
        journal.write_all().unwrap();
        assert_eq!((lines(), written.load(Ordering::Acquire)), (wanted.to_vec(), 9));

        // a kill may come before any of it is done, or behind
        let kept = [(7, Kept::Beyond { beyond: Step(2) }), (8, Kept::Line(line(3, 0.25)))];
        for _again in 0..2 {
            mend(&run_dir, &kept).unwrap();
            assert_eq!(lines(), wanted);
        }
        std::fs::write(run_dir.metrics(), before).unwrap();
        mend(&run_dir, &kept).unwrap();
        assert_eq!(lines(), wanted);
    }

    #[test]
    fn what_is_kept_is_read_back_and_lines_of_older_states_too() {
        let line = line(1, 0.5);
        let old: Kept = serde_json::from_str(&serde_json::to_string(&line).unwrap()).unwrap();
        assert_eq!(old, Kept::Line(line));
        let beyond = Kept::Beyond { beyond: Step(2) };
        assert_eq!(serde_json::from_str::<Kept>(&serde_json::to_string(&beyond).unwrap()).unwrap(), beyond);
    }
}
