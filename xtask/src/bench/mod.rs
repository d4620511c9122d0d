//! `cargo xtask bench`: our parts beside PyTorch, in turns on this machine, and the tables of docs/benchmarks.md.
//!
//! Input: parts and flags. Output: a file of `bench/results` for each part, and the page's tables, which are made from
//! all files that lie there. Ratios and tables are pure ([`results`], [`page`]); [`machine`] is what the page says of the
//! hardware; one file per part.

mod collective;
mod data;
mod gpu;
mod loss;
pub mod machine;
mod memory;
mod page;
mod results;
mod step;
mod turns;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::workspace::Workspace;
use crate::{process, quickstart, setup};

const HELP: &str = "\
Examples:
  cargo xtask bench                        # all parts; an hour on two cores
  cargo xtask bench step --rounds 3
  cargo xtask bench step --precision f32   # on processors without bf16 products
  cargo xtask bench step --device cuda --batch 1024
  cargo xtask bench --tables               # the page of the results there are
  cargo xtask bench --gpu-check OUT_DIR/gpu-check.json
                                           # what gpu-check measured elsewhere

Nothing else should run meanwhile. The first run brings PyTorch and what else is compared with into .deps/bench (5 GB).";

/// Gives the loopback of a network of its own a rate, and runs a program there: rate, program, its arguments.
const ON_LINK: &str = "set -e; rate=$1; shift; ip link set lo up; \
     tc qdisc add dev lo root tbf rate \"$rate\" burst 4mb latency 50ms; exec \"$@\"";

#[derive(Args)]
#[command(after_help = HELP)]
pub struct Options {
    /// What to measure [default: all]
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// How often each is measured, in turns with what it is compared with
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Steps of a turn
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Threads of one operation; 0 = one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[arg(long, default_value = "cpu", value_parser = ["cpu", "cuda"])]
    device: String,
    /// Batches of the part `step`
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128])]
    batch: Vec<u32>,
    /// Number formats of the part `step`; one of them alone has a file and a table of its own
    #[arg(long, value_delimiter = ',', default_values = step::PRECISIONS, value_parser = step::PRECISIONS)]
    precision: Vec<String>,
    /// History lengths: amazon, or a file with a JSON array
    #[arg(long, default_value = "amazon")]
    lengths: String,
    /// Let the ranks of the part `reduction`, where they use sockets, share a link of this rate, such as 8gbit (Linux;
    /// needs `unshare`, `ip` and `tc`); has a file and a table of its own
    #[arg(long, value_name = "RATE")]
    link: Option<String>,
    /// The folder that results are written to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Measure nothing; write the tables from the results that are there
    #[arg(long)]
    tables: bool,
    /// Measure nothing; take what `gpu-check` has measured on a machine with a GPU
    #[arg(long, value_name = "FILE", conflicts_with_all = ["parts", "tables"])]
    gpu_check: Option<PathBuf>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// A training step beside bench/pytorch/padded.py and packed.py
    Step,
    /// InfoNCE: time, and memory against the full matrix
    Loss,
    /// Collectives between processes, beside gloo
    Collective,
    /// What all-reduce adds to a step of four workers
    Reduction,
    /// What a step loses while a checkpoint is written
    Checkpoint,
    /// Memory and start of a worker
    Memory,
    /// Content embedding rows over Arrow Flight beside pyarrow's C++
    Flight,
    /// Bytes that a worker receives
    Wire,
    /// `prepare` beside Polars
    Prepare,
    /// `embed` beside sentence-transformers
    Embed,
}

/// Where things are for a measurement.
struct Bench<'a> {
    workspace: &'a Workspace,
    options: &'a Options,
    threads: usize,
    /// A Python that has PyTorch.
    python: PathBuf,
}

/// # Errors
/// If something cannot be built, brought, run or written.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let folder = options.out.clone().unwrap_or_else(|| workspace.root().join("bench").join("results"));
    if let Some(report) = &options.gpu_check {
        let path = gpu::results(report)?.write(&folder)?;
        eprintln!("wrote {}", workspace.shown(&path));
    } else if !options.tables {
        setup::run(workspace, &setup::Options::default())?;
        quickstart::build(workspace)?;
        let python = setup::bench_python(workspace)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if options.threads == 0 { cores } else { options.threads };
        let bench = Bench { workspace, options, threads, python };
        let all = Part::value_variants();
        for &part in if options.parts.is_empty() { all } else { options.parts.as_slice() } {
            eprintln!("bench {}: {} rounds", name(part), options.rounds);
            let results = bench.measure(part)?;
            let path = results.write(&folder)?;
            eprintln!("wrote {}", workspace.shown(&path));
        }
    }
    let page = workspace.root().join("docs").join("benchmarks.md");
    if options.out.is_none() {
        page::update(&page, &folder)?;
        println!("docs/benchmarks.md has the tables of {}", workspace.shown(&folder));
    } else {
        print!("{}", page::tables(&results::read_all(&folder)?));
    }
    Ok(())
}

