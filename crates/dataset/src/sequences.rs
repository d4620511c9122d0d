//! The sequence files: their schemas, and reading them without copying.
//!
//! Input: mapped Arrow IPC files, possibly several with several batches each. Output: slices by row.
//! Invariants checked on opening: schema, equal lengths of items and times, row counts of the manifest. That every
//! item index is below the number of items is checked by [`crate::Dataset::verify`], which reads all pages.

use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{ArrowPrimitiveType, Int64Type, UInt8Type, UInt32Type};
use arrow_array::{Array, RecordBatch};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Field, Fields};
use rayon::prelude::*;

use crate::error::{DatasetError, MadeBy};
use crate::ipc;
use crate::manifest::{FileEntry, Manifest};
use crate::progress::Progress;

fn list(name: &str, values: DataType) -> Field {
    Field::new(name, DataType::List(Arc::new(Field::new_list_field(values, false))), false)
}

/// What the sequence files of a dataset have besides items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Columns {
    /// Held-out rows have times, as training rows always do: from version 2 on.
    pub(crate) held_out_times: bool,
    pub(crate) labels: bool,
}

impl Columns {
    pub(crate) fn of(manifest: &Manifest) -> Self {
        Self { held_out_times: manifest.version >= 2, labels: manifest.labels.is_some() }
    }
}

/// Columns of `sequences/train-*.arrow`.
pub(crate) fn train_fields(columns: Columns) -> Fields {
    let mut fields = vec![
        Field::new("user", DataType::UInt32, false),
        list("items", DataType::UInt32),
        list("times", DataType::Int64),
    ];
    if columns.labels {
        fields.push(list("labels", DataType::UInt8));
    }
    fields.into()
}

/// Columns of `sequences/valid-*.arrow` and `sequences/test-*.arrow`.
pub(crate) fn held_out_fields(columns: Columns) -> Fields {
    let mut fields = vec![
        Field::new("user", DataType::UInt32, false),
        list("history", DataType::UInt32),
        list("targets", DataType::UInt32),
    ];
    if columns.held_out_times {
        fields.extend(["history_times", "target_times"].map(|name| list(name, DataType::Int64)));
    }
    if columns.labels {
        fields.extend(["history_labels", "target_labels"].map(|name| list(name, DataType::UInt8)));
    }
    fields.into()
}

/// One list column of one batch.
#[derive(Debug)]
struct Lists<T: ArrowPrimitiveType> {
    offsets: OffsetBuffer<i32>,
    values: ScalarBuffer<T::Native>,
}

impl<T: ArrowPrimitiveType> Lists<T> {
    /// A column that the file's schema is known to have.
    fn new(batch: &RecordBatch, column: &str) -> Result<Self, &'static str> {
        let list = batch.column_by_name(column).ok_or("a column is missing")?.as_list::<i32>();
        if list.values().null_count() > 0 {
            return Err("a list has missing values");
        }
        Ok(Self { offsets: list.offsets().clone(), values: list.values().as_primitive::<T>().values().clone() })
    }

    /// A column about the same interactions as `items`.
    fn beside(batch: &RecordBatch, column: &str, items: &Lists<UInt32Type>) -> Result<Self, &'static str> {
        let lists = Self::new(batch, column)?;
        if lists.offsets != items.offsets {
            return Err("a row has more items than times or labels, or fewer");
        }
        Ok(lists)
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

/// One batch: a user in each row, and what else the rows of the split hold.
#[derive(Debug)]
struct Part<L> {
    users: ScalarBuffer<u32>,
    lists: L,
}

/// Rows of several batches under one numbering.
#[derive(Debug)]
struct Batches<L> {
    parts: Vec<Part<L>>,
    /// First row of each part; strictly ascending, since empty batches are left out.
    starts: Vec<usize>,
    rows: usize,
}

