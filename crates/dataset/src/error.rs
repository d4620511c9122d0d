//! What can be wrong with a dataset that is read, and what to do about it.

use std::path::{Path, PathBuf};

/// A dataset directory that cannot be used as it is.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is not a dataset: it holds no dataset.json; make one with `learn-launch prepare CONFIG`", .path.display())]
    NotADataset { path: PathBuf },
    #[error(
        "{} has schema version {found}, this program reads versions 1 to {known}; prepare the dataset again, or use the \
         program that wrote it", .path.display()
    )]
    Version { path: PathBuf, found: u64, known: u32 },
    #[error(
        "{} is damaged: {problem}; restore it from a copy, or prepare the dataset again with `--replace`",
        .path.display()
    )]
    Damaged { path: PathBuf, problem: String },
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
}

impl DatasetError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn damaged(path: &Path, problem: impl ToString) -> Self {
        Self::Damaged { path: path.to_path_buf(), problem: problem.to_string() }
    }
}