fn name(part: Part) -> String {
    part.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

impl Bench<'_> {
    fn measure(&self, part: Part) -> Result<results::Results> {
        match part {
            Part::Step => step::beside_pytorch(self),
            Part::Reduction => step::reduction(self),
            Part::Checkpoint => step::checkpoint(self),
            Part::Loss => loss::run(self),
            Part::Collective => collective::run(self),
            Part::Memory => memory::run(self),
            Part::Flight => data::flight(self),
            Part::Wire => data::wire(self),
            Part::Prepare => data::prepare(self),
            Part::Embed => data::embed(self),
        }
    }

    /// Runs `learn-worker bench` with these words and reads its JSON.
    fn ours(&self, words: &[&str]) -> Result<Value> {
        self.ours_by(Command::new(self.workspace.binary("learn-worker")), words)
    }

    /// The same where all that goes by sockets shares a link of the rate that was asked for, if any was.
    fn ours_on_link(&self, words: &[&str]) -> Result<Value> {
        let Some(rate) = &self.options.link else { return self.ours(words) };
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "sh", "-c", ON_LINK, "sh", rate]);
        command.arg(self.workspace.binary("learn-worker"));
        self.ours_by(command, words)
    }

    fn ours_by(&self, mut command: Command, words: &[&str]) -> Result<Value> {
        json("learn-worker bench", command.arg("bench").args(words).arg("--json"))
    }

    /// Runs a script of `bench/pytorch` and reads its JSON.
    fn script(&self, name: &str, words: &[&str]) -> Result<Value> {
        parsed(name, &self.output(name, &[words, &["--json"]].concat())?)
    }

    /// What a script of `bench/pytorch` prints.
    fn output(&self, name: &str, words: &[&str]) -> Result<String> {
        let script = self.workspace.root().join("bench").join("pytorch").join(name);
        process::output(name, Command::new(&self.python).arg("-B").arg(script).args(words))
    }

    /// The command that measures a part again, with the flags that the part reads.
    fn command(&self, part: Part) -> String {
        let Options { rounds, repetitions, .. } = self.options;
        let mut command = format!("cargo xtask bench {}", name(part));
        if part != Part::Wire {
            command.push_str(&format!(" --rounds {rounds}"));
        }
        if matches!(part, Part::Step | Part::Collective | Part::Reduction | Part::Checkpoint) {
            command.push_str(&format!(" --repetitions {repetitions}"));
        }
        if matches!(part, Part::Step | Part::Loss | Part::Checkpoint | Part::Memory | Part::Embed) {
            command.push_str(&format!(" --threads {}", self.threads));
        }
        if self.options.device != "cpu" {
            command.push_str(&format!(" --device {}", self.options.device));
        }
        if let Some(rate) = self.options.link.as_ref().filter(|_| part == Part::Reduction) {
            command.push_str(&format!(" --link {rate}"));
        }
        if part == Part::Step {
            let batches: Vec<String> = self.options.batch.iter().map(u32::to_string).collect();
            command.push_str(&format!(" --batch {}", batches.join(",")));
            if let Some(precision) = step::single(self.options) {
                command.push_str(&format!(" --precision {precision}"));
            }
            if self.options.lengths != "amazon" {
                command.push_str(" --lengths FILE");
            }
        }
        command
    }
}

/// The JSON that a program prints.
fn json(step: &str, command: &mut Command) -> Result<Value> {
    parsed(step, &process::output(step, command)?)
}

fn parsed(step: &str, text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("{step} printed no JSON: {text}"))
}

/// A number of a program's JSON, `a.b.c`.
fn number(value: &Value, path: &str) -> Result<f64> {
    let found = path.split('.').try_fold(value, |value, key| value.get(key));
    found.and_then(Value::as_f64).with_context(|| format!("there is no number {path} in {value}"))
}
