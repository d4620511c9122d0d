//! `learn-launch export`: embeddings and weights of a checkpoint as files others read.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::{DatasetArgs, RunArgs};
use crate::output::Output;
use crate::{runs, system};

pub const HELP: &str = "\
Examples:
  learn-launch export runs/quickstart --out export
  learn-launch export quickstart --out export --checkpoint step-0000000200
  learn-launch export ml-100k-cvr --out export --cvr-features test

Writes user and item embeddings (Parquet and .npy) and the weights (safetensors, names of the published checkpoint). \
--cvr-features adds, for a ranking model, a row per held-out pair: user, item, label, user_embedding, item_embedding, \
middle (the CVR head's hidden layer). An export that is stopped leaves nothing behind.";

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    data: DatasetArgs,
    /// Directory to write to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Checkpoint: `best`, `last` or a name like step-0000000200 [default: best, else last]
    #[arg(long, value_name = "NAME")]
    checkpoint: Option<String>,
    /// Write what the CVR head makes of each held-out pair of this split, too: cvr-features.parquet
    #[arg(long, value_name = "SPLIT", value_parser = ["valid", "test"])]
    cvr_features: Option<String>,
}

/// # Errors
/// There is no such run or checkpoint, or writing fails.
pub fn run(args: &ExportArgs, output: &Output) -> Result<()> {
    super::refuse_tasks("export")?;
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    let dataset = super::dataset_of(&run, &args.data)?;
    // what the worker has begun to write goes before it ends
    system::catch_stop_signals();
    super::worker(output, |command| {
        command.args(["export", "--progress-json"]).arg("--run").arg(run.root()).arg("--out").arg(&args.out);
        command.arg("--dataset").arg(&dataset);
        if let Some(checkpoint) = &args.checkpoint {
            command.args(["--checkpoint", checkpoint]);
        }
        if let Some(split) = &args.cvr_features {
            command.args(["--cvr-features", split]);
        }
        if output.json() {
            command.arg("--json");
        }
    })
}
