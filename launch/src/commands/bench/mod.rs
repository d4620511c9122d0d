//! `learn-launch bench`: the speed of one part alone, measured by the program that does it.
//!
//! Input: a part and its own flags, which go to that program as they are. Output: the program's, text or JSON. What makes a
//! dataset is measured on the user's own files ([`ingest`]).

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;

use anyhow::Result;
use clap::{Args, Subcommand};

mod ingest;

use ingest::IngestArgs;

use super::program;
use crate::output::Output;

pub const HELP: &str = "\
Examples:
  learn-launch bench step --batch 64 --threads 2 --precision bf16
  learn-launch bench loss --json
  learn-launch bench collective --workers 4
  learn-launch bench flight --clients 4
  learn-launch bench prepare configs/quickstart.toml
  learn-launch bench checkpoint --help

Each part has flags of its own: `learn-launch bench PART --help`. `prepare` and `embed` take a configuration and work \
on its files, in a temporary folder; the others need nothing but the programs: data and weights are made up. \
Everything runs on this machine, mostly in a minute or two. `cargo xtask bench` in the sources sets the parts beside \
PyTorch, in turns, and writes docs/benchmarks.md.";

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
    /// Content embedding rows over Arrow Flight on loopback, from the service of a job to the client of a worker
    Flight(Passed),
    /// Bytes that a worker receives for a user, over those of the published layout
    Wire(Passed),
    /// Rows a second from a configuration's files to a dataset, which does not stay
    Prepare(IngestArgs),
    /// Items a second from a configuration's texts to content embeddings, which do not stay
    Embed(IngestArgs),
}

/// Flags of the program that measures.
#[derive(Debug, Args)]
#[command(disable_help_flag = true, disable_version_flag = true)]
struct Passed {
    /// Flags of the part; --help lists them
    #[arg(value_name = "FLAGS", trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<OsString>,
}

/// Who measures a part.
enum By<'a> {
    /// A program beside this one, with these words before the flags.
    Program(&'static str, &'static [&'static str], &'a [OsString]),
    This(fn(&IngestArgs, &Output) -> Result<()>, &'a IngestArgs),
}

impl Part {
    fn by(&self) -> By<'_> {
        let (program, words, passed): (_, &[&str], _) = match self {
            Self::Step(passed) => ("learn-worker", &["bench", "step"], passed),
            Self::Loss(passed) => ("learn-worker", &["bench", "loss"], passed),
            Self::Collective(passed) => ("learn-worker", &["bench", "collective"], passed),
            Self::Checkpoint(passed) => ("learn-worker", &["bench", "checkpoint"], passed),
            Self::Flight(passed) => ("learn-coordinator", &["bench", "flight"], passed),
            Self::Wire(passed) => ("learn-coordinator", &["bench", "wire"], passed),
            Self::Prepare(args) => return By::This(ingest::prepare, args),
            Self::Embed(args) => return By::This(ingest::embed, args),
        };
        By::Program(program, words, &passed.flags)
    }
}

/// # Errors
/// The program is not there, or fails; its exit code becomes this one's.
pub fn run(args: &BenchArgs, output: &Output) -> Result<()> {
    let (name, words, flags) = match args.part.by() {
        By::Program(name, words, flags) => (name, words, flags),
        By::This(measure, args) => return measure(args, output),
    };
    // `--json` before the first flag of the part was taken for this command's own
    let json = output.json() && !flags.iter().any(|flag| flag == "--json");
    program(name, |command| {
        // its help and its errors show the command as it was typed
        command.arg0("learn-launch").args(words).args(flags).args(json.then_some("--json"));
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
        let By::Program(program, words, flags) = args.part.by() else { panic!("{line} is measured here") };
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
