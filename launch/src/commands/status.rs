//! `learn-launch status`: where a run stands, live from its coordinator or from its last words.

use anyhow::{Result, anyhow};
use clap::Args;
use learn_domain::report::JobStatus;
use learn_domain::run_dir::RunDir;

use crate::api::Api;
use crate::cli::RunArgs;
use crate::output::Output;
use crate::render::{self, Freshness};
use crate::runs;

pub const HELP: &str = "\
Examples:
  learn-launch status runs/quickstart
  learn-launch status quickstart --json | jq .ledger

With --json the whole status is printed, with `freshness`: live (a coordinator answers), ended, or stale (the
coordinator is gone without having ended the job; `resume` continues it).";

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    run: RunArgs,
}

/// # Errors
/// There is no such run, or it has no status yet.
pub fn run(args: &StatusArgs, output: &Output) -> Result<()> {
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    let (status, freshness) = current(&run)?;
    let mut json = serde_json::to_value(&status)?;
    json["freshness"] = match freshness {
        Freshness::Live => "live",
        Freshness::Ended => "ended",
        Freshness::Stale => "stale",
    }
    .into();
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
