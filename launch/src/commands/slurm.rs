//! `learn-launch slurm`: writes a batch script for a new run, or takes that of an existing one, and submits it.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use learn_domain::report::JobState;
use learn_domain::run_dir::RunDir;

use crate::cli::{SettingsArgs, anchor};
use crate::failure::Failure;
use crate::output::Output;
use crate::settings::Resolver;
use crate::slurm::bind;
use crate::slurm::client::{self, Queued};
use crate::slurm::queue::refuse_queued;
use crate::slurm::run::{SlurmJob, device};
use crate::slurm::script::{Place, Request, ScriptError, job_name, script};
use crate::slurm::size;
use crate::{runs, tls};

pub const HELP: &str = "\
Examples:
  learn-launch slurm shop.toml --nodes 2 --gpus-per-node 8 --time 12:00:00 \\
      --partition train --dry-run
  learn-launch slurm shop.toml --nodes 2 --gpus-per-node 8 --cpus-per-task 12 \\
      --time 12:00:00 --account learn
  learn-launch slurm shop.toml --nodes 2 --tasks-per-node 4 --cpus-per-task 8
                        (on the CPU)
  learn-launch slurm --resubmit runs/shop --time 2-00:00:00

The run directory, the dataset and these programs must be on storage that all machines see under the same path. The \
job goes back into the queue before its time limit, with a checkpoint, until it is done. `learn-launch status`, \
`logs` and `stop` find the job by its run. docs/slurm.md has the rest, configs/slurm scripts to start from.";

/// What says how many workers a job has.
const WORKERS: &str = "--nodes and workers of each";

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
    let mut request = args.request.clone();
    if let Some(folder) = &mut request.prometheus_targets {
        // the job may run, or be submitted again, from another folder
        *folder = std::path::absolute(&folder)?;
        if !folder.is_dir() {
            let message = format!("{}: there is no such folder (--prometheus-targets)", folder.display());
            return Err(Failure::Usage(message).into());
        }
    }
    match &args.resubmit {
        Some(run) => resubmit(args, request, run, output),
        None => submit_new(args, &request, output),
    }
}

fn submit_new(args: &SlurmArgs, request: &Request, output: &Output) -> Result<()> {
    let resolver = args.settings.resolver()?.flag("--name", "job.name", args.name.as_ref())?;
    let note = check_size(request, &resolver)?;
    let resolver = resolver.flag(WORKERS, "cluster.workers", Some(request.workers()))?;
    let given = resolver.given();
    let mut config = resolver.finish()?;
    request.refuse_idle_gpus(config.cluster.device).map_err(usage)?;
    runs::find_init(&mut config)?;
    anchor(&mut config)?;
    config.cluster.device = device(config.cluster.device, request.on_gpus());
    super::train::check_ready(&config, &given, output)?;
    if let Some(note) = note {
        output.note(&note);
    }
    super::train::warn_of_warm_up(&config, output)?;
    let root = config.job.runs_dir.join(&config.job.name);
    let run = RunDir::new(&root);
    let text = write(request, &run, &config)?;
    if args.dry_run {
        runs::refuse_new(&root, &config, args.force)?;
        return show(request, &text, &root, output);
    }
    let aside = if args.force { runs::move_aside(&root)? } else { None };
    if let Some(aside) = &aside {
        output.note(&format!("the run that was there is now {}", super::shown(aside)));
    }
    let run = runs::create(&root, &config)?;
    let submitted = keep(&run, request, &text).and_then(|script| submit(&run, &script));
    let job = submitted.or_else(|error| {
        if !nothing_submitted(&error) {
            return Err(error);
        }
        // nothing has come of it but what was written a moment ago
        std::fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
        if let Some(aside) = aside {
            std::fs::rename(&aside, &root)
                .with_context(|| format!("cannot move {} back to {}", aside.display(), root.display()))?;
            output.note(&format!("the run that was there is {} again", super::shown(&root)));
        }
        Err(error)
    })?;
    say(&run, job, request, output)
}

