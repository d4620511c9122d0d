//! The sequence files: their schemas, and reading them without copying.
//!
//! Input: mapped Arrow IPC files, possibly several with several batches each. Output: slices by row.
//! Invariants checked on opening: schema, equal lengths of items and times, row counts of the manifest. That every
//! item index is below the number of items is checked by [`crate::Dataset::verify`], which reads all pages.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use arrow_array::cast::AsArray;
use arrow_array::types::{ArrowPrimitiveType, Int64Type, UInt32Type};
use arrow_array::{Array, RecordBatch};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Field, Fields};
use rayon::prelude::*;

use crate::error::DatasetError;
use crate::ipc;
use crate::manifest::FileEntry;

fn list(name: &str, values: DataType) -> Field {
    Field::new(name, DataType::List(Arc::new(Field::new_list_field(values, false))), false)
}

/// Columns of `sequences/train-*.arrow`.
pub(crate) static TRAIN_FIELDS: LazyLock<Fields> = LazyLock::new(|| {
    vec![Field::new("user", DataType::UInt32, false), list("items", DataType::UInt32), list("times", DataType::Int64)]
        .into()
});

/// Columns of `sequences/valid-*.arrow` and `sequences/test-*.arrow`.
pub(crate) static HELD_OUT_FIELDS: LazyLock<Fields> = LazyLock::new(|| {
    vec![
        Field::new("user", DataType::UInt32, false),
        list("history", DataType::UInt32),
        list("targets", DataType::UInt32),
    ]
    .into()
});

/// One list column of one batch.
#[derive(Debug)]
struct Lists<T: ArrowPrimitiveType> {
    offsets: OffsetBuffer<i32>,
    values: ScalarBuffer<T::Native>,
}

impl<T: ArrowPrimitiveType> Lists<T> {
    fn new(batch: &RecordBatch, column: usize) -> Result<Self, &'static str> {
        let list = batch.column(column).as_list::<i32>();
        if list.values().null_count() > 0 {
            return Err("a list has missing values");
        }
        Ok(Self { offsets: list.offsets().clone(), values: list.values().as_primitive::<T>().values().clone() })
    }

    fn row(&self, row: usize) -> &[T::Native] {
        // Arrow's builder validated that offsets are not negative, grow, and end inside of the values.
        &self.values[self.offsets[row] as usize..self.offsets[row + 1] as usize]
    }

    /// The values of all rows.
    fn all(&self) -> &[T::Native] {
        let (first, last) = (self.offsets[0], self.offsets[self.offsets.len() - 1]);
        &self.values[first as usize..last as usize]
    }
}

/// Rows of several batches under one numbering.
#[derive(Debug)]
struct Batches<B> {
    parts: Vec<B>,
    /// First row of each part; strictly ascending, since empty batches are left out.
    starts: Vec<usize>,
    rows: usize,
}

impl<B> Batches<B> {
    fn open<'a>(
        dir: &Path,
        files: impl Iterator<Item = &'a FileEntry>,
        fields: &Fields,
        part: impl Fn(&RecordBatch) -> Result<B, &'static str>,
    ) -> Result<Self, DatasetError> {
        let mut this = Self { parts: Vec::new(), starts: Vec::new(), rows: 0 };
        for entry in files {
            let path = dir.join(&entry.path);
            let mut rows = 0;
            for batch in ipc::open(&path, fields)?.batches.iter().filter(|batch| batch.num_rows() > 0) {
                this.parts.push(part(batch).map_err(|problem| DatasetError::damaged(&path, problem))?);
                this.starts.push(this.rows);
                this.rows += batch.num_rows();
                rows += batch.num_rows() as u64;
            }
            if rows != entry.rows {
                let problem = format!("it has {rows} rows, dataset.json says {}", entry.rows);
                return Err(DatasetError::damaged(&path, problem));
            }
        }
        Ok(this)
    }

    /// The part that holds a row, and the row's number inside of it.
    ///
    /// # Panics
    /// If `row` is not below the number of rows, as indexing a slice does.
    fn find(&self, row: usize) -> (&B, usize) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let part = self.starts.partition_point(|&start| start <= row) - 1;
        (&self.parts[part], row - self.starts[part])
    }
}

#[derive(Debug)]
struct TrainPart {
    users: ScalarBuffer<u32>,
    items: Lists<UInt32Type>,
    times: Lists<Int64Type>,
}

/// The training sequences: a row per user with at least two training items, oldest item first.
#[derive(Debug)]
pub struct Sequences(Batches<TrainPart>);

