//! Who works with a dataset, so that none is replaced under a job.
//!
//! A job has a shared lock of the dataset's first file while it serves the dataset, `prepare --replace` an exclusive one while
//! it puts another one in its place. Invariants: that file is written once, so that a lock of it is one of the dataset; where the
//! file system has no locks, or the file cannot be opened, nobody is kept from anything.

use std::fs::{File, TryLockError};
use std::path::PathBuf;

use crate::dataset::Dataset;
use crate::error::DatasetError;

impl Dataset {
    /// Keeps `prepare --replace` from this dataset for as long as the file is open; `None` if it cannot be kept.
    ///
    /// # Errors
    /// The dataset is being replaced now.
    pub fn hold(&self) -> Result<Option<File>, DatasetError> {
        let Some(file) = self.first_file().and_then(|path| File::open(path).ok()) else { return Ok(None) };
        match file.try_lock_shared() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Err(DatasetError::BeingReplaced { path: self.dir().to_path_buf() }),
            Err(TryLockError::Error(error)) => {
                tracing::debug!(%error, "there are no locks here: nothing keeps `prepare --replace` from the dataset");
                Ok(None)
            }
        }
    }

    /// Keeps jobs from this dataset for as long as the file is open; `None` if they cannot be kept.
    ///
    /// # Errors
    /// A job has it, or another `prepare --replace`.
    pub(crate) fn claim(&self) -> Result<Option<File>, DatasetError> {
        // NFS locks for one process only what is open for writing
        let opened = self.first_file().and_then(|path| File::options().read(true).write(true).open(path).ok());
        let Some(file) = opened else { return Ok(None) };
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Err(DatasetError::InUse { path: self.dir().to_path_buf() }),
            Err(TryLockError::Error(_)) => Ok(None),
        }
    }

    fn first_file(&self) -> Option<PathBuf> {
        let entry = self.manifest().files.first()?;
        Some(self.dir().join(&entry.path))
    }
}
