//! The datasets of a study: which ones are missing, and making them.
//!
//! Input: the runs. Output: prepared and embedded datasets, each made once with `learn-launch` itself, and those that could
//! not be made. Invariant: all runs on one dataset mean the same one, so it does not matter whose configuration makes it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use learn_dataset::Dataset;
use learn_domain::Config;
use serde_json::Value;

use super::children::{self, POLL, Stops};
use super::runs::{Left, StudyRun, first_difference};
use crate::failure::Failure;
use crate::made_from;
use crate::output::Output;
use crate::process::Process;

/// A dataset that is not ready, and the configuration file of a run that can make it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub dataset: PathBuf,
    pub file: PathBuf,
    /// Not even prepared.
    pub prepare: bool,
    /// It has no content embeddings, and a run reads them.
    pub embed: bool,
}

impl Missing {
    /// The commands that make it, in order.
    #[must_use]
    pub fn steps(&self) -> Vec<&'static str> {
        let steps = [("prepare", self.prepare), ("embed", self.embed)];
        steps.into_iter().filter(|(_, needed)| *needed).map(|(step, _)| step).collect()
    }
}

/// The datasets that must be made first, each once.
#[must_use]
pub fn missing(runs: &[StudyRun]) -> Vec<Missing> {
    let mut missing: Vec<Missing> = Vec::new();
    for run in runs.iter().filter(|run| run.left != Left::Nothing) {
        let dataset = &run.config.data.dataset;
        let prepare = !dataset.exists();
        // whatever else is wrong with a dataset, the command that makes or reads it says best
        let bare = || Dataset::open(dataset).is_ok_and(|dataset| dataset.manifest().embeddings.is_none());
        let embed = run.config.model.item_input.has_content() && (prepare || bare());
        match missing.iter_mut().find(|known| known.dataset == *dataset) {
            Some(known) => known.embed |= embed,
            None if prepare || embed => {
                missing.push(Missing { dataset: dataset.clone(), file: run.file.clone(), prepare, embed });
            }
            None => {}
        }
    }
    missing
}

/// Refuses runs that mean different datasets by the same `data.dataset`: the second would train on what was made for the
/// first.
///
/// # Errors
/// There are two.
pub fn refuse_rivals<'a>(runs: impl IntoIterator<Item = &'a StudyRun>) -> Result<()> {
    let mut seen: Vec<(&StudyRun, Value)> = Vec::new();
    for run in runs {
        let recipe = recipe(&run.config)?;
        match seen.iter().find(|(other, _)| other.config.data.dataset == run.config.data.dataset) {
            None => seen.push((run, recipe)),
            Some((other, theirs)) => {
                let Some(key) = first_difference("", theirs, &recipe) else { continue };
                return Err(Failure::Usage(format!(
                    "the variants `{}` and `{}` have the same data.dataset {}, but another {key}; give one of them \
                     data.dataset of its own",
                    other.variant,
                    run.variant,
                    run.config.data.dataset.display()
                ))
                .into());
            }
        }
    }
    Ok(())
}

/// Refuses to train on a dataset that is there and was not made with the settings of a run.
///
/// # Errors
/// There is one.
pub fn refuse_contradictions<'a>(runs: impl IntoIterator<Item = &'a StudyRun>) -> Result<()> {
    for run in runs.into_iter().filter(|run| !matches!(run.left, Left::Nothing | Left::Resume)) {
        // whatever else is wrong with a dataset, the command that makes or reads it says best
        if let Ok(dataset) = Dataset::open(&run.config.data.dataset) {
            made_from::refuse(&dataset, &run.config, &run.given)?;
        }
    }
    Ok(())
}

/// The settings that a dataset is made from.
fn recipe(config: &Config) -> Result<Value> {
    Ok(serde_json::json!({
        "prepare": serde_json::to_value(&config.prepare)?,
        "embed": serde_json::to_value(&config.embed)?,
    }))
}

/// A dataset that could not be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmade {
    pub dataset: PathBuf,
    /// It is prepared, and only lacks content embeddings.
    pub bare: bool,
    /// The command that failed, and what it said.
    pub reason: String,
}

impl Unmade {
    /// Whether this run needs what is not there.
    #[must_use]
    pub fn hinders(&self, run: &StudyRun) -> bool {
        run.config.data.dataset == self.dataset && (!self.bare || run.config.model.item_input.has_content())
    }
}

