//! Vectors that were made elsewhere: from an `.npy` or `.parquet` file to the rows of the dataset's items.
//!
//! Input: the file and the dataset's items. Output: f16 rows by item index, scaled to unit length (their direction is
//! kept, their length is not, because the towers and the training-free baselines compare directions). Invariants: each
//! item gets exactly one vector; a value that is not a finite number, a row of zeros, a wrong count or an unknown order
//! is an error, never a guess.
//!
//! Which row belongs to which item:
//! - Parquet: by the column `item_id` or `id` if there is one, else row `i` is item index `i`.
//! - `.npy`: by the file beside it with the ending `.ids` (`vectors.ids` or `vectors.npy.ids` for `vectors.npy`; one item
//!   id per line, in the order of the rows) if there is one, else row `i` is item index `i`.
//!
//! The item index is the row of the item in the dataset's `items/` files, which is not the order of the file that
//! `prepare` read. When the item ids are themselves the numbers `0..n` in another order (as text, 10 stands before 2),
//! rows without ids are refused, since "row = item id" and "row = item index" would both fit.

mod matching;
mod npy;
mod parquet;
pub(crate) mod spool;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use self::parquet::ParquetFile;
use half::f16;
use learn_dataset::Item;
use matching::Matching;
use npy::NpyFile;
use spool::Spool;

/// Vectors cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum VectorError {
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: the rows put in order cannot be kept there: {source}; free some space", path.display())]
    Spool { path: PathBuf, source: io::Error },
    #[error("{} {problem}", path.display())]
    Invalid { path: PathBuf, problem: String },
    #[error("{}: row {row} (item {item:?}) {problem}", path.display())]
    Row { path: PathBuf, row: usize, item: String, problem: &'static str },
}

enum Source {
    /// Read at its place; `row_of[item]` if the file has an order of its own.
    Npy { file: NpyFile, row_of: Option<Vec<usize>> },
    /// Already checked, scaled and in item order.
    Spooled(Spool),
}

enum Layout {
    Npy { file: NpyFile, ids: Option<PathBuf> },
    Parquet(ParquetFile),
}

/// An opened file of vectors: what is in it, before anyone asked whose rows they are.
pub struct VectorFile {
    path: PathBuf,
    layout: Layout,
    fingerprint: String,
}

impl VectorFile {
    /// Opens a file and reads all of it once for its digest.
    ///
    /// # Errors
    /// The file is neither `.npy` nor `.parquet`, or is damaged.
    pub fn open(path: &Path) -> Result<Self, VectorError> {
        let mut hasher = blake3::Hasher::new_derive_key("learn-ceg imported vectors 1");
        let layout = match path.extension().and_then(|ending| ending.to_str()) {
            Some("npy") => {
                let file = NpyFile::open(path)?;
                let ids = ids_beside(path)?;
                if let Some(ids) = &ids {
                    digest(&mut hasher, ids)?;
                }
                Layout::Npy { file, ids }
            }
            Some("parquet") => {
                let file = ParquetFile::open(path)?;
                // shards whose rows were taken by their place are not those of this file
                if file.ids_are_called_id() {
                    hasher.update(b"id");
                }
                Layout::Parquet(file)
            }
            _ => {
                return Err(VectorError::Invalid {
                    path: path.into(),
                    problem: "has an unknown ending; vectors are read from .npy and .parquet".into(),
                });
            }
        };
        digest(&mut hasher, path)?;
        Ok(Self { path: path.into(), layout, fingerprint: hasher.finalize().to_hex().to_string() })
    }

    /// Numbers per vector.
    #[must_use]
    pub const fn dim(&self) -> usize {
        match &self.layout {
            Layout::Npy { file, .. } => file.dim(),
            Layout::Parquet(file) => file.dim(),
        }
    }

    /// Rows of the file.
    #[must_use]
    pub const fn rows(&self) -> usize {
        match &self.layout {
            Layout::Npy { file, .. } => file.rows(),
            Layout::Parquet(file) => file.rows(),
        }
    }

    /// Whether it says whose rows they are.
    #[must_use]
    pub const fn has_ids(&self) -> bool {
        match &self.layout {
            Layout::Npy { ids, .. } => ids.is_some(),
            Layout::Parquet(file) => file.has_ids(),
        }
    }

    /// A digest of the file and its ids.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The file's own name.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Finds each item's row. `scratch` is a directory on a disk with room for the vectors once more (Parquet only;
    /// nothing is left there).
    ///
    /// # Errors
    /// The file does not hold exactly one row per item, or a Parquet row is null, zero or not finite.
    pub fn place<'a>(self, items: &'a [Item], scratch: &Path) -> Result<ImportedVectors<'a>, VectorError> {
        let (source, ignored) = match self.layout {
            Layout::Npy { file, ids: Some(ids) } => {
                let (row_of, ignored) = rows_by_ids(&ids, file.rows(), items)?;
                (Source::Npy { file, row_of: Some(row_of) }, ignored)
            }
            Layout::Npy { file, ids: None } => {
                let ids = self.path.with_extension("ids");
                matching::in_item_order(
                    &self.path,
                    file.rows(),
                    items,
                    &format!("one id per line in {}", ids.display()),
                )?;
                (Source::Npy { file, row_of: None }, 0)
            }
            Layout::Parquet(file) => {
                let (spool, ignored) = file.spool(items, scratch)?;
                (Source::Spooled(spool), ignored)
            }
        };
        Ok(ImportedVectors { path: self.path, items, ignored, source })
    }
}

