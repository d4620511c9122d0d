//! `learn-coordinator`: serves one job from its run directory, or its data alone; see the library.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::exit;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, Subcommand};
use learn_coordinator::bench::{self, BenchDataset, Client, Lengths, Shape};
use learn_coordinator::embedding::{EmbeddingCoordinator, Ended};
use learn_coordinator::replica::{self, ReplicaSettings};
use learn_coordinator::{CoordinatorError, Outcome, Settings, exit_code, run, take_over};
use learn_domain::config::RowFormat;
use learn_domain::report;
use learn_domain::report::Task;
use learn_domain::run_dir::RunDir;
use learn_proto::connect::Pass;
use learn_telemetry::stdio;
use tokio::signal::unix::{SignalKind, signal};

/// Serves one LEARN job: control and data (gRPC), metrics and status (HTTP); or an embed job: leases and status.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Arguments {
    #[command(subcommand)]
    beside: Option<Beside>,
    /// The run directory, with config.json and secret
    #[arg(long, value_name = "DIR", required = true)]
    run_dir: Option<PathBuf>,
    /// Another configuration than DIR/config.json; replaces it once it is being served
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What the workers are there for, like {"kind":"train","resume_from":null}
    #[arg(long, value_name = "JSON", value_parser = task, required_unless_present_any = ["embed", "take_over"])]
    task_json: Option<Task>,
    /// How often a scheduler has started this job again
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with_all = ["embed", "take_over"])]
    restarts: u32,
    /// Most workers that whoever starts them can start: a request for more is refused [default: no limit]
    #[arg(long, value_name = "N", value_parser = positive(), conflicts_with_all = ["embed", "take_over"])]
    most_workers: Option<u32>,
    /// Go on with the job of a coordinator of DIR that was killed: same task, same ports, where it was
    #[arg(long, conflicts_with_all = ["task_json", "config", "embed"])]
    take_over: bool,
    /// Do not compare every byte of the dataset with its checksum first: another process has just done so
    #[arg(long, conflicts_with_all = ["embed", "take_over"])]
    no_verify: bool,
    /// Serve an embed job instead: lease item ranges to `learn-embed` processes
    #[arg(long, conflicts_with_all = ["task_json", "config"])]
    embed: bool,
    /// Log lines as JSON
    #[arg(long, global = true)]
    log_json: bool,
}

/// What runs beside a job's coordinator.
#[derive(Debug, Subcommand)]
enum Beside {
    /// Serve a running job's data (batches, embedding rows) beside its coordinator, as long as the job runs
    Data(DataArguments),
    /// Measure the data path alone, on this machine, with the parts that a job uses
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Content embedding rows over loopback, from the service of a job to the client of a worker
    Flight(BenchFlight),
    /// Bytes that a worker receives for a user, over those of the published layout, which sends every position as f32
    Wire(BenchWire),
}

const BENCH_HELP: &str = "\
It serves the rows in this process and starts `learn-worker` beside it as the client. bench/pyarrow/flight.py does \
the same with pyarrow, in turn with this.

Examples:
  learn-launch bench flight --clients 4 --json
  learn-launch bench flight --streams 4
                        (one client, each request over four connections)";

#[derive(Debug, clap::Args)]
#[command(after_help = BENCH_HELP)]
struct BenchFlight {
    /// A dataset with content embeddings; one that does not exist is made there and stays [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    dataset: Option<PathBuf>,
    /// Items of a dataset that is made
    #[arg(long, value_name = "N", default_value_t = 32768, value_parser = positive())]
    items: u32,
    /// Values of its rows
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = positive())]
    dim: u32,
    /// Clients at once, as that many workers of one host
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive())]
    clients: u32,
    /// Connections of each client, which share its requests as those of a worker do (`cluster.row_streams`)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive())]
    streams: u32,
    /// Rows of a request, drawn from the whole catalogue
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = positive())]
    rows: u32,
    /// How long to measure
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    seconds: f64,
    /// The result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct BenchWire {
    /// A dataset with content embeddings; one that does not exist is made there and stays [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    dataset: Option<PathBuf>,
    /// Items that a dataset that is made draws from
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = positive())]
    items: u32,
    /// Its users; half of them have at most 7 interactions, 1 % 40 or more
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = positive())]
    users: u32,
    /// Its items are drawn with the weights 1, 1/2^S, 1/3^S, …
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    skew: f64,
    /// Values of a row
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = positive())]
    dim: u32,
    /// Users of a step
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive())]
    batch: u32,
    /// Share of the catalogue that the cache holds
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    cache: f64,
    /// Steps that fill the cache first
    #[arg(long, value_name = "N", default_value_t = 1000)]
    warm: u64,
    /// Steps that count
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// How rows travel, `data.row_format`: f16, or int8
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = row_format)]
    row_format: RowFormat,
    /// The result as JSON
    #[arg(long)]
    json: bool,
}

