//! The runs of a study and what is left to do of each, from what lies on disk.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use learn_dataset::Dataset;
use learn_domain::Config;
use learn_domain::report::JobState;
use learn_domain::run_dir::RunDir;
use serde::Serialize;

use super::file::{StudyFile, Variant};
use crate::cli::anchor;
use crate::failure::{self, Failure};
use crate::runs;
use crate::settings::{Given, Origin, Resolver, SettingsError};

/// One training of a study.
#[derive(Clone, Debug)]
pub struct StudyRun {
    pub variant: String,
    pub seed: u64,
    pub config: Config,
    /// What of it the variant sets, and what whoever plans adds of the base.
    pub given: Given,
    pub dir: RunDir,
    /// The same configuration as a file that `learn-launch train` takes.
    pub file: PathBuf,
    pub left: Left,
}

/// What is left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Left {
    Nothing,
    Train,
    /// It was started and has a checkpoint.
    Resume,
    /// It was started, but has nothing to go on from; its remains are moved aside.
    TrainAnew,
    /// There is a run of that name with other settings.
    Foreign,
}

/// What is known of a run directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    exists: bool,
    /// Configuration and data are those that the study asks for.
    same: bool,
    finished: bool,
    checkpoint: bool,
}

fn left(found: Found) -> Left {
    match found {
        Found { exists: false, .. } => Left::Train,
        Found { same: false, .. } => Left::Foreign,
        Found { finished: true, .. } => Left::Nothing,
        Found { checkpoint: true, .. } => Left::Resume,
        _ => Left::TrainAnew,
    }
}

impl StudyRun {
    /// `VARIANT-seedN`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.config.job.name
    }

    /// Looks at the disk again.
    ///
    /// # Errors
    /// What is there cannot be read, or another process works on it.
    pub fn look(&mut self) -> Result<()> {
        runs::refuse_live(&self.dir)?;
        self.left = left(found(&self.dir, &self.config)?);
        Ok(())
    }
}

fn found(dir: &RunDir, config: &Config) -> Result<Found> {
    let exists = dir.root().exists();
    let same = foreign(dir, config)?.is_none();
    let status = runs::last_status(dir)?;
    let finished = dir.summary().is_file() && status.as_ref().is_some_and(|status| status.state == JobState::Finished);
    let committed = status.and_then(|status| status.last_checkpoint);
    let checkpoint = committed.is_some_and(|step| dir.checkpoint(step).is_dir());
    Ok(Found { exists, same, finished, checkpoint })
}

/// What a run was trained with that the study does not ask for: a setting, or other data than the dataset holds now.
fn foreign(dir: &RunDir, config: &Config) -> Result<Option<String>> {
    // a run that was killed before its configuration was written has done nothing
    if !dir.config().is_file() {
        return Ok(None);
    }
    let there = runs::config(dir)?;
    if there != *config {
        let key = first_difference("", &serde_json::to_value(there)?, &serde_json::to_value(config)?);
        return Ok(Some(format!("another {}", key.unwrap_or_else(|| "key".into()))));
    }
    let Some(status) = runs::last_status(dir)? else { return Ok(None) };
    // whatever is wrong with a dataset, the command that makes or reads it says best
    let Ok(dataset) = Dataset::open(&config.data.dataset) else { return Ok(None) };
    let other = status.dataset.differ_from(&dataset.facts().seen_by(&config.model));
    Ok(other.map(|what| format!("other {what} than {} has now", config.data.dataset.display())))
}

/// All runs of a study, in the order of variants and seeds; `base` gives the settings that the variants change.
///
/// # Errors
/// A variant's settings are wrong, or what lies on disk cannot be read or is in use.
pub fn plan(study: &StudyFile, base: &Config) -> Result<Vec<StudyRun>> {
    let mut planned = Vec::new();
    for variant in &study.variants {
        for &seed in study.seeds(variant) {
            let mut run = resolve(study, base, variant, seed)?;
            run.look()?;
            refuse_start(&run)?;
            planned.push(run);
        }
    }
    Ok(planned)
}

