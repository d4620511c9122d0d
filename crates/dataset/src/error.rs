//! What can be wrong with a dataset that is read, and what to do about it.

use std::path::{Path, PathBuf};

use crate::embeddings::FOLDER;
use crate::manifest;

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
    #[error(
        "{} is damaged: {problem}; restore it from a copy, or run `learn-launch embed CONFIG`, which makes the damaged \
         content embeddings again and keeps the others", .path.display()
    )]
    DamagedEmbeddings { path: PathBuf, problem: String },
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

    /// A damaged file; what mends it depends on who makes it.
    pub(crate) fn damaged(path: &Path, problem: impl ToString) -> Self {
        let (path, problem) = (path.to_path_buf(), problem.to_string());
        // only these lie in a folder of this name: all that lies in a dataset's own is dataset.json
        let folder = path.parent().and_then(Path::file_name);
        match folder.is_some_and(|folder| folder == FOLDER) && !path.ends_with(manifest::FILE) {
            true => Self::DamagedEmbeddings { path, problem },
            false => Self::Damaged { path, problem },
        }
    }
}
