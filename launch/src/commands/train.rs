//! `learn-launch train`: a new run with one coordinator and its workers on this machine.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use learn_dataset::{Dataset, Unsuitable};
use learn_domain::config::{SplitPolicy, TrainingConfig};
use learn_domain::plan::{Plan, PlanKey};
use learn_domain::report::{Summary, Task};
use learn_domain::run_dir::RunDir;
use learn_domain::{Config, schedule};

use crate::cli::{SettingsArgs, anchor};
use crate::crew;
use crate::failure::Failure;
use crate::job::{self, JobSpec, Workers};
use crate::output::Output;
use crate::settings::{Given, SettingsError};
use crate::{made_from, process, render, runs};

use super::doctor;

pub const HELP: &str = "\
Examples:
  learn-launch train configs/quickstart.toml
  learn-launch train configs/quickstart.toml --name wide --set model.hidden=256
  learn-launch train configs/quickstart.toml --workers 4 --device cuda
  LEARN__TRAINING__EPOCHS=3 learn-launch train configs/quickstart.toml
  learn-launch train configs/quickstart.toml --name tuned --init quickstart
  learn-launch train shop.toml --no-workers --set cluster.bind=10.0.0.7 \\
      --set cluster.grpc_port=4100

The run directory is job.runs_dir/job.name. Ctrl-C (or SIGTERM) stops after the current step with a checkpoint; a \
second one kills.";

/// Arguments of `train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Name of the run (job.name)
    #[arg(long)]
    name: Option<String>,
    /// Workers of the job (cluster.workers)
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Epochs (training.epochs)
    #[arg(long, value_name = "N")]
    epochs: Option<u32>,
    /// Where tensors live (cluster.device)
    #[arg(long, value_parser = ["auto", "cpu", "cuda"])]
    device: Option<String>,
    /// Start with the weights of this run (its directory or name) or .safetensors file (training.init)
    #[arg(long, value_name = "RUN_OR_FILE")]
    init: Option<PathBuf>,
    /// Take what fits of --init and start the rest anew (training.init_partial)
    #[arg(long)]
    init_partial: bool,
    /// Move an existing run of that name aside (nothing is deleted)
    #[arg(long)]
    force: bool,
    /// Start the coordinator alone: workers come from elsewhere, by `learn-worker join`
    #[arg(long)]
    no_workers: bool,
    /// Only check everything and say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// # Errors
/// The configuration, the dataset or the installation is not ready, the run exists, or the job does not finish.
pub fn run(args: &TrainArgs, output: &Output) -> Result<()> {
    super::refuse_tasks("train")?;
    let resolver = args
        .settings
        .resolver()?
        .flag("--name", "job.name", args.name.as_ref())?
        .flag("--workers", "cluster.workers", args.workers)?
        .flag("--epochs", "training.epochs", args.epochs)?
        .flag("--device", "cluster.device", args.device.as_ref())?
        .flag("--init", "training.init", args.init.as_ref())?
        .flag("--init-partial", "training.init_partial", args.init_partial.then_some(true))?;
    let given = resolver.given();
    let mut config = resolver.finish()?;
    runs::find_init(&mut config)?;
    anchor(&mut config)?;
    check_ready(&config, &given, output)?;
    doctor::refuse_lacks(&config, !args.no_workers)?;
    warn_of_warm_up(&config, output)?;
    let root = config.job.runs_dir.join(&config.job.name);
    if args.dry_run {
        runs::refuse_new(&root, &config, args.force)?;
        return describe(&root, &config, output);
    }
    if args.force
        && let Some(aside) = runs::move_aside(&root)?
    {
        output.note(&format!("the run that was there is now {}", super::shown(&aside)));
    }
    let run = runs::create(&root, &config)?;
    let claim = runs::claim(&run)?;
    let threads = match args.no_workers {
        true => String::new(),
        false => format!(" with {} threads each", crew::threads_per_worker(&config, config.cluster.workers)),
    };
    output.note(&format!(
        "{}: {} workers{threads}; logs in {}",
        super::shown(&root),
        config.cluster.workers,
        super::shown(&run.logs())
    ));
    let task = Task::Train { resume_from: None };
    let workers = Workers::unless(args.no_workers);
    let config_file = run.config();
    let spec = JobSpec { workers, ..JobSpec::local(&run, &config_file, &config, &task) };
    job::run(&spec, claim, output)?;
    report(&run, output)
}

/// Everything that can be known to fail before a run directory is made; `given`: what of the configuration somebody has set.
pub(super) fn check_ready(config: &Config, given: &Given, output: &Output) -> Result<()> {
    config.validate_start().map_err(|error| SettingsError::of(given.origin(error.key), error))?;
    runs::refuse_file(&config.data.dataset)?;
    let dataset = Dataset::open(&config.data.dataset)?;
    suits(&dataset, config)?;
    made_from::refuse(&dataset, config, given)?;
    // the coordinator holds it for as long as the job is
    drop(dataset.hold()?);
    refuse_metric(&config.checkpoint.metric, dataset.manifest().split.policy)?;
    for binary in ["learn-coordinator", "learn-worker"] {
        process::sibling(binary)?;
    }
    if config.training.init.is_some() {
        let json = serde_json::to_string(config)?;
        super::worker(output, |command| {
            command.args(["check-init", "--config-json", &json]);
        })?;
    }
    Ok(())
}

