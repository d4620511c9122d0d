//! `learn-launch bench`: the speed of one part alone, measured by the program that does it.
//!
//! Input: a part and its own flags, which go to that program as they are. Output: the program's, text or JSON.

use std::ffi::OsString;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::program;
use crate::output::Output;

pub const HELP: &str = "\
Examples:
  learn-launch bench step --batch 64 --threads 2 --precision bf16
  learn-launch bench loss --json
  learn-launch bench collective --workers 4
  learn-launch bench checkpoint --help

Each part has flags of its own: `learn-launch bench PART --help`. Nothing is needed but the
programs: data and weights are made up. Everything runs on this machine and is over in a minute
or two. `cargo xtask bench` in the sources sets the parts beside PyTorch, in turns, and writes
docs/benchmarks.md.";

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    part: Part,
}

/// What is measured, and where it runs.
#[derive(Debug, Subcommand)]
enum Part {
    /// A training step: users and tokens per second, and their share of what matrix products reach here
    Step(Passed),
    /// InfoNCE with its gradient: seconds, and peak memory against the full matrix of scores
    Loss(Passed),
    /// All-reduce, gather and reduce-scatter between processes of this machine
    Collective(Passed),
    /// What a step loses while a checkpoint is written
    Checkpoint(Passed),
}

/// Flags of the program that measures.
#[derive(Debug, Args)]
#[command(disable_help_flag = true, disable_version_flag = true)]
struct Passed {
    /// Flags of the part; --help lists them
    #[arg(value_name = "FLAGS", trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<OsString>,
}

impl Part {
    /// The program beside this one, and its arguments.
    fn command(&self) -> (&'static str, &'static [&'static str], &[OsString]) {
        let (program, words, passed): (_, &[&str], _) = match self {
            Self::Step(passed) => ("learn-worker", &["bench", "step"], passed),
            Self::Loss(passed) => ("learn-worker", &["bench", "loss"], passed),
            Self::Collective(passed) => ("learn-worker", &["bench", "collective"], passed),
            Self::Checkpoint(passed) => ("learn-worker", &["bench", "checkpoint"], passed),
        };
        (program, words, &passed.flags)
    }
}

/// # Errors
/// The program is not there, or fails; its exit code becomes this one's.
pub fn run(args: &BenchArgs, output: &Output) -> Result<()> {
    let (name, words, flags) = args.part.command();
    // `--json` before the first flag of the part was taken for this command's own
    let json = output.json() && !flags.iter().any(|flag| flag == "--json");
    program(name, |command| {
        command.args(words).args(flags).args(json.then_some("--json"));
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::cli::{Cli, Command};

    use super::*;

    fn parsed(line: &str) -> (&'static str, Vec<String>, Vec<String>, bool) {
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let Command::Bench(args) = cli.command else { panic!("{line} is no bench") };
        let (program, words, flags) = args.part.command();
        let text = |flag: &OsString| flag.to_string_lossy().into_owned();
        (program, words.iter().map(ToString::to_string).collect(), flags.iter().map(text).collect(), cli.global.json)
    }

    #[test]
    fn flags_go_to_the_program_that_measures() {
        let (program, words, flags, _) = parsed("learn-launch bench step --batch 64 --json --threads 2");
        assert_eq!(
            (program, words, flags),
            (
                "learn-worker",
                vec!["bench".to_owned(), "step".into()],
                ["--batch", "64", "--json", "--threads", "2"].map(String::from).to_vec()
            )
        );
        let (_, words, flags, json) = parsed("learn-launch bench loss --json");
        assert_eq!((words, flags, json), (vec!["bench".to_owned(), "loss".into()], Vec::new(), true));
        for help in ["--help", "-h"] {
            assert_eq!(parsed(&format!("learn-launch bench loss {help}")).2, [help]);
        }
    }
}
