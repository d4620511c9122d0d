//! Interactions on disk while they are filtered, in partitions by the user's hash.
//!
//! Invariants: a user's interactions lie in one partition, in input order; partitions are in order of hashes. A
//! partition is what is held in memory at once, so one with too many interactions is divided further: memory does not
//! grow with the interactions (a single user's aside).

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::error::PrepareError;
use super::interner::Interner;
use super::time::Time;
use crate::progress::{Progress, Unit};

/// Bits of the hash that one division looks at.
const BITS: u32 = 8;
const FAN_OUT: usize = 1 << BITS;
const BUFFER: usize = 1 << 16;
const RECORD: usize = 16;
/// Marks a time in millionths, in the bit of the item number that [`super::interner::LIMIT`] keeps free.
const SCALED: u32 = 1 << 31;
/// Marks a conversion on disk, in the same bit of the user number.
const CONVERTED: u32 = 1 << 31;

/// An interaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) user: u32,
    pub(crate) item: u32,
    pub(crate) time: i64,
    /// Its label; false in a dataset without labels.
    pub(crate) converted: bool,
}

impl Record {
    fn bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        let user = if self.converted { self.user | CONVERTED } else { self.user };
        bytes[..4].copy_from_slice(&user.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.item.to_le_bytes());
        bytes[8..].copy_from_slice(&self.time.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; RECORD]) -> Self {
        let [a, b, c, d, e, f, g, h, time @ ..] = *bytes;
        let user = u32::from_le_bytes([a, b, c, d]);
        Self {
            user: user & !CONVERTED,
            item: u32::from_le_bytes([e, f, g, h]),
            time: i64::from_le_bytes(time),
            converted: user & CONVERTED != 0,
        }
    }
}

/// A read interaction, before times have one unit.
pub(crate) fn unsorted((user, item): (u32, u32), time: Time, converted: bool) -> Record {
    Record { user, item: if time.scaled { item | SCALED } else { item }, time: time.value, converted }
}

/// The item and the time of [`unsorted`].
pub(crate) fn item_and_time(record: Record) -> (u32, Time) {
    (record.item & !SCALED, Time { value: record.time, scaled: record.item & SCALED != 0 })
}

/// Partitions being filled; the file of one begins with its first record.
pub(crate) struct SpillWriter {
    dir: PathBuf,
    /// The hashes that all partitions cover together.
    hashes: RangeInclusive<u64>,
    /// The bits of the hash that tell the partitions begin here.
    shift: u32,
    files: Vec<Option<BufWriter<File>>>,
    counts: Vec<u64>,
}

/// A partition on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spilled {
    pub(crate) path: PathBuf,
    /// Hashes of its users.
    pub(crate) hashes: RangeInclusive<u64>,
    pub(crate) count: u64,
}

impl SpillWriter {
    /// Partitions of all users, in a new folder.
    pub(crate) fn create(dir: &Path) -> Result<Self, PrepareError> {
        Self::over(dir, 0..=u64::MAX, u64::BITS - BITS)
    }

    fn over(dir: &Path, hashes: RangeInclusive<u64>, shift: u32) -> Result<Self, PrepareError> {
        fs::create_dir(dir).map_err(PrepareError::io(dir))?;
        let files = std::iter::repeat_with(|| None).take(FAN_OUT).collect();
        Ok(Self { dir: dir.to_path_buf(), hashes, shift, files, counts: vec![0; FAN_OUT] })
    }

    fn path(&self, partition: usize) -> PathBuf {
        self.dir.join(format!("{partition:03}"))
    }

    /// Adds an interaction of a user with this hash.
    pub(crate) fn push(&mut self, hash: u64, record: Record) -> Result<(), PrepareError> {
        self.push_to((hash >> self.shift) as usize % FAN_OUT, record)
    }

    /// Adds an interaction to one of [`Self::create`]'s partitions: those of the hash's top byte.
    pub(crate) fn push_to(&mut self, partition: usize, record: Record) -> Result<(), PrepareError> {
        self.counts[partition] += 1;
        if self.files[partition].is_none() {
            let path = self.path(partition);
            let file = File::create(&path).map_err(PrepareError::io(&path))?;
            self.files[partition] = Some(BufWriter::with_capacity(BUFFER, file));
        }
        match &mut self.files[partition] {
            Some(file) => file.write_all(&record.bytes()).map_err(PrepareError::io(&self.dir)),
            None => Ok(()),
        }
    }

    /// The partitions that have records, in order of hashes.
    pub(crate) fn finish(mut self) -> Result<Vec<Spilled>, PrepareError> {
        for file in self.files.iter_mut().flatten() {
            file.flush().map_err(PrepareError::io(&self.dir))?;
        }
        let filled = (0_u64..).zip(&self.counts).filter(|(_, count)| **count > 0);
        let spilled = filled.map(|(partition, &count)| {
            let first = self.hashes.start() + (partition << self.shift);
            let hashes = first..=first + ((1 << self.shift) - 1);
            Spilled { path: self.path(partition as usize), hashes, count }
        });
        Ok(spilled.collect())
    }
}

