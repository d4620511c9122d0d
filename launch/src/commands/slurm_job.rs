//! `learn-launch slurm-job`: what a batch script becomes on the first node of its job.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use learn_domain::run_dir::RunDir;

use crate::cli::{SettingsArgs, anchor};
use crate::failure::Failure;
use crate::output::Output;
use crate::settings::Resolver;
use crate::slurm::restarts::Budget;
use crate::slurm::run::{self, StartSpec, device, is_run};
use crate::slurm::{Allocation, Variables, bind};
use crate::{runs, system};

/// What says how many workers a job has.
const TASKS: &str = "SLURM_NTASKS";

pub const HELP: &str = "\
Examples (in a batch script):
  exec learn-launch slurm-job runs/shop -- srun --gpus-per-node=8 \\
      --kill-on-bad-exit=0 --no-kill --wait=0
  exec learn-launch slurm-job shop.toml --set training.epochs=5 \\
      -- srun --gpus-per-node=8 --kill-on-bad-exit=0 --no-kill --wait=0

Each worker takes the GPU of its own number among those of its machine; --gpus-per-task and --gpu-bind would hide its \
neighbours' from it, which breaks NCCL.

With a configuration it makes the run at its first start and goes on with it at later ones. SIGUSR1 (#SBATCH \
--signal=B:USR1@SECONDS) asks for a checkpoint and puts the job back into the queue; SIGTERM for a checkpoint alone. \
docs/slurm.md explains it.";

/// Arguments of `slurm-job`.
#[derive(Debug, Args)]
pub struct SlurmJobArgs {
    /// Directory of the run, or the configuration of one
    #[arg(value_name = "RUN_OR_CONFIG")]
    subject: PathBuf,
    /// Override one key of the configuration (repeatable); of a run that exists, one that `resume` may change
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Starts of the same job by Slurm after the first, before it is given up (exit code 9)
    #[arg(long, value_name = "N", default_value_t = Budget::RESTARTS)]
    max_restarts: u32,
    /// Starts in a row without a new checkpoint, before it is given up (exit code 9)
    #[arg(long, value_name = "N", default_value_t = Budget::FRUITLESS, value_parser = clap::value_parser!(u32).range(1..))]
    max_fruitless: u32,
    /// Keep a file with the job's targets for Prometheus (file_sd_configs) in this folder, JOB.json, while the job runs
    #[arg(long, value_name = "DIR")]
    prometheus_targets: Option<PathBuf>,
    /// The command that starts the workers: srun and its options
    #[arg(last = true, required = true, value_name = "SRUN")]
    srun: Vec<String>,
}

/// # Errors
/// Slurm's variables make no sense, or the job does not finish in this start.
pub fn run(args: &SlurmJobArgs, output: &Output) -> Result<()> {
    // Slurm may give notice at once: checkpoints are checked for minutes
    system::catch_stop_signals();
    let variables = Variables::of_process();
    let allocation = Allocation::read(&variables).map_err(|error| Failure::Usage(error.to_string()))?;
    let on_gpus = variables.has_gpus() || args.srun.iter().any(|option| asks_for_gpus(option));
    let run = if is_run(&args.subject) {
        RunDir::new(std::path::absolute(&args.subject)?)
    } else {
        of_config(args, &allocation, on_gpus, output)?
    };
    let budget = Budget { restarts: args.max_restarts, fruitless: args.max_fruitless };
    let targets = args.prometheus_targets.as_deref();
    let spec = StartSpec { run: &run, allocation: &allocation, srun: &args.srun, budget, targets };
    run::start(&spec, || apply(&run, &args.sets, &allocation, on_gpus), output)
}

/// An option of srun, for itself or with others of one letter before it.
fn asks_for_gpus(option: &str) -> bool {
    option.starts_with("--gpus") || option.starts_with("-G") || option.starts_with("--gres") && option.contains("gpu")
}

