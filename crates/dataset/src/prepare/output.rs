//! Writes the dataset's files and computes its fingerprint in one pass over what the filters left.
//!
//! Partitions are divided and numbered in parallel, a few at a time, and written in order while the next are divided.
//! The fingerprint hashes ids, texts, sequences, times and the split rule, in the order of item indices and user
//! numbers; file layout, input format and names of files do not enter.

use std::path::Path;
use std::sync::Arc;

use arrow_array::types::{ArrowPrimitiveType, Int64Type, UInt32Type};
use arrow_array::{Array, ListArray, PrimitiveArray, RecordBatch, UInt32Array};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_ipc::writer::FileWriter;
use arrow_schema::{ArrowError, Field, Fields, Schema};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::error::PrepareError;
use super::split::Rule;
use super::store::{Partition, Store};
use crate::catalogue::{Item, UserWriter, write_items};
use crate::files::{HashingFile, hex};
use crate::ipc;
use crate::manifest::{Counts, FileEntry};
use crate::progress::Progress;
use crate::sequences::{HELD_OUT_FIELDS, TRAIN_FIELDS};

/// How rows are grouped while working and into batches and files; neither content nor fingerprint depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Most rows of a batch of sequences.
    pub batch_rows: usize,
    /// A batch of sequences ends when it has this many items.
    pub batch_items: usize,
    /// Batches of one file of sequences.
    pub file_batches: usize,
    /// Rows of one file of items or users.
    pub file_rows: usize,
    /// Interactions that are held in memory at once, per thread.
    pub partition_rows: u64,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            batch_rows: 1 << 16,
            batch_items: 1 << 20,
            file_batches: 256,
            file_rows: 1 << 20,
            partition_rows: 1 << 21,
        }
    }
}

/// What is written, and how.
pub(crate) struct Output<'a> {
    /// The directory that becomes the dataset; its folders exist.
    pub(crate) root: &'a Path,
    pub(crate) store: &'a Store,
    pub(crate) rule: &'a Rule,
    /// Item index by item number.
    pub(crate) item_index: &'a [u32],
    /// In order of item index.
    pub(crate) items: &'a [Item],
    pub(crate) users_left: &'a [u64],
    pub(crate) time_scale: i64,
    pub(crate) layout: Layout,
}

/// What was written.
pub(crate) struct Written {
    pub(crate) files: Vec<FileEntry>,
    pub(crate) counts: Counts,
    pub(crate) fingerprint: String,
    /// Rows of valid and test that were left out since the user has no history before them.
    pub(crate) without_history: [u64; 2],
}

/// The folders of a dataset that `prepare` writes.
pub(crate) const FOLDERS: [&str; 3] = ["items", "users", "sequences"];

/// A list column of a few rows.
struct Lists<T> {
    ends: Vec<usize>,
    values: Vec<T>,
}

impl<T> Default for Lists<T> {
    fn default() -> Self {
        Self { ends: Vec::new(), values: Vec::new() }
    }
}

impl<T: Copy> Lists<T> {
    fn push(&mut self, values: impl Iterator<Item = T>) {
        self.values.extend(values);
        self.ends.push(self.values.len());
    }

    fn rows(&self) -> impl Iterator<Item = &[T]> {
        let mut start = 0;
        self.ends.iter().map(move |&end| &self.values[std::mem::replace(&mut start, end)..end])
    }
}

/// Rows of a sequence file: user, items or history, times or targets.
struct Rows<T> {
    users: Vec<u32>,
    first: Lists<u32>,
    second: Lists<T>,
}

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Self { users: Vec::new(), first: Lists::default(), second: Lists::default() }
    }
}

/// A partition, divided.
#[derive(Default)]
struct Divided {
    ranks: Vec<u32>,
    train: Rows<i64>,
    valid: Rows<u32>,
    test: Rows<u32>,
    without_history: [u64; 2],
    interactions: u64,
    /// SHA-256 of each user.
    digests: Vec<u8>,
}