/// Divides the partitions with more than `limit` records by further bits of the hash, until none has more or it is
/// one hash; the order of hashes is kept.
pub(crate) fn divide(
    spilled: Vec<Spilled>,
    limit: u64,
    users: &Interner,
    progress: &dyn Progress,
) -> Result<Vec<Spilled>, PrepareError> {
    let too_many: u64 = spilled.iter().map(|part| part.count).filter(|&count| count > limit).sum();
    if too_many > 0 {
        progress.stage("divide", Some(too_many), Unit::Rows);
    }
    let mut parts = Vec::with_capacity(spilled.len());
    for part in spilled {
        super::refuse_stop(progress)?;
        let count = part.count;
        divide_one(part, limit, users, &mut parts)?;
        if count > limit {
            progress.advance(count);
        }
    }
    Ok(parts)
}

/// Adds what [`divide`] makes of a partition to `parts`.
fn divide_one(part: Spilled, limit: u64, users: &Interner, parts: &mut Vec<Spilled>) -> Result<(), PrepareError> {
    let span = part.hashes.end() - part.hashes.start();
    if part.count <= limit || span == 0 {
        parts.push(part);
        return Ok(());
    }
    let shift = (u64::BITS - span.leading_zeros()) - BITS;
    let mut writer = SpillWriter::over(&part.path.with_extension("parts"), part.hashes.clone(), shift)?;
    each_record(&part, |record| writer.push(users.hash(record.user), record))?;
    fs::remove_file(&part.path).map_err(PrepareError::io(&part.path))?;
    writer.finish()?.into_iter().try_for_each(|part| divide_one(part, limit, users, parts))
}

/// The contents of a partition, for [`records`].
pub(crate) fn bytes(part: &Spilled) -> Result<Vec<u8>, PrepareError> {
    let bytes = fs::read(&part.path).map_err(PrepareError::io(&part.path))?;
    if bytes.len() as u64 != part.count * RECORD as u64 {
        let source = io::Error::other("it was changed by somebody else; run `prepare` again");
        return Err(PrepareError::Io { path: part.path.clone(), source });
    }
    Ok(bytes)
}

/// The records in the bytes of a partition, in order.
pub(crate) fn records(bytes: &[u8]) -> impl Iterator<Item = Record> {
    bytes.as_chunks().0.iter().map(Record::from_bytes)
}

fn each_record(part: &Spilled, mut each: impl FnMut(Record) -> Result<(), PrepareError>) -> Result<(), PrepareError> {
    let failed = || PrepareError::io(&part.path);
    let mut file = BufReader::with_capacity(BUFFER, File::open(&part.path).map_err(failed())?);
    let mut bytes = [0; RECORD];
    for _ in 0..part.count {
        file.read_exact(&mut bytes).map_err(failed())?;
        each(Record::from_bytes(&bytes))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divided_partitions_hold_the_same_in_the_same_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut users = Interner::new("users");
        let mut writer = SpillWriter::create(&dir.path().join("spill")).unwrap();
        for at in 0..5000_i64 {
            let name = if at % 3 == 0 { "busy".to_owned() } else { format!("u{}", at % 400) };
            let (user, _) = users.intern(&name).unwrap();
            writer.push(users.hash(user), Record { user, item: at as u32, time: -at, converted: at % 5 == 0 }).unwrap();
        }
        let whole = writer.finish().unwrap();
        let read = |part: &Spilled| records(&bytes(part).unwrap()).collect::<Vec<_>>();
        let contents = |parts: &[Spilled]| parts.iter().flat_map(read).collect::<Vec<_>>();
        let by_user = |mut records: Vec<Record>| {
            records.sort_by_key(|record| (users.hash(record.user), record.item));
            records
        };
        let before = by_user(contents(&whole));
        let parts = divide(whole, 20, &users, &()).unwrap();
        assert!(parts.windows(2).all(|pair| pair[0].hashes.end() < pair[1].hashes.start()));
        for part in &parts {
            let records = read(part);
            let mut names: Vec<u32> = records.iter().map(|record| record.user).collect();
            names.sort_unstable();
            names.dedup();
            assert!(part.count <= 20 || names.len() == 1, "only a single user exceeds the limit");
            assert!(records.iter().all(|record| part.hashes.contains(&users.hash(record.user))));
            assert!(records.is_sorted_by_key(|record| (record.user, record.item)) || names.len() > 1, "input order");
        }
        assert_eq!(by_user(contents(&parts)), before);
    }
}
