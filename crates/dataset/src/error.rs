//! What can be wrong with a dataset that is read, and what to do about it.

use std::path::{Path, PathBuf};

/// Which command has made a file of a dataset: it also mends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadeBy {
    /// `learn-launch prepare`: everything but the content embeddings.
    Prepare,
    /// `learn-launch embed`: the content embeddings.
    Embed,
}

impl MadeBy {
    fn remedy(self) -> &'static str {
        match self {
            Self::Prepare => "prepare the dataset again with `--replace`",
            Self::Embed => {
                "run `learn-launch embed CONFIG`, which makes the damaged content embeddings again and keeps the others"
            }
        }
    }
}

/// A dataset directory that cannot be used as it is.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is not a dataset: it holds no dataset.json; make one with `learn-launch prepare CONFIG`", .path.display())]
    NotADataset { path: PathBuf },
    #[error(
        "{} holds no dataset: `prepare --replace` ended while it put another one there. The one before is {}: \
         `mv -T {} {}` gets it back; if nobody needs it, remove the folder that it is in",
        .path.display(), .old.display(), .old.display(), .path.display()
    )]
    PutAside { path: PathBuf, old: PathBuf },
    #[error(
        "{} has schema version {found}, this program reads versions 1 to {known}; prepare the dataset again, or use the \
         program that wrote it", .path.display()
    )]
    Version { path: PathBuf, found: u64, known: u32 },
    #[error("{} is damaged: {problem}; restore it from a copy, or {}", .path.display(), .made_by.remedy())]
    Damaged { path: PathBuf, made_by: MadeBy, problem: String },
    #[error("{} is being replaced by `prepare --replace` now; start again when that has ended", .path.display())]
    BeingReplaced { path: PathBuf },
    #[error(
        "a job works with {} now, or another `prepare --replace`: wait until it has ended, or stop it with `learn-launch stop \
         RUN`; another directory in data.dataset needs no waiting", .path.display()
    )]
    InUse { path: PathBuf },
    #[error("{} has no content embeddings; run `learn-launch embed CONFIG`", .path.display())]
    NoEmbeddings { path: PathBuf },
    #[error("content embeddings of {}: {problem}; run `learn-launch embed CONFIG`", .path.display())]
    Embeddings { path: PathBuf, problem: String },
    #[error("content embeddings of {}: {problem}", .path.display())]
    BadRows { path: PathBuf, problem: String },
    #[error(
        "content embeddings of {}: the row of item index {item}, counted from 0 in items/*.parquet, {problem}",
        .path.display()
    )]
    BadRow { path: PathBuf, item: usize, problem: String },
    #[error("the check of the dataset's files was stopped")]
    Stopped,
}

impl DatasetError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    /// A damaged file.
    pub(crate) fn damaged(made_by: MadeBy, path: &Path, problem: impl ToString) -> Self {
        Self::Damaged { path: path.to_path_buf(), made_by, problem: problem.to_string() }
    }
}
