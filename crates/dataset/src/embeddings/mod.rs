//! Content embeddings of the items: reading them ([`Embeddings`]) and making them ([`EmbeddingStore`]).
//!
//! Layout: `embeddings/part-SHARD-KEY.arrow`, one column of `FixedSizeList<f16, dim>`, row = item index within the
//! shard. Shards are in item order without gaps; the manifest's `embeddings` section names the files that count.

pub mod int8;
mod store;

use std::path::Path;
use std::sync::Arc;

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::Float16Type;
use arrow_buffer::ScalarBuffer;
use arrow_schema::{DataType, Field, Fields};
use half::f16;
use learn_domain::config::RowFormat;
use rayon::prelude::*;
pub use store::{EmbeddingSpec, EmbeddingStore, Shard};

use crate::error::{DatasetError, MadeBy};
use crate::ipc;
use crate::manifest::EmbeddingInfo;

/// Folder of the embeddings inside a dataset directory.
pub(crate) const FOLDER: &str = "embeddings";
/// The element type of version 1.
pub(crate) const DTYPE: &str = "f16";

fn fields(dim: usize) -> Result<Fields, String> {
    let size = i32::try_from(dim).ok().filter(|&size| size > 0).ok_or_else(|| format!("dimension {dim}"))?;
    let list = DataType::FixedSizeList(Arc::new(Field::new_list_field(DataType::Float16, false)), size);
    Ok(vec![Field::new("embedding", list, false)].into())
}

/// The values of one mapped file, row after row.
pub(crate) fn values(path: &Path, dim: usize) -> Result<(Vec<ScalarBuffer<f16>>, ipc::MappedBatches), DatasetError> {
    let damaged = |problem: String| DatasetError::damaged(MadeBy::Embed, path, problem);
    let fields = fields(dim).map_err(damaged)?;
    let file = ipc::open(MadeBy::Embed, path, &fields)?;
    let mut parts = Vec::new();
    for batch in file.batches.iter().filter(|batch| batch.num_rows() > 0) {
        let list = batch.column(0).as_fixed_size_list();
        let values = list.values().as_primitive::<Float16Type>();
        if values.null_count() > 0 || values.len() != batch.num_rows() * dim {
            return Err(damaged("it has missing values".into()));
        }
        parts.push(values.values().clone());
    }
    Ok((parts, file))
}

/// A content embedding that cannot be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    #[error("item {item} does not exist; there are {rows} items")]
    NoSuchItem { item: u32, rows: usize },
    #[error(
        "the content embedding of item {item} cannot be written as int8: {source}; restore the dataset from a copy, or run \
         `learn-launch embed CONFIG`, which makes damaged ones again"
    )]
    NotFinite { item: u32, source: int8::NotFinite },
}

/// The content embeddings of all items, memory-mapped.
#[derive(Debug)]
pub struct Embeddings {
    dim: usize,
    rows: usize,
    parts: Vec<ScalarBuffer<f16>>,
    /// First row of each part, strictly ascending.
    starts: Vec<usize>,
}

impl Embeddings {
    pub(crate) fn open(dir: &Path, info: &EmbeddingInfo, items: usize) -> Result<Self, DatasetError> {
        let wrong = |problem: String| DatasetError::Embeddings { path: dir.to_path_buf(), problem };
        if info.dtype != DTYPE {
            return Err(wrong(format!("they are {}, this program reads {DTYPE}", info.dtype)));
        }
        let dim = info.dim as usize;
        let mut this = Self { dim, rows: 0, parts: Vec::new(), starts: Vec::new() };
        for entry in &info.files {
            let path = dir.join(&entry.path);
            let before = this.rows;
            for part in values(&path, dim)?.0 {
                this.starts.push(this.rows);
                this.rows += part.len() / dim;
                this.parts.push(part);
            }
            if (this.rows - before) as u64 != entry.rows {
                let problem = format!("it has {} rows, dataset.json says {}", this.rows - before, entry.rows);
                return Err(DatasetError::damaged(MadeBy::Embed, &path, problem));
            }
        }
        if this.rows != items {
            return Err(wrong(format!("there are {} rows for {items} items", this.rows)));
        }
        Ok(this)
    }

