//! Rows of the sequence files while they are gathered, and the writer of these files.
//!
//! A row is a user with one or two spans of interactions: the training sequence, or history and targets. A batch's columns
//! are the user, the items of each span, the times of each span, and the labels of each span if the dataset has any.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow_array::types::{ArrowPrimitiveType, Int64Type, UInt8Type, UInt32Type};
use arrow_array::{Array, ListArray, PrimitiveArray, RecordBatch, UInt32Array};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_ipc::writer::FileWriter;
use arrow_schema::{ArrowError, Field, Fields};

use super::error::PrepareError;
use super::output::Layout;
use super::partition::History;
use crate::files::HashingFile;
use crate::ipc;
use crate::manifest::FileEntry;

/// One span of interactions of each row.
#[derive(Default)]
struct Spans {
    /// Where each row's span ends.
    ends: Vec<usize>,
    items: Vec<u32>,
    times: Vec<i64>,
    labels: Vec<u8>,
}

impl Spans {
    /// Appends the spans of these rows of another column.
    fn append(&mut self, other: &Self, rows: Range<usize>) {
        let (from, to) = (other.start(rows.start), other.start(rows.end));
        let before = self.items.len();
        self.items.extend_from_slice(&other.items[from..to]);
        self.times.extend_from_slice(&other.times[from..to]);
        self.labels.extend_from_slice(&other.labels[from..to]);
        self.ends.extend(other.ends[rows].iter().map(|end| end - from + before));
    }

    fn start(&self, row: usize) -> usize {
        row.checked_sub(1).map_or(0, |before| self.ends[before])
    }
}

/// Rows of N spans each.
pub(super) struct Rows<const N: usize> {
    users: Vec<u32>,
    spans: [Spans; N],
}

impl<const N: usize> Default for Rows<N> {
    fn default() -> Self {
        Self { users: Vec::new(), spans: std::array::from_fn(|_| Spans::default()) }
    }
}

impl<const N: usize> Rows<N> {
    /// Adds a user's row; `index` is the item index by item number.
    pub(super) fn push(&mut self, user: u32, spans: [History; N], index: &[u32]) {
        self.users.push(user);
        for (column, span) in self.spans.iter_mut().zip(spans) {
            column.items.extend(span.items.iter().map(|&item| index[item as usize]));
            column.times.extend_from_slice(span.times);
            column.labels.extend_from_slice(span.labels);
            column.ends.push(column.items.len());
        }
    }

    /// Interactions of all spans.
    pub(super) fn interactions(&self) -> u64 {
        self.spans.iter().map(|spans| spans.items.len() as u64).sum()
    }
}

/// Writes `sequences/NAME-*.arrow`.
pub(super) struct SequenceWriter<'a, const N: usize> {
    root: &'a Path,
    name: &'static str,
    fields: Fields,
    layout: Layout,
    file: Option<(FileWriter<HashingFile>, usize, u64)>,
    entries: Vec<FileEntry>,
    /// Rows that wait to be written as a batch.
    rows: Rows<N>,
}

