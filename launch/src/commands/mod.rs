//! One file per subcommand, and the one place where they are called and their errors printed.

pub mod bench;
pub mod config;
pub mod doctor;
pub mod embed;
pub mod eval;
pub mod export;
pub mod logs;
pub mod prepare;
pub mod recommend;
pub mod report;
pub mod resume;
pub mod scale;
pub mod simulate;
pub mod slurm;
pub mod slurm_job;
pub mod slurm_task;
pub mod status;
pub mod stop;
pub mod study;
pub mod train;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command as ChildCommand, ExitStatus};

use anyhow::{Context as _, Result};
use learn_domain::report::exit;
use learn_domain::run_dir::RunDir;
use learn_telemetry::stdio;

use crate::cli::{Cli, Command, DatasetArgs};
use crate::failure::{self, Failure};
use crate::output::{Output, Unit};
use crate::slurm::Variables;
use crate::{process, relay, runs, system};

/// Runs one command and returns its exit code.
pub fn run(cli: Cli) -> i32 {
    let level = match cli.global.verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    learn_telemetry::log::init_at("launch", cli.global.log_json, level);
    let output = Output::new(cli.global.json, cli.global.quiet);
    let ended = match cli.command {
        Command::Prepare(args) => prepare::run(&args, &output),
        Command::Embed(args) => embed::run(&args, &output),
        Command::Train(args) => train::run(&args, &output),
        Command::Resume(args) => resume::run(&args, &output),
        Command::Eval(args) => eval::run(&args, &output),
        Command::Export(args) => export::run(&args, &output),
        Command::Recommend(args) => recommend::run(&args, &output),
        Command::Report(args) => report::run(&args, &output),
        Command::Status(args) => status::run(&args, &output),
        Command::Logs(args) => logs::run(&args, &output),
        Command::Slurm(args) => slurm::run(&args, &output),
        Command::SlurmJob(args) => slurm_job::run(&args, &output),
        Command::SlurmTask(args) => slurm_task::run(&args),
        Command::Study(args) => study::run(&args, &output),
        Command::Scale(args) => scale::run(&args, &output),
        Command::Simulate(args) => simulate::run(&args, &output),
        Command::Stop(args) => stop::run(&args, &output),
        Command::Bench(args) => bench::run(&args, &output),
        Command::Config(args) => config::run(&args, &output),
        Command::Doctor(args) => doctor::run(&args, &output),
    };
    match ended {
        Ok(()) => exit::OK,
        Err(error) => {
            let code = failure::exit_code(&error);
            let message = failure::message(&error);
            stdio::say(format_args!("learn-launch: {message}"));
            let reported = matches!(error.downcast_ref(), Some(Failure::Reported { .. }));
            if output.json() && !reported {
                print_error(&output, &message, code);
            }
            code
        }
    }
}

/// Says why `arguments` are no command line, as JSON too if they ask for it, or prints the help or the version that they ask
/// for; returns the exit code.
pub fn refuse(error: &clap::Error, arguments: impl Iterator<Item = OsString>) -> i32 {
    // if nobody reads it, there is nobody to tell that
    let _nobody = error.print();
    let code = error.exit_code();
    if code != exit::OK && asks_for_json(arguments) {
        print_error(&Output::new(true, false), &refusal(error), code);
    }
    code
}

/// What clap says, without the word that it begins with.
fn refusal(error: &clap::Error) -> String {
    let text = error.render().to_string();
    text.strip_prefix("error: ").unwrap_or(&text).trim().to_owned()
}

fn asks_for_json(arguments: impl Iterator<Item = OsString>) -> bool {
    arguments.take_while(|argument| argument != "--").any(|argument| argument == "--json")
}

fn print_error(output: &Output, message: &str, code: i32) {
    // Where stdout cannot be written there is nobody left to tell.
    let _nobody = output.result("", &serde_json::json!({ "error": message, "exit_code": code }));
}

/// Runs `learn-worker` to its end with this process's own input, shows its progress, and prints what it prints; its error
/// becomes this command's.
fn worker(output: &Output, arguments: impl FnOnce(&mut ChildCommand)) -> Result<()> {
    let name = "learn-worker";
    let mut command = beside(name, arguments)?;
    let mut progress = output.progress(Unit::Count).patient();
    let relay::Ended { status, error, printed } =
        relay::run(&mut command, &mut progress).with_context(|| format!("cannot start {name}"))?;
    // the stop has ended it as it does not listen yet, or not at all: nothing of it would be left behind
    if status.code().is_none() && system::stop_requests() == 1 {
        return Err(Failure::Stopped("stopped before there was a result".into()).into());
    }
    stdio::print(&printed)?;
    ended(name, status, error)
}

/// Runs a program beside this one to its end with this process's own input and output.
fn program(name: &'static str, arguments: impl FnOnce(&mut ChildCommand)) -> Result<()> {
    let status = beside(name, arguments)?.status().with_context(|| format!("cannot start {name}"))?;
    ended(name, status, None)
}

fn beside(name: &'static str, arguments: impl FnOnce(&mut ChildCommand)) -> Result<ChildCommand> {
    let mut command = ChildCommand::new(process::sibling(name)?);
    arguments(&mut command);
    if std::env::var_os("LEARN_LOG").is_none() && std::env::var_os("RUST_LOG").is_none() {
        command.env("LEARN_LOG", "warn");
    }
    process::logs_alike(&mut command);
    system::end_with_parent(&mut command);
    Ok(command)
}

/// What a program's end means for this command; `error` is what it has said last, unless that stands above.
fn ended(name: &str, status: ExitStatus, error: Option<String>) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let end = format!("{name}: {}", process::describe(status));
    let message = match error {
        // what it has said last need not be what has ended it
        Some(error) if status.code().is_none() => format!("{end}; before that: {error}"),
        Some(error) => error,
        None => format!("{end}; its message stands above"),
    };
    Err(Failure::Child { code: status.code().unwrap_or(exit::FAILED), message }.into())
}

/// A process that does all the work itself must not be one of several tasks of a Slurm step.
fn refuse_tasks(command: &str) -> Result<()> {
    Variables::of_process().refuse_tasks(command).map_err(|error| Failure::Usage(error.to_string()).into())
}

/// Where the data of a run lie, which were compared with those that it was trained on.
fn dataset_of(run: &RunDir, args: &DatasetArgs) -> Result<PathBuf> {
    let mut config = runs::config(run)?;
    if let Some(dataset) = &args.dataset {
        config.data.dataset = std::path::absolute(dataset)?;
    }
    runs::dataset(run, &config).map(|dataset| dataset.dir().to_owned())
}

fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).display().to_string()
}

fn shown_run(run: &RunDir) -> String {
    shown(run.root())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn a_wrong_command_line_is_told_as_json_if_it_asks_for_that() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>().into_iter();
        assert!(asks_for_json(words(&["status", "r", "--jsn", "--json"])));
        assert!(!asks_for_json(words(&["status", "r", "--log-json", "--", "--json"])));
        let error = Cli::try_parse_from(["learn-launch", "status", "r", "--wach", "--json"]).unwrap_err();
        let text = refusal(&error);
        assert!(text.starts_with("unexpected argument '--wach'") && !text.contains('\u{1b}'), "{text}");
        assert_eq!(error.exit_code(), exit::USAGE);
        for asked in ["--help", "--version"] {
            assert_eq!(Cli::try_parse_from(["learn-launch", asked]).unwrap_err().exit_code(), exit::OK);
        }
    }
}
