//! A table of rows in the memory of one rank, which others of its machine read while its owner fills it.
//!
//! Input: rows by slot, each of an item. Output: to the owner its rows where they lie, to others copies of rows by item.
//! Invariants: a row is given whole and under its own item, or counts as missing; who reads neither waits nor tries again, and
//! stays inside of the memory whatever lies there; an owner that is killed while it writes leaves a row that is missing.
//!
//! Each slot has a number that is odd while the slot is written to, a seqlock (Boehm, "Can seqlocks get along with
//! programming language memory models?", 2012). There is one writer, so it needs no lock of its own.
//!
//! ```text
//! head        version, items, slots, row_bytes                             u64 each
//! directory   by item: its slot + 1; 0 = not here                          u32 each, up to a whole u64
//! records     by slot: number, item + 1 (0 = none), row up to a whole u64  u64 each
//! ```

use std::io;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

use crate::sealed::{NO_OFFER, Offer, Own, Theirs, gather_offers};
use crate::{Collective, CollectiveError};

/// Of the layout; the ranks of a job have one version, and this makes sure.
const VERSION: u64 = 1;
const WORD: usize = size_of::<u64>();
/// Words of the head.
const HEAD: usize = 4;
/// Words of a record before its row.
const RECORD_HEAD: usize = 2;

/// What a table has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowsShape {
    /// They are numbered from 0 on.
    pub items: u32,
    /// At most as many as items.
    pub slots: usize,
    pub row_bytes: usize,
}

/// By which others find a table.
#[derive(Clone, Copy, Debug)]
pub struct RowsOffer {
    shape: RowsShape,
    memory: Offer,
}

/// The table of this process, the only one that writes to it.
pub struct OwnRows {
    memory: Own,
    shape: RowsShape,
    places: Places,
}

/// The table of another worker of this machine.
pub struct TheirRows {
    memory: Theirs,
    shape: RowsShape,
    places: Places,
}

/// Where the parts of a table of some shape lie, in words.
#[derive(Clone, Copy, Debug)]
struct Places {
    /// The first word of the records.
    records: usize,
    /// Words of a record.
    record: usize,
    /// Words of the whole table.
    words: usize,
}

impl Places {
    fn of(shape: &RowsShape) -> io::Result<Self> {
        let places = || {
            let records = HEAD + (shape.items as usize).div_ceil(2);
            let record = RECORD_HEAD + shape.row_bytes.div_ceil(WORD);
            let words = record.checked_mul(shape.slots)?.checked_add(records)?;
            // with room for a page before them
            (words < isize::MAX as usize / WORD / 2).then_some(Self { records, record, words })
        };
        if shape.slots > shape.items as usize {
            return Err(io::Error::other("a table has no more slots than items"));
        }
        places().ok_or_else(|| io::Error::other("the table is larger than memory can be"))
    }

    fn bytes(&self) -> usize {
        self.words * WORD
    }
}

/// The memory of a table, part by part.
struct Table<'a> {
    head: &'a [AtomicU64],
    directory: &'a [AtomicU32],
    records: &'a [AtomicU64],
}

/// # Safety
/// For `'a`, `start` is the first of the bytes of a table of this shape, aligned for u64; they may be read, and whoever
/// writes to them does so through a `Table`.
unsafe fn table<'a>(start: *const u8, (shape, places): (&RowsShape, &Places)) -> Table<'a> {
    let Places { records, record, .. } = *places;
    // SAFETY: the parts lie one behind the other inside of the table, as `Places::of` says, which the caller vouches for;
    // each is aligned, because `start` is and the directory begins at a whole word; every bit pattern is a number.
    unsafe {
        Table {
            head: std::slice::from_raw_parts(start.cast(), HEAD),
            directory: std::slice::from_raw_parts(start.add(HEAD * WORD).cast(), shape.items as usize),
            records: std::slice::from_raw_parts(start.add(records * WORD).cast(), record * shape.slots),
        }
    }
}

impl RowsShape {
    fn head(&self) -> [u64; HEAD] {
        [VERSION, self.items.into(), self.slots as u64, self.row_bytes as u64]
    }
}

