//! `learn-launch slurm-job`: what a batch script becomes on the first node of its job.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use learn_domain::run_dir::RunDir;

use crate::cli::{SettingsArgs, anchor};
use crate::failure::Failure;
use crate::output::Output;
use crate::runs;
use crate::slurm::restarts::Budget;
use crate::slurm::run::{self, StartSpec, device, is_run};
use crate::slurm::{Allocation, Variables};

pub const HELP: &str = "\
Examples (in a batch script):
  exec learn-launch slurm-job runs/shop -- srun --gpus-per-task=1 --kill-on-bad-exit=0 --no-kill
  exec learn-launch slurm-job shop.toml --set training.epochs=5 -- srun --gpus-per-task=1 --kill-on-bad-exit=0 --no-kill

With a configuration it makes the run at its first start and goes on with it at later ones. SIGUSR1 (#SBATCH
--signal=B:USR1@SECONDS) asks for a checkpoint and puts the job back into the queue; SIGTERM for a checkpoint alone.
docs/slurm.md explains it.";

/// Arguments of `slurm-job`.
#[derive(Debug, Args)]
pub struct SlurmJobArgs {
    /// Directory of the run, or the configuration of one
    #[arg(value_name = "RUN_OR_CONFIG")]
    subject: PathBuf,
    /// Override one key of the configuration (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Starts of the same job by Slurm after the first, before it is given up (exit code 9)
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_restarts: u32,
    /// Starts in a row without a new checkpoint, before it is given up (exit code 9)
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    max_fruitless: u32,
    /// The command that starts the workers: srun and its options
    #[arg(last = true, required = true, value_name = "SRUN")]
    srun: Vec<String>,
}

/// # Errors
/// Slurm's variables make no sense, or the job does not finish in this start.
pub fn run(args: &SlurmJobArgs, output: &Output) -> Result<()> {
    let allocation = Allocation::read(&Variables::of_process()).map_err(|error| Failure::Usage(error.to_string()))?;
    let run = if is_run(&args.subject) {
        RunDir::new(std::path::absolute(&args.subject)?)
    } else {
        of_config(args, &allocation)?
    };
    let budget = Budget { restarts: args.max_restarts, fruitless: args.max_fruitless };
    run::start(&StartSpec { run: &run, allocation: &allocation, srun: &args.srun, budget }, output)
}

/// The run of a configuration: made at the first start.
fn of_config(args: &SlurmJobArgs, allocation: &Allocation) -> Result<RunDir> {
    let settings = SettingsArgs { file: Some(args.subject.clone()), sets: args.sets.clone() };
    let mut config = settings.resolver()?.flag("SLURM_NTASKS", "cluster.workers", Some(allocation.tasks))?.finish()?;
    runs::find_init(&mut config)?;
    anchor(&mut config)?;
    let root = config.job.runs_dir.join(&config.job.name);
    if is_run(&root) {
        if allocation.restarts == 0 && run::SlurmJob::of(&RunDir::new(&root)).is_none() {
            let shown = root.display();
            let message = format!(
                "the run {shown} exists already, and no Slurm job has made it: give the new one another name with `--set \
                 job.name=NAME`, or continue the old one with `slurm-job {shown}`"
            );
            return Err(Failure::Usage(message).into());
        }
        return Ok(RunDir::new(root));
    }
    let on_gpus = args.srun.iter().any(|option| option.starts_with("--gpus") || option.starts_with("--gres"));
    config.cluster.device = device(config.cluster.device, on_gpus);
    super::train::check_ready(&config)?;
    runs::create(&root, &config)
}
