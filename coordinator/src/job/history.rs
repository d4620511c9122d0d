//! What earlier processes of this run have left: finished steps, evaluations and the ledger.
//!
//! Input: the run directory and the task. Output: a [`History`]. Invariants: reading it changes nothing, because the job may
//! yet come to nothing; after a resume from step `s` the files lose what is of the past beyond `s` before they get the first
//! step or evaluation of the job, so that no step is there twice, and not before checkpoints beyond `s` are out of the way:
//! whoever goes on from one of them would miss its lines.

use std::path::{Path, PathBuf};

use learn_domain::Step;
use learn_domain::ledger::Ledger;
use learn_domain::report::{Evaluation, StepRecord, Task};
use learn_domain::run_dir::{RunDir, checkpoint_step};
use serde::{Deserialize, Serialize};

use super::Job;
use crate::files::{FileError, Lines, read_json, retain_lines, write_json};

/// Version of [`LedgerFile`].
const LEDGER_VERSION: u32 = 1;

/// `ledger/step-N.json`: the ledger as it was when the checkpoint of step N was committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerFile {
    version: u32,
    step: Step,
    /// Of the dataset whose users are counted.
    fingerprint: String,
    ledger: Ledger,
}

/// The past of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Finished steps of the checkpoint that is resumed.
    pub step: Step,
    pub ledger: Option<Ledger>,
    pub trained: Trained,
    pub evaluations: Vec<Evaluation>,
    /// The files hold lines of later steps, too.
    pub beyond: bool,
}

/// What a job that goes on has to know of the steps before it, however many they are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trained {
    pub users: u64,
    pub seconds: f64,
    pub last: Option<StepRecord>,
}

impl Trained {
    fn add(&mut self, record: StepRecord) {
        self.users += u64::from(record.users);
        self.seconds += record.seconds;
        self.last = Some(record);
    }
}

impl FromIterator<StepRecord> for Trained {
    fn from_iter<I: IntoIterator<Item = StepRecord>>(records: I) -> Self {
        let mut trained = Self::default();
        records.into_iter().for_each(|record| trained.add(record));
        trained
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    #[error("{0} is not a checkpoint directory; name one like checkpoints/step-0000000100")]
    NotACheckpoint(PathBuf),
    #[error("there is no checkpoint at {0}; `learn-worker checkpoints` lists those of a run")]
    NoCheckpoint(PathBuf),
    #[error(
        "the ledger of step {step} is missing ({path}), so nobody can tell which users this epoch has used; resume from \
         a checkpoint that has one, or start a new run"
    )]
    NoLedger { step: Step, path: PathBuf },
    #[error(
        "{path} has version {found} and this build reads version {LEDGER_VERSION}; resume with the build that wrote it"
    )]
    LedgerVersion { path: PathBuf, found: u32 },
    #[error("{path} does not belong to this checkpoint and dataset; resume with the dataset that the run began with")]
    ForeignLedger { path: PathBuf },
    #[error(
        "{0} holds the steps of an earlier training; continue it with `learn-launch resume`, or choose another job.name"
    )]
    NotFresh(PathBuf),
    #[error(transparent)]
    File(#[from] FileError),
}

impl LedgerFile {
    /// Writes the ledger of a checkpoint.
    ///
    /// # Errors
    /// If the run directory is not writable.
    pub fn write(run_dir: &RunDir, step: Step, fingerprint: &str, ledger: Ledger) -> Result<(), FileError> {
        let file = Self { version: LEDGER_VERSION, step, fingerprint: fingerprint.into(), ledger };
        write_json(&run_dir.ledger(step), &file)
    }

    fn read(run_dir: &RunDir, step: Step, fingerprint: &str) -> Result<Ledger, ResumeError> {
        let path = run_dir.ledger(step);
        if !path.is_file() {
            return Err(ResumeError::NoLedger { step, path });
        }
        let file: Self = read_json(&path)?;
        if file.version != LEDGER_VERSION {
            return Err(ResumeError::LedgerVersion { path, found: file.version });
        }
        if file.step != step || file.fingerprint != fingerprint {
            return Err(ResumeError::ForeignLedger { path });
        }
        Ok(file.ledger)
    }
}

impl History {
    /// Reads the past that `task` goes on from.
    ///
    /// # Errors
    /// If there is no such past, it is damaged, or a new training would write over an old one.
    pub fn load(run_dir: &RunDir, task: &Task, fingerprint: &str) -> Result<Self, ResumeError> {
        match task {
            Task::Train { resume_from: Some(checkpoint) } => Self::resume(run_dir, Path::new(checkpoint), fingerprint),
            Task::Train { resume_from: None } => {
                let metrics = run_dir.metrics();
                match Lines::<serde_json::Value>::open(&metrics)?.next().transpose()? {
                    None => Ok(Self::default()),
                    Some(_) => Err(ResumeError::NotFresh(metrics)),
                }
            }
            Task::Evaluate { .. } => Ok(Self::default()),
        }
    }

    fn resume(run_dir: &RunDir, checkpoint: &Path, fingerprint: &str) -> Result<Self, ResumeError> {
        let name = checkpoint.file_name().and_then(|name| name.to_str());
        let step = name.and_then(checkpoint_step).ok_or_else(|| ResumeError::NotACheckpoint(checkpoint.to_owned()))?;
        if !checkpoint.is_dir() {
            return Err(ResumeError::NoCheckpoint(checkpoint.to_owned()));
        }
        let ledger = Some(LedgerFile::read(run_dir, step, fingerprint)?);
        let mut history = Self { step, ledger, ..Self::default() };
        for record in Lines::<StepRecord>::open(&run_dir.metrics())? {
            let record = record?;
            if record.step <= step {
                history.trained.add(record);
            } else {
                history.beyond = true;
            }
        }
        for evaluation in Lines::<Evaluation>::open(&run_dir.evaluations())? {
            let evaluation = evaluation?;
            if evaluation.step <= step {
                history.evaluations.push(evaluation);
            } else {
                history.beyond = true;
            }
        }
        Ok(history)
    }
}