impl OwnRows {
    /// A table without rows, whose memory is taken as it fills.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub fn new(shape: RowsShape) -> io::Result<Self> {
        let places = Places::of(&shape)?;
        let rows = Self { memory: Own::sparse(places.bytes())?, shape, places };
        rows.table().head.iter().zip(shape.head()).for_each(|(word, value)| word.store(value, Relaxed));
        Ok(rows)
    }

    #[must_use]
    pub fn shape(&self) -> RowsShape {
        self.shape
    }

    /// For other processes, as long as this table is here.
    #[must_use]
    pub fn offer(&self) -> RowsOffer {
        RowsOffer { shape: self.shape, memory: self.memory.offer() }
    }

    fn table(&self) -> Table<'_> {
        // SAFETY: the memory is as long as the places say, begins at a page, and lives as long as `self`; nobody but this
        // process maps it to write, and it writes through a `Table` alone.
        unsafe { table(self.memory.start().cast_const(), (&self.shape, &self.places)) }
    }

    /// The row in a slot; zeros where none was put.
    ///
    /// # Panics
    /// If there is no such slot.
    #[must_use]
    pub fn row(&self, slot: usize) -> &[u8] {
        assert!(slot < self.shape.slots, "slot {slot} of {}", self.shape.slots);
        let word = self.places.records + slot * self.places.record + RECORD_HEAD;
        // SAFETY: the row lies inside of the memory, which lives as long as `self`. Nobody writes to it meanwhile: only
        // `put` does, which borrows `self` for itself alone. What others do meanwhile is to read.
        unsafe { std::slice::from_raw_parts(self.memory.start().add(word * WORD), self.shape.row_bytes) }
    }

    /// Puts the row of an item into a slot, in place of what is there. An item is in one slot at a time.
    ///
    /// # Panics
    /// If there is no such slot or item, or the row has another length.
    pub fn put(&mut self, slot: usize, item: u32, row: &[u8]) {
        assert!(item < self.shape.items, "item {item} of {}", self.shape.items);
        assert_eq!(row.len(), self.shape.row_bytes, "another row");
        let Table { directory, records, .. } = self.table();
        let record = &records[slot * self.places.record..][..self.places.record];
        let (number, its_item, words) = (&record[0], &record[1], &record[RECORD_HEAD..]);
        if let Some(before) = (its_item.load(Relaxed) as usize).checked_sub(1) {
            directory[before].store(0, Relaxed);
        }
        let even = number.load(Relaxed);
        number.store(even + 1, Relaxed);
        // who sees any of the words below sees the odd number, too
        fence(Release);
        its_item.store(u64::from(item) + 1, Relaxed);
        let (whole, rest) = row.as_chunks::<WORD>();
        whole.iter().zip(words).for_each(|(bytes, word)| word.store(u64::from_ne_bytes(*bytes), Relaxed));
        if let Some(word) = words.get(whole.len()) {
            let mut bytes = [0; WORD];
            bytes[..rest.len()].copy_from_slice(rest);
            word.store(u64::from_ne_bytes(bytes), Relaxed);
        }
        // who sees this number sees all words above
        number.store(even + 2, Release);
        // a hint: the record says itself whose it is
        directory[item as usize].store(slot as u32 + 1, Relaxed);
    }
}

impl TheirRows {
    /// Maps a table that is offered.
    ///
    /// # Errors
    /// If it is not to be had from here, or has another shape.
    pub fn open(offer: &RowsOffer) -> io::Result<Self> {
        let RowsOffer { shape, memory } = *offer;
        let places = Places::of(&shape)?;
        let rows = Self { memory: Theirs::open(&memory, places.bytes())?, shape, places };
        if rows.table().head.iter().map(|word| word.load(Relaxed)).ne(shape.head()) {
            return Err(io::Error::other("the table of the rank has another shape"));
        }
        Ok(rows)
    }

