//! `learn-launch resume`: continues a run exactly where a checkpoint of it is.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use learn_domain::Step;
use learn_domain::config::TrainingConfig;
use learn_domain::report::{JobState, Task};
use learn_domain::run_dir::RunDir;
use serde::Deserialize;

use crate::cli::{DatasetArgs, RunArgs, anchor};
use crate::failure::Failure;
use crate::job::{self, JobSpec, Workers};
use crate::output::Output;
use crate::settings::Resolver;
use crate::slurm::bind;
use crate::slurm::queue::refuse_queued;
use crate::{process, runs, system, tls};

use super::doctor;

pub const HELP: &str = "\
Examples:
  learn-launch resume runs/quickstart
  learn-launch resume quickstart --set training.epochs=40
  learn-launch resume quickstart --checkpoint step-0000000200
  learn-launch resume quickstart --dataset /new/place/of/ml-100k

Keys that --set may change (the others would make it another run):
  data.dataset (to another place of the same data)
  training.{epochs, max_steps, micro_batch, activation_checkpointing,
      threads, non_finite, non_finite_budget}
  evaluation.*, checkpoint.*, cluster.*

More epochs also stretch the cosine schedule. A damaged checkpoint is refused with its reason; --checkpoint picks the \
one before it.";

/// Keys, and sections (ending in a dot), that a resumed run may change.
const CHANGEABLE: [&str; 11] = [
    "data.dataset",
    "training.epochs",
    "training.max_steps",
    "training.micro_batch",
    "training.activation_checkpointing",
    "training.threads",
    "training.non_finite",
    "training.non_finite_budget",
    "evaluation.",
    "checkpoint.",
    "cluster.",
];

/// Arguments of `resume`.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    data: DatasetArgs,
    /// Continue from this checkpoint instead of the latest one
    #[arg(long, value_name = "NAME")]
    checkpoint: Option<String>,
    /// Change one of the keys below for the rest of the run (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Start the coordinator alone: workers come from elsewhere, by `learn-worker join`
    #[arg(long)]
    no_workers: bool,
    /// Do nothing, and end with 0, if the run has finished, and wait two minutes for the lock of a machine that may have died: for
    /// a scheduler that may start it once more
    #[arg(long, conflicts_with = "checkpoint")]
    unless_finished: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// A checkpoint as `learn-worker checkpoints --json` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Checkpoint {
    pub step: Step,
    pub path: PathBuf,
    pub valid: bool,
    pub reason: Option<String>,
    pub best: bool,
    /// The coordinator has not written its ledger: it was killed before it heard of the checkpoint.
    #[serde(default)]
    pub uncommitted: bool,
    /// This user may not read it, which says nothing of what it holds.
    #[serde(skip)]
    pub closed: bool,
}

