//! One start of a Slurm job, on its first node: the coordinator, the step with the workers, and what follows their end.
//!
//! Input: a run directory and Slurm's variables. Output: a finished run, a job that is back in the queue, or an exit code
//! that says what to do. Invariants: a start goes on from the newest whole checkpoint; [`outcome`] says what puts the job back
//! into the queue, and [`restarts`] ends that.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use learn_domain::config::DeviceKind;
use learn_domain::report::{JobState, JobStatus, Task, exit};
use learn_domain::run_dir::RunDir;
use learn_domain::{Config, Step};
use serde::{Deserialize, Serialize};

use super::outcome::{self, End, Heard, Next};
use super::restarts::{self, Budget, Start};
use super::targets::Keeper;
use super::{Allocation, JobStep, address, bind, client, stopped};
use crate::commands::resume::{self, Checkpoint};
use crate::failure::{self, Failure};
use crate::job::{self, JobSpec, Workers};
use crate::output::Output;
use crate::runs::Claim;
use crate::{runs, system, tls};

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
    /// Where Prometheus reads targets, if it shall know the job by a file.
    pub targets: Option<&'a Path>,
}

/// This start among those of the run.
#[derive(Clone, Copy, Debug, Default)]
struct Here {
    /// How many were before it.
    number: u32,
    /// The step that it goes on from, once that is known.
    began: Option<Step>,
}

/// Runs one start of the job. Signals are to be caught already. `change` is what its command changes of the run, which nobody
/// else works on by then.
///
/// # Errors
/// The job does not finish in this start, for whatever reason; the exit code says which.
pub fn start(spec: &StartSpec<'_>, change: impl FnOnce() -> Result<()>, output: &Output) -> Result<()> {
    let StartSpec { run, allocation, .. } = spec;
    let shown = run.root().display();
    let mut here = Here::default();
    // before a wait that would be in vain, and once nobody else can make it another's
    refuse_other(run, allocation)?;
    let claim = match take(run, allocation, output) {
        Ok(claim) => claim,
        Err(error) => return Err(after(spec, error, here, output)),
    };
    refuse_other(run, allocation)?;
    job::forget_address(run)?;
    change()?;
    SlurmJob { job_id: allocation.job }.write(run)?;
    stopped::clear(run)?;
    if runs::last_status(run)?.is_some_and(|status| status.state == JobState::Finished) {
        output.note(&format!("{shown} has finished already"));
        return Ok(());
    }
    match attempt(spec, claim, &mut here, output) {
        Ok(()) => crate::commands::train::report(run, output),
        Err(error) => Err(after(spec, error, here, output)),
    }
}

/// Takes the run for this start.
fn take(run: &RunDir, allocation: &Allocation, output: &Output) -> Result<Claim> {
    if allocation.restarts > 0 { runs::claim_patiently(run, output) } else { runs::claim(run) }
}

/// A job that comes back from the queue finds the run of another one: the run was moved aside and made anew, or submitted
/// again.
fn refuse_other(run: &RunDir, allocation: &Allocation) -> Result<()> {
    match SlurmJob::of(run) {
        Some(other) if allocation.restarts > 0 && other.job_id != allocation.job => Err(Failure::Usage(format!(
            "{} belongs to Slurm's job {} now, not to this one ({}), which began with a run of that name before; `scancel {}` \
             ends this job",
            run.root().display(),
            other.job_id,
            allocation.job,
            allocation.job
        ))
        .into()),
        _ => Ok(()),
    }
}

/// One attempt to finish the job.
fn attempt(spec: &StartSpec<'_>, claim: Claim, here: &mut Here, output: &Output) -> Result<()> {
    let StartSpec { run, allocation, .. } = spec;
    let shown = run.root().display();
    let before = restarts::read(run)?;
    here.number = u32::try_from(before.len()).unwrap_or(u32::MAX);
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = |checkpoint| Start { job: allocation.job, restart: allocation.restarts, checkpoint, time };
    let permit = |now: &Start| {
        restarts::verdict(&before, now, spec.budget).map_err(|verdict| Failure::Child {
            code: exit::RESTARTS,
            message: format!(
                "{shown}: {verdict}. Read the logs, mend the cause, and go on with `learn-launch slurm --resubmit {shown}`"
            ),
        })
    };
    let found = newest(run);
    if system::stop_requests() > 0 {
        // the check of the checkpoints may have been cut short as well; it counts as a start that has brought nothing
        let now = now(before.last().and_then(|start| start.checkpoint));
        permit(&now)?;
        restarts::add(run, &now)?;
        return Err(Failure::Stopped(format!("{shown}: stopped before the job began; nothing is lost")).into());
    }
    let checkpoint = found?;
    let step = checkpoint.as_ref().map(|checkpoint| checkpoint.step);
    here.began = step;
    let now = now(step);
    permit(&now)?;
    restarts::add(run, &now)?;
    let config = configure(spec, output)?;
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
    runs::ensure_token(run)?;
    tls::provide(run, &config.cluster.tls)?;
    let workers = JobStep {
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
        restarts: here.number,
    };
    let _targets = spec.targets.map(|folder| Keeper::start(run, folder, allocation.job)).transpose()?;
    job::run(&job, claim, output).map(drop)
}

