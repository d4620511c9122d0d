//! `learn-launch status`: where a run or a dataset's embed job stands, live from its coordinator or from its last words.

use std::io::IsTerminal as _;

use anyhow::{Result, bail};
use clap::Args;
use learn_dataset::Dataset;
use learn_domain::report::{JobState, JobStatus};
use learn_domain::run_dir::RunDir;

use crate::api::Api;
use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::output::Output;
use crate::render::{self, Freshness};
use crate::runs::{self, Life, Named};
use crate::slurm::queue::Inquiry;
use crate::watch;

pub const HELP: &str = "\
Examples:
  learn-launch status runs/quickstart
  learn-launch status quickstart --json | jq .ledger
  learn-launch status quickstart --watch
                        (a screen; q leaves it, and the job goes on)
  learn-launch status quickstart --watch --plain >> watch.log
  learn-launch status quickstart --watch --json | jq -c '.last_step.loss'
  learn-launch status data/ml-100k
                        (the embed job of a dataset)

With --json the whole status is printed, with `seconds_since_written` (null if a coordinator has just told it), with \
`slurm` if it is a job of Slurm's, and with `freshness`, which is
  live     a coordinator answers, or the run's lock is taken and its last
           status has not ended
  ended    also of a run that is just being resumed
  queued   it waits in Slurm's queue
  stale    the coordinator is gone without having ended the job; `resume`,
           or `embed`, continues it
  unknown  it was on another machine, and nobody can tell from here";

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Follow the run: a screen on a terminal; in a pipe a line for each change until its job has ended, JSON lines with
    /// --json
    #[arg(short, long)]
    watch: bool,
    /// With --watch: lines on a terminal, too
    #[arg(long, requires = "watch")]
    plain: bool,
}

/// # Errors
/// There is no such run, or it has no status yet.
pub fn run(args: &StatusArgs, output: &Output) -> Result<()> {
    let run = match runs::find_named(&args.run.run, &args.run.runs_dir)? {
        Named::Run(run) => run,
        Named::Dataset(_) if args.watch => {
            let message = "--watch follows a run; `learn-launch status DATASET` shows an embed job as it is now";
            return Err(Failure::Usage(message.into()).into());
        }
        Named::Dataset(dataset) => return embedding(&dataset, output),
    };
    if args.watch {
        return watch::run(run, args.plain, output);
    }
    let mut inquiry = Inquiry::default();
    let current = current(&run, &mut inquiry)?;
    let queue = inquiry.of(&run);
    let Some(Current { status, freshness, age, trouble }) = current else {
        if let Some(queue) = queue {
            // a job that has not started has no status yet
            let text = format!("{}: Slurm's {}", super::shown_run(&run), queue.describe());
            let freshness = if queue.ended() { Freshness::Stale } else { Freshness::Queued };
            return output.result(&text, &serde_json::json!({ "freshness": freshness.name(), "slurm": queue.json() }));
        }
        let (shown, log) = (run.root().display(), run.coordinator_log());
        bail!("{shown} has no status yet; its coordinator has not come that far, see {}", log.display());
    };
    if let Some(trouble) = trouble {
        tracing::warn!("{trouble}; showing the last status on disk");
    }
    let mut json = serde_json::to_value(&status)?;
    json["freshness"] = freshness.name().into();
    json["seconds_since_written"] = age.into();
    let mut text = render::status(&status, freshness, age);
    if let Some(queue) = &queue {
        json["slurm"] = queue.json();
        text += &format!("  slurm       {}\n", queue.describe());
    }
    if let Some(address) = runs::live(&run).filter(|_| freshness == Freshness::Live) {
        json["page"] = address.http.clone().into();
        text += &format!("  page        {}", runs::page(&run, &address, std::io::stdout().is_terminal()));
    }
    output.result(&text, &json)
}

/// What can be learnt of a run.
#[derive(Clone, Debug)]
pub struct Current {
    pub status: JobStatus,
    pub freshness: Freshness,
    /// Seconds since it was written to disk; none if its coordinator has just told it.
    pub age: Option<f64>,
    /// Why its coordinator, which is alive or may be, was not heard, unless Slurm says how its job is; the status is the last on
    /// disk then.
    pub trouble: Option<String>,
}

/// The status of a run now, from its coordinator or else from disk, which Slurm's queue makes fresh or not; none before
/// its coordinator has come that far.
///
/// # Errors
/// The last status is there and cannot be read.
pub fn current(run: &RunDir, inquiry: &mut Inquiry) -> Result<Option<Current>> {
    let life = runs::life(run);
    let mut trouble = life.describe(run);
    if let Life::Live(address) = &life {
        match Api::new(run, address).job() {
            Ok(status) => return Ok(Some(Current { status, freshness: Freshness::Live, age: None, trouble: None })),
            Err(error) => trouble = Some(error.to_string()),
        }
    }
    // a coordinator on one node listens there alone: `stop` asks Slurm as well
    let told = match &life {
        Life::Locked(Some(_)) => inquiry.of(run).is_some_and(|queue| queue.runs()),
        Life::Unknown { .. } => inquiry.of(run).is_some_and(|queue| queue.known.is_ok()),
        _ => false,
    };
    if told {
        trouble = None;
    }
    let Some(status) = runs::last_status(run)? else { return Ok(None) };
    let freshness = match (&status.state, &life) {
        (JobState::Finished, _) => Freshness::Ended,
        (state, Life::Live(_) | Life::Locked(_)) if !state.ended() => Freshness::Live,
        (state, life) => {
            let alone = match life {
                _ if state.ended() => Freshness::Ended,
                Life::Unknown { .. } => Freshness::Unknown,
                _ => Freshness::Stale,
            };
            inquiry.of(run).map_or(alone, |queue| queue.freshness(state, alone))
        }
    };
    Ok(Some(Current { status, freshness, age: runs::status_age(run), trouble }))
}

/// Where the embed job of a dataset stands.
fn embedding(dataset: &Dataset, output: &Output) -> Result<()> {
    let job = RunDir::of_embedding(dataset.dir());
    let live = runs::live(&job).and_then(|address| match Api::new(&job, &address).embedding() {
        Ok(status) => Some(status),
        Err(error) => {
            tracing::warn!("{error}");
            None
        }
    });
    let freshness = match &live {
        Some(_) => Freshness::Live,
        // an embed that has ended leaves no job behind
        None if job.root().exists() => Freshness::Stale,
        None => Freshness::Ended,
    };
    let made = dataset.manifest().embeddings.as_ref();
    let json = serde_json::json!({
        "dataset": dataset.dir(),
        "freshness": freshness.name(),
        "job": live,
        "embeddings": made,
    });
    let has = made.map(|info| format!("{} dimensions, {}", info.dim, info.model));
    let text = render::embedding(live.as_ref(), freshness, has.as_deref());
    output.result(&format!("{}: {text}", super::shown(dataset.dir())), &json)
}