/// A value of `data.row_format`.
fn row_format(text: &str) -> Result<RowFormat, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

/// A count of at least one.
fn positive() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

impl BenchWire {
    fn dataset(&self) -> BenchDataset {
        let BenchWire { users, items, skew, dim, .. } = *self;
        BenchDataset {
            dir: self.dataset.clone(),
            shape: Shape { users, items, skew, lengths: Lengths::Shop, dim: dim as usize },
        }
    }

    fn client(&self) -> Client {
        let BenchWire { batch: users, cache, warm, steps, row_format, .. } = *self;
        Client::Wire { users, cache, warm, steps, row_format }
    }
}

impl BenchFlight {
    fn dataset(&self) -> BenchDataset {
        // the items come in turn, 20 a user
        let shape = Shape {
            users: self.items.div_ceil(20),
            items: self.items,
            skew: 0.0,
            lengths: Lengths::All(20),
            dim: self.dim as usize,
        };
        BenchDataset { dir: self.dataset.clone(), shape }
    }

    fn client(&self) -> Client {
        Client::Flight { clients: self.clients, streams: self.streams, rows: self.rows, seconds: self.seconds }
    }
}

const DATA_HELP: &str = "\
Start any number of them, at any time, on any machine that has the dataset. Workers find them within 15 seconds, \
spread over them, and go on with another one, or with the coordinator, when one ends or dies. The order and the \
numbers of the job do not depend on them. Another dataset than the job's is refused.

Examples:
  learn-coordinator data --run-dir runs/shop
  learn-coordinator data --coordinator http://node1:4100 --secret-file secret \\
    --dataset /local/shop --bind 0.0.0.0

Exit codes: 0 the job is over, or SIGTERM; 1 failed; 2 wrong flags.";

#[derive(Debug, clap::Args)]
#[command(after_help = DATA_HELP)]
struct DataArguments {
    /// The dataset directory, or a copy of it on this machine [default: the job's data.dataset]
    #[arg(long, value_name = "DIR")]
    dataset: Option<PathBuf>,
    /// The run directory, where the coordinator's address and the secret are read; or say --coordinator and --secret-file
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// http://HOST:PORT of the coordinator's gRPC; `grpc` of RUN/coordinator.json
    #[arg(long, value_name = "URL")]
    coordinator: Option<String>,
    /// A file with the job's secret, like RUN/secret
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Address to listen on; workers are told it, or the host's name for 0.0.0.0 [default: the job's cluster.bind]
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<String>,
    /// Port of the data service; 0 = any free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    grpc_port: u16,
    /// Port of /metrics and /healthz; 0 = any free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    http_port: u16,
    /// Do not compare every byte of the dataset with its checksum first: another process has just done so
    #[arg(long)]
    no_verify: bool,
}

impl DataArguments {
    fn names_a_job(&self) -> bool {
        self.run_dir.is_some() || self.coordinator.is_some() && self.secret_file.is_some()
    }

    fn settings(self) -> Result<ReplicaSettings, CoordinatorError> {
        // `parsed` sees to it that there is a run directory or all that it would say
        let run_dir = RunDir::new(self.run_dir.unwrap_or_default());
        let coordinator = match self.coordinator {
            Some(url) => url,
            None => replica::coordinator_of(&run_dir)?,
        };
        let secret_file = self.secret_file.unwrap_or_else(|| run_dir.secret());
        Ok(ReplicaSettings {
            dataset: self.dataset,
            coordinator,
            pass: Pass::read(&secret_file)?,
            bind: self.bind,
            grpc_port: self.grpc_port,
            http_port: self.http_port,
            verify: !self.no_verify,
        })
    }
}