/// Refuses a training that is yet to begin and lacks what it starts with.
fn refuse_start(run: &StudyRun) -> Result<(), SettingsError> {
    if matches!(run.left, Left::Nothing | Left::Resume) {
        return Ok(());
    }
    let variant = Origin::Variant(run.variant.clone());
    run.config.validate_start().map_err(|error| SettingsError::of(Some(&variant), error))
}

/// Checks the settings of all runs, wherever a study is about to run.
///
/// # Errors
/// A variant's settings are wrong.
pub fn check(study: &StudyFile, base: &Config) -> Result<(), SettingsError> {
    study.variants.iter().try_for_each(|variant| resolver(base, variant)?.finish().map(drop))
}

fn resolver(base: &Config, variant: &Variant) -> Result<Resolver, SettingsError> {
    Resolver::new(base).variant(&variant.name, &variant.set)
}

/// The directory of a study.
#[must_use]
pub fn root(study: &StudyFile, base: &Config) -> PathBuf {
    base.job.runs_dir.join(&study.study.name)
}

fn resolve(study: &StudyFile, base: &Config, variant: &Variant, seed: u64) -> Result<StudyRun> {
    let resolver = resolver(base, variant)?;
    let given = resolver.given();
    let mut config = resolver.finish()?;
    // a run by its name is one of the user's, not of the study's directory
    runs::find_init(&mut config).map_err(|error| {
        Failure::Usage(format!("variant `{}`: training.init: {}", variant.name, failure::message(&error)))
    })?;
    config.job.runs_dir = root(study, base);
    config.job.name = format!("{}-seed{seed}", variant.name);
    config.job.seed = seed;
    anchor(&mut config)?;
    let dir = RunDir::new(config.job.runs_dir.join(&config.job.name));
    let file = config.job.runs_dir.join("configs").join(format!("{}.toml", config.job.name));
    Ok(StudyRun { variant: variant.name.clone(), seed, config, given, dir, file, left: Left::Train })
}

/// Refuses runs of other settings or data with their first difference.
///
/// # Errors
/// There is one, or it cannot be read.
pub fn refuse_foreign(runs: &[StudyRun]) -> Result<()> {
    let Some(run) = runs.iter().find(|run| run.left == Left::Foreign) else { return Ok(()) };
    let other = foreign(&run.dir, &run.config)?.unwrap_or_else(|| "other settings".into());
    Err(Failure::Usage(format!(
        "{} was trained with {other}; give the study another name, or move such runs aside with `--force`",
        run.dir.root().display()
    ))
    .into())
}

/// The dotted key of the first value of `b` that `a` has not got.
pub(super) fn first_difference(path: &str, a: &serde_json::Value, b: &serde_json::Value) -> Option<String> {
    match (a, b) {
        (serde_json::Value::Object(a), serde_json::Value::Object(b)) => b.iter().find_map(|(key, value)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            first_difference(&path, a.get(key).unwrap_or(&serde_json::Value::Null), value)
        }),
        (a, b) => (a != b).then(|| path.to_owned()),
    }
}