/// What becomes of a start that has not finished the job.
fn after(spec: &StartSpec<'_>, error: anyhow::Error, Here { number, began }: Here, output: &Output) -> anyhow::Error {
    let (run, shown, job) = (spec.run, spec.run.root().display(), spec.allocation.job);
    let status = runs::last_status(run).ok().flatten();
    let reached = status.as_ref().and_then(|status| status.last_step.as_ref()).map(|record| record.step);
    let code = failure::exit_code(&error);
    let end = End { code, advanced: reached.unwrap_or_default() > began.unwrap_or_default() };
    let heard = Heard {
        notice: system::was_noticed(),
        asked: system::was_asked_to_stop(),
        operator: stopped::is_left(run, job) || status.as_ref().is_some_and(|status| is_stopped(status, number)),
        // it may have asked the tasks alone
        reason: if outcome::depends(code) { client::reason(job).ok() } else { None },
    };
    let message = failure::message(&error);
    let from = match status.and_then(|status| status.last_checkpoint).or(began) {
        Some(step) => format!("from the checkpoint of step {step}"),
        None => "from the beginning, since there is no checkpoint yet".to_owned(),
    };
    let way_on = format!("`learn-launch slurm --resubmit {shown}` on a login node goes on {from}");
    match outcome::next(end, heard) {
        Next::Stay => error,
        Next::Requeue => match client::requeue(job) {
            Ok(()) => {
                output.note(&format!("{message}\n{shown}: job {job} is back in the queue"));
                Failure::Child { code, message: format!("{shown}: Slurm starts the job again by itself, {from}") }.into()
            }
            Err(refused) => Failure::Child {
                code: exit::RESUBMIT,
                message: format!("{message}\nthe job cannot be put back into the queue from here ({refused}). {way_on}"),
            }
            .into(),
        },
        Next::Resubmit => Failure::Child {
            code: exit::RESUBMIT,
            message: format!(
                "{message}\nSlurm needs the machines for another job. It starts this one again by itself where the PreemptMode of the \
                 partition is REQUEUE; elsewhere {way_on}"
            ),
        }
        .into(),
    }
}

/// Its coordinator says that an operator has stopped this start, not one before: that status stays until the next coordinator's.
fn is_stopped(status: &JobStatus, number: u32) -> bool {
    status.operator_stop && status.restarts == number
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
fn configure(spec: &StartSpec<'_>, output: &Output) -> Result<Config> {
    let StartSpec { run, allocation, .. } = spec;
    let mut config = runs::config(run)?;
    // what comes next writes the address of this start's first node into the run's configuration
    bind::keep(run, &config.cluster.bind)?;
    let binding = address::of_coordinator(&config.cluster.bind, spec.targets.is_some(), allocation)?;
    for note in &binding.notes {
        output.note(note);
    }
    config.cluster.bind = binding.address;
    config.cluster.workers = allocation.tasks;
    config.validate().map_err(|error| {
        let tasks = allocation.tasks;
        Failure::Usage(format!("{}: {}, and this allocation has {tasks} tasks", error.key, error.problem))
    })?;
    let dataset = runs::dataset(run, &config)?;
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
    fn a_run_knows_its_job() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        assert_eq!(SlurmJob::of(&run), None);
        SlurmJob { job_id: 12 }.write(&run).unwrap();
        assert_eq!(SlurmJob::of(&run), Some(SlurmJob { job_id: 12 }));
    }

    #[test]
    fn a_job_from_the_queue_does_not_take_the_run_of_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        let allocation =
            |job, restarts| Allocation { job, first: "a".into(), nodes: vec!["a".into()], tasks: 1, restarts };
        refuse_other(&run, &allocation(12, 1)).unwrap();
        SlurmJob { job_id: 13 }.write(&run).unwrap();
        let text = refuse_other(&run, &allocation(12, 1)).unwrap_err().to_string();
        assert!(text.contains("job 13 now") && text.contains("scancel 12"), "{text}");
        refuse_other(&run, &allocation(13, 1)).unwrap();
        refuse_other(&run, &allocation(14, 0)).unwrap();
    }

    #[test]
    fn a_start_that_is_refused_has_changed_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let run = runs::create(&folder.path().join("one"), &Config::default()).unwrap();
        SlurmJob { job_id: 13 }.write(&run).unwrap();
        let allocation = Allocation { job: 12, first: "a".into(), nodes: vec!["a".into()], tasks: 1, restarts: 1 };
        let budget = Budget { restarts: 1, fruitless: 1 };
        let spec = StartSpec { run: &run, allocation: &allocation, srun: &[], budget, targets: None };
        let refused = start(&spec, || panic!("the run was changed"), &Output::new(false, true)).unwrap_err();
        assert!(refused.to_string().contains("job 13 now"), "{refused}");
        assert_eq!(SlurmJob::of(&run), Some(SlurmJob { job_id: 13 }));
    }

    #[test]
    fn a_stop_counts_for_the_start_that_it_was_meant_for() {
        let mut status = crate::watch::tests::scene().current.unwrap().status;
        for (operator_stop, restarts, number, counts) in [(true, 2, 2, true), (false, 2, 2, false), (true, 1, 2, false)]
        {
            (status.operator_stop, status.restarts) = (operator_stop, restarts);
            assert_eq!(is_stopped(&status, number), counts, "{operator_stop} of start {restarts} at start {number}");
        }
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