impl<L> Batches<L> {
    fn open<'a>(
        dir: &Path,
        files: impl Iterator<Item = &'a FileEntry>,
        fields: &Fields,
        lists: impl Fn(&RecordBatch) -> Result<L, &'static str>,
    ) -> Result<Self, DatasetError> {
        let mut this = Self { parts: Vec::new(), starts: Vec::new(), rows: 0 };
        for entry in files {
            let path = dir.join(&entry.path);
            let damaged = |problem: &str| DatasetError::damaged(MadeBy::Prepare, &path, problem);
            let (file, mut rows) = (ipc::open(MadeBy::Prepare, &path, fields)?, 0);
            for batch in file.batches.iter().filter(|batch| batch.num_rows() > 0) {
                let users = batch.column(0).as_primitive::<UInt32Type>().values().clone();
                this.parts.push(Part { users, lists: lists(batch).map_err(damaged)? });
                this.starts.push(this.rows);
                this.rows += batch.num_rows();
                rows += batch.num_rows() as u64;
            }
            if rows != entry.rows {
                return Err(damaged(&format!("it has {rows} rows, dataset.json says {}", entry.rows)));
            }
        }
        Ok(this)
    }

    /// The part that holds a row, and the row's number inside of it.
    ///
    /// # Panics
    /// If `row` is not below the number of rows, as indexing a slice does.
    fn find(&self, row: usize) -> (&Part<L>, usize) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let part = self.starts.partition_point(|&start| start <= row) - 1;
        (&self.parts[part], row - self.starts[part])
    }

    /// The lists of the part that holds a row, and the row's number inside of it.
    ///
    /// # Panics
    /// As [`Self::find`].
    fn lists(&self, row: usize) -> (&L, usize) {
        let (part, row) = self.find(row);
        (&part.lists, row)
    }

    /// The global user number of a row.
    ///
    /// # Panics
    /// As [`Self::find`].
    fn user(&self, row: usize) -> u32 {
        let (part, row) = self.find(row);
        part.users[row]
    }

    /// Checks that users are below `users` and ascend, and the lists of each part; when it is stopped, of none that is left.
    fn check(
        &self,
        users: u64,
        progress: &dyn Progress,
        lists: impl Fn(&L) -> Result<(), String> + Sync,
    ) -> Result<(), String>
    where
        L: Sync,
    {
        let mut before = None;
        for &user in self.parts.iter().flat_map(|part| &part.users[..]) {
            if u64::from(user) >= users || before.is_some_and(|before| before >= user) {
                return Err(format!("user number {user} is out of order or not below {users}"));
            }
            before = Some(user);
        }
        let check = |part: &Part<L>| if progress.stopped() { Ok(()) } else { lists(&part.lists) };
        self.parts.par_iter().try_for_each(check)
    }
}

#[derive(Debug)]
struct TrainLists {
    items: Lists<UInt32Type>,
    times: Lists<Int64Type>,
    labels: Option<Lists<UInt8Type>>,
}

/// The training sequences: a row per user with at least two training items, oldest item first.
#[derive(Debug)]
pub struct Sequences(Batches<TrainLists>);

impl Sequences {
    pub(crate) fn open<'a>(
        dir: &Path,
        files: impl Iterator<Item = &'a FileEntry>,
        columns: Columns,
    ) -> Result<Self, DatasetError> {
        let lists = |batch: &RecordBatch| {
            let items = Lists::new(batch, "items")?;
            Ok(TrainLists {
                times: Lists::beside(batch, "times", &items)?,
                labels: columns.labels.then(|| Lists::beside(batch, "labels", &items)).transpose()?,
                items,
            })
        };
        Batches::open(dir, files, &train_fields(columns), lists).map(Self)
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
        let (lists, row) = self.0.lists(row);
        lists.items.row(row)
    }

    /// The times of [`Self::items`], in the input's unit times the manifest's `time_scale`.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn times(&self, row: usize) -> &[i64] {
        let (lists, row) = self.0.lists(row);
        lists.times.row(row)
    }

    /// The labels of [`Self::items`], 1 = converted; `None` in a dataset without labels.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn labels(&self, row: usize) -> Option<&[u8]> {
        let (lists, row) = self.0.lists(row);
        lists.labels.as_ref().map(|labels| labels.row(row))
    }

    /// The global user number of a row.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn user(&self, row: usize) -> u32 {
        self.0.user(row)
    }

    /// The item indices of all rows, in pieces.
    pub(crate) fn all_items(&self) -> impl Iterator<Item = &[u32]> {
        self.0.parts.iter().map(|part| part.lists.items.all())
    }

    pub(crate) fn check(&self, users: u64, items: u32, progress: &dyn Progress) -> Result<(), String> {
        self.0.check(users, progress, |lists| {
            check_items(lists.items.all(), items)?;
            check_labels(lists.labels.as_ref())?;
            match lists.items.offsets.windows(2).all(|pair| pair[1] - pair[0] >= 2) {
                true => Ok(()),
                false => Err("a training sequence has fewer than two items".into()),
            }
        })
    }
}

