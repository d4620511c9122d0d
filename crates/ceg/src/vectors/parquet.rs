//! Reading vectors from a Parquet file: a column of float lists, and the column `item_id` or `id` if the rows have an
//! order of their own.
//!
//! Input: the file and the dataset's items. Output: a [`Spool`] of unit-length rows in item order. The file is streamed;
//! memory grows with the number of items, not with their vectors.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type};
use arrow_array::{Array, ArrayRef};
use arrow_schema::{DataType, Schema};
use half::f16;
use learn_dataset::{Item, id_texts};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::matching::{self, Matching};
use super::spool::Spool;
use super::{VectorError, unit_row};

/// Names of the column of ids: that of interactions, and that of the dataset's `items/` files and of `export`.
const ID_COLUMNS: [&str; 2] = ["item_id", "id"];
const VECTOR_COLUMN: &str = "embedding";
const BATCH_ROWS: usize = 1024;

/// A Parquet file whose columns of interest are known.
pub(super) struct ParquetFile {
    path: PathBuf,
    rows: usize,
    dim: usize,
    vectors: String,
    ids: Option<&'static str>,
}

impl ParquetFile {
    pub(super) fn open(path: &Path) -> Result<Self, VectorError> {
        let invalid = |problem: String| VectorError::Invalid { path: path.into(), problem };
        let builder = builder(path)?;
        let vectors = vector_column(builder.schema()).map_err(invalid)?;
        let field = builder.schema().field(vectors).clone();
        let ids = id_column(builder.schema()).map_err(invalid)?;
        let rows = usize::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or_default();
        let mask = ProjectionMask::roots(builder.parquet_schema(), [vectors]);
        let mut first =
            builder.with_projection(mask).with_batch_size(1).build().map_err(|error| damaged(path, &error))?;
        let first =
            first.next().ok_or_else(|| invalid("has no rows".into()))?.map_err(|error| damaged(path, &error))?;
        let mut values = Vec::new();
        list_values(first.column(0), 0, &mut values).map_err(|problem| invalid(format!("row 0 {problem}")))?;
        if values.is_empty() {
            return Err(invalid("has vectors without numbers".into()));
        }
        Ok(Self { path: path.into(), rows, dim: values.len(), vectors: field.name().clone(), ids })
    }

    pub(super) const fn dim(&self) -> usize {
        self.dim
    }

    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    pub(super) const fn has_ids(&self) -> bool {
        self.ids.is_some()
    }

    pub(super) fn ids_are_called_id(&self) -> bool {
        self.ids == Some(ID_COLUMNS[1])
    }

    /// Reads the whole file; the second value is the number of rows whose id no item has.
    pub(super) fn spool(&self, items: &[Item], scratch: &Path) -> Result<(Spool, usize), VectorError> {
        let path = self.path.as_path();
        let invalid = |problem: String| VectorError::Invalid { path: path.into(), problem };
        if !self.has_ids() {
            matching::in_item_order(path, self.rows, items, &format!("a column {}", ID_COLUMNS[0]))?;
        }
        let builder = builder(path)?;
        let wanted = self.ids.into_iter().chain([self.vectors.as_str()]);
        let columns: Vec<usize> = wanted.filter_map(|name| builder.schema().index_of(name).ok()).collect();
        let mask = ProjectionMask::roots(builder.parquet_schema(), columns);
        let reader =
            builder.with_projection(mask).with_batch_size(BATCH_ROWS).build().map_err(|error| damaged(path, &error))?;

        let spool = Spool::new(scratch, self.dim)?;
        let mut matching = Matching::new(path, items);
        let mut row = 0;
        for batch in reader {
            let batch = batch.map_err(|error| damaged(path, &error))?;
            let column =
                |name: &str| batch.column_by_name(name).ok_or_else(|| invalid(format!("lost its column {name}")));
            let vectors = column(&self.vectors)?;
            let ids = match self.ids {
                None => None,
                Some(name) => {
                    let texts = id_texts(column(name)?).map_err(|problem| invalid(format!("column {name} {problem}")));
                    Some((name, texts?))
                }
            };
            for at in 0..batch.num_rows() {
                let item = match &ids {
                    None => Some(row),
                    Some((name, ids)) if ids.is_null(at) => {
                        return Err(invalid(format!("row {row}: {name} is missing")));
                    }
                    Some((_, ids)) => matching.item(row, ids.value(at))?,
                };
                if let Some(item) = item {
                    let unit = self.unit_row(vectors, at).map_err(|problem| VectorError::Row {
                        path: path.into(),
                        row,
                        item: items[item].id.clone(),
                        problem,
                    })?;
                    spool.write(item, &unit)?;
                }
                row += 1;
            }
        }
        let ignored = if self.has_ids() { matching.finish()? } else { 0 };
        Ok((spool, ignored))
    }

