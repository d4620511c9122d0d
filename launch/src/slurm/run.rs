//! One start of a Slurm job, on its first node: the coordinator, the step with the workers, and what follows their end.
//!
//! Input: a run directory and Slurm's variables. Output: a finished run, a job that is back in the queue, or an exit code
//! that says what to do. Invariants: a start goes on from the newest whole checkpoint; only a notice, or the loss of too
//! many workers after at least one finished step, puts the job back into the queue, and [`restarts`] ends that.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use learn_dataset::Dataset;
use learn_domain::config::DeviceKind;
use learn_domain::report::{JobState, Task, exit};
use learn_domain::run_dir::RunDir;
use learn_domain::{Config, Step as TrainingStep};
use serde::{Deserialize, Serialize};

use super::restarts::{self, Budget, Start};
use super::{Allocation, Step, address, bind, client};
use crate::commands::resume::{self, Checkpoint};
use crate::failure::{self, Failure};
use crate::job::{self, JobSpec, Workers};
use crate::output::Output;
use crate::{runs, system};

/// `slurm/job.json`: which job a run is, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlurmJob {
    pub job_id: u32,
}

impl SlurmJob {
    /// Where it is kept.
    #[must_use]
    pub fn file(run: &RunDir) -> PathBuf {
        run.slurm().join("job.json")
    }

    /// The last job of a run, if it ever was one of Slurm's.
    #[must_use]
    pub fn of(run: &RunDir) -> Option<Self> {
        runs::read_json(&Self::file(run)).ok()
    }

    /// # Errors
    /// It cannot be written.
    pub fn write(self, run: &RunDir) -> Result<()> {
        runs::replace(&Self::file(run), &serde_json::to_vec_pretty(&self)?)
    }
}

/// What a start works with.
#[derive(Clone, Debug)]
pub struct StartSpec<'a> {
    pub run: &'a RunDir,
    pub allocation: &'a Allocation,
    /// `srun` and its options.
    pub srun: &'a [String],
    pub budget: Budget,
}

/// How a start has ended, as far as its successor is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The exit code of the job.
    pub code: i32,
    /// Slurm has given notice, and nobody has asked to stop besides.
    pub noticed: bool,
    /// A step was finished in this start.
    pub advanced: bool,
}

/// Whether the job goes back into the queue by itself.
#[must_use]
pub fn goes_back(end: End) -> bool {
    match end.code {
        exit::STOPPED => end.noticed,
        // with a cause that a restart may mend; one that fails before its first step fails again
        exit::WORKER_LOST => end.advanced,
        _ => false,
    }
}

/// Runs one start of the job.
///
/// # Errors
/// The job does not finish in this start, for whatever reason; the exit code says which.
pub fn start(spec: &StartSpec<'_>, output: &Output) -> Result<()> {
    let StartSpec { run, allocation, .. } = spec;
    let shown = run.root().display();
    runs::refuse_live(run)?;
    SlurmJob { job_id: allocation.job }.write(run)?;
    if runs::last_status(run)?.is_some_and(|status| status.state == JobState::Finished) {
        output.note(&format!("{shown} has finished already"));
        return Ok(());
    }
    let checkpoint = newest(run)?;
    let step = checkpoint.as_ref().map(|checkpoint| checkpoint.step);
    let before = restarts::read(run)?;
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = Start { job: allocation.job, restart: allocation.restarts, checkpoint: step, time };
    restarts::verdict(&before, &now, spec.budget).map_err(|verdict| Failure::Child {
        code: exit::RESTARTS,
        message: format!(
            "{shown}: {verdict}. Read the logs, mend the cause, and go on with `learn-launch slurm --resubmit {shown}`"
        ),
    })?;
    restarts::add(run, &now)?;
    let config = configure(run, allocation, output)?;
    let task = match &checkpoint {
        Some(checkpoint) => Task::Train { resume_from: Some(resume::path_text(&checkpoint.path)?) },
        None => {
            set_aside(run, before.len())?;
            Task::Train { resume_from: None }
        }
    };
    let from = step.map_or("from the beginning".to_owned(), |step| format!("from step {step}"));
    let Allocation { job, tasks, nodes, restarts, .. } = allocation;
    output.note(&format!(
        "{shown}: Slurm job {job}, restart {restarts}: {from} with {tasks} workers on {}",
        nodes.join(", ")
    ));
    runs::write_config(&run.next_config(), &config)?;
    let workers = Step {
        command: spec.srun.to_vec(),
        launch: std::env::current_exe().context("cannot find the path of learn-launch")?,
    };
    let config_file = run.next_config();
    let job = JobSpec {
        run,
        config_file: &config_file,
        config: &config,
        task: &task,
        workers: Workers::Slurm(&workers),
        restarts: u32::try_from(before.len()).unwrap_or(u32::MAX),
    };
    match job::run(&job, output) {
        Ok(_) => crate::commands::train::report(run, output),
        Err(error) => Err(after(spec, error, step, output)),
    }
}