impl Output<'_> {
    /// Writes items, users and sequences.
    pub(crate) fn write(&self, progress: &dyn Progress) -> Result<Written, PrepareError> {
        progress.stage("write", Some(self.users_left.iter().sum()));
        let failed = |error| PrepareError::write(self.root)(error);
        let mut files = write_items(self.root, self.items.iter(), self.layout.file_rows).map_err(failed)?;
        let mut sink = Sink {
            users: UserWriter::new(self.root, self.layout.file_rows),
            train: SequenceWriter::new(self.root, "train", &TRAIN_FIELDS, self.layout),
            valid: SequenceWriter::new(self.root, "valid", &HELD_OUT_FIELDS, self.layout),
            test: SequenceWriter::new(self.root, "test", &HELD_OUT_FIELDS, self.layout),
            digest: Sha256::new(),
            interactions: 0,
            train_interactions: 0,
            without_history: [0; 2],
            output: self,
        };
        let starts = self.users_left.iter().scan(0, |next, users| {
            let start = *next;
            *next += users;
            Some(start)
        });
        let work: Vec<(&Partition, u64)> = self.store.partitions.iter().zip(starts).collect();
        let mut divided: Vec<Divided> = Vec::new();
        for window in work.chunks(rayon::current_num_threads()) {
            let divide = || window.par_iter().map(|&(partition, start)| self.divide(partition, start)).collect();
            let (written, next): (_, Result<Vec<Divided>, PrepareError>) =
                rayon::join(|| sink.take(&divided, progress), divide);
            written?;
            divided = next?;
        }
        sink.take(&divided, progress)?;
        sink.finish(&mut files)
    }

    /// Divides the users of a partition; `start` is the number of its first user.
    fn divide(&self, partition: &Partition, start: u64) -> Result<Divided, PrepareError> {
        let mut divided = Divided::default();
        // `prepare` refuses more users than 32 bits number.
        let mut user = start as u32;
        self.store.for_each_user(partition, |rank, records| {
            let index = |at: usize| self.item_index[records[at].item as usize];
            let parts = self.rule.divide(records);
            let id = self.store.users.get(self.store.order[rank as usize]);
            let mut digest = Sha256::new();
            digest.update((id.len() as u64).to_le_bytes());
            digest.update(id);
            for (at, record) in records.iter().enumerate() {
                let mut bytes = [0; 12];
                bytes[..4].copy_from_slice(&index(at).to_le_bytes());
                bytes[4..].copy_from_slice(&record.time.to_le_bytes());
                digest.update(bytes);
            }
            divided.digests.extend_from_slice(&digest.finalize());
            if parts.train >= 2 {
                divided.train.users.push(user);
                divided.train.first.push((0..parts.train).map(index));
                divided.train.second.push(records[..parts.train].iter().map(|record| record.time));
            }
            for (split, rows, targets) in [(0, &mut divided.valid, parts.valid), (1, &mut divided.test, parts.test)] {
                if targets.is_empty() {
                    continue;
                }
                if targets.start == 0 {
                    divided.without_history[split] += 1;
                    continue;
                }
                rows.users.push(user);
                rows.first.push((0..targets.start).map(index));
                rows.second.push(targets.map(index));
            }
            divided.ranks.push(rank);
            divided.interactions += records.len() as u64;
            user += 1;
        })?;
        Ok(divided)
    }

    /// The hash of everything but the sequences.
    fn frame(&self) -> Sha256 {
        let mut digest = Sha256::new();
        digest.update(b"learn-dataset/1\n");
        match self.rule {
            Rule::LeaveOneOut => digest.update(b"leave-one-out\n"),
            Rule::ByTime(by) => digest.update(format!("by-time {} {}\n", by.valid_from, by.test_from)),
        }
        digest.update(self.time_scale.to_le_bytes());
        digest.update((self.items.len() as u64).to_le_bytes());
        for item in self.items {
            for text in std::iter::once(Some(&item.id)).chain(item.texts().map(Option::as_ref)) {
                digest.update(text.map_or(u64::MAX, |text| text.len() as u64).to_le_bytes());
                digest.update(text.map_or("", String::as_str));
            }
        }
        digest
    }
}

/// The open files.
struct Sink<'a> {
    users: UserWriter<'a>,
    train: SequenceWriter<'a, Int64Type>,
    valid: SequenceWriter<'a, UInt32Type>,
    test: SequenceWriter<'a, UInt32Type>,
    digest: Sha256,
    interactions: u64,
    train_interactions: u64,
    without_history: [u64; 2],
    output: &'a Output<'a>,
}

impl Sink<'_> {
    /// Appends divided partitions, in order.
    fn take(&mut self, divided: &[Divided], progress: &dyn Progress) -> Result<(), PrepareError> {
        let Self { users, train, valid, test, output, .. } = self;
        let write_users = || -> Result<(), PrepareError> {
            for part in divided {
                let id = |&rank: &u32| output.store.users.get(output.store.order[rank as usize]);
                let ids: Vec<&str> = part.ranks.iter().map(id).collect();
                users.write(&ids).map_err(PrepareError::write(output.root))?;
            }
            Ok(())
        };
        let (first, second) = rayon::join(
            || rayon::join(write_users, || divided.iter().try_for_each(|part| train.append(&part.train))),
            || {
                rayon::join(
                    || divided.iter().try_for_each(|part| valid.append(&part.valid)),
                    || divided.iter().try_for_each(|part| test.append(&part.test)),
                )
            },
        );
        first.0.and(first.1).and(second.0).and(second.1)?;
        for part in divided {
            self.digest.update(&part.digests);
            self.interactions += part.interactions;
            self.train_interactions += part.train.first.values.len() as u64;
            for (sum, count) in self.without_history.iter_mut().zip(part.without_history) {
                *sum += count;
            }
            progress.advance(part.ranks.len() as u64);
        }
        Ok(())
    }

    fn finish(self, files: &mut Vec<FileEntry>) -> Result<Written, PrepareError> {
        let output = self.output;
        let mut rows = [0; 3];
        files.extend(self.users.finish().map_err(PrepareError::write(output.root))?);
        for (rows, entries) in rows.iter_mut().zip([self.train.finish()?, self.valid.finish()?, self.test.finish()?]) {
            // At most one row per user, and users are numbered with 32 bits.
            *rows = entries.iter().map(|entry| entry.rows).sum::<u64>() as u32;
            files.extend(entries);
        }
        let [train_users, valid_users, test_users] = rows;
        let mut fingerprint = output.frame();
        fingerprint.update(self.digest.finalize());
        Ok(Written {
            files: std::mem::take(files),
            counts: Counts {
                users: output.users_left.iter().sum(),
                train_users,
                valid_users,
                test_users,
                items: output.items.len() as u32,
                interactions: self.interactions,
                train_interactions: self.train_interactions,
            },
            fingerprint: hex(&fingerprint.finalize()),
            without_history: self.without_history,
        })
    }
}