    fn unit_row(&self, vectors: &ArrayRef, at: usize) -> Result<Vec<f16>, &'static str> {
        let mut values = Vec::with_capacity(self.dim);
        list_values(vectors, at, &mut values)?;
        if values.len() != self.dim {
            return Err("has another number of values than row 0; all vectors need the same dimension");
        }
        let mut unit = Vec::with_capacity(self.dim);
        unit_row(&values, &mut unit)?;
        Ok(unit)
    }
}

fn damaged(path: &Path, error: &dyn std::error::Error) -> VectorError {
    VectorError::Invalid { path: path.into(), problem: format!("is not a readable Parquet file: {error}") }
}

fn builder(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, VectorError> {
    let file = File::open(path).map_err(|source| VectorError::Read { path: path.into(), source })?;
    ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| damaged(path, &error))
}

fn is_vector(kind: &DataType) -> bool {
    match kind {
        DataType::List(inner) | DataType::LargeList(inner) | DataType::FixedSizeList(inner, _) => {
            matches!(inner.data_type(), DataType::Float16 | DataType::Float32 | DataType::Float64)
        }
        _ => false,
    }
}

fn vector_column(schema: &Schema) -> Result<usize, String> {
    let found: Vec<usize> = (0..schema.fields().len()).filter(|&at| is_vector(schema.field(at).data_type())).collect();
    let names =
        |columns: &[usize]| columns.iter().map(|&at| schema.field(at).name().as_str()).collect::<Vec<_>>().join(", ");
    match found[..] {
        [] => Err(format!(
            "has no column of float lists (its columns: {})",
            names(&(0..schema.fields().len()).collect::<Vec<_>>())
        )),
        [only] => Ok(only),
        _ => found.iter().copied().find(|&at| schema.field(at).name() == VECTOR_COLUMN).ok_or_else(|| {
            format!("has several columns of float lists ({}); call the right one {VECTOR_COLUMN:?}", names(&found))
        }),
    }
}

fn id_column(schema: &Schema) -> Result<Option<&'static str>, String> {
    let mut found = ID_COLUMNS.into_iter().filter(|name| schema.index_of(name).is_ok());
    match (found.next(), found.next()) {
        (Some(one), Some(other)) => {
            Err(format!("has both a column {one} and a column {other}; leave out the one that does not hold item ids"))
        }
        (only, _) => Ok(only),
    }
}

fn list_values(vectors: &ArrayRef, at: usize, out: &mut Vec<f32>) -> Result<(), &'static str> {
    const NULL: &str = "has no value; give the item a vector, or leave it out of prepare";
    if vectors.is_null(at) {
        return Err(NULL);
    }
    let list = match vectors.data_type() {
        DataType::FixedSizeList(..) => vectors.as_fixed_size_list().value(at),
        DataType::LargeList(_) => vectors.as_list::<i64>().value(at),
        _ => vectors.as_list::<i32>().value(at),
    };
    if list.null_count() > 0 {
        return Err(NULL);
    }
    match list.data_type() {
        DataType::Float16 => out.extend(list.as_primitive::<Float16Type>().values().iter().map(|value| value.to_f32())),
        DataType::Float32 => out.extend_from_slice(list.as_primitive::<Float32Type>().values()),
        // Beyond f32's range a value becomes infinite and is refused.
        _ => out.extend(list.as_primitive::<Float64Type>().values().iter().map(|&value| value as f32)),
    }
    Ok(())
}