/// The run of a configuration: made at the first start.
fn of_config(args: &SlurmJobArgs, allocation: &Allocation, on_gpus: bool, output: &Output) -> Result<RunDir> {
    let settings = SettingsArgs { file: Some(args.subject.clone()), sets: args.sets.clone() };
    let resolver = settings.resolver()?.flag(TASKS, "cluster.workers", Some(allocation.tasks))?;
    let given = resolver.given();
    let mut config = resolver.finish()?;
    runs::find_init(&mut config)?;
    anchor(&mut config)?;
    let root = config.job.runs_dir.join(&config.job.name);
    if is_run(&root) {
        let run = RunDir::new(&root);
        if allocation.restarts == 0 && run::SlurmJob::of(&run).is_none() {
            let shown = root.display();
            let message = format!(
                "the run {shown} exists already, and no Slurm job has made it: give the new one another name with `--set \
                 job.name=NAME`, or continue the old one with `slurm-job {shown}`"
            );
            return Err(Failure::Usage(message).into());
        }
        return Ok(run);
    }
    config.cluster.device = device(config.cluster.device, on_gpus);
    super::train::check_ready(&config, &given, output)?;
    super::train::warn_of_warm_up(&config, output)?;
    runs::create(&root, &config)
}

/// Changes the configuration of a run that exists as `--set` says; what would make it another run is refused.
fn apply(run: &RunDir, sets: &[String], allocation: &Allocation, on_gpus: bool) -> Result<()> {
    let before = runs::config(run)?;
    let resolver = Resolver::new(&before).sets(sets)?;
    let keys: Vec<String> = resolver.changed().map(str::to_owned).collect();
    if keys.is_empty() {
        return Ok(());
    }
    let mut config = resolver.flag(TASKS, "cluster.workers", Some(allocation.tasks))?.finish()?;
    runs::find_init(&mut config)?;
    anchor(&mut config)?;
    config.cluster.device = device(config.cluster.device, on_gpus);
    let (old, new) = (serde_json::to_value(&before)?, serde_json::to_value(&config)?);
    let differs = |key: &&String| {
        let path = format!("/{}", key.replace('.', "/"));
        key.as_str() != "cluster.workers" && old.pointer(&path) != new.pointer(&path)
    };
    let mut differing = keys.iter().filter(differs).peekable();
    if differing.peek().is_none() {
        return Ok(());
    }
    super::resume::refuse_unchangeable(differing.map(String::as_str))?;
    if config.data.dataset != before.data.dataset {
        runs::dataset(run, &config)?;
    }
    bind::change(run, &config.cluster.bind)?;
    runs::write_config(&run.config(), &config)
}

#[cfg(test)]
mod tests {
    use learn_domain::Config;

    use super::*;

    fn sets(values: &[&str]) -> Vec<String> {
        values.iter().map(|&value| value.to_owned()).collect()
    }

    #[test]
    fn a_run_that_exists_takes_what_a_resume_may_change_and_refuses_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        anchor(&mut config).unwrap();
        config.cluster.device = device(config.cluster.device, false);
        // a new training would be refused
        config.training.init_partial = true;
        let run = runs::create(&folder.path().join("one"), &config).unwrap();
        let allocation = Allocation { job: 1, first: "a".into(), nodes: vec!["a".into()], tasks: 4, restarts: 1 };
        let apply = |values: &[&str]| apply(&run, &sets(values), &allocation, false);

        // as at the first start
        let same = format!("job.name={}", config.job.name);
        let dataset = format!("data.dataset={}", Config::default().data.dataset.display());
        apply(&[&same, &dataset, "cluster.device=auto"]).unwrap();
        assert_eq!(runs::config(&run).unwrap(), config, "nothing has changed");

        apply(&["training.epochs=77", "cluster.min_workers=4"]).unwrap();
        let changed = runs::config(&run).unwrap();
        assert_eq!((changed.training.epochs, changed.cluster.min_workers), (77, 4));
        let error = apply(&["job.seed=77"]).unwrap_err();
        assert!(error.to_string().contains("job.seed cannot change"), "{error}");
        assert!(apply(&["cluster.min_workers=5"]).unwrap_err().to_string().contains("at most cluster.workers"));
        assert_eq!(runs::config(&run).unwrap(), changed);
    }

    #[test]
    fn what_asks_srun_for_gpus_is_known() {
        for option in ["--gpus-per-node=8", "--gpus-per-task=1", "--gpus=8", "-G8", "--gres=gpu:2", "--gres=gpu"] {
            assert!(asks_for_gpus(option), "{option}");
        }
        for option in ["srun", "--gres=craynetwork:1", "--ntasks=4", "--cpus-per-task=2"] {
            assert!(!asks_for_gpus(option), "{option}");
        }
    }
}
