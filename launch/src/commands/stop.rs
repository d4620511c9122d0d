//! `learn-launch stop`: ends a running job after its current step, with a checkpoint.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::api::Api;
use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::output::Output;
use crate::{render, runs};

pub const HELP: &str = "\
Examples:
  learn-launch stop runs/quickstart
  learn-launch stop quickstart --no-wait

The job finishes its step, writes a checkpoint and ends; `learn-launch resume` continues it exactly.";

/// Pause between two looks at a job that is about to end.
const POLL: Duration = Duration::from_millis(200);

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
/// The run is not running, its coordinator refuses, or it does not end in time.
pub fn run(args: &StopArgs, output: &Output) -> Result<()> {
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    let shown = super::shown_run(&run);
    let Some(address) = runs::live(&run) else {
        return Err(Failure::Usage(format!(
            "{shown} is not running; `learn-launch status {shown}` shows how it ended"
        ))
        .into());
    };
    let secret =
        std::fs::read_to_string(run.secret()).with_context(|| format!("cannot read {}", run.secret().display()))?;
    Api::new(&address).stop(secret.trim())?;
    output.note(&format!("{shown}: stopping after the current step"));
    if args.no_wait {
        return output.result(&format!("{shown}: asked to stop"), &serde_json::json!({ "state": "stopping" }));
    }
    let start = Instant::now();
    while runs::live(&run).is_some() {
        if start.elapsed() >= Duration::from_secs(args.timeout) {
            bail!("{shown} still runs after {} s; `kill {}` ends its coordinator", args.timeout, address.pid);
        }
        std::thread::sleep(POLL);
    }
    let status = runs::last_status(&run)?.context("the job ended without a last status")?;
    let step = status.last_step.as_ref().map_or(0, |step| step.step.0);
    let text = format!("{shown}: {} at step {step}", render::state(&status.state));
    output.result(&text, &status)
}
