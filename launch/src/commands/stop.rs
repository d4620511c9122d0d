//! `learn-launch stop`: ends a running job after its current step, with a checkpoint; or a dataset's embed job.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use learn_domain::Step;
use learn_domain::report::{CoordinatorAddress, JobState, JobStatus, Task, exit};
use learn_domain::run_dir::RunDir;

use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::operator::{self, OperatorError};
use crate::output::Output;
use crate::runs::{self, Named};
use crate::slurm::client;
use crate::slurm::queue::{self, Queue};
use crate::slurm::stopped;

pub const HELP: &str = "\
Examples:
  learn-launch stop runs/quickstart
  learn-launch stop quickstart --no-wait
  learn-launch stop data/ml-100k            (the embed job of a dataset)

The job finishes its step, writes a checkpoint and ends; `learn-launch resume` continues it exactly. A job that waits \
in Slurm's queue is taken out of it; `learn-launch slurm --resubmit` continues it. An embed job ends at once and \
keeps its finished ranges; `learn-launch embed` goes on behind them.

Exit codes:
  0  it was stopped and lost no step, or had finished
  1  it has failed, or its last steps are in no checkpoint, or it is just
     being started
  2  it is not running";

/// Pause between two looks at a job that is about to end.
const POLL: Duration = Duration::from_millis(200);
/// Looks in a row that find no coordinator before it counts as gone: one that was killed is started again within a second,
/// and one on another machine may miss to answer.
const GONE: u32 = 8;

/// Arguments of `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Return at once instead of waiting for the end
    #[arg(long)]
    no_wait: bool,
    /// Give up waiting after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
}

/// # Errors
/// The run is not running, its coordinator refuses, or it does not end in time, or not as it was asked to.
pub fn run(args: &StopArgs, output: &Output) -> Result<()> {
    match runs::find_named(&args.run.run, &args.run.runs_dir)? {
        Named::Run(run) => {
            let shown = super::shown_run(&run);
            let (before, lives) = (runs::last_status(&run)?, runs::live(&run).is_some());
            if !end(args, &run, (&shown, "stopping after the current step"), output)? {
                return Ok(());
            }
            let Some(status) = runs::last_status(&run)? else {
                let text = format!("{shown}: ended before it had begun");
                return output.result(&text, &serde_json::json!({ "state": "stopped" }));
            };
            if !status.state.ended() {
                bail!(
                    "{shown}: its coordinator is gone and has left it {}; `learn-launch resume {shown}` goes on from its last checkpoint",
                    status.state.name()
                );
            }
            let step = status.last_step.as_ref().map_or(0, |step| step.step.0);
            output.result(&format!("{shown}: {} at step {step}", status.state.name()), &status)?;
            // of a job that only waited in a queue the status is that of an earlier start
            match lost(&status).filter(|_| lives || before.is_none_or(|before| before != status)) {
                None => Ok(()),
                Some(why) => Err(Failure::Reported { code: exit::FAILED, message: format!("{shown}: {why}") }.into()),
            }
        }
        Named::Dataset(dataset) => {
            let shown = super::shown(dataset.dir());
            let job = RunDir::of_embedding(dataset.dir());
            if !end(args, &job, (&shown, "stopping its embed job; finished ranges are kept"), output)? {
                return Ok(());
            }
            let text = format!("{shown}: its embed job has ended; `learn-launch embed` goes on where it was");
            output.result(&text, &serde_json::json!({ "state": "stopped" }))
        }
    }
}

/// Why a job that has ended did not end as it was asked to: with all that was done in a checkpoint, or at its end.
fn lost(status: &JobStatus) -> Option<String> {
    let kept = status.last_checkpoint.unwrap_or_default();
    let done = status.last_step.as_ref().map_or(Step(0), |step| step.step);
    match (&status.state, &status.task) {
        (JobState::Finished, _) | (JobState::Stopped, Task::Evaluate { .. }) => None,
        (JobState::Stopped, Task::Train { .. }) if kept >= done => None,
        (JobState::Stopped, Task::Train { .. }) => Some(match kept {
            Step(0) => format!("it has no checkpoint, so its {done} steps are lost"),
            kept => format!("its last checkpoint is of step {kept}; what came after it is lost"),
        }),
        _ => {
            let cause = status.cause.as_deref().unwrap_or("its coordinator has not said why");
            Some(format!("it was not stopped, it has failed: {cause}"))
        }
    }
}

