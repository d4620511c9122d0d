//! `learn-launch slurm`: writes a batch script for a new run, or takes that of an existing one, and submits it.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use learn_domain::report::JobState;
use learn_domain::run_dir::RunDir;

use crate::cli::{SettingsArgs, anchor};
use crate::failure::Failure;
use crate::output::Output;
use crate::runs;
use crate::settings::Resolver;
use crate::slurm::client::{self, Queued};
use crate::slurm::queue::refuse_queued;
use crate::slurm::run::{SlurmJob, device};
use crate::slurm::script::{Place, Request, script};

pub const HELP: &str = "\
Examples:
  learn-launch slurm shop.toml --nodes 2 --gpus-per-node 8 --time 12:00:00 --partition train --dry-run
  learn-launch slurm shop.toml --nodes 2 --gpus-per-node 8 --cpus-per-task 12 --time 12:00:00 --account learn
  learn-launch slurm shop.toml --nodes 2 --tasks-per-node 4 --cpus-per-task 8     (on the CPU)
  learn-launch slurm --resubmit runs/shop --time 2-00:00:00

The run directory, the dataset and these programs must be on storage that all machines see under the same path. The job
goes back into the queue before its time limit, with a checkpoint, until it is done. `learn-launch status`, `logs` and
`stop` find the job by its run. docs/slurm.md has the rest, configs/slurm scripts to start from.";

/// Arguments of `slurm`.
#[derive(Debug, Args)]
pub struct SlurmArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Submit an existing run again: it goes on from its last checkpoint. Options that are not given are those of before
    #[arg(long, value_name = "RUN", conflicts_with_all = ["file", "name", "force"])]
    resubmit: Option<PathBuf>,
    /// Name of the run (job.name)
    #[arg(long)]
    name: Option<String>,
    /// Move an existing run of that name aside (nothing is deleted)
    #[arg(long)]
    force: bool,
    /// Print the script, and neither make a run nor submit it
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    request: Request,
}

/// # Errors
/// The configuration or the dataset is not ready, the request contradicts itself, or Slurm refuses it.
pub fn run(args: &SlurmArgs, output: &Output) -> Result<()> {
    match &args.resubmit {
        Some(run) => resubmit(args, run, output),
        None => submit_new(args, output),
    }
}

fn submit_new(args: &SlurmArgs, output: &Output) -> Result<()> {
    let request = &args.request;
    let mut config = args
        .settings
        .resolver()?
        .flag("--name", "job.name", args.name.as_ref())?
        .flag("--nodes and workers of each", "cluster.workers", Some(request.workers()))?
        .finish()?;
    runs::find_init(&mut config)?;
    anchor(&mut config)?;
    config.cluster.device = device(config.cluster.device, request.on_gpus());
    super::train::check_ready(&config)?;
    let root = config.job.runs_dir.join(&config.job.name);
    let run = RunDir::new(&root);
    let text = write(request, &run, &config)?;
    if args.dry_run {
        return output.result(&text, &serde_json::json!({ "script": text, "run": root }));
    }
    if args.force
        && let Some(aside) = runs::move_aside(&root)?
    {
        output.note(&format!("the run that was there is now {}", super::shown(&aside)));
    }
    let run = runs::create(&root, &config)?;
    let submitted = keep(&run, request, &text).and_then(|script| submit(&run, &script, output));
    if submitted.is_err() {
        // nothing has come of it but what was written a moment ago
        std::fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    submitted
}

fn resubmit(args: &SlurmArgs, named: &std::path::Path, output: &Output) -> Result<()> {
    let runs_dir = args.settings.resolver()?.finish()?.job.runs_dir;
    let run = runs::find(named, &runs_dir)?;
    let shown = super::shown_run(&run);
    runs::refuse_live(&run)?;
    refuse_queued(&run)?;
    if runs::last_status(&run)?.is_some_and(|status| status.state == JobState::Finished) {
        let message = format!("{shown} has finished; `learn-launch resume {shown} --set training.epochs=N` trains on");
        return Err(Failure::Usage(message).into());
    }
    let before = runs::config(&run)?;
    let resolver = Resolver::new(&before).sets(&args.settings.sets)?;
    super::resume::refuse_unchangeable(resolver.changed())?;
    let mut config = resolver.finish()?;
    let earlier: Option<Request> = runs::read_json(&request_file(&run)).ok();
    let Some(request) = earlier.map(|earlier| args.request.clone().over(earlier)).or_else(|| {
        // a run that was not one of Slurm's so far
        args.request.nodes.is_some().then(|| args.request.clone())
    }) else {
        let message = format!("{shown} was not submitted by `learn-launch slurm`: say --nodes and --gpus-per-node");
        return Err(Failure::Usage(message).into());
    };
    config.cluster.workers = request.workers();
    config.cluster.min_workers = config.cluster.min_workers.min(config.cluster.workers);
    let text = write(&request, &run, &config)?;
    if args.dry_run {
        return output.result(&text, &serde_json::json!({ "script": text, "run": run.root() }));
    }
    runs::keep_bind(&run, &config.cluster.bind)?;
    runs::write_config(&run.config(), &config)?;
    let script = keep(&run, &request, &text)?;
    submit(&run, &script, output)
}

fn write(request: &Request, run: &RunDir, config: &learn_domain::Config) -> Result<String> {
    let launch = std::env::current_exe().context("cannot find the path of learn-launch")?;
    let place = Place {
        name: &config.job.name,
        run: run.root(),
        dataset: &config.data.dataset,
        launch: &launch,
        log: &run.slurm_log(),
        stop_within: config.cluster.stop_within(),
    };
    script(request, &place).map_err(|error| Failure::Usage(error.to_string()).into())
}

fn request_file(run: &RunDir) -> PathBuf {
    run.slurm().join("request.json")
}

/// Keeps the script and the request in the run directory.
fn keep(run: &RunDir, request: &Request, text: &str) -> Result<PathBuf> {
    let script = run.slurm().join("job.sbatch");
    std::fs::create_dir_all(run.slurm())
        .and_then(|()| std::fs::write(&script, text))
        .and_then(|()| std::fs::write(request_file(run), serde_json::to_vec_pretty(request).unwrap_or_default()))
        .with_context(|| format!("cannot write {}", script.display()))?;
    Ok(script)
}

fn submit(run: &RunDir, script: &std::path::Path, output: &Output) -> Result<()> {
    let job_id = client::submit(script)?;
    SlurmJob { job_id }.write(run)?;
    let shown = super::shown_run(run);
    let state = client::queued(job_id).ok().flatten();
    let now = state.as_ref().map_or_else(|| format!("job {job_id}"), Queued::describe);
    let text = format!(
        "{shown}: {now}\nscript  {}\nlog     {}\n\nnext: learn-launch status {shown}\n      learn-launch logs {shown} --follow\n      \
         learn-launch stop {shown}",
        super::shown(script),
        super::shown(&run.slurm_log())
    );
    output.result(&text, &serde_json::json!({ "job_id": job_id, "run": run.root(), "script": script, "queue": state }))
}