impl Sequences {
    pub(crate) fn open<'a>(dir: &Path, files: impl Iterator<Item = &'a FileEntry>) -> Result<Self, DatasetError> {
        let part = |batch: &RecordBatch| {
            let (items, times) = (Lists::new(batch, 1)?, Lists::new(batch, 2)?);
            if items.offsets != times.offsets {
                return Err("a row has more items than times, or fewer");
            }
            Ok(TrainPart { users: users(batch), items, times })
        };
        Batches::open(dir, files, &TRAIN_FIELDS, part).map(Self)
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.rows
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The item indices of a row, oldest first.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn items(&self, row: usize) -> &[u32] {
        let (part, row) = self.0.find(row);
        part.items.row(row)
    }

    /// The times of [`Self::items`], in the input's unit times the manifest's `time_scale`.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn times(&self, row: usize) -> &[i64] {
        let (part, row) = self.0.find(row);
        part.times.row(row)
    }

    /// The global user number of a row.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn user(&self, row: usize) -> u32 {
        let (part, row) = self.0.find(row);
        part.users[row]
    }

    /// The item indices of all rows, in pieces.
    pub(crate) fn all_items(&self) -> impl Iterator<Item = &[u32]> {
        self.0.parts.iter().map(|part| part.items.all())
    }

    pub(crate) fn check(&self, users: u64, items: u32) -> Result<(), String> {
        check_users(self.0.parts.iter().map(|part| &part.users[..]), users)?;
        self.0.parts.par_iter().try_for_each(|part| {
            check_items(part.items.all(), items)?;
            match part.items.offsets.windows(2).all(|pair| pair[1] - pair[0] >= 2) {
                true => Ok(()),
                false => Err("a training sequence has fewer than two items".into()),
            }
        })
    }
}

#[derive(Debug)]
struct HeldOutPart {
    users: ScalarBuffer<u32>,
    history: Lists<UInt32Type>,
    targets: Lists<UInt32Type>,
}

/// The rows of a held-out split: what a user did before, and what is to be predicted.
#[derive(Debug)]
pub struct HeldOut(Batches<HeldOutPart>);

impl HeldOut {
    pub(crate) fn open<'a>(dir: &Path, files: impl Iterator<Item = &'a FileEntry>) -> Result<Self, DatasetError> {
        let part = |batch: &RecordBatch| {
            Ok(HeldOutPart { users: users(batch), history: Lists::new(batch, 1)?, targets: Lists::new(batch, 2)? })
        };
        Batches::open(dir, files, &HELD_OUT_FIELDS, part).map(Self)
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.rows
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The global user number of a row; ascending.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn user(&self, row: usize) -> u32 {
        let (part, row) = self.0.find(row);
        part.users[row]
    }

    /// The item indices before the split point, oldest first; at least one.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn history(&self, row: usize) -> &[u32] {
        let (part, row) = self.0.find(row);
        part.history.row(row)
    }

    /// The item indices to be predicted, oldest first; at least one.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn targets(&self, row: usize) -> &[u32] {
        let (part, row) = self.0.find(row);
        part.targets.row(row)
    }

    pub(crate) fn check(&self, users: u64, items: u32) -> Result<(), String> {
        check_users(self.0.parts.iter().map(|part| &part.users[..]), users)?;
        self.0.parts.par_iter().try_for_each(|part| {
            for lists in [&part.history, &part.targets] {
                check_items(lists.all(), items)?;
                if lists.offsets.windows(2).any(|pair| pair[0] == pair[1]) {
                    return Err("a row has no history or no targets".into());
                }
            }
            Ok(())
        })
    }
}

fn users(batch: &RecordBatch) -> ScalarBuffer<u32> {
    batch.column(0).as_primitive::<UInt32Type>().values().clone()
}

fn check_users<'a>(parts: impl Iterator<Item = &'a [u32]>, users: u64) -> Result<(), String> {
    let mut before = None;
    for &user in parts.flatten() {
        if u64::from(user) >= users || before.is_some_and(|before| before >= user) {
            return Err(format!("user number {user} is out of order or not below {users}"));
        }
        before = Some(user);
    }
    Ok(())
}

fn check_items(indices: &[u32], items: u32) -> Result<(), String> {
    match indices.iter().max() {
        Some(&largest) if largest >= items => {
            Err(format!("item index {largest} is not below {items}, the number of items"))
        }
        _ => Ok(()),
    }
}
