//! `learn-launch eval`: full ranking of a checkpoint on a split, with its own coordinator and workers.
//!
//! It works in a directory of its own inside the run (`eval/…`), so the run's status, metrics and summary stay as the
//! training left them, and a run that is training can be evaluated too.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use learn_domain::Config;
use learn_domain::config::ClusterConfig;
use learn_domain::report::{Split, Task};

use crate::cli::{DatasetArgs, RunArgs, anchor};
use crate::failure::Failure;
use crate::job::{self, JobSpec};
use crate::output::Output;
use crate::settings::Resolver;
use crate::{render, runs};

use super::doctor;
use super::resume::{checkpoints, choose, is_among, listed, path_text};

pub const HELP: &str = "\
Examples:
  learn-launch eval runs/quickstart
  learn-launch eval quickstart --split valid --checkpoint last --workers 4
  learn-launch eval quickstart --segments --set evaluation.segments.cold_items=5
  learn-launch eval quickstart --set evaluation.exclude_history=true --json

Keys that --set may change: evaluation.*, cluster.*, data.*, training.{threads, precision} (an evaluation does not read \
the others, or takes them as the checkpoint was trained). summary.json of the run is not touched; logs and status of the evaluation are in RUN/eval.";

/// Keys, and sections (ending in a dot), that an evaluation reads and a checkpoint leaves open.
const READ: [&str; 5] = ["evaluation.", "cluster.", "data.", "training.threads", "training.precision"];

/// Arguments of `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    data: DatasetArgs,
    /// Which held-out part
    #[arg(long, value_enum, default_value_t = SplitArg::Test)]
    split: SplitArg,
    /// Checkpoint: `best`, `last` or a name like step-0000000200 [default: best, else last]
    #[arg(long, value_name = "NAME")]
    checkpoint: Option<String>,
    /// Workers [default: as the run]
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Show the segments too: rare and popular items, new and active users, with 95 % intervals
    #[arg(long)]
    segments: bool,
    /// Override one of the keys below for this evaluation, for example --set evaluation.cutoffs=[20] (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// A split as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SplitArg {
    Valid,
    Test,
}

impl From<SplitArg> for Split {
    fn from(split: SplitArg) -> Self {
        match split {
            SplitArg::Valid => Self::Valid,
            SplitArg::Test => Self::Test,
        }
    }
}

/// # Errors
/// There is no such run or checkpoint, or the evaluation fails.
pub fn run(args: &EvalArgs, output: &Output) -> Result<()> {
    super::refuse_tasks("eval")?;
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    let resolver = Resolver::new(&at_rest(runs::config(&run)?)).sets(&args.sets)?;
    refuse_unread(resolver.changed())?;
    let mut config = resolver
        .flag("--dataset", "data.dataset", args.data.dataset.as_ref())?
        .flag("--workers", "cluster.workers", args.workers)?
        .finish()?;
    anchor(&mut config)?;
    let dataset = runs::dataset(&run, &config)?;
    super::train::suits(&dataset, &config)?;
    doctor::refuse_lacks(&config, true)?;
    let all = checkpoints(&run)?;
    let wanted = match &args.checkpoint {
        Some(name) => Some(name.as_str()),
        None => all.iter().any(|checkpoint| checkpoint.best).then_some("best"),
    };
    let checkpoint = choose(&all, wanted, &super::shown_run(&run))?;
    let split = Split::from(args.split);
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let root = run.root().join("eval").join(format!("{split}-step-{:010}-{seconds}", checkpoint.step.0));
    config.job.name = format!("{}-eval", config.job.name);
    let own = runs::create(&root, &config)?;
    let claim = runs::claim(&own)?;
    let task = Task::Evaluate { checkpoint: path_text(&checkpoint.path)?, split };
    let config_file = own.config();
    output.note(&format!(
        "{}: evaluating step {} on the {split} split with {}; logs in {}",
        super::shown_run(&run),
        checkpoint.step,
        render::workers(config.cluster.workers as usize),
        super::shown(&own.logs())
    ));
    let spec = JobSpec::local(&own, &config_file, &config, &task);
    let status = job::run(&spec, claim, output)?;
    let evaluation = status.evaluations.last().context("the job ended without an evaluation")?;
    output.result(&render::evaluated(evaluation, args.segments), evaluation)
}

/// The configuration of a run without what holds for its training alone.
fn at_rest(mut trained: Config) -> Config {
    let cluster = &mut trained.cluster;
    // the training's is perhaps one of another machine, and here nobody comes from elsewhere
    cluster.bind = ClusterConfig::default().bind;
    // ports that are fixed for the training may be in use by it
    (cluster.grpc_port, cluster.http_port) = (0, 0);
    // whoever is left evaluates alone what the others do not
    cluster.min_workers = 1;
    // no checkpoint is chosen here, so any cutoffs will do: these are valid with them all
    (trained.checkpoint.keep_best, trained.checkpoint.metric) = (false, "mrr".into());
    trained
}

/// # Errors
/// An evaluation would not look at a key, or not find what the checkpoint holds.
fn refuse_unread<'a>(mut keys: impl Iterator<Item = &'a str>) -> Result<()> {
    match keys.find(|key| !is_among(&READ, key)) {
        None => Ok(()),
        Some(key) => Err(Failure::Usage(format!(
            "{key} cannot be set for an evaluation, which does not read it or takes it as the checkpoint was trained; it may \
             set {}",
            listed(&READ)
        ))
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_evaluation_reads_can_be_set() {
        let check = |key: &str| refuse_unread(std::iter::once(key));
        for key in ["evaluation.cutoffs", "cluster.device", "data.row_format", "training.precision"] {
            check(key).unwrap();
        }
        for key in
            ["training.epochs", "job.name", "embed.model", "model.layers", "checkpoint.metric", "sampling.history"]
        {
            let error = check(key).unwrap_err();
            assert_eq!(crate::failure::exit_code(&error), learn_domain::report::exit::USAGE);
            let text = error.to_string();
            assert!(text.starts_with(key) && text.contains("evaluation.*, cluster.*"), "{text}");
        }
        for key in READ {
            let section = key.trim_end_matches('.');
            let catalogue = crate::settings::Catalogue::of_config();
            assert!(catalogue.key(section).is_some() || catalogue.section(section).is_some(), "{key}");
            assert!(HELP.contains(section.trim_start_matches("training.")), "{key} is not in the help");
        }
    }

    #[test]
    fn what_holds_for_the_training_alone_is_left_behind() {
        let mut trained = Config::default();
        trained.cluster.bind = "203.0.113.7".into();
        (trained.cluster.grpc_port, trained.cluster.min_workers) = (4100, 2);
        let rest = at_rest(trained);
        assert_eq!(rest.cluster, ClusterConfig::default());
        assert_eq!((rest.checkpoint.keep_best, rest.checkpoint.metric.as_str()), (false, "mrr"));
    }
}