/// Makes the datasets that are not there and gives those that cannot be made; `logs` gets what each command says.
///
/// # Errors
/// The study was stopped, or a process could not be started.
pub fn make(missing: &[Missing], logs: &Path, stops: &mut Stops, output: &Output) -> Result<Vec<Unmade>> {
    let mut unmade = Vec::new();
    for one in missing {
        for step in one.steps() {
            stops.check()?;
            output.note(&format!("{step} {}", one.dataset.display()));
            let mut command = children::launch(&[step])?;
            command.arg(&one.file);
            let log = logs.join(format!("{step}.log"));
            let mut child = Process::start(format!("learn-launch {step}"), &mut command, &log)?;
            while child.ended().is_none() {
                if stops.pass_on(std::iter::once(&mut child)) {
                    output.note(&format!("stopping `learn-launch {step}`; once more to kill"));
                }
                std::thread::sleep(POLL);
            }
            stops.check()?;
            if let Some(reason) = children::reason(&mut child) {
                let reason = format!("`learn-launch {step} {}` failed: {reason}", one.file.display());
                output.note(&format!("{reason} (log: {})", log.display()));
                unmade.push(Unmade { dataset: one.dataset.clone(), bare: step == "embed", reason });
                break;
            }
        }
    }
    Ok(unmade)
}

#[cfg(test)]
mod tests {
    use super::super::file::StudyFile;
    use super::super::runs::plan;
    use super::*;

    fn planned(folder: &Path, variants: &str) -> Vec<StudyRun> {
        let text = format!(
            "study = {{ name = \"s\", config = \"c.toml\" }}\ntable = [{{ name = \"t\", title = \"T\" }}]\n{variants}"
        );
        let study: StudyFile = toml::from_str(&text).unwrap();
        let mut base = Config::default();
        base.job.runs_dir = folder.into();
        base.data.dataset = folder.join("dataset");
        plan(&study, &base).unwrap()
    }

    #[test]
    fn two_runs_that_mean_different_datasets_by_one_name_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for setting in ["embed.refine.whitening = true", "prepare.k_core = 5", "embed.prompt.separator = ';'"] {
            let key = setting.split(' ').next().unwrap();
            let variants = format!("[[variant]]\nname = \"plain\"\n[[variant]]\nname = \"other\"\nset.{setting}\n");
            let message = refuse_rivals(&planned(folder.path(), &variants)).unwrap_err().to_string();
            for words in ["`plain`", "`other`", key, "give one of them data.dataset of its own"] {
                assert!(message.contains(words), "{words} is not in {message}");
            }
            let apart = format!("{variants}set.data.dataset = \"elsewhere\"\n");
            refuse_rivals(&planned(folder.path(), &apart)).unwrap();
        }
    }

    #[test]
    fn a_dataset_that_a_variant_means_otherwise_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/dataset/tests/data/v1");
        let variant = |settings: &str| {
            let dataset = stored.display();
            let text = format!("[[variant]]\nname = \"dense\"\nset.data.dataset = \"{dataset}\"\n{settings}");
            refuse_contradictions(&planned(folder.path(), &text))
        };
        variant("").unwrap();
        variant("set.prepare.k_core = 1\n").unwrap();
        let error = variant("set.prepare.k_core = 5\n").unwrap_err();
        assert_eq!(crate::failure::exit_code(&error), learn_domain::report::exit::USAGE);
        let message = error.to_string();
        for words in ["variant `dense`: prepare.k_core is 5, but ", "was prepared with 0", "leave the setting out"] {
            assert!(message.contains(words), "{words} is not in {message}");
        }
    }

    #[test]
    fn only_what_a_run_reads_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let id = "[[variant]]\nname = \"id\"\nset.model.item_input = \"id\"\nset.model.item_tower = \"per_item\"\n";
        let content = "[[variant]]\nname = \"content\"\n";
        let steps =
            |variants: &str| missing(&planned(folder.path(), variants)).iter().map(Missing::steps).collect::<Vec<_>>();
        assert_eq!(steps(id), [["prepare"]]);
        assert_eq!(steps(&format!("{id}{content}")), [["prepare", "embed"]]);
        assert_eq!(
            steps(&format!("{content}{id}set.data.dataset = \"bare\"\n")),
            [vec!["prepare", "embed"], vec!["prepare"]]
        );
    }
}