/// Writes the configuration file of each run.
///
/// # Errors
/// The folder cannot be written.
pub fn write_configs(runs: &[StudyRun]) -> Result<()> {
    for run in runs {
        let folder = run.file.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let text = toml::to_string(&run.config)?;
        std::fs::write(&run.file, text).with_context(|| format!("cannot write {}", run.file.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::datasets;
    use super::*;

    #[test]
    fn what_is_left_follows_from_what_is_there() {
        let found = |exists, same, finished, checkpoint| Found { exists, same, finished, checkpoint };
        assert_eq!(left(found(false, true, false, false)), Left::Train);
        assert_eq!(left(found(true, true, true, true)), Left::Nothing);
        assert_eq!(left(found(true, true, false, true)), Left::Resume);
        assert_eq!(left(found(true, true, false, false)), Left::TrainAnew);
        assert_eq!(left(found(true, false, true, true)), Left::Foreign);
    }

    fn study() -> StudyFile {
        toml::from_str(
            r#"
            study = { name = "s", config = "c.toml", seeds = [1, 2] }
            table = [{ name = "t", title = "T" }]
            [[variant]]
            name = "deep"
            set.model.layers = 6
            "#,
        )
        .unwrap()
    }

    #[test]
    fn variants_and_seeds_become_runs_and_other_settings_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut base = Config::default();
        base.job.runs_dir = folder.path().into();
        let planned = plan(&study(), &base).unwrap();
        let names: Vec<_> = planned.iter().map(StudyRun::name).collect();
        assert_eq!(names, ["deep-seed1", "deep-seed2"]);
        let second = &planned[1];
        assert_eq!((second.config.model.layers, second.config.job.seed, second.left), (6, 2, Left::Train));
        assert_eq!(second.dir.root(), folder.path().join("s/deep-seed2"));

        write_configs(&planned).unwrap();
        let read = Resolver::new(&Config::default()).file(&second.file).unwrap().finish().unwrap();
        assert_eq!(read, second.config, "the file gives the same run");

        runs::create(second.dir.root(), &second.config).unwrap();
        assert_eq!(plan(&study(), &base).unwrap()[1].left, Left::TrainAnew);
        base.training.epochs += 1;
        let planned = plan(&study(), &base).unwrap();
        let message = refuse_foreign(&planned).unwrap_err().to_string();
        assert!(message.contains("deep-seed2") && message.contains("training.epochs"), "{message}");
    }

    #[test]
    fn weights_by_the_name_of_a_run_are_those_of_the_user() {
        let folder = tempfile::tempdir().unwrap();
        let mut base = Config::default();
        base.job.runs_dir = folder.path().into();
        let mut study = study();
        study.variants[0].set = toml::from_str("training.init = 'towers'").unwrap();
        let message = plan(&study, &base).unwrap_err().to_string();
        assert!(message.contains("variant `deep`: training.init: towers is not a run"), "{message}");
        runs::create(&folder.path().join("towers"), &base).unwrap();
        let planned = plan(&study, &base).unwrap();
        assert_eq!(planned[0].config.training.init, Some(folder.path().join("towers")));
    }

    #[test]
    fn a_variant_brings_the_weights_that_a_base_without_any_starts_with() {
        let folder = tempfile::tempdir().unwrap();
        let mut base = Config::default();
        base.job.runs_dir = folder.path().into();
        base.training.init_partial = true;
        let mut study = study();
        let error = plan(&study, &base).unwrap_err();
        let words = "variant `deep`: training.init_partial: takes what fits of training.init";
        assert!(error.to_string().starts_with(words), "{error}");
        assert_eq!(failure::exit_code(&error), learn_domain::report::exit::USAGE);
        check(&study, &base).expect("`study --set` may name them");

        runs::create(&folder.path().join("towers"), &base).unwrap();
        study.variants[0].set = toml::from_str("training.init = 'towers'").unwrap();
        let mut run = plan(&study, &base).unwrap().remove(0);
        run.config.training.init = None;
        refuse_start(&run).unwrap_err();
        for begun in [Left::Resume, Left::Nothing] {
            run.left = begun;
            refuse_start(&run).unwrap();
        }
    }

    #[test]
    fn the_studies_of_the_repository_can_be_planned() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let files: Vec<_> = std::fs::read_dir(repository.join("configs/studies")).unwrap().flatten().collect();
        assert!(!files.is_empty());
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let study = StudyFile::read(&file.path()).unwrap();
            let resolver = Resolver::new(&Config::default()).file(&repository.join(&study.study.config)).unwrap();
            let mut base = resolver.finish().unwrap();
            base.job.runs_dir = folder.path().into();
            let planned = plan(&study, &base).unwrap();
            assert!(planned.iter().all(|run| run.left == Left::Train), "{:?}", file.path());
            datasets::refuse_rivals(&planned).unwrap();
            let unnamed = |run: &StudyRun| {
                let mut config = run.config.clone();
                config.job.name.clear();
                config
            };
            for (place, run) in planned.iter().enumerate() {
                let twin = planned[..place].iter().find(|other| unnamed(other) == unnamed(run));
                assert!(twin.is_none(), "{} is {} once more", run.name(), twin.map_or("", |twin| twin.name()));
            }
        }
    }

    #[test]
    fn a_variant_with_an_unknown_key_is_named() {
        let mut study = study();
        study.variants[0].set = toml::from_str("model.layer = 6").unwrap();
        let message = plan(&study, &Config::default()).unwrap_err().to_string();
        assert!(message.contains("variant `deep`") && message.contains("model.layers"), "{message}");
    }
}