impl<'a, const N: usize> SequenceWriter<'a, N> {
    pub(super) fn new(root: &'a Path, (name, fields): (&'static str, Fields), layout: Layout) -> Self {
        Self { root, name, fields, layout, file: None, entries: Vec::new(), rows: Rows::default() }
    }

    pub(super) fn append(&mut self, rows: &Rows<N>) -> Result<(), PrepareError> {
        let mut row = 0;
        while row < rows.users.len() {
            let end = row + self.room(rows, row);
            if end == row {
                self.flush()?;
                // a row that is too long for any batch has one of its own
                self.take(rows, row..row + 1)?;
                row += 1;
            } else {
                self.take(rows, row..end)?;
                row = end;
            }
        }
        Ok(())
    }

    /// How many of the rows from `start` on the batch that waits has room for.
    fn room(&self, rows: &Rows<N>, start: usize) -> usize {
        let room = self.layout.batch_rows.saturating_sub(self.rows.users.len());
        let within = |(own, new): (&Spans, &Spans)| {
            let most = (new.start(start) + self.layout.batch_items).checked_sub(own.items.len());
            most.map_or(0, |most| new.ends[start..].partition_point(|&end| end <= most))
        };
        self.rows.spans.iter().zip(&rows.spans).map(within).fold(room.min(rows.users.len() - start), usize::min)
    }

    fn take(&mut self, rows: &Rows<N>, taken: Range<usize>) -> Result<(), PrepareError> {
        self.rows.users.extend_from_slice(&rows.users[taken.clone()]);
        for (own, new) in self.rows.spans.iter_mut().zip(&rows.spans) {
            own.append(new, taken.clone());
            if i32::try_from(own.items.len()).is_err() {
                let limit = i32::MAX as u64;
                return Err(PrepareError::TooMany { what: "interactions of one user", limit });
            }
        }
        Ok(())
    }

    /// Writes what waits as a batch.
    fn flush(&mut self) -> Result<(), PrepareError> {
        if !self.rows.users.is_empty() {
            self.write_batch().map_err(PrepareError::write(self.root))?;
        }
        Ok(())
    }

    fn write_batch(&mut self) -> Result<(), ArrowError> {
        let schema = Arc::new(ipc::schema(&self.fields, [("learn.split".to_owned(), self.name.to_owned())]));
        let Rows { users, mut spans } = std::mem::take(&mut self.rows);
        let rows = users.len() as u64;
        let mut columns: Vec<Arc<dyn Array>> = vec![Arc::new(UInt32Array::from(users))];
        for span in &mut spans {
            columns.push(list::<UInt32Type>(&span.ends, std::mem::take(&mut span.items))?);
        }
        for span in &mut spans {
            columns.push(list::<Int64Type>(&span.ends, std::mem::take(&mut span.times))?);
        }
        if self.fields.len() > columns.len() {
            for span in &mut spans {
                columns.push(list::<UInt8Type>(&span.ends, std::mem::take(&mut span.labels))?);
            }
        }
        let batch = RecordBatch::try_new(schema.clone(), columns)?;
        let relative = self.relative();
        let (writer, batches, file_rows) = match &mut self.file {
            Some(file) => file,
            none => {
                let file = HashingFile::create(&self.root.join(&relative))?;
                none.insert((FileWriter::try_new(file, &schema)?, 0, 0))
            }
        };
        writer.write(&batch)?;
        *batches += 1;
        *file_rows += rows;
        if *batches >= self.layout.file_batches {
            self.close()?;
        }
        Ok(())
    }

    /// Of the file that is being written, or is next.
    fn relative(&self) -> String {
        format!("sequences/{}-{:05}.arrow", self.name, self.entries.len())
    }

    fn close(&mut self) -> Result<(), ArrowError> {
        if let Some((writer, _, rows)) = self.file.take() {
            let relative = self.relative();
            self.entries.push(writer.into_inner()?.finish()?.entry(relative, rows));
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Vec<FileEntry>, PrepareError> {
        self.flush()?;
        self.close().map_err(PrepareError::write(self.root))?;
        Ok(self.entries)
    }
}

/// A list column; `append` has checked that its offsets fit.
fn list<T: ArrowPrimitiveType>(ends: &[usize], values: Vec<T::Native>) -> Result<Arc<dyn Array>, ArrowError> {
    let element = Arc::new(Field::new_list_field(T::DATA_TYPE, false));
    let values = PrimitiveArray::<T>::new(ScalarBuffer::from(values), None);
    let offsets: Vec<i32> = std::iter::once(0).chain(ends.iter().map(|&end| end as i32)).collect();
    Ok(Arc::new(ListArray::try_new(element, OffsetBuffer::new(offsets.into()), Arc::new(values), None)?))
}
