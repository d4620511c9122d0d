//! Content embeddings of the items: reading them ([`Embeddings`]) and making them ([`EmbeddingStore`]).
//!
//! Layout: `embeddings/part-SHARD-KEY.arrow`, one column of `FixedSizeList<f16, dim>`, row = item index within the
//! shard. Shards are in item order without gaps; the manifest's `embeddings` section names the files that count.

mod store;

use std::path::Path;
use std::sync::Arc;

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::Float16Type;
use arrow_buffer::ScalarBuffer;
use arrow_schema::{DataType, Field, Fields};
use half::f16;
pub use store::{EmbeddingSpec, EmbeddingStore, Shard};

use crate::error::DatasetError;
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
    let fields = fields(dim).map_err(|problem| DatasetError::damaged(path, problem))?;
    let file = ipc::open(path, &fields)?;
    let mut parts = Vec::new();
    for batch in file.batches.iter().filter(|batch| batch.num_rows() > 0) {
        let list = batch.column(0).as_fixed_size_list();
        let values = list.values().as_primitive::<Float16Type>();
        if values.null_count() > 0 || values.len() != batch.num_rows() * dim {
            return Err(DatasetError::damaged(path, "it has missing values"));
        }
        parts.push(values.values().clone());
    }
    Ok((parts, file))
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
                return Err(DatasetError::damaged(&path, problem));
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

    /// All rows in item order, as long contiguous pieces (whole rows each).
    pub fn pieces(&self) -> impl Iterator<Item = &[f16]> {
        self.parts.iter().map(|part| &part[..])
    }
}
