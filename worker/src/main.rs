//! `learn-worker`: started by `learn-launch` (or a cluster's scheduler), rarely by hand.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use learn_domain::config::{ByteSize, Config, DeviceKind, ItemTower, Precision};
use learn_domain::report::{Split, exit};
use learn_domain::run_dir::RunDir;
use learn_worker::bench::{BenchSettings, bench_step};
use learn_worker::error::WorkerError;
use learn_worker::export::{ExportSettings, export};
use learn_worker::recommend::{RecommendSettings, recommend, table};
use learn_worker::session::{JoinSettings, join};
use learn_worker::{checkpoint, doctor, init};

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
        /// Write the CVR head's features of the pairs of this split, too.
        #[arg(long, value_enum)]
        cvr_features: Option<SplitName>,
        #[arg(long)]
        json: bool,
    },
    /// Print the best items for users.
    Recommend {
        /// Run directory.
        #[arg(long)]
        run: PathBuf,
        /// User ids of the original data, separated by commas.
        #[arg(long, value_delimiter = ',', required = true)]
        users: Vec<String>,
        /// Items per user.
        #[arg(short, long, default_value_t = 10)]
        k: usize,
        /// `best`, `last` or a directory name; the best by default.
        #[arg(long)]
        checkpoint: Option<String>,
        /// Recommend items that the user already had, too.
        #[arg(long)]
        with_history: bool,
        #[arg(long)]
        json: bool,
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
    /// Measure a training step on synthetic data.
    BenchStep(BenchArgs),
}

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    Auto,
    Cpu,
    Cuda,
}

impl From<Device> for DeviceKind {
    fn from(device: Device) -> Self {
        match device {
            Device::Auto => Self::Auto,
            Device::Cpu => Self::Cpu,
            Device::Cuda => Self::Cuda,
        }
    }
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

#[derive(Clone, Copy, ValueEnum)]
enum Tower {
    Causal,
    PerItem,
    Content,
}

impl From<Tower> for ItemTower {
    fn from(tower: Tower) -> Self {
        match tower {
            Tower::Causal => Self::Causal,
            Tower::PerItem => Self::PerItem,
            Tower::Content => Self::Content,
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
struct BenchArgs {
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[arg(long, default_value_t = 4)]
    layers: u32,
    #[arg(long, default_value_t = 768)]
    hidden: u32,
    #[arg(long, default_value_t = 12)]
    heads: u32,
    /// Dimension of the content embeddings.
    #[arg(long, default_value_t = 4096)]
    input_dim: u32,
    #[arg(long, default_value_t = 64)]
    output_dim: u32,
    /// Users of a step.
    #[arg(long, default_value_t = 64)]
    batch: u32,
    #[arg(long, default_value_t = 0)]
    micro_batch: u32,
    #[arg(long, default_value_t = 40)]
    history: u32,
    #[arg(long, default_value_t = 20)]
    targets: u32,
    /// JSON array of history lengths, which users take in turn; default: uniform in 1..=HISTORY.
    #[arg(long, value_name = "FILE")]
    lengths: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "per-item")]
    item_tower: Tower,
    #[arg(long, default_value_t = 100_000)]
    items: u32,
    /// bf16 matrix products.
    #[arg(long)]
    bf16: bool,
    #[arg(long, default_value_t = 5)]
    repetitions: u32,
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
        Command::Export { run, out, checkpoint, cvr_features, json } => {
            let cvr_features = cvr_features.map(Split::from);
            let exported = export(&ExportSettings { run, out, checkpoint, cvr_features })?;
            if json {
                print_json(&exported)?;
            } else {
                println!(
                    "exported {} items and {} users of dimension {} (step {}) to {}",
                    exported.items,
                    exported.users,
                    exported.dim,
                    exported.step,
                    exported.out.display()
                );
            }
        }
        Command::Recommend { run, users, k, checkpoint, with_history, json } => {
            let lists = recommend(&RecommendSettings { run, checkpoint, users, k, with_history })?;
            if json { print_json(&lists)? } else { print!("{}", table(&lists)) }
        }
        Command::Checkpoints { run, json } => {
            let listed = checkpoint::list(&RunDir::new(run))?;
            if json {
                print_json(&listed)?;
            } else {
                for one in &listed {
                    let mark = if one.best { "best" } else { "" };
                    println!("{:<60} {mark:<5} {}", one.path.display(), one.reason.as_deref().unwrap_or("valid"));
                }
            }
        }
        Command::CheckInit { config_json } => {
            let config: Config =
                serde_json::from_str(&config_json).map_err(|error| WorkerError::Usage(error.to_string()))?;
            if let Some((origin, used)) = init::check(&config)? {
                eprintln!("starts with {}: {used}", origin.path.display());
            }
        }
        Command::Doctor { json } => {
            let facts = doctor::facts();
            if json { print_json(&facts)? } else { println!("{facts:#?}") }
        }
        Command::BenchStep(args) => {
            let json = args.json;
            let result = bench_step(&bench_settings(&args)?)?;
            if json { print_json(&result)? } else { println!("{result:#?}") }
        }
    }
    Ok(exit::OK)
}

fn bench_settings(args: &BenchArgs) -> Result<BenchSettings, WorkerError> {
    if args.threads > 0 {
        learn_torch::set_threads(args.threads);
    }
    let mut config = Config::default();
    config.model.layers = args.layers;
    config.model.hidden = args.hidden;
    config.model.heads = args.heads;
    config.model.output_dim = args.output_dim;
    config.model.item_tower = args.item_tower.into();
    config.sampling.history = args.history;
    config.sampling.targets = args.targets;
    config.training.global_batch = args.batch;
    config.training.micro_batch = args.micro_batch;
    config.training.precision = if args.bf16 { Precision::Bf16 } else { Precision::F32 };
    config.cluster.row_cache = ByteSize(0);
    config.validate().map_err(|error| WorkerError::Usage(error.to_string()))?;
    let device = learn_torch::device(args.device.into(), 0)?;
    let lengths = match &args.lengths {
        Some(file) => {
            let usage = |problem: String| WorkerError::Usage(format!("{}: {problem}", file.display()));
            let text = std::fs::read_to_string(file).map_err(|error| usage(error.to_string()))?;
            let lengths: Vec<u32> = serde_json::from_str(&text).map_err(|error| usage(error.to_string()))?;
            if lengths.is_empty() || lengths.contains(&0) {
                return Err(usage("must be a JSON array of history lengths of at least 1".into()));
            }
            lengths
        }
        None => Vec::new(),
    };
    let (input_dim, items, repetitions) = (args.input_dim, args.items, args.repetitions);
    Ok(BenchSettings { config, input_dim, items, lengths, repetitions, device })
}

fn print_json(value: &impl serde::Serialize) -> Result<(), WorkerError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| WorkerError::Usage(error.to_string()))?;
    println!("{text}");
    Ok(())
}
