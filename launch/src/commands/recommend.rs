//! `learn-launch recommend`: the best items for users.

use anyhow::Result;
use clap::Args;

use crate::cli::{DatasetArgs, RunArgs};
use crate::failure::Failure;
use crate::output::Output;
use crate::{runs, system};

pub const HELP: &str = "\
Examples:
  learn-launch recommend runs/quickstart --users 196,186 -k 10
  learn-launch recommend quickstart --users 196 --json
  learn-launch recommend shop --user 'Doe, Jane' --user 'Roe, Richard'";

/// Arguments of `recommend`.
#[derive(Debug, Args)]
pub struct RecommendArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    data: DatasetArgs,
    /// Ids of users as they stand in the interactions, separated by commas; spaces around them do not count
    #[arg(long, value_name = "ID,ID,…", required_unless_present = "user")]
    users: Option<String>,
    /// One user more, by exactly this id, which may have commas and spaces (repeatable)
    #[arg(long, value_name = "ID")]
    user: Vec<String>,
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

impl RecommendArgs {
    fn users(&self) -> impl Iterator<Item = &str> {
        let listed = self.users.iter().flat_map(|users| users.split(',').map(str::trim));
        listed.chain(self.user.iter().map(String::as_str))
    }

    fn refuse_empty(&self) -> Result<()> {
        if self.users().all(|id| !id.is_empty()) {
            return Ok(());
        }
        let message = match &self.users {
            Some(users) if users.contains(',') && users.split(',').any(|id| id.trim().is_empty()) => {
                format!("--users {users}: there is a comma without an id before or after it; take it out")
            }
            _ => "an id of a user is empty; name one with --users or --user".to_owned(),
        };
        Err(Failure::Usage(message).into())
    }
}

/// # Errors
/// There is no such run, checkpoint or user.
pub fn run(args: &RecommendArgs, output: &Output) -> Result<()> {
    args.refuse_empty()?;
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    let dataset = super::dataset_of(&run, &args.data)?;
    // to be stopped has an exit code of its own
    system::catch_stop_signals();
    super::worker(output, |command| {
        command.args(["recommend", "--progress-json"]);
        command.arg("--run").arg(run.root()).arg("--dataset").arg(&dataset);
        command.args(args.users().map(|id| format!("--user={id}"))).args(["-k", &args.k.to_string()]);
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

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Only {
        #[command(flatten)]
        args: RecommendArgs,
    }

    #[test]
    fn an_id_that_is_empty_is_refused() {
        let check = |words: &[&str]| Only::parse_from([&["recommend", "r"], words].concat()).args.refuse_empty();
        for fine in [&["--users", "196"][..], &["--users", "196, 186"], &["--user", "a,"]] {
            check(fine).unwrap();
        }
        for (wrong, said) in [
            (&["--users", "196,"][..], "--users 196,: there is a comma"),
            (&["--users", ",196"], "a comma"),
            (&["--users", ""], "id of a user is empty"),
            (&["--users", "196,186", "--user", ""], "id of a user is empty"),
        ] {
            let text = check(wrong).unwrap_err().to_string();
            assert!(text.contains(said), "{text}");
        }
    }
}