/// Writes `sequences/NAME-*.arrow`.
struct SequenceWriter<'a, T: ArrowPrimitiveType> {
    root: &'a Path,
    name: &'static str,
    fields: &'a Fields,
    layout: Layout,
    file: Option<(FileWriter<HashingFile>, usize, u64)>,
    entries: Vec<FileEntry>,
    users: Vec<u32>,
    offsets: [Vec<i32>; 2],
    first: Vec<u32>,
    second: Vec<T::Native>,
}

impl<'a, T: ArrowPrimitiveType> SequenceWriter<'a, T> {
    fn new(root: &'a Path, name: &'static str, fields: &'a Fields, layout: Layout) -> Self {
        Self {
            root,
            name,
            fields,
            layout,
            file: None,
            entries: Vec::new(),
            users: Vec::new(),
            offsets: [vec![0], vec![0]],
            first: Vec::new(),
            second: Vec::new(),
        }
    }

    fn append(&mut self, rows: &Rows<T::Native>) -> Result<(), PrepareError> {
        for ((&user, first), second) in rows.users.iter().zip(rows.first.rows()).zip(rows.second.rows()) {
            let longest = self.first.len().max(self.second.len()) + first.len().max(second.len());
            if self.users.len() >= self.layout.batch_rows || longest > self.layout.batch_items {
                self.flush()?;
            }
            self.users.push(user);
            self.first.extend_from_slice(first);
            self.second.extend_from_slice(second);
            let end = |length: usize| {
                let limit = i32::MAX as u64;
                i32::try_from(length).map_err(|_| PrepareError::TooMany { what: "interactions of one user", limit })
            };
            self.offsets[0].push(end(self.first.len())?);
            self.offsets[1].push(end(self.second.len())?);
        }
        Ok(())
    }

    /// Writes what waits as a batch.
    fn flush(&mut self) -> Result<(), PrepareError> {
        if !self.users.is_empty() {
            self.write_batch().map_err(PrepareError::write(self.root))?;
        }
        Ok(())
    }

    fn write_batch(&mut self) -> Result<(), ArrowError> {
        let schema = Arc::new(self.schema());
        let [first, second] = std::mem::replace(&mut self.offsets, [vec![0], vec![0]]);
        let users = UInt32Array::from(std::mem::take(&mut self.users));
        let rows = users.len() as u64;
        let columns: Vec<Arc<dyn Array>> = vec![
            Arc::new(users),
            Arc::new(list::<UInt32Type>(first, std::mem::take(&mut self.first))?),
            Arc::new(list::<T>(second, std::mem::take(&mut self.second))?),
        ];
        let batch = RecordBatch::try_new(schema.clone(), columns)?;
        let (writer, batches, file_rows) = match &mut self.file {
            Some(file) => file,
            none => {
                let relative = format!("sequences/{}-{:05}.arrow", self.name, self.entries.len());
                none.insert((FileWriter::try_new(HashingFile::create(self.root, relative)?, &schema)?, 0, 0))
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

    fn schema(&self) -> Schema {
        ipc::schema(self.fields, [("learn.split".to_owned(), self.name.to_owned())])
    }

    fn close(&mut self) -> Result<(), ArrowError> {
        if let Some((writer, _, rows)) = self.file.take() {
            self.entries.push(writer.into_inner()?.finish(rows)?);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<FileEntry>, PrepareError> {
        self.flush()?;
        self.close().map_err(PrepareError::write(self.root))?;
        Ok(self.entries)
    }
}

fn list<T: ArrowPrimitiveType>(offsets: Vec<i32>, values: Vec<T::Native>) -> Result<ListArray, ArrowError> {
    let element = Arc::new(Field::new_list_field(T::DATA_TYPE, false));
    let values = PrimitiveArray::<T>::new(ScalarBuffer::from(values), None);
    ListArray::try_new(element, OffsetBuffer::new(ScalarBuffer::from(offsets)), Arc::new(values), None)
}
