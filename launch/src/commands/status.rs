//! `learn-launch status`: where a run or a dataset's embed job stands, live from its coordinator or from its last words.

use anyhow::{Result, anyhow};
use clap::Args;
use learn_dataset::Dataset;
use learn_domain::report::JobStatus;
use learn_domain::run_dir::RunDir;

use crate::api::Api;
use crate::cli::RunArgs;
use crate::output::Output;
use crate::render::{self, Freshness};
use crate::runs::{self, Named};

pub const HELP: &str = "\
Examples:
  learn-launch status runs/quickstart
  learn-launch status quickstart --json | jq .ledger
  learn-launch status data/ml-100k                    (the embed job of a dataset)

With --json the whole status is printed, with `freshness`: live (a coordinator answers), ended, or stale (the
coordinator is gone without having ended the job; `resume`, or `embed`, continues it).";

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    run: RunArgs,
}

/// # Errors
/// There is no such run, or it has no status yet.
pub fn run(args: &StatusArgs, output: &Output) -> Result<()> {
    let run = match runs::find_named(&args.run.run, &args.run.runs_dir)? {
        Named::Run(run) => run,
        Named::Dataset(dataset) => return embedding(&dataset, output),
    };
    let (status, freshness) = current(&run)?;
    let mut json = serde_json::to_value(&status)?;
    json["freshness"] = freshness.name().into();
    output.result(&render::status(&status, freshness), &json)
}

/// The status of a run now.
fn current(run: &RunDir) -> Result<(JobStatus, Freshness)> {
    if let Some(address) = runs::live(run) {
        match Api::new(&address).job() {
            Ok(status) => return Ok((status, Freshness::Live)),
            Err(error) => tracing::warn!("{error}; showing the last status on disk"),
        }
    }
    let status = runs::last_status(run)?.ok_or_else(|| {
        anyhow!(
            "{} has no status yet; its coordinator has not come that far, see {}",
            run.root().display(),
            run.coordinator_log().display()
        )
    })?;
    let freshness = if status.state.ended() { Freshness::Ended } else { Freshness::Stale };
    Ok((status, freshness))
}

/// Where the embed job of a dataset stands.
fn embedding(dataset: &Dataset, output: &Output) -> Result<()> {
    let job = RunDir::of_embedding(dataset.dir());
    let live = runs::live(&job).and_then(|address| match Api::new(&address).embedding() {
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