/// Asks a job to stop; `true` once it has ended, `false` if nobody waits for that.
fn end(args: &StopArgs, run: &RunDir, (shown, stopping): (&str, &str), output: &Output) -> Result<bool> {
    let Some(address) = runs::live(run) else {
        match Queue::of(run) {
            Some(queue) if queue.waits() || queue.runs() => return end_in_queue(args, run, &queue, shown, output),
            Some(queue) if queue.known.is_err() && queue.may_go_on() => {
                bail!("{shown}: Slurm's {}; try again", queue.describe())
            }
            _ => {}
        }
        // it may be where it cannot be asked from here
        runs::refuse_live(run)?;
        return Err(Failure::Usage(format!(
            "{shown} is not running; `learn-launch status {shown}` shows how it ended"
        ))
        .into());
    };
    if let Err(error) = operator::stop(run, &address) {
        let away = matches!(error, OperatorError::Unreachable { .. } | OperatorError::Silent { .. });
        match Queue::of(run).filter(|queue| away && queue.runs()) {
            Some(queue) => return end_in_queue(args, run, &queue, shown, output),
            // it may have ended by itself meanwhile
            None if away && has_ended(run) => return Ok(true),
            None => return Err(error.into()),
        }
    }
    output.note(&format!("{shown}: {stopping}"));
    if args.no_wait {
        output.result(&format!("{shown}: asked to stop"), &serde_json::json!({ "state": "stopping" }))?;
        return Ok(false);
    }
    let start = Instant::now();
    let mut missed = 0;
    while missed == 0 || missed < GONE && !has_ended(run) {
        missed = if runs::live(run).is_some() { 0 } else { missed + 1 };
        if start.elapsed() >= Duration::from_secs(args.timeout) {
            bail!("{shown} still runs after {} s; {} ends its coordinator", args.timeout, kill(&address));
        }
        std::thread::sleep(POLL);
    }
    Ok(true)
}

/// What kills a coordinator, and where.
fn kill(address: &CoordinatorAddress) -> String {
    let host = if address.host.is_empty() { "this machine" } else { &address.host };
    format!("`kill {}` on {host}", address.pid)
}

/// The last status of a run says that nothing more will happen.
fn has_ended(run: &RunDir) -> bool {
    matches!(runs::last_status(run), Ok(Some(status)) if status.state.ended())
}

/// Asks a job of Slurm's to stop by a signal. It learns that an operator has sent it, lest it goes back into the queue when
/// Slurm gives notice meanwhile.
fn signal(run: &RunDir, job: u32) -> Result<()> {
    if let Err(error) = stopped::leave(run) {
        tracing::warn!("{error:#}; should Slurm give notice now, the job goes back into the queue");
    }
    client::ask_to_stop(job).inspect_err(|_| {
        // what was not asked for must not count later; a word that stays is taken away by the next start
        let _stays = stopped::clear(run);
    })?;
    Ok(())
}

/// Ends a Slurm job whose coordinator cannot be asked from here: out of the queue, or by a signal to its batch script.
fn end_in_queue(args: &StopArgs, run: &RunDir, queue: &Queue, shown: &str, output: &Output) -> Result<bool> {
    let job = queue.job.job_id;
    if queue.waits() {
        client::cancel(job)?;
        output.note(&format!("{shown}: job {job} is taken out of Slurm's queue"));
    } else if stopped::is_left(run, job) {
        // a second signal would end it at once, without a checkpoint
        output.note(&format!("{shown}: job {job} was asked to stop already, and does after its current step"));
    } else {
        signal(run, job)?;
        output.note(&format!("{shown}: job {job} stops after its current step"));
    }
    if args.no_wait {
        output.result(&format!("{shown}: asked to stop"), &serde_json::json!({ "state": "stopping" }))?;
        return Ok(false);
    }
    let start = Instant::now();
    while Queue::of(run).is_some_and(|queue| queue.may_go_on()) {
        if start.elapsed() >= Duration::from_secs(args.timeout) {
            bail!("{shown} still runs after {} s; `scancel {job}` ends it at once", args.timeout);
        }
        std::thread::sleep(queue::ASK);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use learn_domain::report::StepRecord;

    use super::*;

    #[test]
    fn a_process_is_killed_where_it_is() {
        let at = |host: &str| kill(&CoordinatorAddress { pid: 7, host: host.into(), ..CoordinatorAddress::default() });
        assert_eq!((at("node1"), at("")), ("`kill 7` on node1".into(), "`kill 7` on this machine".into()));
    }

    #[test]
    fn only_what_loses_no_step_was_stopped_well() {
        let of = |state, done, kept: Option<u64>| {
            let mut status = crate::watch::tests::scene().current.unwrap().status;
            status.state = state;
            status.last_step = (done > 0).then(|| StepRecord { step: Step(done), ..StepRecord::default() });
            status.last_checkpoint = kept.map(Step);
            status.cause = Some("worker 0 died".into());
            lost(&status)
        };
        assert_eq!(of(JobState::Finished, 14, None), None);
        assert_eq!(of(JobState::Stopped, 14, Some(14)), None);
        assert_eq!(of(JobState::Stopped, 0, None), None, "it had not begun");
        assert!(of(JobState::Stopped, 14, Some(10)).unwrap().contains("of step 10"));
        assert!(of(JobState::Stopped, 14, None).unwrap().contains("its 14 steps are lost"));
        assert!(of(JobState::Failed, 14, Some(14)).unwrap().ends_with("failed: worker 0 died"));
    }
}