/// Vectors of all items of a dataset.
pub struct ImportedVectors<'a> {
    path: PathBuf,
    items: &'a [Item],
    ignored: usize,
    source: Source,
}

impl ImportedVectors<'_> {
    /// Rows whose id no item has.
    #[must_use]
    pub const fn ignored(&self) -> usize {
        self.ignored
    }

    /// The unit-length rows of these items.
    ///
    /// # Errors
    /// The file cannot be read, or a row is zero or holds a value that is not finite.
    pub fn rows(&self, items: Range<usize>) -> Result<Vec<f16>, VectorError> {
        let (file, row_of) = match &self.source {
            Source::Spooled(spool) => return spool.read(items),
            Source::Npy { file, row_of } => (file, row_of.as_deref()),
        };
        let row = |item: usize| row_of.map_or(item, |rows| rows[item]);
        let mut values = Vec::with_capacity(items.len() * file.dim());
        let mut next = items.start;
        while next < items.end {
            let run = 1 + (next + 1..items.end).take_while(|&item| row(item) == row(next) + (item - next)).count();
            file.read(row(next), run, &mut values)?;
            next += run;
        }
        let mut out = Vec::with_capacity(values.len());
        for (item, vector) in items.zip(values.chunks_exact(file.dim())) {
            unit_row(vector, &mut out).map_err(|problem| VectorError::Row {
                path: self.path.clone(),
                row: row(item),
                item: self.items[item].id.clone(),
                problem,
            })?;
        }
        Ok(out)
    }
}

/// The file of ids that belongs to an `.npy` file, if there is one.
fn ids_beside(path: &Path) -> Result<Option<PathBuf>, VectorError> {
    let files = [path.with_extension("ids"), path.with_extension("npy.ids")];
    let mut found = files.into_iter().filter(|ids| ids.is_file());
    match (found.next(), found.next()) {
        (Some(one), Some(other)) => {
            let problem = format!("and {} both hold ids of its rows; remove the wrong one", other.display());
            Err(VectorError::Invalid { path: one, problem })
        }
        (only, _) => Ok(only),
    }
}

fn digest(hasher: &mut blake3::Hasher, path: &Path) -> Result<(), VectorError> {
    File::open(path)
        .and_then(|file| hasher.update_reader(file).map(|_| ()))
        .map_err(|source| VectorError::Read { path: path.into(), source })
}

/// The `.npy` row of each item, by the ids beside the file, and how many rows belong to no item.
fn rows_by_ids(path: &Path, rows: usize, items: &[Item]) -> Result<(Vec<usize>, usize), VectorError> {
    let text = std::fs::read_to_string(path).map_err(|source| VectorError::Read { path: path.into(), source })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let lines = text.lines().count();
    if lines != rows {
        return Err(VectorError::Invalid {
            path: path.into(),
            problem: format!("has {lines} lines but the .npy file has {rows} rows; one id per row is wanted"),
        });
    }
    let mut matching = Matching::new(path, items);
    let mut row_of = vec![0; items.len()];
    for (row, id) in text.lines().enumerate() {
        if let Some(item) = matching.item(row, id)? {
            row_of[item] = row;
        }
    }
    Ok((row_of, matching.finish()?))
}

/// Appends a row at unit length.
///
/// # Errors
/// What is wrong with the row and what to do.
pub(crate) fn unit_row(row: &[f32], out: &mut Vec<f16>) -> Result<(), &'static str> {
    let norm = row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if !norm.is_finite() {
        return Err("holds NaN or infinity; look at the text and the precision it was made with, and make it again");
    }
    if norm == 0.0 {
        return Err(
            "is all zeros, which has no direction; give the item a vector of its text, or leave it out of prepare",
        );
    }
    out.extend(row.iter().map(|&value| f16::from_f64(f64::from(value) / norm)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_keeps_its_direction_at_any_length() {
        for scale in [1.0, 1e-30, 1e30] {
            let mut out = Vec::new();
            unit_row(&[3.0 * scale, -4.0 * scale], &mut out).unwrap();
            assert_eq!(out, [f16::from_f32(0.6), f16::from_f32(-0.8)]);
        }
    }

    #[test]
    fn rows_without_a_direction_are_refused() {
        let refused = |row: &[f32]| unit_row(row, &mut Vec::new()).unwrap_err();
        assert!(refused(&[0.0, 0.0]).contains("zeros"));
        assert!(refused(&[1.0, f32::NAN]).contains("NaN"));
        assert!(refused(&[f32::NEG_INFINITY, 1.0]).contains("infinity"));
    }
}