    /// The tables of the other workers of this machine, if this one has a table, too: of those that offer one of the same
    /// shape, and which can be opened from here. Every rank calls it, or none.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn meet(collective: &mut dyn Collective, own: Option<&RowsOffer>) -> Result<Vec<Self>, CollectiveError> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        if world_size == 1 {
            return Ok(Vec::new());
        }
        let offers = gather_offers(collective, &own.map_or(NO_OFFER, |own| own.memory))?;
        let Some(own) = own else { return Ok(Vec::new()) };
        // each begins with the rank behind it, so that not all of them look at the same one first
        let peers = (1..world_size).map(|step| (rank + step) % world_size);
        let open = |peer: usize| {
            let offer = RowsOffer { shape: own.shape, memory: offers[peer] };
            Self::open(&offer).inspect_err(|error| tracing::debug!(peer, %error, "its rows cannot be read here")).ok()
        };
        Ok(peers.filter_map(open).collect())
    }

    fn table(&self) -> Table<'_> {
        // SAFETY: the memory is as long as the places say, which is sealed, begins at a page, and lives as long as `self`;
        // its owner writes through a `Table`. It is mapped to read only, where relaxed loads of up to a word are allowed.
        unsafe { table(self.memory.start(), (&self.shape, &self.places)) }
    }

    /// Whether the table seems to have this item's row.
    #[must_use]
    pub fn holds(&self, item: u32) -> bool {
        self.table().directory.get(item as usize).is_some_and(|slot| slot.load(Relaxed) != 0)
    }

    /// Copies the row of an item; whether it is there. If not, what is in `into` means nothing.
    ///
    /// # Panics
    /// If rows have another length.
    #[must_use]
    pub fn copy(&self, item: u32, into: &mut [u8]) -> bool {
        assert_eq!(into.len(), self.shape.row_bytes, "another row");
        let Table { directory, records, .. } = self.table();
        let slot = directory.get(item as usize).and_then(|slot| (slot.load(Relaxed) as usize).checked_sub(1));
        // the slot is what its owner says, and may be none
        let record = slot.and_then(|slot| records.chunks_exact(self.places.record).nth(slot));
        let Some([number, its_item, words @ ..]) = record else { return false };
        let before = number.load(Relaxed);
        // all that was written before this number is seen below
        fence(Acquire);
        if !before.is_multiple_of(2) || its_item.load(Relaxed) != u64::from(item) + 1 {
            return false;
        }
        let (whole, rest) = into.as_chunks_mut::<WORD>();
        whole.iter_mut().zip(words).for_each(|(bytes, word)| *bytes = word.load(Relaxed).to_ne_bytes());
        if let Some(word) = words.get(whole.len()) {
            let bytes = word.load(Relaxed).to_ne_bytes();
            rest.copy_from_slice(&bytes[..rest.len()]);
        }
        // if any word above was written after the number was read, the number is seen to be another one
        fence(Acquire);
        number.load(Relaxed) == before
    }
}