impl Checkpoint {
    fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// # Errors
/// The run is alive or finished, has no usable checkpoint, or does not finish now.
pub fn run(args: &ResumeArgs, output: &Output) -> Result<()> {
    super::refuse_tasks("resume")?;
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    let shown = super::shown_run(&run);
    // what is read from here on stays as it is until the job begins
    let claim = if args.unless_finished { runs::claim_patiently(&run, output) } else { runs::claim(&run) }?;
    refuse_queued(&run)?;
    // who only looks keeps nobody from the run for as long as checkpoints are checked
    let claim = (!args.dry_run).then_some(claim);
    let before = runs::config(&run)?;
    let resolver =
        Resolver::new(&before).sets(&args.sets)?.flag("--dataset", "data.dataset", args.data.dataset.as_ref())?;
    refuse_unchangeable(resolver.changed())?;
    let mut config = resolver.finish()?;
    anchor(&mut config)?;
    let unchanged =
        (config.training.epochs, config.training.max_steps) == (before.training.epochs, before.training.max_steps);
    let last = runs::last_status(&run)?;
    let finished = last.as_ref().is_some_and(|status| status.state == JobState::Finished);
    if finished && unchanged && args.unless_finished {
        let json = serde_json::json!({ "state": JobState::Finished.name() });
        return output.result(&format!("{shown} has finished already"), &json);
    }
    if finished && unchanged && args.checkpoint.is_none() {
        return Err(Failure::Usage(format!(
            "{shown} has finished its {} epochs; `--set training.epochs=N` trains on, `--checkpoint NAME` repeats the \
             end from an earlier checkpoint",
            config.training.epochs
        ))
        .into());
    }
    let dataset = runs::dataset(&run, &config)?;
    super::train::suits(&dataset, &config)?;
    doctor::refuse_lacks(&config, !args.no_workers)?;
    if claim.is_some() {
        job::forget_address(&run)?;
    }
    let checkpoints = with_ledgers(&run, checkpoints(&run)?);
    let checkpoint = choose(&checkpoints, args.checkpoint.as_deref(), &shown)?;
    if let Some(status) = &last {
        refuse_less_than_done(&config.training, checkpoint.step, status.steps_per_epoch)?;
    }
    let text = format!("{shown}: resuming from step {}", checkpoint.step);
    let Some(claim) = claim else {
        return output
            .result(&text.replace("resuming", "would resume"), &serde_json::json!({ "checkpoint": checkpoint.path }));
    };
    output.note(&text);
    bind::change(&run, &config.cluster.bind)?;
    runs::write_config(&run.next_config(), &config)?;
    runs::ensure_token(&run)?;
    tls::provide(&run, &config.cluster.tls)?;
    let task = Task::Train { resume_from: Some(path_text(&checkpoint.path)?) };
    let workers = Workers::unless(args.no_workers);
    let next = run.next_config();
    let spec = JobSpec { workers, ..JobSpec::local(&run, &next, &config, &task) };
    job::run(&spec, claim, output)?;
    super::train::report(&run, output)
}

pub(super) fn refuse_unchangeable<'a>(mut keys: impl Iterator<Item = &'a str>) -> Result<()> {
    match keys.find(|key| !is_among(&CHANGEABLE, key)) {
        None => Ok(()),
        Some(key) => Err(Failure::Usage(format!(
            "{key} cannot change when a run is resumed: it would be another run. Start one with `learn-launch train`; \
             a resumed run may change {}",
            listed(&CHANGEABLE)
        ))
        .into()),
    }
}

/// Whether keys, and sections (ending in a dot), have this key among them.
pub(super) fn is_among(keys: &[&str], key: &str) -> bool {
    keys.iter().any(|one| if one.ends_with('.') { key.starts_with(one) } else { key == *one })
}

/// Such keys, for people.
pub(super) fn listed(keys: &[&str]) -> String {
    let one = |key: &&str| if key.ends_with('.') { format!("{key}*") } else { (*key).to_owned() };
    keys.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A training that has come to step `done` cannot end before it.
pub(super) fn refuse_less_than_done(training: &TrainingConfig, done: Step, steps_per_epoch: u64) -> Result<()> {
    let total = training.total_steps(steps_per_epoch);
    // a status from before the dataset was looked at knows no steps
    if steps_per_epoch == 0 || total >= done.0 {
        return Ok(());
    }
    let epochs = done.0.div_ceil(steps_per_epoch);
    let (key, least) = match u64::from(training.epochs) * steps_per_epoch < done.0 {
        true => ("training.epochs", epochs),
        false => ("training.max_steps", done.0),
    };
    Err(Failure::Usage(format!(
        "the checkpoint is at step {done}, in epoch {epochs}, and a training of {total} steps would end before it: set {key} to \
         {least} or more, or name an earlier checkpoint with `--checkpoint NAME`"
    ))
    .into())
}

/// A path as the task carries it.
pub(crate) fn path_text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
}

/// All checkpoints of a run, oldest first, each checked by the worker binary.
pub(crate) fn checkpoints(run: &RunDir) -> Result<Vec<Checkpoint>> {
    let mut command = Command::new(process::sibling("learn-worker")?);
    command.arg("checkpoints").arg("--run").arg(run.root()).arg("--json").stdin(Stdio::null()).stderr(Stdio::piped());
    system::end_with_parent(&mut command);
    let answer = command.output().context("cannot start learn-worker")?;
    if !answer.status.success() {
        let said = String::from_utf8_lossy(&answer.stderr);
        bail!("learn-worker checkpoints ended with {}: {}", process::describe(answer.status), said.trim());
    }
    let mut checkpoints: Vec<Checkpoint> =
        serde_json::from_slice(&answer.stdout).context("learn-worker checkpoints printed something else than JSON")?;
    checkpoints.sort_by_key(|checkpoint| checkpoint.step);
    for checkpoint in checkpoints.iter_mut().filter(|checkpoint| !checkpoint.valid) {
        checkpoint.closed = is_closed(&checkpoint.path);
    }
    Ok(checkpoints)
}

