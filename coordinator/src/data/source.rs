//! Everything that a stream of the data service depends on: the dataset, the plan and the sampling.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use arrow_schema::Schema;
use learn_dataset::{Dataset, DatasetError, Embeddings, Unsuitable};
use learn_domain::config::RowFormat;
use learn_domain::plan::{Plan, PlanError, PlanKey, Position};
use learn_domain::report::DatasetFacts;
use learn_domain::sampling::{Sample, SampleKey, SampleSize, SamplingShape, sample, sample_size};
use learn_domain::{Config, Step, UserIndex};
use learn_proto::flight::{Provenance, RowFile, RowFiles};

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Unsuitable(#[from] Unsuitable),
}

/// A dataset as one job sees it.
pub struct Source {
    pub dataset: Dataset,
    /// None for a model that does not read content.
    pub embeddings: Option<Arc<Embeddings>>,
    /// How the job's own workers ask for them.
    pub row_format: RowFormat,
    /// What their files were before they were mapped.
    row_files: Option<(PathBuf, RowFiles)>,
    pub plan: Plan,
    pub shape: SamplingShape,
    pub total_steps: u64,
    pub facts: DatasetFacts,
    provenance: Provenance,
    /// Keeps `prepare --replace` from the dataset.
    _held: Option<File>,
}

impl Source {
    /// Checks that dataset and configuration go together.
    ///
    /// # Errors
    /// If they do not, for example because the dataset has no content embeddings yet, or if it is being replaced.
    pub fn new(dataset: Dataset, config: &Config) -> Result<Self, SourceError> {
        let held = dataset.hold()?;
        dataset.suits(config)?;
        let facts = dataset.facts().seen_by(&config.model);
        let row_files = row_files(&dataset);
        let embeddings =
            if config.model.item_input.has_content() { Some(Arc::new(dataset.embeddings()?)) } else { None };
        let dim = embeddings.as_ref().map_or(0, |embeddings| embeddings.dim());
        let plan = Plan::new(PlanKey::of(config, &facts))?;
        let total_steps = config.training.total_steps(plan.steps_per_epoch());
        let provenance = Provenance {
            dataset: facts.name.clone(),
            fingerprint: facts.fingerprint.clone(),
            seed: config.job.seed,
            users: facts.train_users,
            global_batch: config.training.global_batch,
            steps_per_epoch: plan.steps_per_epoch(),
            total_steps,
            items: facts.items,
            dim: dim as u32,
        };
        Ok(Self {
            dataset,
            embeddings,
            row_format: config.data.row_format,
            row_files,
            plan,
            shape: config.sample_shape(),
            total_steps,
            facts,
            provenance,
            _held: held,
        })
    }

    /// Adds what a stream was made from to its schema.
    #[must_use]
    pub fn describe(&self, schema: Schema) -> Arc<Schema> {
        self.provenance.describe(schema).into()
    }

    /// Where the content embeddings lie, and what their files are; `None` if there are none, or they are not those that are
    /// mapped any more.
    #[must_use]
    pub fn row_files(&self) -> Option<(PathBuf, RowFiles)> {
        self.embeddings.as_ref()?;
        let now = row_files(&self.dataset);
        if now != self.row_files {
            let dataset = self.dataset.dir();
            tracing::warn!(dataset = %dataset.display(), "the files of content embeddings have changed; they are not offered");
            return None;
        }
        now
    }

    #[must_use]
    pub fn dim(&self) -> u32 {
        self.embeddings.as_ref().map_or(0, |embeddings| embeddings.dim()) as u32
    }

    fn key(&self, epoch: u32, user: UserIndex) -> (SampleKey, u32) {
        let length = self.dataset.train().items(user.0 as usize).len() as u32;
        (SampleKey { seed: self.plan.draw_seed(), epoch, user }, length)
    }

    /// The users of the update after `finished` steps, in plan order, with the size of each sample.
    #[must_use]
    pub fn step(&self, finished: Step) -> (Position, Vec<(UserIndex, SampleSize)>) {
        let position = self.plan.position(finished);
        let with_size = |user| {
            let (key, length) = self.key(position.epoch, user);
            // a training sequence has two items at least: `prepare` leaves out shorter ones
            let nothing = SampleSize { history: 0, targets: 0, pairs: 0 };
            (user, sample_size(key, length, &self.shape).unwrap_or(nothing))
        };
        (position, self.plan.users(position).into_iter().map(with_size).collect())
    }

    /// One user's sample in one epoch.
    #[must_use]
    pub fn sample(&self, epoch: u32, user: UserIndex) -> Sample {
        let (key, length) = self.key(epoch, user);
        sample(key, length, &self.shape).unwrap_or_default()
    }
}

/// What the files of a dataset's content embeddings are now.
fn row_files(dataset: &Dataset) -> Option<(PathBuf, RowFiles)> {
    let dir = std::fs::canonicalize(dataset.dir()).ok()?;
    let info = dataset.manifest().embeddings.as_ref()?;
    let file = |path: &str| {
        let metadata = std::fs::metadata(dir.join(path)).ok()?;
        let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        let modified_nanos = u64::try_from(modified.as_nanos()).ok()?;
        Some(RowFile { path: path.to_owned(), bytes: metadata.len(), modified_nanos })
    };
    let files = info.files.iter().map(|entry| file(&entry.path)).collect::<Option<_>>()?;
    let fingerprint = dataset.manifest().fingerprint.clone();
    let row_files = RowFiles { fingerprint, embeddings_fingerprint: info.fingerprint.clone(), files };
    Some((dir, row_files))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use learn_domain::config::TimeEmbedding;

    use super::*;

    #[test]
    fn a_dataset_without_times_is_refused_with_the_remedy_if_the_model_reads_them() {
        let version_1 = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/dataset/tests/data/v1");
        let source = |config: &Config| Source::new(Dataset::open(&version_1).unwrap(), config).map(drop);
        let mut config = Config::default();
        source(&config).unwrap();
        config.model.time_embedding = TimeEmbedding::Gap;
        let error = source(&config).unwrap_err().to_string();
        assert!(error.contains("model.time_embedding") && error.contains("--replace"), "{error}");
    }

    #[test]
    fn files_that_were_written_to_since_they_were_mapped_are_not_offered() {
        let version_1 = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/dataset/tests/data/v1");
        let folder = tempfile::tempdir().unwrap();
        let copied = std::process::Command::new("cp").arg("-r").arg(version_1).arg(folder.path().join("v1")).status();
        assert!(copied.unwrap().success());
        let source = Source::new(Dataset::open(&folder.path().join("v1")).unwrap(), &Config::default()).unwrap();
        let (dir, offered) = source.row_files().unwrap();
        let file = std::fs::File::options().write(true).open(dir.join(&offered.files[0].path)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1)).unwrap();
        assert_eq!(source.row_files(), None);
    }
}
