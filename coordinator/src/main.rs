//! `learn-coordinator`: serves one job from its run directory; see the library.

use std::path::PathBuf;
use std::process::exit;

use clap::Parser;
use learn_coordinator::embedding::{EmbeddingCoordinator, Ended};
use learn_coordinator::{CoordinatorError, Outcome, Settings, exit_code, run, take_over};
use learn_domain::report;
use learn_domain::report::Task;
use tokio::signal::unix::{SignalKind, signal};

/// Serves one LEARN job: control and data (gRPC), metrics and status (HTTP); or an embed job: leases and status.
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
    #[arg(long, value_name = "JSON", value_parser = task, required_unless_present_any = ["embed", "take_over"])]
    task_json: Option<Task>,
    /// Go on with the job of a coordinator of DIR that was killed: same task, same ports, where it was
    #[arg(long, conflicts_with_all = ["task_json", "config", "embed"])]
    take_over: bool,
    /// Serve an embed job instead: lease item ranges to `learn-embed` processes
    #[arg(long, conflicts_with_all = ["task_json", "config"])]
    embed: bool,
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
        Ok(code) => code,
        Err(error) => {
            eprintln!("learn-coordinator: {error}");
            error.downcast_ref::<CoordinatorError>().map_or(report::exit::FAILED, CoordinatorError::exit_code)
        }
    });
}

/// Serves until the job has ended; the exit code that says how.
async fn serve(arguments: Arguments) -> anyhow::Result<i32> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut notice = signal(SignalKind::user_defined1())?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = notice.recv() => {}
        }
    };
    if arguments.take_over {
        return Ok(said(&take_over(&arguments.run_dir, shutdown).await?));
    }
    // Without a task it is an embed job: clap sees to it.
    let Some(task) = arguments.task_json else {
        return Ok(match EmbeddingCoordinator::bind(&arguments.run_dir).await?.run(shutdown).await? {
            Ended::Finished => report::exit::OK,
            Ended::Stopped => report::exit::STOPPED,
            Ended::Failed(cause) => {
                eprintln!("learn-coordinator: {cause}");
                report::exit::FAILED
            }
        });
    };
    let settings = Settings::load(&arguments.run_dir, arguments.config, task).map_err(CoordinatorError::from)?;
    Ok(said(&run(settings, shutdown).await?))
}

/// Says why a job was stopped; the exit code.
fn said(outcome: &Outcome) -> i32 {
    if let Outcome::Stopped(cause) = outcome {
        eprintln!("learn-coordinator: {cause}");
    }
    exit_code(outcome)
}