#[derive(Debug)]
struct HeldOutLists {
    history: Lists<UInt32Type>,
    targets: Lists<UInt32Type>,
    /// Of history and targets.
    times: Option<[Lists<Int64Type>; 2]>,
    labels: Option<[Lists<UInt8Type>; 2]>,
}

/// The rows of a held-out split: what a user did before, and what is to be predicted.
#[derive(Debug)]
pub struct HeldOut(Batches<HeldOutLists>);

impl HeldOut {
    pub(crate) fn open<'a>(
        dir: &Path,
        files: impl Iterator<Item = &'a FileEntry>,
        columns: Columns,
    ) -> Result<Self, DatasetError> {
        let lists = |batch: &RecordBatch| {
            let (history, targets) = (Lists::new(batch, "history")?, Lists::new(batch, "targets")?);
            let times = || -> Result<_, &'static str> {
                let history = Lists::beside(batch, "history_times", &history)?;
                Ok([history, Lists::beside(batch, "target_times", &targets)?])
            };
            let labels = || -> Result<_, &'static str> {
                let history = Lists::beside(batch, "history_labels", &history)?;
                Ok([history, Lists::beside(batch, "target_labels", &targets)?])
            };
            Ok(HeldOutLists {
                times: columns.held_out_times.then(times).transpose()?,
                labels: columns.labels.then(labels).transpose()?,
                history,
                targets,
            })
        };
        Batches::open(dir, files, &held_out_fields(columns), lists).map(Self)
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
        self.0.user(row)
    }

    /// The item indices before the split point, oldest first; at least one.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn history(&self, row: usize) -> &[u32] {
        let (lists, row) = self.0.lists(row);
        lists.history.row(row)
    }

    /// The item indices to be predicted, oldest first; at least one.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn targets(&self, row: usize) -> &[u32] {
        let (lists, row) = self.0.lists(row);
        lists.targets.row(row)
    }

    /// The times of [`Self::history`] and of [`Self::targets`], in the input's unit times the manifest's `time_scale`;
    /// `None` in a dataset of version 1.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn times(&self, row: usize) -> Option<(&[i64], &[i64])> {
        let (lists, row) = self.0.lists(row);
        lists.times.as_ref().map(|[history, targets]| (history.row(row), targets.row(row)))
    }

    /// The labels of [`Self::history`] and of [`Self::targets`], 1 = converted; `None` in a dataset without labels.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn labels(&self, row: usize) -> Option<(&[u8], &[u8])> {
        let (lists, row) = self.0.lists(row);
        lists.labels.as_ref().map(|[history, targets]| (history.row(row), targets.row(row)))
    }

    pub(crate) fn check(&self, users: u64, items: u32, progress: &dyn Progress) -> Result<(), String> {
        self.0.check(users, progress, |lists| {
            for labels in lists.labels.iter().flatten() {
                check_labels(Some(labels))?;
            }
            for list in [&lists.history, &lists.targets] {
                check_items(list.all(), items)?;
                if list.offsets.windows(2).any(|pair| pair[0] == pair[1]) {
                    return Err("a row has no history or no targets".into());
                }
            }
            Ok(())
        })
    }
}

fn check_labels(labels: Option<&Lists<UInt8Type>>) -> Result<(), String> {
    match labels.and_then(|labels| labels.all().iter().max()) {
        Some(&largest) if largest > 1 => Err(format!("label {largest} is neither 0 nor 1")),
        _ => Ok(()),
    }
}

fn check_items(indices: &[u32], items: u32) -> Result<(), String> {
    match indices.iter().max() {
        Some(&largest) if largest >= items => {
            Err(format!("item index {largest} is not below {items}, the number of items"))
        }
        _ => Ok(()),
    }
}
