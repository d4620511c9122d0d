//! `learn-worker export --cvr-features SPLIT`: what the CVR head knows of each held-out pair, for a ranking model.
//!
//! Output: `cvr-features.parquet`, a row per exposure of the split in its order, with the columns `user` and `item` (ids of
//! the original data), `label` (1 = converted), `user_embedding` and `item_embedding` (`d` f32 each) and `middle` (the
//! head's hidden layer after its ReLU, `objective.cvr_hidden` f32). The schema's metadata names the split and the dataset's
//! fingerprint.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, FixedSizeListArray, Float32Array, RecordBatch, StringArray, UInt8Array};
use arrow_schema::{DataType, Field, Schema};
use learn_dataset::{Progress, Unit};
use learn_domain::report::Split;
use parquet::arrow::ArrowWriter;
use tch::Tensor;

use crate::error::WorkerError;
use crate::offline::{History, Offline, refuse_non_finite};

/// Version of the schema.
const VERSION: u32 = 1;
/// Name of the file.
pub const FILE: &str = "cvr-features.parquet";
/// Users whose pairs are in memory at once.
const USER_BLOCK: usize = 256;

/// Width of the CVR head's hidden layer of a run that has what [`write`] writes.
///
/// # Errors
/// If the run has no CVR head, or the dataset no labels.
pub fn width(offline: &Offline) -> Result<i64, WorkerError> {
    match offline.cvr_hidden() {
        None => Err(WorkerError::Usage(
            "the run has no CVR head, so there are no features of it; train with objective.cvr_weight above 0".into(),
        )),
        Some(_) if !offline.dataset.has_labels() => Err(no_labels()),
        Some(width) => Ok(width),
    }
}

fn no_labels() -> WorkerError {
    WorkerError::Usage("the dataset has no labels; name their column with prepare.interactions.label".into())
}

/// What is written.
#[derive(Clone, Copy)]
pub struct Features<'a> {
    pub offline: &'a Offline,
    /// Item embeddings `[N, d]`.
    pub items: &'a Tensor,
    pub split: Split,
}

/// Writes the pairs of a split into `folder` and returns their number.
///
/// # Errors
/// If the run has no CVR head, the dataset no labels, a value is not finite, or the disk refuses.
pub fn write(features: &Features<'_>, folder: &Path, progress: &dyn Progress) -> Result<usize, WorkerError> {
    let Features { offline, items, split } = *features;
    let path = folder.join(FILE);
    let failed = |reason: String| WorkerError::File { path: path.display().to_string(), reason };
    let width = width(offline)?;
    let rows = offline.dataset.held_out(split);
    progress.stage("cvr features", Some(rows.len() as u64), Unit::Rows);
    let dim = items.size()[1];
    let schema = schema(offline, split, (dim, width));
    let file = File::create(&path).map_err(|error| failed(error.to_string()))?;
    let mut writer = ArrowWriter::try_new(file, schema.clone(), None).map_err(|error| failed(error.to_string()))?;
    let user_ids = offline.dataset.user_ids()?;
    let item_ids: Vec<String> = offline.dataset.items()?.into_iter().map(|item| item.id).collect();
    let mut written = 0;
    for first in (0..rows.len()).step_by(USER_BLOCK) {
        let block = first..(first + USER_BLOCK).min(rows.len());
        let histories: Vec<History> = block.clone().map(|row| History::before_targets(rows, row)).collect();
        let users = offline.users(&histories, progress)?;
        let mut pairs: Vec<(i64, usize, u32, u8)> = Vec::new();
        for (at, row) in (0..).zip(block) {
            let (_, labels) = rows.labels(row).ok_or_else(no_labels)?;
            let user = rows.user(row) as usize;
            pairs.extend(rows.targets(row).iter().zip(labels).map(|(&item, &label)| (at, user, item, label)));
        }
        let index = |values: Vec<i64>| Tensor::from_slice(&values);
        let user = users.index_select(0, &index(pairs.iter().map(|pair| pair.0).collect()));
        let item = items.index_select(0, &index(pairs.iter().map(|pair| i64::from(pair.2)).collect()));
        let middle = offline.cvr_middle(&user, &item);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(pairs.iter().map(|pair| &user_ids[pair.1]))),
            Arc::new(StringArray::from_iter_values(pairs.iter().map(|pair| &item_ids[pair.2 as usize]))),
            Arc::new(UInt8Array::from_iter_values(pairs.iter().map(|pair| pair.3))),
            vectors(&user)?,
            vectors(&item)?,
            vectors(&middle)?,
        ];
        let batch = RecordBatch::try_new(schema.clone(), columns).map_err(|error| failed(error.to_string()))?;
        writer.write(&batch).map_err(|error| failed(error.to_string()))?;
        written += pairs.len();
    }
    writer.close().map_err(|error| failed(error.to_string()))?;
    Ok(written)
}

fn element() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::Float32, false))
}

fn schema(offline: &Offline, split: Split, (dim, width): (i64, i64)) -> Arc<Schema> {
    let list = |name: &str, width: i64| Field::new(name, DataType::FixedSizeList(element(), width as i32), false);
    let fields = vec![
        Field::new("user", DataType::Utf8, false),
        Field::new("item", DataType::Utf8, false),
        Field::new("label", DataType::UInt8, false),
        list("user_embedding", dim),
        list("item_embedding", dim),
        list("middle", width),
    ];
    let metadata = [
        ("learn.version", VERSION.to_string()),
        ("learn.split", split.to_string()),
        ("learn.fingerprint", offline.dataset.manifest().fingerprint.clone()),
    ];
    let metadata: HashMap<String, String> = metadata.map(|(key, value)| (key.to_owned(), value)).into();
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

/// A column of the rows of a tensor `[K, W]`.
fn vectors(rows: &Tensor) -> Result<ArrayRef, WorkerError> {
    refuse_non_finite(rows)?;
    let values: Vec<f32> = Vec::try_from(rows.contiguous().view([-1]))?;
    let list =
        FixedSizeListArray::try_new(element(), rows.size()[1] as i32, Arc::new(Float32Array::from(values)), None);
    Ok(Arc::new(list.map_err(|error| WorkerError::File { path: FILE.into(), reason: error.to_string() })?))
}
