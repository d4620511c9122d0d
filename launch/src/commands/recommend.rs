//! `learn-launch recommend`: the best items for users.

use anyhow::Result;
use clap::Args;

use crate::cli::RunArgs;
use crate::output::Output;
use crate::runs;

pub const HELP: &str = "\
Examples:
  learn-launch recommend runs/quickstart --users 196,186 -k 10
  learn-launch recommend quickstart --users 196 --json";

/// Arguments of `recommend`.
#[derive(Debug, Args)]
pub struct RecommendArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Ids of users as they stand in the interactions, separated by commas
    #[arg(long, value_name = "ID,ID,…", required = true)]
    users: String,
    /// Items per user
    #[arg(short, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    k: u32,
    /// Checkpoint: `best`, `last` or a name like step-0000000200 [default: best, else last]
    #[arg(long, value_name = "NAME")]
    checkpoint: Option<String>,
    /// Recommend items that the user already had, too
    #[arg(long)]
    with_history: bool,
}

/// # Errors
/// There is no such run, checkpoint or user.
pub fn run(args: &RecommendArgs, output: &Output) -> Result<()> {
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    super::worker(|command| {
        command.arg("recommend").arg("--run").arg(run.root());
        command.args(["--users", &args.users, "-k", &args.k.to_string()]);
        if let Some(checkpoint) = &args.checkpoint {
            command.args(["--checkpoint", checkpoint]);
        }
        if args.with_history {
            command.arg("--with-history");
        }
        if output.json() {
            command.arg("--json");
        }
    })
}
