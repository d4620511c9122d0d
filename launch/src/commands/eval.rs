//! `learn-launch eval`: full ranking of a checkpoint on a split, with its own coordinator and workers.
//!
//! It works in a directory of its own inside the run (`eval/…`), so the run's status, metrics and summary stay as the
//! training left them, and a run that is training can be evaluated too.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use learn_domain::config::ClusterConfig;
use learn_domain::report::{Split, Task};

use crate::cli::{DatasetArgs, RunArgs, anchor};
use crate::job::{self, JobSpec};
use crate::output::Output;
use crate::settings::Resolver;
use crate::{render, runs};

use super::doctor;
use super::resume::{checkpoints, choose, path_text};

pub const HELP: &str = "\
Examples:
  learn-launch eval runs/quickstart
  learn-launch eval quickstart --split valid --checkpoint last --workers 4
  learn-launch eval quickstart --segments --set evaluation.segments.cold_items=5
  learn-launch eval quickstart --set evaluation.exclude_history=true --json

summary.json of the run is not touched; logs and status of the evaluation are in RUN/eval.";

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
    /// Override one key for this evaluation, for example --set evaluation.cutoffs=[20] (repeatable)
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
    let mut trained = runs::config(&run)?;
    // the training's is perhaps one of another machine, and here nobody comes from elsewhere
    trained.cluster.bind = ClusterConfig::default().bind;
    let mut config = Resolver::new(&trained)
        .sets(&args.sets)?
        .flag("--dataset", "data.dataset", args.data.dataset.as_ref())?
        .flag("--workers", "cluster.workers", args.workers)?
        // whoever is left evaluates alone what the others do not
        .flag("--workers", "cluster.min_workers", Some(1))?
        // no checkpoint is chosen here, so any cutoffs will do: these are valid with them all
        .flag("eval", "checkpoint.keep_best", Some(false))?
        .flag("eval", "checkpoint.metric", Some("mrr"))?
        .finish()?;
    anchor(&mut config)?;
    let dataset = runs::dataset(&run, &config)?;
    super::train::suits(&dataset, &config)?;
    // Ports that are fixed for the training may be in use by it.
    (config.cluster.grpc_port, config.cluster.http_port) = (0, 0);
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
