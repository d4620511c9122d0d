//! The workers of a Slurm job, seen from its first node: one `srun` process with a task each.
//!
//! Input: the command that starts the step. Output: a [`Team`]. Invariants: nobody is replaced from here, because each task
//! looks after its own worker; a task that gives up leaves a note in `slurm/failed` of the run directory, since the step
//! goes on with the others.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use learn_domain::report::{CoordinatorAddress, JobState};
use learn_domain::run_dir::RunDir;
use serde::{Deserialize, Serialize};

use crate::crew::{Changes, Guilt, Team, View};
use crate::process::Process;
use crate::runs;
use crate::system::End;

/// The step of a Slurm job (not one of the training), and how it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobStep {
    /// `srun` and its options.
    pub command: Vec<String>,
    /// This program, as the tasks find it.
    pub launch: PathBuf,
}

/// A task has given its worker up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    pub node: String,
    pub number: u32,
    /// How the worker ended, or why there was none.
    pub how: String,
    pub log: PathBuf,
    /// The end of what it said.
    pub said: Vec<String>,
}

impl GivenUp {
    fn folder(run: &RunDir) -> PathBuf {
        run.slurm().join("failed")
    }

    /// Leaves the note.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn leave(&self, run: &RunDir) -> Result<()> {
        let folder = Self::folder(run);
        let (path, aside) =
            (folder.join(format!("{}.json", self.number)), folder.join(format!("{}.part", self.number)));
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::write(&aside, serde_json::to_vec(self).unwrap_or_default()))
            .and_then(|()| std::fs::rename(&aside, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The notes of this start, by task.
    fn all(run: &RunDir) -> Vec<Self> {
        let entries = std::fs::read_dir(Self::folder(run)).into_iter().flatten().flatten();
        let notes = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "json"));
        let mut notes: Vec<Self> = notes.filter_map(|path| runs::read_json(&path).ok()).collect();
        notes.sort_by_key(|note| note.number);
        notes
    }

    /// Takes away those of an earlier start.
    fn clear(run: &RunDir) -> Result<()> {
        let folder = Self::folder(run);
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot empty {}", folder.display()))
            }
            _ => Ok(()),
        }
    }
}

impl JobStep {
    /// Starts the step for the coordinator at `address`.
    ///
    /// # Errors
    /// srun cannot be started.
    pub fn start(&self, run: &RunDir, address: &CoordinatorAddress) -> Result<RunningStep> {
        GivenUp::clear(run)?;
        let (program, options) = self.command.split_first().context("there is no command behind `--`")?;
        let mut command = Command::new(program);
        command.args(options).arg(&self.launch).arg("slurm-task").arg(run.root());
        command.args(["--coordinator", &address.grpc, "--status", &address.http, "--first-host", &address.host]);
        let process = Process::start(format!("the step ({program})"), &mut command, &run.logs().join("srun.log"))?;
        Ok(RunningStep { run: run.clone(), process, told: BTreeSet::new() })
    }
}

/// The step of this start.
pub struct RunningStep {
    run: RunDir,
    process: Process,
    /// Tasks whose notes were told of.
    told: BTreeSet<u32>,
}

impl RunningStep {
    fn failed(&mut self) -> bool {
        self.process.ended().is_some_and(|status| !status.success())
    }
}

impl Team for RunningStep {
    fn asks(&mut self) -> bool {
        false
    }

    fn follow(&mut self, view: &View) -> Changes {
        let notes = GivenUp::all(&self.run);
        let mut changes = Changes::default();
        for GivenUp { node, number, how, .. } in &notes {
            if !self.told.insert(*number) {
                continue;
            }
            changes.lines.push(format!("worker process {number} on {node} ended with {how} and is not replaced"));
        }
        if view.state == JobState::Gathering {
            changes.lost = notes.first().map(|note| note.number).or_else(|| self.failed().then_some(0));
        }
        changes
    }

    fn is_gone(&mut self) -> bool {
        self.process.ended().is_some()
    }

    fn ask_to_end(&mut self, how: End) {
        // srun passes SIGUSR1 on to its tasks; at SIGTERM it kills them
        self.process.ask_to_end(match how {
            End::Gracefully | End::Notice => End::Notice,
            End::AtOnce => End::Gracefully,
        });
    }

    fn wait(&mut self, limit: Duration) {
        self.process.wait(limit);
    }

    fn guilt(&mut self, _number: Option<u32>) -> Option<Guilt> {
        let notes = GivenUp::all(&self.run);
        let Some(GivenUp { node, number, how, log, said }) = notes.into_iter().next() else {
            return self.failed().then(|| Guilt::of(&mut self.process));
        };
        Some(Guilt { name: format!("worker process {number} on {node}"), how, log, said })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(number: u32) -> GivenUp {
        let how = "exit code 1".into();
        GivenUp { node: "node2".into(), number, how, log: "/r/logs/worker-3.log".into(), said: vec!["no".into()] }
    }

    fn step(folder: &std::path::Path, script: &str) -> (RunDir, RunningStep) {
        let run = RunDir::new(folder);
        std::fs::create_dir_all(run.logs()).unwrap();
        let command = ["sh", "-c", script].map(str::to_owned).to_vec();
        let step = JobStep { command, launch: "learn-launch".into() };
        let started = step.start(&run, &CoordinatorAddress::default()).unwrap();
        (run, started)
    }

    fn view(state: JobState) -> View {
        View { state, wanted: 4, members: 4, steps_left: true }
    }

    #[test]
    fn a_task_that_gives_up_before_all_have_joined_ends_the_job_and_later_is_told_of_once() {
        let folder = tempfile::tempdir().unwrap();
        let (run, mut step) = step(folder.path(), "exec sleep 600");
        assert_eq!(step.follow(&view(JobState::Gathering)), Changes::default());
        note(3).leave(&run).unwrap();
        assert_eq!(step.follow(&view(JobState::Gathering)).lost, Some(3));
        let changes = step.follow(&view(JobState::Running));
        assert_eq!(changes, Changes::default(), "it was told of");
        note(1).leave(&run).unwrap();
        let lines = step.follow(&view(JobState::Running)).lines;
        assert_eq!(lines.len(), 1);
        assert_eq!(step.guilt(None).unwrap().name, "worker process 1 on node2");
        assert!(!step.is_gone());
        step.ask_to_end(End::AtOnce);
        step.wait(Duration::from_secs(10));
        assert!(step.is_gone());
    }

    #[test]
    fn a_step_that_fails_is_explained_by_what_srun_says() {
        let folder = tempfile::tempdir().unwrap();
        note(7).leave(&RunDir::new(folder.path())).unwrap();
        let (_, mut step) = step(folder.path(), "echo srun: error: no nodes >&2; exit 1");
        step.wait(Duration::from_secs(10));
        assert_eq!(step.follow(&view(JobState::Gathering)).lost, Some(0));
        let guilt = step.guilt(Some(0)).unwrap();
        assert_eq!((guilt.how.as_str(), guilt.said), ("exit code 1", vec!["srun: error: no nodes".to_owned()]));
    }
}
