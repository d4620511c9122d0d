//! Writes the dataset's files and computes its fingerprint in one pass over what the filters left.
//!
//! Partitions are divided and numbered in parallel, a few at a time, and written in order while the next are divided.
//! The fingerprint hashes ids, texts, sequences, times, labels if there are any, and the split rule, in the order of item
//! indices and user numbers; file layout, input format and names of files do not enter.

use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::error::PrepareError;
use super::partition::{History, Partition};
use super::sequences::{Rows, SequenceWriter};
use super::split::Rule;
use super::store::Store;
use crate::catalogue::{Item, UserWriter, write_items};
use crate::files::hex;
use crate::manifest::{Counts, FileEntry, LabelInfo};
use crate::progress::{Progress, Unit};
use crate::sequences::{Columns, held_out_fields, train_fields};

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
    /// The interactions have labels, and this threshold if they are numbers.
    pub(crate) labels: Option<Option<f64>>,
    pub(crate) layout: Layout,
}

/// What was written.
pub(crate) struct Written {
    pub(crate) files: Vec<FileEntry>,
    pub(crate) counts: Counts,
    pub(crate) fingerprint: String,
    pub(crate) labels: Option<LabelInfo>,
    /// Rows of valid and test that were left out since the user has no history before them.
    pub(crate) without_history: [u64; 2],
}

/// The folders of a dataset that `prepare` writes.
pub(crate) const FOLDERS: [&str; 3] = ["items", "users", "sequences"];

/// A partition, divided.
#[derive(Default)]
struct Divided {
    ranks: Vec<u32>,
    /// The sequence.
    train: Rows<1>,
    /// History and targets.
    valid: Rows<2>,
    test: Rows<2>,
    without_history: [u64; 2],
    interactions: u64,
    conversions: u64,
    /// SHA-256 of each user.
    digests: Vec<u8>,
}

impl Output<'_> {
    /// Writes items, users and sequences.
    pub(crate) fn write(&self, progress: &dyn Progress) -> Result<Written, PrepareError> {
        progress.stage("write items", Some(self.items.len() as u64), Unit::Rows);
        let failed = |error| PrepareError::write(self.root)(error);
        let items = self.items.iter().take_while(|_| !progress.stopped());
        let mut files = write_items(self.root, items, self.layout.file_rows, progress).map_err(failed)?;
        super::refuse_stop(progress)?;
        progress.stage("write", Some(self.users_left.iter().sum()), Unit::Rows);
        let columns = Columns { held_out_times: true, labels: self.labels.is_some() };
        let mut sink = Sink {
            users: UserWriter::new(self.root, self.layout.file_rows),
            train: SequenceWriter::new(self.root, ("train", train_fields(columns)), self.layout),
            valid: SequenceWriter::new(self.root, ("valid", held_out_fields(columns)), self.layout),
            test: SequenceWriter::new(self.root, ("test", held_out_fields(columns)), self.layout),
            digest: Sha256::new(),
            interactions: 0,
            conversions: 0,
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
            super::refuse_stop(progress)?;
            let divide = || window.par_iter().map(|&(partition, start)| self.divide(partition, start)).collect();
            let (written, next): (_, Result<Vec<Divided>, PrepareError>) =
                rayon::join(|| sink.take(&divided, progress), divide);
            written?;
            divided = next?;
        }
        sink.take(&divided, progress)?;
        progress.stage("sync", None, Unit::Rows);
        sink.finish(&mut files)
    }

    /// Divides the users of a partition; `start` is the number of its first user.
    fn divide(&self, partition: &Partition, start: u64) -> Result<Divided, PrepareError> {
        let mut divided = Divided::default();
        // `prepare` refuses more users than 32 bits number.
        let mut user = start as u32;
        let mut hashed = Vec::new();
        self.store.for_each_user(partition, |rank, history| {
            let parts = self.rule.divide(history);
            let id = self.store.users.get(self.store.order[rank as usize]);
            hashed.clear();
            hashed.extend_from_slice(&(id.len() as u64).to_le_bytes());
            hashed.extend_from_slice(id.as_bytes());
            self.put_hashed(history, &mut hashed);
            divided.digests.extend_from_slice(&Sha256::digest(&hashed));
            if parts.train >= 2 {
                divided.train.push(user, [history.slice(0..parts.train)], self.item_index);
            }
            for (split, rows, targets) in [(0, &mut divided.valid, parts.valid), (1, &mut divided.test, parts.test)] {
                if targets.is_empty() {
                    continue;
                }
                if targets.start == 0 {
                    divided.without_history[split] += 1;
                    continue;
                }
                rows.push(user, [history.slice(0..targets.start), history.slice(targets)], self.item_index);
            }
            divided.ranks.push(rank);
            divided.interactions += history.len() as u64;
            divided.conversions += history.labels.iter().map(|&label| u64::from(label)).sum::<u64>();
            user += 1;
        })?;
        Ok(divided)
    }

    /// What of a user's interactions the fingerprint covers.
    fn put_hashed(&self, history: History, hashed: &mut Vec<u8>) {
        for ((&item, &time), &label) in history.items.iter().zip(history.times).zip(history.labels) {
            let mut bytes = [0; 13];
            bytes[..4].copy_from_slice(&self.item_index[item as usize].to_le_bytes());
            bytes[4..12].copy_from_slice(&time.to_le_bytes());
            bytes[12] = label;
            hashed.extend_from_slice(if self.labels.is_some() { &bytes } else { &bytes[..12] });
        }
    }

    /// The hash of everything but the sequences.
    fn frame(&self) -> Sha256 {
        let mut digest = Sha256::new();
        digest.update(b"learn-dataset/1\n");
        match self.rule {
            Rule::LeaveOneOut => digest.update(b"leave-one-out\n"),
            Rule::ByTime(by) => digest.update(format!("by-time {} {}\n", by.valid_from, by.test_from)),
        }
        if self.labels.is_some() {
            digest.update(b"labels\n");
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
    train: SequenceWriter<'a, 1>,
    valid: SequenceWriter<'a, 2>,
    test: SequenceWriter<'a, 2>,
    digest: Sha256,
    interactions: u64,
    conversions: u64,
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
            self.conversions += part.conversions;
            self.train_interactions += part.train.interactions();
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
            labels: output.labels.map(|at_least| LabelInfo { at_least, conversions: self.conversions }),
            without_history: self.without_history,
        })
    }
}
