//! `learn-launch scale`: more or fewer workers for a running job.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use learn_domain::report::{CoordinatorAddress, JobState, JobStatus};

use crate::api::Api;
use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::output::Output;
use crate::slurm::queue::Queue;
use crate::{operator, render, runs};

pub const HELP: &str = "\
Examples:
  learn-launch scale runs/quickstart --workers 4
  learn-launch scale quickstart --workers 1 --no-wait

New workers join, and surplus ones leave, between two steps; the batches, the losses and the result stay the same. \
The `learn-launch` that runs the job starts the new processes, and refuses more than its machine takes: 16 a core, 64 \
on small ones. If nobody starts them (`train --no-workers`), this says by which command they come. Never fewer than \
cluster.min_workers. A job of Slurm's can have fewer, not more: its tasks are those that it was submitted with.";

/// Pause between two looks at the job.
const POLL: Duration = Duration::from_millis(200);

/// Arguments of `scale`.
#[derive(Debug, Args)]
pub struct ScaleArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Workers that the job shall have
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
    /// Return at once instead of waiting until they are there
    #[arg(long)]
    no_wait: bool,
    /// Give up waiting after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
}

/// # Errors
/// The run is not running, its coordinator refuses, or the workers are not there in time.
pub fn run(args: &ScaleArgs, output: &Output) -> Result<()> {
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    let shown = super::shown_run(&run);
    let Some(address) = runs::live(&run) else {
        if let Some(queue) = Queue::of(&run).filter(Queue::runs) {
            bail!(
                "the coordinator of {shown} cannot be reached from here: that of a job on one node listens on that node only. \
                 Scale it there, with `srun --jobid {} --overlap learn-launch scale {shown} --workers {}`, or submit it with \
                 `--set cluster.bind=0.0.0.0`. It is {}",
                queue.job.job_id,
                args.workers,
                queue.describe()
            );
        }
        // it may be where it cannot be asked from here
        runs::refuse_live(&run)?;
        let message = format!("{shown} is not running; `learn-launch status {shown}` shows how it ended");
        return Err(Failure::Usage(message).into());
    };
    let api = Api::new(&run, &address);
    let slurm = Queue::of(&run);
    if let Some(queue) = slurm.as_ref().filter(|queue| queue.runs() || queue.known.is_err() && queue.may_go_on()) {
        let most = api.job()?.wanted_workers;
        if args.workers > most {
            return Err(Failure::Usage(format!(
                "{shown} is a job of Slurm's with a task for each of {most} workers, and cannot have more: `learn-launch stop {shown}`, \
                 then `learn-launch slurm --resubmit {shown} --nodes N`. It is {}",
                queue.describe()
            ))
            .into());
        }
    }
    let wanted = operator::scale(&run, &address, args.workers)?;
    if wanted != args.workers {
        output.note(&format!("{shown}: {wanted} is what it can have (cluster.min_workers, training.global_batch)"));
    }
    // it is done, whether or not the job can tell how it stands now
    let status = api.job().ok();
    let advised = status.as_ref().filter(|_| !by_slurm(slurm.as_ref()));
    let more = advised.and_then(|status| who_must_join(status, wanted, &address, &run.secret()));
    if let Some(more) = &more {
        output.note(&format!("{shown}: {more}"));
    }
    if args.no_wait {
        return output.result(&format!("{shown}: {wanted} workers are wanted"), &status);
    }
    let started = Instant::now();
    let status = loop {
        let status: JobStatus = api.job()?;
        if status.state == JobState::Running && status.world_size == wanted {
            break status;
        }
        if !matches!(status.state, JobState::Gathering | JobState::Running | JobState::Regrouping) {
            bail!("{shown} is {} already", status.state.name());
        }
        if started.elapsed() > Duration::from_secs(args.timeout) {
            let (there, seconds) = (there(&status), args.timeout);
            let why = more.unwrap_or_else(|| "its logs say what the others do".into());
            bail!("{shown} has {there} of {wanted} workers after {seconds} s; {why}");
        }
        std::thread::sleep(POLL);
    };
    output.result(&format!("{shown}: {wanted} workers since generation {}", status.generation), &status)
}

/// Workers that a job has.
fn there(status: &JobStatus) -> u32 {
    match status.state {
        // its ranks are those that it will have
        JobState::Gathering => status.workers.iter().map(|worker| u32::from(!worker.left)).sum(),
        _ => status.world_size,
    }
}

/// Slurm starts the workers, again too: they are tasks of the job.
fn by_slurm(queue: Option<&Queue>) -> bool {
    queue.is_some_and(|queue| !queue.ended())
}

/// What to do for workers that are missing and that the job does not start; Kubernetes, say, may.
fn who_must_join(status: &JobStatus, wanted: u32, address: &CoordinatorAddress, secret: &Path) -> Option<String> {
    let missing = wanted.saturating_sub(there(status));
    (missing > 0 && status.most_workers.is_none()).then(|| {
        format!(
            "the job starts no workers itself; if nothing else starts them, start {} more: learn-worker join --coordinator {} \
             --secret-file {}",
            render::workers(missing as usize),
            address.grpc,
            secret.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slurm::client::ClientError;
    use crate::slurm::run::SlurmJob;

    #[test]
    fn who_scales_a_job_of_slurm_is_told_to_start_nobody() {
        let queue = |known| Queue { job: SlurmJob { job_id: 12 }, known };
        assert!(by_slurm(Some(&queue(Err(ClientError::Missing("squeue".into()))))), "it cannot be asked from here");
        assert!(!by_slurm(Some(&queue(Ok(None)))), "a run that was Slurm's before");
        assert!(!by_slurm(None));
    }

    #[test]
    fn workers_that_nobody_starts_come_by_a_command() {
        let address = CoordinatorAddress { grpc: "http://h:4100".into(), ..CoordinatorAddress::default() };
        let mut status = crate::watch::tests::scene().current.unwrap().status;
        let told = |status: &JobStatus, wanted| who_must_join(status, wanted, &address, Path::new("/r/secret"));
        assert_eq!(told(&status, 6), None, "its launcher starts them");
        status.most_workers = None;
        assert_eq!(
            told(&status, 6).as_deref(),
            Some(
                "the job starts no workers itself; if nothing else starts them, start 2 workers more: learn-worker join \
                 --coordinator http://h:4100 --secret-file /r/secret"
            )
        );
        for enough in [1, 4] {
            assert_eq!(told(&status, enough), None);
        }
        // before the first generation
        (status.state, status.world_size) = (JobState::Gathering, 6);
        status.workers[0].left = true;
        assert!(told(&status, 6).unwrap().contains("start 3 workers more"), "three are there");
    }
}
