//! The `learn-launch` binary: reads the command line, runs one command, turns its end into an exit code.

use std::process::ExitCode;

use clap::Parser as _;
use learn_launch::cli::Cli;

fn main() -> ExitCode {
    let code = learn_launch::commands::run(Cli::parse());
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