fn resubmit(args: &SlurmArgs, request: Request, named: &Path, output: &Output) -> Result<()> {
    let run = runs::find(named, &crate::cli::runs_dir())?;
    let shown = super::shown_run(&run);
    let claim = runs::claim(&run)?;
    refuse_queued(&run)?;
    let last = runs::last_status(&run)?;
    if last.as_ref().is_some_and(|status| status.state == JobState::Finished) {
        let message = format!("{shown} has finished; `learn-launch resume {shown} --set training.epochs=N` trains on");
        return Err(Failure::Usage(message).into());
    }
    let before = runs::config(&run)?;
    let resolver = Resolver::new(&before).sets(&args.settings.sets)?;
    super::resume::refuse_unchangeable(resolver.changed())?;
    let earlier: Option<Request> = runs::read_json(&request_file(&run)).ok();
    let request = match earlier {
        Some(earlier) => Some(request.over(earlier)),
        // a run that was not one of Slurm's so far
        None => Some(request).filter(|request| request.nodes.is_some()),
    };
    let Some(request) = request else {
        let message = format!("{shown} was not submitted by `learn-launch slurm`: say --nodes and --gpus-per-node");
        return Err(Failure::Usage(message).into());
    };
    check_size(&request, &resolver)?;
    let mut config = resolver.flag(WORKERS, "cluster.workers", Some(request.workers()))?.finish()?;
    request.refuse_idle_gpus(config.cluster.device).map_err(usage)?;
    anchor(&mut config)?;
    if config.data.dataset != before.data.dataset {
        runs::dataset(&run, &config)?;
    }
    tls::check(&config.cluster.tls)?;
    if let Some((status, step)) = last.as_ref().and_then(|status| Some((status, status.last_checkpoint?))) {
        super::resume::refuse_less_than_done(&config.training, step, status.steps_per_epoch)?;
    }
    let text = write(&request, &run, &config)?;
    if args.dry_run {
        return show(&request, &text, run.root(), output);
    }
    let before = Kept::of([run.config(), bind::file(&run), script_file(&run), request_file(&run)])?;
    let written = bind::keep(&run, &config.cluster.bind)
        .and_then(|()| runs::write_config(&run.config(), &config))
        .and_then(|()| keep(&run, &request, &text));
    // the job may begin before sbatch has answered
    drop(claim);
    let submitted = written.and_then(|script| submit(&run, &script));
    let job = submitted.or_else(|error| {
        // who has taken the run meanwhile works with what it has found
        if nothing_submitted(&error)
            && let Ok(_claim) = runs::claim(&run)
        {
            before.restore()?;
        }
        Err(error)
    })?;
    say(&run, job, &request, output)
}

fn usage(error: ScriptError) -> Failure {
    Failure::Usage(error.to_string())
}

/// Compares the request with what was asked for by `cluster.workers`; gives what is to be noted.
fn check_size(request: &Request, resolver: &Resolver) -> Result<Option<String>> {
    let said = resolver.set_by("cluster.workers");
    let said = said.and_then(|(value, origin)| Some((u32::try_from(value.as_u64()?).ok()?, origin)));
    size::check(request, said).map_err(|error| Failure::Usage(error.to_string()).into())
}

/// The script that would be submitted.
fn show(request: &Request, text: &str, run: &Path, output: &Output) -> Result<()> {
    output.note(&format!("would ask for {}", size::describe(request)));
    output.result(text, &serde_json::json!({ "script": text, "run": run, "workers": request.workers() }))
}

/// Files as they were before a submission.
struct Kept(Vec<(PathBuf, Option<Vec<u8>>)>);