/// Removes the lines of steps beyond `step`; a second time changes nothing, as long as there are no new ones.
///
/// # Errors
/// If a file cannot be read or replaced.
pub fn forget_beyond(run_dir: &RunDir, step: Step) -> Result<(), FileError> {
    retain_lines(&run_dir.metrics(), |record: &StepRecord| record.step <= step)?;
    retain_lines(&run_dir.evaluations(), |evaluation: &Evaluation| evaluation.step <= step)
}

impl Job {
    /// The step beyond which the run's files hold lines of a past that is not gone on from, as soon as this job has trained
    /// or evaluated; given once. By then all ranks have met after the first one has moved later checkpoints away.
    pub fn take_beyond(&mut self) -> Option<Step> {
        // a step without a record, or one that not all ranks have reported yet, counts as well
        let last = self.last_step.as_ref().map_or(Step(0), |record| record.step).max(self.books.complete());
        let evaluated = self.evaluations.len() > self.inherited;
        let beyond = self.beyond.take_if(|step| last > *step || evaluated);
        self.unsaved.job |= beyond.is_some();
        beyond
    }
}

/// Removes ledgers whose checkpoint was pruned; `step`'s own stays.
///
/// # Errors
/// If the directory cannot be read or a file not removed.
pub fn prune_ledgers(run_dir: &RunDir, step: Step) -> std::io::Result<()> {
    let newest = run_dir.ledger(step);
    let Some(folder) = newest.parent() else { return Ok(()) };
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let of = path.file_stem().and_then(|stem| stem.to_str()).and_then(checkpoint_step);
        let pruned = of.is_some_and(|of| of != step && !run_dir.checkpoint(of).is_dir());
        if pruned {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use learn_domain::UserIndex;

    use super::*;
    use crate::files::{JsonLines, read_lines};

    fn train(from: Option<&Path>) -> Task {
        Task::Train { resume_from: from.map(|path| path.to_string_lossy().into_owned()) }
    }

    #[test]
    fn a_resume_goes_on_from_the_checkpoint_and_forgets_what_came_after_it_when_told_to() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let mut steps = JsonLines::open(run_dir.metrics()).unwrap();
        for step in 1..=5 {
            steps.append(&StepRecord { step: Step(step), users: 2, seconds: 0.5, ..StepRecord::default() }).unwrap();
        }
        let mut ledger = Ledger::new(9, 3);
        ledger.record(0, &[UserIndex(3)]);
        LedgerFile::write(&run_dir, Step(3), "f", ledger.clone()).unwrap();
        let checkpoint = run_dir.checkpoint(Step(3));
        let task = train(Some(&checkpoint));
        let missing = History::load(&run_dir, &task, "f").unwrap_err();
        assert!(matches!(missing, ResumeError::NoCheckpoint(_)));
        std::fs::create_dir_all(&checkpoint).unwrap();

        let foreign = History::load(&run_dir, &task, "g").unwrap_err();
        assert!(matches!(foreign, ResumeError::ForeignLedger { .. }));
        let history = History::load(&run_dir, &task, "f").unwrap();
        assert_eq!((history.step, history.ledger), (Step(3), Some(ledger)));
        let Trained { users, seconds, last } = history.trained;
        assert_eq!((users, seconds, last.map(|last| last.step)), (6, 1.5, Some(Step(3))));
        let lines = || read_lines::<StepRecord>(&run_dir.metrics()).unwrap().len();
        assert_eq!((history.beyond, lines()), (true, 5), "reading takes nothing away");
        for _again in 0..2 {
            forget_beyond(&run_dir, Step(3)).unwrap();
            assert_eq!(lines(), 3);
        }
        assert!(!History::load(&run_dir, &task, "f").unwrap().beyond);
    }

    #[test]
    fn a_checkpoint_without_ledger_and_a_used_directory_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        assert_eq!(History::load(&run_dir, &train(None), "f").unwrap(), History::default());
        let checkpoint = run_dir.checkpoint(Step(2));
        std::fs::create_dir_all(&checkpoint).unwrap();
        let error = History::load(&run_dir, &train(Some(&checkpoint)), "f").unwrap_err().to_string();
        assert!(error.contains("ledger of step 2") && error.contains("start a new run"), "{error}");
        let best = run_dir.checkpoints().join("best");
        assert!(matches!(
            History::load(&run_dir, &train(Some(&best)), "f").unwrap_err(),
            ResumeError::NotACheckpoint(_)
        ));
        JsonLines::open(run_dir.metrics()).unwrap().append(&StepRecord::default()).unwrap();
        assert!(matches!(History::load(&run_dir, &train(None), "f").unwrap_err(), ResumeError::NotFresh(_)));
    }

    #[test]
    fn ledgers_go_with_their_checkpoints() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        for step in 1..=3 {
            LedgerFile::write(&run_dir, Step(step), "f", Ledger::new(1, 1)).unwrap();
        }
        std::fs::create_dir_all(run_dir.checkpoint(Step(2))).unwrap();
        prune_ledgers(&run_dir, Step(3)).unwrap();
        let kept = [1, 2, 3].map(|step| run_dir.ledger(Step(step)).is_file());
        assert_eq!(kept, [false, true, true]);
    }
}
