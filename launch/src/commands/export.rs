//! `learn-launch export`: embeddings and weights of a checkpoint as files others read.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::RunArgs;
use crate::output::Output;
use crate::runs;

pub const HELP: &str = "\
Examples:
  learn-launch export runs/quickstart --out export
  learn-launch export quickstart --out export --checkpoint step-0000000200

Writes user and item embeddings (Parquet and .npy) and the weights (safetensors, names of the published checkpoint).";

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Directory to write to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Checkpoint: `best`, `last` or a name like step-0000000200 [default: best, else last]
    #[arg(long, value_name = "NAME")]
    checkpoint: Option<String>,
}

/// # Errors
/// There is no such run or checkpoint, or writing fails.
pub fn run(args: &ExportArgs, output: &Output) -> Result<()> {
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    super::worker(|command| {
        command.arg("export").arg("--run").arg(run.root()).arg("--out").arg(&args.out);
        if let Some(checkpoint) = &args.checkpoint {
            command.args(["--checkpoint", checkpoint]);
        }
        if output.json() {
            command.arg("--json");
        }
    })
}