impl Kept {
    fn of(paths: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let read = |path: PathBuf| match std::fs::read(&path) {
            Ok(bytes) => Ok((path, Some(bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((path, None)),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        paths.into_iter().map(read).collect::<Result<_>>().map(Self)
    }

    fn restore(self) -> Result<()> {
        for (path, bytes) in self.0 {
            match bytes {
                Some(bytes) => runs::replace(&path, &bytes)?,
                None => match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                    }
                    _ => {}
                },
            }
        }
        Ok(())
    }
}

/// It is certain that no job has come of a failed submission.
fn nothing_submitted(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<Submitted>() {
        Some(Submitted::Unsure { .. } | Submitted::Unkept { .. }) => false,
        None => true,
    }
}

/// A submission has failed, and yet there is a job, or may be.
#[derive(Debug, thiserror::Error)]
enum Submitted {
    #[error(
        "{source}\nIt is unknown whether Slurm has taken the job: `squeue --name={name}` shows it if so, and \
         `scancel --name={name}` ends it. {run} is kept; `learn-launch slurm --resubmit {run}` submits it again"
    )]
    Unsure { source: client::ClientError, name: String, run: String },
    #[error("job {job} is submitted, but {problem}; `scancel {job}` ends it, and {run} is kept")]
    Unkept { job: u32, problem: String, run: String },
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
    script(request, &place).map_err(|error| usage(error).into())
}

fn request_file(run: &RunDir) -> PathBuf {
    run.slurm().join("request.json")
}

fn script_file(run: &RunDir) -> PathBuf {
    run.slurm().join("job.sbatch")
}

/// Keeps the script and the request in the run directory.
fn keep(run: &RunDir, request: &Request, text: &str) -> Result<PathBuf> {
    let script = script_file(run);
    runs::replace(&script, text.as_bytes())?;
    runs::replace(&request_file(run), &serde_json::to_vec_pretty(request)?)?;
    Ok(script)
}

/// Submits a run; the number of its job, which is kept.
fn submit(run: &RunDir, script: &Path) -> Result<u32> {
    let shown = super::shown_run(run);
    let job_id = match client::submit(script) {
        Ok(job_id) => job_id,
        Err(refused) if refused.nothing_submitted() => return Err(refused.into()),
        Err(source) => {
            let name = job_name(&run.root().file_name().unwrap_or_default().to_string_lossy());
            return Err(Submitted::Unsure { source, name, run: shown }.into());
        }
    };
    let kept = SlurmJob { job_id }.write(run);
    kept.map_err(|error| Submitted::Unkept { job: job_id, problem: format!("{error:#}"), run: shown })?;
    Ok(job_id)
}

/// What has come of it, and what is next.
fn say(run: &RunDir, job_id: u32, request: &Request, output: &Output) -> Result<()> {
    let (shown, script) = (super::shown_run(run), script_file(run));
    let state = client::queued(job_id).ok().flatten();
    let now = state.as_ref().map_or_else(|| format!("job {job_id}"), Queued::describe);
    let text = format!(
        "{shown}: {now}, {}\nscript  {}\nlog     {}\n\nnext: learn-launch status {shown}\n      learn-launch logs {shown} --follow\n      \
         learn-launch stop {shown}",
        size::describe(request),
        super::shown(&script),
        super::shown(&run.slurm_log())
    );
    let workers = request.workers();
    output.result(
        &text,
        &serde_json::json!({ "job_id": job_id, "run": run.root(), "script": script, "queue": state, "workers": workers }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_submission_leaves_files_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("config.json"), folder.path().join("slurm/bind"));
        std::fs::write(&old, "before").unwrap();
        let kept = Kept::of([old.clone(), new.clone()]).unwrap();
        runs::replace(&old, b"after").unwrap();
        runs::replace(&new, b"after").unwrap();
        kept.restore().unwrap();
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "before");
        assert!(!new.exists());
    }

    #[test]
    fn a_run_stays_where_there_may_be_a_job() {
        let lost = client::ClientError::NoNumber("hello".into());
        let unsure = Submitted::Unsure { source: lost, name: "learn-shop".into(), run: "runs/shop".into() };
        let text = unsure.to_string();
        assert!(text.contains("`hello`") && text.contains("scancel --name=learn-shop"), "{text}");
        assert!(!nothing_submitted(&unsure.into()));
        let unkept = Submitted::Unkept { job: 12, problem: "disk full".into(), run: "runs/shop".into() };
        assert!(!nothing_submitted(&unkept.into()));
        assert!(nothing_submitted(&client::ClientError::Missing("sbatch".into()).into()));
    }
}
