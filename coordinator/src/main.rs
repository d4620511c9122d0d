//! `learn-coordinator`: serves one job from its run directory; see the library.

use std::path::PathBuf;
use std::process::exit;

use clap::Parser;
use learn_coordinator::{CoordinatorError, Outcome, Settings, exit_code, run};
use learn_domain::report;
use learn_domain::report::Task;
use tokio::signal::unix::{SignalKind, signal};

/// Serves one LEARN job: control and data (gRPC), metrics and status (HTTP).
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The run directory, with config.json and secret
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
    /// Another configuration than DIR/config.json; replaces it once it is being served
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What the workers are there for, like {"kind":"train","resume_from":null}
    #[arg(long, value_name = "JSON", value_parser = task)]
    task_json: Task,
    /// Log lines as JSON
    #[arg(long)]
    log_json: bool,
}

fn task(text: &str) -> Result<Task, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

fn main() {
    let arguments = Arguments::parse();
    learn_telemetry::log::init("coordinator", arguments.log_json);
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(serve(arguments)));
    exit(match result {
        Ok(outcome) => {
            if let Outcome::Stopped(cause) = &outcome {
                eprintln!("learn-coordinator: {cause}");
            }
            exit_code(&outcome)
        }
        Err(error) => {
            eprintln!("learn-coordinator: {error}");
            error.downcast_ref::<CoordinatorError>().map_or(report::exit::FAILED, CoordinatorError::exit_code)
        }
    });
}

async fn serve(arguments: Arguments) -> anyhow::Result<Outcome> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let settings =
        Settings::load(&arguments.run_dir, arguments.config, arguments.task_json).map_err(CoordinatorError::from)?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(run(settings, shutdown).await?)
}