fn task(text: &str) -> Result<Task, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// The command line. clap alone cannot say that there are two ways to name the job of a data server.
fn parsed(words: impl IntoIterator<Item = OsString>) -> Result<Arguments, clap::Error> {
    let arguments = Arguments::try_parse_from(words)?;
    if !matches!(&arguments.beside, Some(Beside::Data(data)) if !data.names_a_job()) {
        return Ok(arguments);
    }
    let mut command = Arguments::command();
    command.build();
    let own = command.find_subcommand("data").cloned();
    let why = "nothing says which job: name it by --run-dir DIR, or by --coordinator URL and --secret-file FILE";
    Err(own.unwrap_or(command).error(ErrorKind::MissingRequiredArgument, why))
}

fn main() {
    let arguments = parsed(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let role = match arguments.beside {
        Some(Beside::Data(_)) => "data",
        Some(Beside::Bench(_)) => "bench",
        None => "coordinator",
    };
    learn_telemetry::log::init(role, arguments.log_json);
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(serve(arguments)));
    exit(match result {
        Ok(code) => code,
        Err(error) => {
            stdio::say(format_args!("learn-coordinator: {error}"));
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
    match arguments.beside {
        Some(Beside::Data(data)) => {
            replica::serve(data.settings()?, shutdown).await?;
            return Ok(report::exit::OK);
        }
        Some(Beside::Bench(bench)) => {
            let (dataset, client, json) = match bench {
                Bench::Flight(flight) => (flight.dataset(), flight.client(), flight.json),
                Bench::Wire(wire) => (wire.dataset(), wire.client(), wire.json),
            };
            tokio::select! {
                printed = bench::measure(&dataset, &client, json) => {
                    stdio::print(&printed?)?;
                }
                () = shutdown => return Ok(report::exit::STOPPED),
            }
            return Ok(report::exit::OK);
        }
        None => {}
    }
    // clap sees to it that it is there
    let run_dir = arguments.run_dir.unwrap_or_default();
    if arguments.take_over {
        return Ok(said(&take_over(&run_dir, shutdown).await?));
    }
    // Without a task it is an embed job: clap sees to it.
    let Some(task) = arguments.task_json else {
        return Ok(match EmbeddingCoordinator::bind(&run_dir).await?.run(shutdown).await? {
            Ended::Finished => report::exit::OK,
            Ended::Stopped => report::exit::STOPPED,
            Ended::Failed(cause) => {
                stdio::say(format_args!("learn-coordinator: {cause}"));
                report::exit::FAILED
            }
        });
    };
    let settings = Settings::load(&run_dir, arguments.config, task).map_err(CoordinatorError::from)?;
    let settings = Settings {
        restarts: arguments.restarts,
        most_workers: arguments.most_workers,
        verify: !arguments.no_verify,
        ..settings
    };
    Ok(said(&run(settings, shutdown).await?))
}

/// Says why a job was stopped; the exit code.
fn said(outcome: &Outcome) -> i32 {
    if let Outcome::Stopped(cause) = outcome {
        stdio::say(format_args!("learn-coordinator: {cause}"));
    }
    exit_code(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_server_without_a_job_hears_of_both_ways_to_name_it() {
        let parse = |words: &[&str]| parsed(["learn-coordinator", "data"].iter().chain(words).map(OsString::from));
        let cases: [&[&str]; 3] = [&[], &["--coordinator", "http://h:1"], &["--secret-file", "s"]];
        for words in cases {
            let error = parse(words).unwrap_err();
            assert_eq!(error.exit_code(), report::exit::USAGE);
            let text = error.to_string();
            assert!(text.contains("--run-dir DIR, or by --coordinator URL and --secret-file FILE"), "{text}");
        }
        parse(&["--run-dir", "runs/shop"]).unwrap();
        parse(&["--coordinator", "http://h:1", "--secret-file", "s"]).unwrap();
    }
}