/// Whether this user lacks the right to read a directory or one of its files.
fn is_closed(folder: &Path) -> bool {
    let denied = |error: io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    match fs::read_dir(folder) {
        Ok(entries) => entries.flatten().any(|entry| fs::File::open(entry.path()).is_err_and(denied)),
        Err(error) => denied(error),
    }
}

/// A training goes on only from a checkpoint whose ledger is there: a kill may come between the two.
pub(crate) fn with_ledgers(run: &RunDir, checkpoints: Vec<Checkpoint>) -> Vec<Checkpoint> {
    let check = |checkpoint: Checkpoint| {
        let ledger = run.ledger(checkpoint.step);
        if !checkpoint.valid || ledger.is_file() {
            return checkpoint;
        }
        let reason = format!("its ledger {} is missing, which says whom the epoch has used", ledger.display());
        Checkpoint { valid: false, reason: Some(reason), uncommitted: true, ..checkpoint }
    };
    checkpoints.into_iter().map(check).collect()
}

/// The checkpoint that `wanted` names (`best`, `last` or a directory's name), or the latest that was committed; never a
/// damaged one.
pub(crate) fn choose<'a>(checkpoints: &'a [Checkpoint], wanted: Option<&str>, shown: &str) -> Result<&'a Checkpoint> {
    let usage = |message: String| anyhow::Error::from(Failure::Usage(message));
    let chosen = match wanted {
        None => checkpoints.iter().rfind(|checkpoint| !checkpoint.uncommitted).or(checkpoints.last()),
        Some("last") => checkpoints.last(),
        Some("best") => checkpoints.iter().find(|checkpoint| checkpoint.best),
        Some(name) => checkpoints.iter().find(|checkpoint| checkpoint.name() == name),
    };
    let Some(chosen) = chosen else {
        let names: Vec<_> = checkpoints.iter().map(Checkpoint::name).collect();
        return Err(usage(match (names.as_slice(), wanted) {
            ([], _) => format!("{shown} has no checkpoint; start again with `learn-launch train … --force`"),
            (names, wanted) => {
                format!("{shown} has no checkpoint `{}`; it has {}", wanted.unwrap_or("last"), names.join(", "))
            }
        }));
    };
    if chosen.valid {
        return Ok(chosen);
    }
    let earlier = checkpoints.iter().rfind(|checkpoint| checkpoint.valid && checkpoint.step < chosen.step);
    let way = match earlier {
        _ if chosen.closed => "let this user read it, or run this as the user who may".into(),
        Some(earlier) => format!("the one before it is whole: add `--checkpoint {}`", earlier.name()),
        None => "there is no whole one before it; start again with `learn-launch train … --force`".into(),
    };
    let reason = chosen.reason.as_deref().unwrap_or("it did not pass its check");
    bail!("{} cannot be used: {reason}; {way}", chosen.path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(step: u64, valid: bool, best: bool) -> Checkpoint {
        let reason = (!valid).then(|| "checksum of model.safetensors differs".to_owned());
        Checkpoint {
            step: Step(step),
            path: format!("/r/checkpoints/step-{step:010}").into(),
            valid,
            reason,
            best,
            uncommitted: false,
            closed: false,
        }
    }

    #[test]
    fn one_that_may_not_be_read_is_not_given_up() {
        let closed = Checkpoint { closed: true, ..checkpoint(20, false, false) };
        let text = choose(&[checkpoint(10, true, false), closed], None, "r").unwrap_err().to_string();
        assert!(text.contains("let this user read it"), "{text}");
        assert!(!text.contains("--force") && !text.contains("step-0000000010"), "nothing is lost: {text}");
    }

    #[test]
    fn a_directory_that_can_be_read_or_is_not_there_is_not_closed() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("state.json"), "damaged").unwrap();
        assert!(!is_closed(folder.path()) && !is_closed(&folder.path().join("none")));
    }

    #[test]
    fn the_latest_checkpoint_is_chosen_unless_another_is_named() {
        let all = [checkpoint(10, true, true), checkpoint(20, true, false)];
        let step = |wanted| choose(&all, wanted, "r").unwrap().step.0;
        assert_eq!(
            [step(None), step(Some("last")), step(Some("best")), step(Some("step-0000000010"))],
            [20, 20, 10, 10]
        );
    }

    #[test]
    fn a_damaged_one_is_refused_and_the_one_before_offered() {
        let all = [checkpoint(10, true, false), checkpoint(20, false, false), checkpoint(30, false, false)];
        let text = choose(&all, None, "r").unwrap_err().to_string();
        assert!(text.contains("step-0000000030 cannot be used: checksum of model.safetensors differs"), "{text}");
        assert!(text.contains("--checkpoint step-0000000010"), "{text}");
        let text = choose(&all[1..2], None, "r").unwrap_err().to_string();
        assert!(text.contains("no whole one before it"), "{text}");
    }

    #[test]
    fn one_without_its_ledger_is_passed_over_and_refused_if_it_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        std::fs::create_dir_all(run.ledger(Step(10)).parent().unwrap()).unwrap();
        std::fs::write(run.ledger(Step(10)), "{}").unwrap();
        let all = with_ledgers(&run, vec![checkpoint(10, true, false), checkpoint(20, true, false)]);
        assert_eq!(choose(&all, None, "r").unwrap().step, Step(10));
        let text = choose(&all, Some("last"), "r").unwrap_err().to_string();
        assert!(text.contains("its ledger") && text.contains("--checkpoint step-0000000010"), "{text}");
    }

    #[test]
    fn a_missing_one_lists_what_there_is() {
        let text = choose(&[checkpoint(10, true, false)], Some("step-7"), "r").unwrap_err().to_string();
        assert!(text.contains("no checkpoint `step-7`; it has step-0000000010"), "{text}");
        assert!(choose(&[], None, "r").unwrap_err().to_string().contains("has no checkpoint; start again"));
    }

    #[test]
    fn less_than_is_done_is_no_goal() {
        let check = |epochs, max_steps, done| {
            let training = TrainingConfig { epochs, max_steps, ..TrainingConfig::default() };
            refuse_less_than_done(&training, Step(done), 4).map_err(|error| error.to_string())
        };
        // what is exactly done can be ended and tested
        for (epochs, max_steps, done) in [(5, 0, 20), (6, 0, 20), (9, 20, 20), (2, 0, 8)] {
            check(epochs, max_steps, done).unwrap();
        }
        let text = check(2, 0, 20).unwrap_err();
        assert!(text.contains("at step 20, in epoch 5") && text.contains("training.epochs to 5 or more"), "{text}");
        assert!(check(5, 0, 21).unwrap_err().contains("training.epochs to 6 or more"));
        let text = check(9, 19, 20).unwrap_err();
        assert!(text.contains("of 19 steps") && text.contains("training.max_steps to 20 or more"), "{text}");
        let before_the_plan = TrainingConfig { epochs: 1, ..TrainingConfig::default() };
        refuse_less_than_done(&before_the_plan, Step(7), 0).unwrap();
    }

    #[test]
    fn only_documented_keys_change() {
        let check = |key: &str| refuse_unchangeable(std::iter::once(key));
        for key in ["training.epochs", "checkpoint.keep_last", "cluster.workers", "evaluation.exclude_history"] {
            check(key).unwrap();
        }
        for key in ["training.global_batch", "data.row_format", "model.layers", "job.seed", "optimizer.learning_rate"] {
            let text = check(key).unwrap_err().to_string();
            assert!(text.contains(key) && text.contains("training.epochs") && text.contains("cluster.*"), "{text}");
        }
        for key in CHANGEABLE {
            let section = key.trim_end_matches('.');
            let catalogue = crate::settings::Catalogue::of_config();
            assert!(catalogue.key(section).is_some() || catalogue.section(section).is_some(), "{key}");
            assert!(HELP.contains(section.trim_start_matches("training.")), "{key} is not in the help");
        }
    }
}