impl std::fmt::Debug for OwnRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnRows").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for TheirRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TheirRows").field("shape", &self.shape).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;

    const SHAPE: RowsShape = RowsShape { items: 9, slots: 3, row_bytes: 26 };

    /// All of it says whose row it is.
    fn row(item: u32, row_bytes: usize) -> Vec<u8> {
        (0..row_bytes).map(|place| (item as usize * 31 + place * 7 + 1) as u8).collect()
    }

    fn put(own: &mut OwnRows, slot: usize, item: u32) {
        own.put(slot, item, &row(item, own.shape.row_bytes));
    }

    /// The row of an item as another process sees it.
    fn found(theirs: &TheirRows, item: u32) -> Option<Vec<u8>> {
        let mut into = vec![0; theirs.shape.row_bytes];
        theirs.copy(item, &mut into).then_some(into)
    }

    /// Items that are found, with their own rows.
    fn items(theirs: &TheirRows) -> Vec<u32> {
        let here = |&item: &u32| {
            let found = found(theirs, item);
            assert!(found.as_ref().is_none_or(|found| *found == row(item, theirs.shape.row_bytes)), "item {item}");
            found.is_some()
        };
        (0..theirs.shape.items).filter(here).collect()
    }

    #[test]
    fn what_is_put_is_found_until_something_else_takes_its_slot() {
        for row_bytes in [0, 2, 8, 26, 64] {
            let mut own = OwnRows::new(RowsShape { row_bytes, ..SHAPE }).unwrap();
            put(&mut own, 0, 4);
            let theirs = TheirRows::open(&own.offer()).unwrap();
            assert_eq!(items(&theirs), [4], "not item 0, to which slots without a row belong no more than to others");
            put(&mut own, 2, 0);
            put(&mut own, 1, 8);
            assert_eq!(items(&theirs), [0, 4, 8]);
            put(&mut own, 0, 5);
            assert_eq!(items(&theirs), [0, 5, 8]);
            assert!(theirs.holds(5) && !theirs.holds(4) && !theirs.holds(9));
            assert_eq!([0, 1, 2].map(|slot| own.row(slot).to_vec()), [5, 8, 0].map(|item| row(item, row_bytes)));
            assert_eq!(found(&theirs, 9), None, "there is no such item");
            drop(own);
            assert_eq!(items(&theirs), [0, 5, 8], "as long as it is mapped");
        }
    }

    #[test]
    fn a_table_of_another_shape_is_refused() {
        let own = OwnRows::new(SHAPE).unwrap();
        let refused = |shape: RowsShape| {
            let offer = RowsOffer { shape, ..own.offer() };
            TheirRows::open(&offer).err().unwrap().to_string()
        };
        assert!(refused(RowsShape { slots: 4, ..SHAPE }).contains("right size"));
        // as many bytes
        assert!(refused(RowsShape { items: 10, ..SHAPE }).contains("another shape"));
        assert!(refused(RowsShape { row_bytes: 25, ..SHAPE }).contains("another shape"));
        let none = RowsOffer { memory: NO_OFFER, ..own.offer() };
        assert!(TheirRows::open(&none).err().unwrap().to_string().contains("shares no memory"));
        assert!(OwnRows::new(RowsShape { slots: 10, ..SHAPE }).is_err(), "more slots than items");
        assert!(OwnRows::new(RowsShape { row_bytes: usize::MAX / 4, ..SHAPE }).is_err());
    }

    #[test]
    fn what_an_owner_leaves_behind_is_missing_and_nothing_else_is_read() {
        let mut own = OwnRows::new(SHAPE).unwrap();
        (0..3).for_each(|slot| put(&mut own, slot, slot as u32));
        let theirs = TheirRows::open(&own.offer()).unwrap();
        let record = |slot: usize| slot * own.places.record;
        // killed while it wrote
        own.table().records[record(0)].fetch_add(1, Relaxed);
        assert_eq!(items(&theirs), [1, 2]);
        // killed after the record and before the directory, or the other way around
        own.table().records[record(1) + 1].store(8, Relaxed);
        assert_eq!(items(&theirs), [2]);
        // slots that are not there, and one that is another item's
        for slot in [4, u32::MAX, 2] {
            own.table().directory[2].store(slot, Relaxed);
            assert_eq!(items(&theirs), [0_u32; 0], "slot {slot}");
        }
    }

    #[test]
    fn rows_that_are_replaced_meanwhile_are_whole_or_missing() {
        const ROUNDS: usize = 100_000;
        /// Of rows that readers find while there is a writer, before it may end.
        const FOUND: usize = 1000;
        let shape = RowsShape { items: 12, slots: 5, row_bytes: 510 };
        let mut own = OwnRows::new(shape).unwrap();
        let tables = [(); 3].map(|()| TheirRows::open(&own.offer()).unwrap());
        let (begin, done) = (&Barrier::new(1 + tables.len()), &AtomicBool::new(false));
        let found = &AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for theirs in &tables {
                scope.spawn(move || {
                    begin.wait();
                    while !done.load(Acquire) {
                        found.fetch_add(items(theirs).len(), Relaxed);
                    }
                });
            }
            begin.wait();
            // every item comes back, each time to another slot
            let mut rounds = 0;
            while rounds < 100 * ROUNDS && (rounds < ROUNDS || found.load(Relaxed) < FOUND) {
                (rounds..rounds + 60).for_each(|round| put(&mut own, round % 5, (round % 12) as u32));
                rounds += 60;
            }
            done.store(true, Release);
        });
        assert!(found.load(Relaxed) >= FOUND, "readers have hardly met the writer");
        // of sixty rounds the last five
        assert!(tables.iter().all(|theirs| items(theirs) == [7, 8, 9, 10, 11]));
    }
}