/// What becomes of a start that has not finished the job.
fn after(spec: &StartSpec<'_>, error: anyhow::Error, began: Option<TrainingStep>, output: &Output) -> anyhow::Error {
    let (run, shown) = (spec.run, spec.run.root().display());
    let reached = runs::last_status(run).ok().flatten().and_then(|status| status.last_step).map(|record| record.step);
    let end = End {
        code: failure::exit_code(&error),
        noticed: system::only_noticed(),
        advanced: reached.unwrap_or_default() > began.unwrap_or_default(),
    };
    if !goes_back(end) {
        return error;
    }
    let message = failure::message(&error);
    match client::requeue(spec.allocation.job) {
        Ok(()) => {
            output.note(&format!("{message}\n{shown}: job {} is back in the queue", spec.allocation.job));
            Failure::Child { code: end.code, message: format!("{shown}: Slurm starts the job again by itself") }.into()
        }
        Err(refused) => Failure::Child {
            code: exit::RESUBMIT,
            message: format!(
                "{message}\nthe job cannot be put back into the queue from here ({refused:#}). `learn-launch slurm --resubmit \
                 {shown}` on a login node goes on"
            ),
        }
        .into(),
    }
}

/// The newest checkpoint that was committed; a damaged one is refused.
fn newest(run: &RunDir) -> Result<Option<Checkpoint>> {
    let all = resume::with_ledgers(run, resume::checkpoints(run)?);
    if all.iter().all(|checkpoint| checkpoint.uncommitted) {
        return Ok(None);
    }
    resume::choose(&all, None, &run.root().display().to_string()).map(|checkpoint| Some(checkpoint.clone()))
}

/// The configuration for this allocation.
fn configure(run: &RunDir, allocation: &Allocation, output: &Output) -> Result<Config> {
    let mut config = runs::config(run)?;
    // what comes next writes the address of this start's first node into the run's configuration
    bind::keep(run, &config.cluster.bind)?;
    let binding = address::of_coordinator(&config.cluster.bind, allocation)?;
    if let Some(note) = &binding.note {
        output.note(note);
    }
    config.cluster.bind = binding.address;
    config.cluster.workers = allocation.tasks;
    config.cluster.min_workers = config.cluster.min_workers.min(allocation.tasks);
    let dataset = Dataset::open(&config.data.dataset)?;
    if config.model.item_input.has_content() {
        dataset.embeddings()?;
    }
    Ok(config)
}

/// Steps that no checkpoint has kept are trained again from the beginning: their lines make room.
fn set_aside(run: &RunDir, starts: usize) -> Result<()> {
    for path in [run.metrics(), run.evaluations(), run.events()] {
        let aside = path.with_extension(format!("start-{starts}.jsonl"));
        match std::fs::rename(&path, &aside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot move {} aside", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The device that the job is for, if the configuration leaves it open.
#[must_use]
pub fn device(wanted: DeviceKind, on_gpus: bool) -> DeviceKind {
    match wanted {
        DeviceKind::Auto if on_gpus => DeviceKind::Cuda,
        DeviceKind::Auto => DeviceKind::Cpu,
        set => set,
    }
}

/// The run of a path: a run directory, or nothing yet.
#[must_use]
pub fn is_run(path: &Path) -> bool {
    RunDir::new(path).config().is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_notice_and_losses_after_a_step_go_back_into_the_queue() {
        let end = |code, noticed, advanced| goes_back(End { code, noticed, advanced });
        assert!(end(exit::STOPPED, true, false), "notice");
        assert!(!end(exit::STOPPED, false, true), "an operator's stop, or scancel");
        assert!(end(exit::WORKER_LOST, false, true), "a node is lost");
        assert!(!end(exit::WORKER_LOST, false, false), "it would fail again");
        for code in [exit::FAILED, exit::USAGE, exit::DIVERGED, exit::UNSAVED, exit::NO_PROGRESS, exit::RESTARTS] {
            assert!(!end(code, true, true), "{code}");
        }
    }

    #[test]
    fn a_run_knows_its_job() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        assert_eq!(SlurmJob::of(&run), None);
        SlurmJob { job_id: 12 }.write(&run).unwrap();
        assert_eq!(SlurmJob::of(&run), Some(SlurmJob { job_id: 12 }));
    }

    #[test]
    fn an_open_device_is_that_of_the_request() {
        assert_eq!(device(DeviceKind::Auto, true), DeviceKind::Cuda);
        assert_eq!(device(DeviceKind::Auto, false), DeviceKind::Cpu);
        assert_eq!(device(DeviceKind::Cpu, false), DeviceKind::Cpu);
    }

    #[test]
    fn steps_without_a_checkpoint_make_room_and_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        std::fs::write(run.metrics(), "{}\n").unwrap();
        set_aside(&run, 2).unwrap();
        assert!(!run.metrics().exists());
        assert!(folder.path().join("metrics.start-2.jsonl").exists());
        set_aside(&run, 3).unwrap();
    }
}
