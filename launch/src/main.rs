//! The `learn-launch` binary: reads the command line, runs one command, turns its end into an exit code.

use std::process::ExitCode;

use clap::Parser as _;
use learn_launch::cli::Cli;
use learn_launch::commands;

fn main() -> ExitCode {
    let code = match Cli::try_parse() {
        Ok(cli) => commands::run(cli),
        Err(error) => commands::refuse(&error, std::env::args_os().skip(1)),
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