/// Says so if the training ends before its warm-up does.
pub(super) fn warn_of_warm_up(config: &Config, output: &Output) -> Result<()> {
    let total = config.training.total_steps(steps_per_epoch(config)?);
    if let Some(warning) = schedule::endless_warm_up(&config.optimizer, total) {
        output.note(&format!("warning: {warning}"));
    }
    Ok(())
}

fn steps_per_epoch(config: &Config) -> Result<u64> {
    let facts = Dataset::open(&config.data.dataset)?.facts();
    Ok(Plan::new(PlanKey::of(config, &facts))?.steps_per_epoch())
}

/// How long a training is, and what says so.
fn length(training: &TrainingConfig, steps_per_epoch: u64) -> String {
    let total = training.total_steps(steps_per_epoch);
    let steps = if total == 1 { "1 step".into() } else { format!("{} steps", render::count(total)) };
    match training.epochs {
        epochs if total < u64::from(epochs) * steps_per_epoch => format!("{steps} (training.max_steps)"),
        1 => format!("{steps} (1 epoch)"),
        epochs => format!("{steps} ({epochs} epochs)"),
    }
}

/// # Errors
/// Dataset and configuration do not go together.
pub(super) fn suits(dataset: &Dataset, config: &Config) -> Result<()> {
    dataset.suits(config).map_err(|unsuitable| match unsuitable {
        Unsuitable::Dataset(error) => error.into(),
        unsuitable if unsuitable.is_usage() => Failure::Usage(unsuitable.to_string()).into(),
        unsuitable => unsuitable.into(),
    })
}

/// An AUC within users needs one with held-out exposures of both kinds, and leave-one-out holds one exposure out for each.
fn refuse_metric(metric: &str, split: SplitPolicy) -> Result<()> {
    if split == SplitPolicy::LeaveOneOut && ["cvr.uauc", "cvr.wuauc"].contains(&metric) {
        return Err(Failure::Usage(format!(
            "checkpoint.metric is {metric}, which compares exposures of one user, but the dataset's split is leave-one-out, with \
             one held-out exposure for each: set checkpoint.metric=cvr.auc, or prepare it again with prepare.split=by-time"
        ))
        .into());
    }
    Ok(())
}

fn describe(root: &Path, config: &Config, output: &Output) -> Result<()> {
    let (exists, per_epoch) = (root.exists(), steps_per_epoch(config)?);
    let text = format!(
        "would train {} in {} with {} ({} threads each) on {}\n{}",
        length(&config.training, per_epoch),
        super::shown(root),
        render::workers(config.cluster.workers as usize),
        crew::threads_per_worker(config, config.cluster.workers),
        super::shown(&config.data.dataset),
        if exists { "the run that is there would be moved aside (--force)" } else { "nothing is in the way" },
    );
    let mut json = serde_json::to_value(config)?;
    let steps = config.training.total_steps(per_epoch);
    json["run"] = serde_json::json!({ "directory": root.to_string_lossy(), "exists": exists, "steps": steps });
    output.result(&text, &json)
}

/// Shows the summary of a finished job and where everything lies.
///
/// # Errors
/// There is no summary.
pub fn report(run: &RunDir, output: &Output) -> Result<()> {
    let summary: Summary = runs::read_json(&run.summary())?;
    let shown = super::shown_run(run);
    let best = run.checkpoint(summary.best_step);
    let text = format!(
        "\n{}\nsummary      {}\nbest weights {}\nlogs         {}\n\nnext: learn-launch export {shown} --out export\n      \
         learn-launch recommend {shown} --users ID,ID -k 10",
        render::summary(&summary),
        super::shown(&run.summary()),
        super::shown(&best),
        super::shown(&run.logs()),
    );
    let mut json = serde_json::to_value(&summary)?;
    for (name, path) in [("run", run.root().to_owned()), ("best_checkpoint", best), ("logs", run.logs())] {
        json[name] = path.to_string_lossy().into();
    }
    output.result(&text, &json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_is_as_long_as_what_ends_it_first() {
        let told = |epochs, max_steps| length(&TrainingConfig { epochs, max_steps, ..TrainingConfig::default() }, 20);
        assert_eq!(told(120, 0), "2,400 steps (120 epochs)");
        assert_eq!(told(120, 5), "5 steps (training.max_steps)");
        assert_eq!(told(120, 1), "1 step (training.max_steps)");
        assert_eq!(told(1, 20), "20 steps (1 epoch)");
        assert_eq!(told(2, 50), "40 steps (2 epochs)");
    }

    #[test]
    fn a_metric_that_cannot_come_is_refused() {
        for metric in ["cvr.uauc", "cvr.wuauc"] {
            let text = refuse_metric(metric, SplitPolicy::LeaveOneOut).unwrap_err().to_string();
            assert!(text.contains(metric) && text.contains("checkpoint.metric=cvr.auc"), "{text}");
            refuse_metric(metric, SplitPolicy::ByTime).unwrap();
        }
        for metric in ["cvr.auc", "ndcg@10"] {
            refuse_metric(metric, SplitPolicy::LeaveOneOut).unwrap();
        }
    }
}
