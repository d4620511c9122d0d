//! Who works on a dataset's embeddings: one `embed`, or a `prepare` that replaces the dataset.
//!
//! Input: a dataset's directory. Output: an open file, which the system unlocks with the process at the latest.

use std::fs::{File, TryLockError};
use std::path::Path;

use anyhow::{Context as _, Result};
use learn_domain::run_dir::RunDir;

use crate::failure::Failure;
use crate::runs;

/// One `embed` a dataset; the system drops the lock with the process.
pub(super) fn take(dataset: &Path) -> Result<File> {
    match try_lock(dataset) {
        Ok(file) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let shown = crate::commands::shown(dataset);
            let message = format!(
                "{shown} is being embedded now by another `learn-launch embed`, or replaced by `prepare --replace`; wait for \
                 it, or stop it"
            );
            Err(Failure::Busy(message).into())
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", RunDir::embedding_lock(dataset).display()))
        }
    }
}

/// Keeps every `embed` from a dataset that is there, for as long as the file is open; `None` if it cannot be kept.
///
/// # Errors
/// An `embed` works on it.
pub fn keep_out(dataset: &Path) -> Result<Option<File>, String> {
    let lock = match try_lock(dataset) {
        Ok(file) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(()),
        Err(TryLockError::Error(error)) => {
            tracing::debug!(%error, "there are no locks here: nothing keeps `embed` from the dataset");
            Ok(None)
        }
    };
    // the coordinator may have outlived the command that has started it
    match lock {
        Ok(lock) if runs::live(&RunDir::of_embedding(dataset)).is_none() => Ok(lock),
        _ => {
            let shown = crate::commands::shown(dataset);
            Err(format!(
                "{shown} is being embedded now; wait until that has ended, or stop it with `learn-launch stop {shown}`"
            ))
        }
    }
}

/// The lock of a dataset's embed job.
fn try_lock(dataset: &Path) -> Result<File, TryLockError> {
    let path = RunDir::embedding_lock(dataset);
    let open = || {
        path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        File::options().create(true).append(true).open(&path)
    };
    let file = open().map_err(TryLockError::Error)?;
    file.try_lock()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dataset_is_replaced_where_there_are_no_locks_and_not_under_an_embed() {
        let folder = tempfile::tempdir().unwrap();
        let first = keep_out(folder.path()).unwrap();
        assert!(first.is_some());
        let second = keep_out(folder.path()).unwrap_err();
        assert!(second.contains("is being embedded now"), "{second}");
        drop(first);
        assert!(take(folder.path()).is_ok());

        let folder = tempfile::tempdir().unwrap();
        // a lock that cannot be made
        std::fs::write(folder.path().join("embeddings"), "").unwrap();
        assert!(keep_out(folder.path()).unwrap().is_none());
        let refused = take(folder.path()).unwrap_err().to_string();
        assert!(refused.starts_with("cannot lock "), "{refused}");
    }
}
