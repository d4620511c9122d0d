//! `learn-worker`: started by `learn-launch` (or a cluster's scheduler), rarely by hand.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use learn_dataset::Progress;
use learn_domain::config::Config;
use learn_domain::report::{Split, exit};
use learn_domain::run_dir::RunDir;
use learn_telemetry::stdio;
use learn_worker::bench::arguments::Device;
use learn_worker::error::WorkerError;
use learn_worker::export::{ExportSettings, export};
use learn_worker::feed::bench::{FlightBenchSettings, WireBenchSettings, bench_flight, bench_wire};
use learn_worker::progress::Lines;
use learn_worker::recommend::{RecommendSettings, recommend, table};
use learn_worker::session::{JoinSettings, join};
use learn_worker::{bench, checkpoint, doctor, init};

#[derive(Parser)]
#[command(name = "learn-worker", version, about = "Trains, evaluates and exports the towers of a LEARN job")]
struct Cli {
    /// Log lines as JSON.
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Take part in a job until its coordinator says otherwise.
    Join(JoinArgs),
    /// Write embeddings and weights for other systems.
    Export {
        /// Run directory.
        #[arg(long)]
        run: PathBuf,
        /// New directory for the output.
        #[arg(long)]
        out: PathBuf,
        /// `best`, `last` or a directory name; the best by default.
        #[arg(long)]
        checkpoint: Option<String>,
        /// Where the run's data lie now, if not where its configuration says.
        #[arg(long)]
        dataset: Option<PathBuf>,
        /// Write the CVR head's features of the pairs of this split, too.
        #[arg(long, value_enum)]
        cvr_features: Option<SplitName>,
        #[arg(long)]
        json: bool,
        /// Progress as JSON lines on stderr.
        #[arg(long)]
        progress_json: bool,
    },
    /// Print the best items for users.
    Recommend {
        /// Run directory.
        #[arg(long)]
        run: PathBuf,
        /// The id of a user in the original data; once for each user.
        #[arg(long = "user", value_name = "ID", required = true)]
        users: Vec<String>,
        /// Items per user.
        #[arg(short, long, default_value_t = 10)]
        k: usize,
        /// `best`, `last` or a directory name; the best by default.
        #[arg(long)]
        checkpoint: Option<String>,
        /// Where the run's data lie now, if not where its configuration says.
        #[arg(long)]
        dataset: Option<PathBuf>,
        /// Recommend items that the user already had, too.
        #[arg(long)]
        with_history: bool,
        #[arg(long)]
        json: bool,
        /// Progress as JSON lines on stderr.
        #[arg(long)]
        progress_json: bool,
    },
    /// List the checkpoints of a run, each checked.
    Checkpoints {
        /// Run directory.
        #[arg(long)]
        run: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Say what a training would take from `training.init`.
    CheckInit {
        /// The configuration as JSON.
        #[arg(long)]
        config_json: String,
    },
    /// Print what libtorch, CUDA and NCCL say.
    Doctor {
        #[arg(long)]
        json: bool,
    },
    /// Measure one part alone, on made-up data.
    Bench {
        #[command(subcommand)]
        part: bench::Part,
    },
    /// Measure how fast a data service sends rows; `learn-coordinator bench flight` starts this.
    BenchFlight(BenchFlightArgs),
    /// Measure how many bytes a user takes; `learn-coordinator bench wire` starts this.
    BenchWire(BenchWireArgs),
}

#[derive(Clone, Copy, ValueEnum)]
enum SplitName {
    Valid,
    Test,
}

impl From<SplitName> for Split {
    fn from(split: SplitName) -> Self {
        match split {
            SplitName::Valid => Self::Valid,
            SplitName::Test => Self::Test,
        }
    }
}

#[derive(Args)]
struct JoinArgs {
    /// `http://HOST:PORT` of the coordinator.
    #[arg(long)]
    coordinator: String,
    /// File with the job's secret.
    #[arg(long)]
    secret_file: PathBuf,
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
    /// Number of the GPU among the visible ones.
    #[arg(long, default_value_t = 0)]
    ordinal: usize,
    /// Threads of tensor operations; 0 = libtorch's choice.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Address that the collective and the metrics listen on.
    #[arg(long, default_value = "127.0.0.1")]
    bind: String,
}

#[derive(Args)]
struct BenchFlightArgs {
    /// `http://HOST:PORT` of the data service.
    #[arg(long, value_name = "URL")]
    location: String,
    /// File with the service's secret.
    #[arg(long, value_name = "FILE")]
    secret_file: PathBuf,
    /// Items of the catalogue.
    #[arg(long)]
    items: u32,
    /// Values of a row.
    #[arg(long)]
    dim: usize,
    /// Clients at once, each with connections of its own.
    #[arg(long, default_value_t = 1)]
    clients: usize,
    /// Connections of each client, which share its requests.
    #[arg(long, default_value_t = 1)]
    streams: u32,
    /// Rows of a request.
    #[arg(long, default_value_t = 1024)]
    rows: usize,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct BenchWireArgs {
    /// `http://HOST:PORT` of the data service.
    #[arg(long, value_name = "URL")]
    location: String,
    /// File with the service's secret.
    #[arg(long, value_name = "FILE")]
    secret_file: PathBuf,
    /// The job's configuration.
    #[arg(long, value_name = "JSON")]
    config_json: String,
    /// Items of the catalogue.
    #[arg(long)]
    items: u32,
    /// Values of a row.
    #[arg(long)]
    dim: usize,
    /// Steps before those that count.
    #[arg(long)]
    warm: u64,
    #[arg(long)]
    steps: u64,
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    learn_telemetry::log::init("worker", cli.log_json);
    learn_torch::keep_freed_memory();
    let code = run(cli.command).unwrap_or_else(|error| {
        tracing::error!("{error}");
        error.exit_code()
    });
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn run(command: Command) -> Result<i32, WorkerError> {
    match command {
        Command::Join(args) => {
            return join(&JoinSettings {
                coordinator: args.coordinator,
                secret_file: args.secret_file,
                device: args.device.into(),
                ordinal: args.ordinal,
                threads: args.threads,
                bind: args.bind,
            });
        }
        Command::Export { run, out, checkpoint, dataset, cvr_features, json, progress_json } => {
            let cvr_features = cvr_features.map(Split::from);
            let settings = ExportSettings { run, out, checkpoint, dataset, cvr_features };
            let exported = export(&settings, &*progress(progress_json))?;
            if json {
                print_json(&exported)?;
            } else {
                print(&format!("{exported}\n"))?;
            }
        }
        Command::Recommend { run, users, k, checkpoint, dataset, with_history, json, progress_json } => {
            let settings = RecommendSettings { run, checkpoint, dataset, users, k, with_history };
            let lists = recommend(&settings, &*progress(progress_json))?;
            if json { print_json(&lists)? } else { print(&table(&lists))? }
        }
        Command::Checkpoints { run, json } => {
            let listed = checkpoint::list(&RunDir::new(run))?;
            if json {
                print_json(&listed)?;
            } else {
                let line = |one: &checkpoint::Listed| {
                    let mark = if one.best { "best" } else { "" };
                    format!("{:<60} {mark:<5} {}\n", one.path.display(), one.reason.as_deref().unwrap_or("valid"))
                };
                print(&listed.iter().map(line).collect::<String>())?;
            }
        }
        Command::CheckInit { config_json } => {
            let config: Config =
                serde_json::from_str(&config_json).map_err(|error| WorkerError::Usage(error.to_string()))?;
            if let Some((origin, used)) = init::check(&config)? {
                stdio::say(format_args!("starts with {}: {used}", origin.path.display()));
            }
        }
        Command::Doctor { json } => {
            let facts = doctor::facts();
            if json { print_json(&facts)? } else { print(&format!("{facts:#?}\n"))? }
        }
        Command::Bench { part } => part.run()?,
        Command::BenchFlight(args) => {
            let span = std::time::Duration::try_from_secs_f64(args.seconds)
                .map_err(|error| WorkerError::Usage(format!("--seconds {}: {error}", args.seconds)))?;
            let BenchFlightArgs { location, secret_file, items, dim, clients, streams, rows, seconds: _, json } = args;
            let settings = FlightBenchSettings { location, secret_file, items, dim, clients, streams, rows, span };
            let result = bench_flight(&settings)?;
            if json { print_json(&result)? } else { print(&format!("{result}\n"))? }
        }
        Command::BenchWire(args) => {
            let BenchWireArgs { location, secret_file, config_json, items, dim, warm, steps, json } = args;
            let config = serde_json::from_str(&config_json).map_err(|error| WorkerError::Usage(error.to_string()))?;
            let settings = WireBenchSettings { location, secret_file, config, items, dim, warm, steps };
            let result = bench_wire(&settings)?;
            if json { print_json(&result)? } else { print(&format!("{result}\n"))? }
        }
    }
    Ok(exit::OK)
}

fn progress(in_lines: bool) -> Box<dyn Progress> {
    if in_lines { Box::new(Lines::on_stderr()) } else { Box::new(()) }
}

fn print_json(value: &impl serde::Serialize) -> Result<(), WorkerError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| WorkerError::Defect(format!("the result as JSON: {error}")))?;
    print(&format!("{text}\n"))
}

/// That nobody reads it any more is no error.
fn print(text: &str) -> Result<(), WorkerError> {
    stdio::print(text).map(drop).map_err(WorkerError::Stdout)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_result_that_cannot_be_printed_is_no_wrong_usage() {
        // JSON has no such keys
        let error = print_json(&BTreeMap::from([((1, 2), 3)])).unwrap_err();
        assert_eq!(error.exit_code(), exit::FAILED, "{error}");
    }
}
