//! The repository's own tasks: set-up, the quickstart, the tests, what CI runs, the chaos run, the archive, fuzzing,
//! the benchmarks and the GPU check.
//!
//! Depends on little, so that the first command on a new machine starts soon; in particular on no other crate of the
//! workspace and never on libtorch, which `setup` brings.

mod bench;
mod chaos;
mod ci;
mod dist;
mod files;
mod fuzz;
mod gpu_check;
#[cfg(test)]
mod left_out;
mod process;
mod progress;
mod python;
mod quickstart;
mod report;
mod setup;
mod system;
mod test;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::process::StepFailed;
use crate::workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of this repository", version)]
struct Arguments {
    /// Root of the repository to work in; default: the one this was built from.
    #[arg(long, global = true)]
    root: Option<PathBuf>,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Bring what building and the quickstart need: libtorch, MovieLens-100K, the MiniLM encoder.
    Setup(setup::Options),
    /// From nothing to a model trained on MovieLens-100K by a coordinator and two workers.
    Quickstart(quickstart::Options),
    /// Format, lint, and pass all tests.
    Test(test::Options),
    /// Tests against real programs of a cluster: Slurm, Prometheus, a browser.
    System(system::Options),
    /// What CI runs: the tests, those against real programs, the quickstart for one epoch, then `dist --check`.
    Ci,
    /// Disturb a real job with kills, pauses, broken connections and full disks, and check that nothing is lost.
    Chaos(chaos::Options),
    /// Pack binaries, configurations, documentation and an installer of libtorch for machines without a toolchain.
    Dist(dist::Options),
    /// Measure our parts beside PyTorch, in turns on this machine; writes bench/results and docs/benchmarks.md.
    Bench(bench::Options),
    /// Fuzz every parser of what comes from outside.
    Fuzz(fuzz::Options),
    /// Pack what checks the CUDA path on a machine with an NVIDIA GPU and PyTorch, without network or toolchain.
    GpuCheck(gpu_check::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = Workspace::locate(arguments.root).and_then(|workspace| match arguments.task {
        Task::Setup(options) => setup::run(&workspace, &options),
        Task::Quickstart(options) => quickstart::run(&workspace, &options),
        Task::Test(options) => test::run(&workspace, &options),
        Task::System(options) => system::run(&workspace, &options),
        Task::Ci => ci::run(&workspace),
        Task::Chaos(options) => chaos::run(&workspace, &options),
        Task::Dist(options) => dist::run(&workspace, &options),
        Task::Bench(options) => bench::run(&workspace, &options),
        Task::Fuzz(options) => fuzz::run(&workspace, &options),
        Task::GpuCheck(options) => gpu_check::run(&workspace, &options),
    });
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    let code = error.downcast_ref::<StepFailed>().map_or(1, |failed| failed.code);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
