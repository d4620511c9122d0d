//! `dataset.json`: what a dataset is, and what each of its files must be.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Component, Path};

use learn_domain::config::SplitPolicy;
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{DatasetError, MadeBy};
use crate::made_from::MadeFrom;
use crate::{files, leftovers};

/// Schema version that this program writes. It reads this one and all before it: version 2 adds times to the held-out
/// rows, and labels.
pub const VERSION: u32 = 2;

/// Name of the manifest inside a dataset directory.
pub(crate) const FILE: &str = "dataset.json";

/// The contents of `dataset.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub version: u32,
    pub name: String,
    /// SHA-256 over the logical content; the same for the same content in any input format and file layout.
    pub fingerprint: String,
    pub counts: Counts,
    /// Stored times are input times multiplied by this: 1, or 1,000,000 when some input time has a fraction. Input times
    /// that are dates or timestamps are microseconds since 1970.
    pub time_scale: i64,
    pub split: SplitInfo,
    pub filters: FilterInfo,
    /// What the labels of the interactions mean; `None` = they have none.
    #[serde(default)]
    pub labels: Option<LabelInfo>,
    /// Every file but this one and the embeddings, in reading order.
    pub files: Vec<FileEntry>,
    pub embeddings: Option<EmbeddingInfo>,
}

/// How many of what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Users of all splits.
    pub users: u64,
    /// Users with at least two training items: the rows of the training sequences.
    pub train_users: u32,
    pub valid_users: u32,
    pub test_users: u32,
    pub items: u32,
    /// Interactions that the filters kept, over all splits.
    pub interactions: u64,
    /// Interactions in the training sequences.
    pub train_interactions: u64,
}

/// How sequences were divided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitInfo {
    pub policy: SplitPolicy,
    /// By-time only: what was asked for and the first (scaled) times of the valid and the test part.
    pub by_time: Option<ByTime>,
}

/// A by-time split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ByTime {
    pub valid_share: f64,
    pub test_share: f64,
    pub valid_from: i64,
    pub test_from: i64,
}

/// The filters that were applied, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilterInfo {
    pub k_core: u32,
    pub min_length: u32,
    pub max_length: u32,
    pub keep_unseen_items: bool,
}

/// The conversion labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelInfo {
    /// Input labels of at least this are conversions; `None` = they were 0 and 1.
    pub at_least: Option<f64>,
    /// Interactions that converted, of [`Counts::interactions`].
    pub conversions: u64,
}

/// One file of the dataset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Relative to the dataset directory, with `/`.
    pub path: String,
    pub bytes: u64,
    pub sha256: String,
    pub rows: u64,
}

/// The content embeddings of the items.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingInfo {
    pub dim: u32,
    /// Always `f16`.
    pub dtype: String,
    /// The encoder or the file that made them, for people.
    pub model: String,
    /// SHA-256 over dimension, type and all rows in item order.
    pub fingerprint: String,
    pub files: Vec<FileEntry>,
    /// What these were refined from (`embed.refine`); kept, so that another refinement needs no language model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<Box<EmbeddingInfo>>,
    /// The settings that they were made with; `None` where another version has made them that has others, and of what others
    /// were refined from.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "known")]
    pub made_from: Option<MadeFrom>,
}

/// What this version knows to read, or nothing: it is for comparing, and no dataset is unreadable for its sake.
fn known<'de, D: Deserializer<'de>>(from: D) -> Result<Option<MadeFrom>, D::Error> {
    Ok(serde_json::from_value(serde_json::Value::deserialize(from)?).ok())
}

impl EmbeddingInfo {
    /// Its own files and those of what it was refined from.
    pub(crate) fn all_files(&self) -> impl Iterator<Item = &FileEntry> {
        self.files.iter().chain(self.raw.iter().flat_map(|raw| &raw.files))
    }
}

impl Manifest {
    /// Reads `dir/dataset.json`.
    pub(crate) fn read(dir: &Path) -> Result<Self, DatasetError> {
        let path = dir.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(leftovers::missing(dir));
            }
            Err(source) => return Err(DatasetError::Io { path, source }),
        };
        Self::parse(&text, &path)
    }

    /// The manifest in `text`, which `path` is named for in errors.
    pub(crate) fn parse(text: &[u8], path: &Path) -> Result<Self, DatasetError> {
        let damaged = |problem: &dyn ToString| DatasetError::damaged(MadeBy::Prepare, path, problem.to_string());
        let value: serde_json::Value = serde_json::from_slice(text).map_err(|error| damaged(&error))?;
        let found = value.get("version").and_then(serde_json::Value::as_u64);
        let found = found.ok_or_else(|| damaged(&"it has no schema version"))?;
        if !(1..=u64::from(VERSION)).contains(&found) {
            return Err(DatasetError::Version { path: path.to_owned(), found, known: VERSION });
        }
        let manifest: Self = serde_json::from_value(value).map_err(|error| damaged(&error))?;
        let embeddings = manifest.embeddings.iter().flat_map(EmbeddingInfo::all_files);
        for entry in manifest.files.iter().chain(embeddings) {
            let inside = Path::new(&entry.path).components().all(|part| matches!(part, Component::Normal(_)));
            if entry.path.is_empty() || !inside {
                return Err(damaged(&format!("it names the file \"{}\" outside of the dataset", entry.path)));
            }
        }
        Ok(manifest)
    }

    /// Replaces `dir/dataset.json` atomically.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), DatasetError> {
        let path = dir.join(FILE);
        files::write_atomically(&path, |file| {
            serde_json::to_writer_pretty(&mut *file, self)?;
            file.write_all(b"\n")
        })
        .map_err(DatasetError::io(&path))
    }

    /// Changes `dir/dataset.json` and returns what it says now; it is written only if that is something else. `prepare` and
    /// `embed` may do so at the same time, and neither loses what the other has written, unless the file system has no locks.
    pub(crate) fn update(dir: &Path, change: impl FnOnce(&mut Self)) -> Result<Self, DatasetError> {
        let lock = File::open(dir).map_err(DatasetError::io(dir))?;
        if let Err(error) = lock.lock() {
            tracing::debug!(%error, "there are no locks here: nothing keeps others from writing dataset.json meanwhile");
        }
        let before = Self::read(dir)?;
        let mut now = before.clone();
        change(&mut now);
        if now != before {
            now.write(dir)?;
        }
        Ok(now)
    }

    /// The files of one folder whose name begins with `prefix`.
    pub(crate) fn files_of<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a FileEntry> {
        self.files.iter().filter(move |entry| entry.path.starts_with(prefix))
    }
}

#[cfg(test)]
mod tests {
    use learn_domain::Config;

    use super::*;

    #[test]
    fn embeddings_that_another_version_has_made_with_other_settings_can_be_read() {
        let known = MadeFrom::of(&Config::default().embed, "minilm".into());
        let info = |made_from: serde_json::Value| -> EmbeddingInfo {
            let info = serde_json::json!({
                "dim": 8, "dtype": "f16", "model": "minilm", "fingerprint": "e", "files": [], "made_from": made_from,
            });
            serde_json::from_value(info).unwrap()
        };
        assert_eq!(info(serde_json::to_value(&known).unwrap()).made_from, Some(known));
        assert_eq!(info(serde_json::json!({ "source": { "oracle": {} }, "refine": {} })).made_from, None);
        assert_eq!(info(serde_json::Value::Null).made_from, None);
    }
}