    /// Values per row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Number of rows, the same as of items.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The embedding of an item.
    ///
    /// # Panics
    /// If there is no such item, as indexing a slice does.
    #[must_use]
    pub fn row(&self, item: usize) -> &[f16] {
        assert!(item < self.rows, "item {item} of {}", self.rows);
        let part = self.starts.partition_point(|&start| start <= item) - 1;
        let start = (item - self.starts[part]) * self.dim;
        &self.parts[part][start..start + self.dim]
    }

    /// The embeddings of `items` `[items, dim]`, with the values that they have after travelling in this format.
    ///
    /// # Errors
    /// If there is no such item, or one of its values is not finite and the format is int8.
    pub fn gather(&self, items: &[u32], format: RowFormat) -> Result<Vec<f16>, RowError> {
        let mut block = vec![f16::ZERO; items.len() * self.dim];
        self.gather_into(items, format, &mut block)?;
        Ok(block)
    }

    /// As [`Embeddings::gather`], into a block of this size.
    ///
    /// # Errors
    /// As [`Embeddings::gather`].
    pub fn gather_into(&self, items: &[u32], format: RowFormat, block: &mut [f16]) -> Result<(), RowError> {
        if let Some(&item) = items.iter().find(|&&item| item as usize >= self.rows) {
            return Err(RowError::NoSuchItem { item, rows: self.rows });
        }
        let rows = block.par_chunks_exact_mut(self.dim).zip(items).with_min_len(64);
        match format {
            RowFormat::F16 => rows.for_each(|(row, &item)| row.copy_from_slice(self.row(item as usize))),
            RowFormat::Int8 => rows.try_for_each(|(row, &item)| {
                let rounded = int8::round_trip(self.row(item as usize), row);
                rounded.map_err(|source| RowError::NotFinite { item, source })
            })?,
        }
        Ok(())
    }

    /// All rows in item order, as long contiguous pieces (whole rows each).
    pub fn pieces(&self) -> impl Iterator<Item = &[f16]> {
        self.parts.iter().map(|part| &part[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[[f32; 3]]) -> Embeddings {
        let part = |rows: &[[f32; 3]]| -> ScalarBuffer<f16> {
            rows.iter().flatten().map(|&value| f16::from_f32(value)).collect::<Vec<_>>().into()
        };
        let (first, rest) = rows.split_at(1);
        Embeddings { dim: 3, rows: rows.len(), parts: vec![part(first), part(rest)], starts: vec![0, 1] }
    }

    #[test]
    fn rows_are_gathered_with_the_values_that_the_format_gives_them() {
        let table = table(&[[1.0, 0.3, -0.2], [0.1, -0.7, 0.6], [0.5, 0.5, 0.011]]);
        let rows = |format| table.gather(&[2, 0, 2], format).unwrap();
        assert_eq!(rows(RowFormat::F16), [table.row(2), table.row(0), table.row(2)].concat());
        let mut expected = vec![f16::ZERO; 9];
        for (item, rounded) in [2, 0, 2].into_iter().zip(expected.chunks_exact_mut(3)) {
            int8::round_trip(table.row(item), rounded).unwrap();
        }
        assert_eq!(rows(RowFormat::Int8), expected);
        assert_ne!(rows(RowFormat::Int8), rows(RowFormat::F16));
        assert!(table.gather(&[], RowFormat::Int8).unwrap().is_empty());
        let missing = table.gather(&[0, 3], RowFormat::Int8).unwrap_err();
        assert_eq!(missing, RowError::NoSuchItem { item: 3, rows: 3 });
    }

    #[test]
    fn a_damaged_row_is_named_where_it_cannot_be_rounded() {
        let table = table(&[[1.0, 0.3, -0.2], [0.1, f32::NAN, 0.6], [0.5, 0.5, 0.0]]);
        let error = table.gather(&[0, 2, 1], RowFormat::Int8).unwrap_err().to_string();
        assert!(error.contains("item 1") && error.contains("learn-launch embed"), "{error}");
        assert!(table.gather(&[0, 2], RowFormat::Int8).is_ok());
        assert!(table.gather(&[1], RowFormat::F16).unwrap()[1].is_nan());
    }
}
