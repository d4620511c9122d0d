//! `learn-launch slurm-task`: one task of a Slurm job's step; started by `slurm-job`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;

use crate::runs;
use crate::slurm::Variables;
use crate::slurm::task::{self, TaskSpec};

/// Arguments of `slurm-task`.
#[derive(Debug, Args)]
pub struct SlurmTaskArgs {
    /// Directory of the run
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// `http://HOST:PORT` of the coordinator's control and data
    #[arg(long, value_name = "URL")]
    coordinator: String,
    /// `http://HOST:PORT` of the coordinator's status
    #[arg(long, value_name = "URL")]
    status: String,
    /// Name of the coordinator's machine
    #[arg(long, value_name = "NAME")]
    first_host: String,
}

/// # Errors
/// Slurm's variables make no sense, or the worker fails and the job does not go on.
pub fn run(args: &SlurmTaskArgs) -> Result<()> {
    let run = RunDir::new(&args.run);
    let config = runs::config(&run)?;
    let coordinator = CoordinatorAddress {
        pid: 0,
        host: args.first_host.clone(),
        grpc: args.coordinator.clone(),
        http: args.status.clone(),
        incarnation: String::new(),
    };
    task::run(&TaskSpec { run: &run, config: &config, coordinator: &coordinator }, &Variables::of_process())
}
