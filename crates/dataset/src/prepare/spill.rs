//! Interactions on disk while they are filtered: 256 partitions by the top byte of the user's hash.
//!
//! Invariants: a user's interactions lie in one partition, in input order; a partition is the unit that is held in
//! memory, so memory is about a 256th of the interactions per thread at most, 16 bytes each.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::error::PrepareError;
use super::time::Time;

pub(crate) const PARTITIONS: usize = 256;
const RECORD: usize = 16;
/// Marks a time in millionths, in the bit of the item number that [`super::interner::LIMIT`] keeps free.
const SCALED: u32 = 1 << 31;

/// The partition of a user.
pub(crate) fn partition_of(hash: u64) -> usize {
    (hash >> 56) as usize
}

/// An interaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) user: u32,
    pub(crate) item: u32,
    pub(crate) time: i64,
}

impl Record {
    fn bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..4].copy_from_slice(&self.user.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.item.to_le_bytes());
        bytes[8..].copy_from_slice(&self.time.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; RECORD]) -> Self {
        let [a, b, c, d, e, f, g, h, time @ ..] = *bytes;
        Self {
            user: u32::from_le_bytes([a, b, c, d]),
            item: u32::from_le_bytes([e, f, g, h]),
            time: i64::from_le_bytes(time),
        }
    }
}

/// A read interaction, before times have one unit.
pub(crate) fn unsorted(user: u32, item: u32, time: Time) -> Record {
    Record { user, item: if time.scaled { item | SCALED } else { item }, time: time.value }
}

/// The item and the time of [`unsorted`].
pub(crate) fn item_and_time(record: Record) -> (u32, Time) {
    (record.item & !SCALED, Time { value: record.time, scaled: record.item & SCALED != 0 })
}

/// Partitions being filled; the file of one begins with its first record.
pub(crate) struct SpillWriter {
    dir: PathBuf,
    files: Vec<Option<BufWriter<File>>>,
    counts: Vec<u64>,
}

impl SpillWriter {
    pub(crate) fn create(dir: &Path) -> Result<Self, PrepareError> {
        fs::create_dir(dir).map_err(PrepareError::io(dir))?;
        let files = std::iter::repeat_with(|| None).take(PARTITIONS).collect();
        Ok(Self { dir: dir.to_path_buf(), files, counts: vec![0; PARTITIONS] })
    }

    pub(crate) fn push(&mut self, partition: usize, record: Record) -> Result<(), PrepareError> {
        self.counts[partition] += 1;
        let file = match &mut self.files[partition] {
            Some(file) => file,
            none => {
                let path = partition_path(&self.dir, partition);
                let file = File::create(&path).map_err(PrepareError::io(&path))?;
                none.insert(BufWriter::with_capacity(1 << 16, file))
            }
        };
        file.write_all(&record.bytes()).map_err(PrepareError::io(&self.dir))
    }

    /// The number of records of each partition.
    pub(crate) fn finish(mut self) -> Result<Vec<u64>, PrepareError> {
        for file in self.files.iter_mut().flatten() {
            file.flush().map_err(PrepareError::io(&self.dir))?;
        }
        Ok(self.counts)
    }
}

pub(crate) fn partition_path(dir: &Path, partition: usize) -> PathBuf {
    dir.join(format!("{partition:03}"))
}

/// All records of a partition of `count`.
pub(crate) fn read(path: &Path, count: u64) -> Result<Vec<Record>, PrepareError> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let bytes = fs::read(path).map_err(PrepareError::io(path))?;
    let (records, rest) = bytes.as_chunks::<RECORD>();
    if !rest.is_empty() || records.len() as u64 != count {
        return Err(PrepareError::unreadable(
            path,
            "a temporary file was changed by another program; run prepare again",
        ));
    }
    Ok(records.iter().map(Record::from_bytes).collect())
}

/// Replaces a partition file.
pub(crate) fn write(path: &Path, records: &[Record]) -> Result<(), PrepareError> {
    if records.is_empty() {
        return Ok(());
    }
    let bytes: Vec<u8> = records.iter().flat_map(|record| record.bytes()).collect();
    fs::write(path, bytes).map_err(PrepareError::io(path))
}
