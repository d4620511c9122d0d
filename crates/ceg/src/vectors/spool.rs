//! Finished rows in item order, in a file without a name: it is gone when the process is, however that ends.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::f16;

use super::VectorError;

/// Rows that arrive in any order and are read by item index.
pub(crate) struct Spool {
    directory: PathBuf,
    file: File,
    dim: usize,
}

impl Spool {
    pub(crate) fn new(directory: &Path, dim: usize) -> Result<Self, VectorError> {
        let file =
            tempfile::tempfile_in(directory).map_err(|source| VectorError::Spool { path: directory.into(), source })?;
        Ok(Self { directory: directory.into(), file, dim })
    }

    fn offset(&self, item: usize) -> u64 {
        (item * self.dim * size_of::<f16>()) as u64
    }

    pub(crate) fn write(&self, item: usize, row: &[f16]) -> Result<(), VectorError> {
        self.file
            .write_all_at(bytemuck::cast_slice(row), self.offset(item))
            .map_err(|source| VectorError::Spool { path: self.directory.clone(), source })
    }

    pub(crate) fn read(&self, items: Range<usize>) -> Result<Vec<f16>, VectorError> {
        let mut rows = vec![f16::ZERO; items.len() * self.dim];
        self.file
            .read_exact_at(bytemuck::cast_slice_mut(&mut rows), self.offset(items.start))
            .map_err(|source| VectorError::Spool { path: self.directory.clone(), source })?;
        Ok(rows)
    }
}
