//! Ids to dense numbers, in order of first appearance.
//!
//! One arena of text and one open-addressing table, since a string object per user would cost more than the user.
//! Each id has a stable hash, which decides the order of users and which partition holds them, so it depends on the id
//! alone; it is worked out once an id. Rows are looked up by a faster hash of the table's own.

use arrow_array::{Array, StringArray};

use super::error::PrepareError;

/// Numbers stop here: the spill file uses the bit above.
pub(crate) const LIMIT: u32 = (1 << 31) - 1;
/// No number: the cell is empty, or the id unknown.
pub(crate) const NONE: u32 = u32::MAX;
/// Ids of one round of [`Interner::numbers`]: few enough for the innermost cache.
const BLOCK: usize = 256;

/// FNV-1a, 64 bits, with the finisher of SplitMix64 so that the top bits depend on every byte.
pub(crate) fn stable_hash(id: &str) -> u64 {
    let mut hash = id
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// A hash for the table alone: it may differ from version to version, so it takes eight bytes at a time.
fn table_hash(id: &[u8]) -> u64 {
    let word = |at: usize| id[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let half = |at: usize| id[at..].first_chunk().map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)));
    let length = id.len();
    let mut hash = fold(length as u64 ^ 0x9e37_79b9_7f4a_7c15, 0xe703_7ed1_a0b4_28db);
    let last = match length {
        8.. => {
            for at in (0..length - 8).step_by(8) {
                hash = fold(hash ^ word(at), 0x8ebc_6af0_9c88_c6e3);
            }
            word(length - 8)
        }
        4.. => half(0) | (half(length - 4) << 32),
        _ => id.iter().fold(0, |word, &byte| (word << 8) | u64::from(byte)),
    };
    fold(hash ^ last, 0x5899_65cc_7537_4cc3)
}

/// Both halves of the product together.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

/// The table.
#[derive(Debug)]
pub(crate) struct Interner {
    what: &'static str,
    text: String,
    /// End of each id in `text`.
    ends: Vec<u64>,
    /// The stable hashes.
    hashes: Vec<u64>,
    slots: Vec<Slot>,
}

/// A place of the table; there is a power of two of them, at most half full.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Upper 24 bits of the table's hash, then the top byte of the stable hash, so that who only needs the latter of an
    /// id that is there has it without another miss of the caches.
    tag: u32,
    number: u32,
}

impl Slot {
    const FREE: Self = Self { tag: 0, number: NONE };

    fn new(hash: u64, stable: u64, number: u32) -> Self {
        Self { tag: ((hash >> 40) as u32) << 8 | (stable >> 56) as u32, number }
    }

    /// Whether it may hold an id with this hash of the table.
    fn fits(self, hash: u64) -> bool {
        self.tag >> 8 == (hash >> 40) as u32
    }
}

impl Interner {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, text: String::new(), ends: Vec::new(), hashes: Vec::new(), slots: vec![Slot::FREE; 1 << 10] }
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn get(&self, number: u32) -> &str {
        let (from, to) = self.span(number);
        &self.text[from..to]
    }

    fn span(&self, number: u32) -> (usize, usize) {
        let number = number as usize;
        let start = if number == 0 { 0 } else { self.ends[number - 1] };
        (start as usize, self.ends[number] as usize)
    }

    /// The stable hash of an id.
    pub(crate) fn hash(&self, number: u32) -> u64 {
        self.hashes[number as usize]
    }

    /// The stable hashes by number.
    pub(crate) fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// The slot that holds the id, or the free one where it belongs.
    fn slot(&self, id: &str, hash: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut place = hash as usize & mask;
        loop {
            let slot = self.slots[place];
            if slot.number == NONE || (slot.fits(hash) && self.get(slot.number) == id) {
                return place;
            }
            place = (place + 1) & mask;
        }
    }

    /// The number of an id, a new one if it has none; and whether it is new.
    pub(crate) fn intern(&mut self, id: &str) -> Result<(u32, bool), PrepareError> {
        let before = self.len();
        let slot = self.intern_hashed(id, table_hash(id.as_bytes()))?;
        Ok((slot.number, self.len() > before))
    }

    fn intern_hashed(&mut self, id: &str, hash: u64) -> Result<Slot, PrepareError> {
        let place = self.slot(id, hash);
        let found = self.slots[place];
        if found.number != NONE {
            return Ok(found);
        }
        let number = self.ends.len() as u32;
        if number >= LIMIT {
            return Err(PrepareError::TooMany { what: self.what, limit: u64::from(LIMIT) });
        }
        let stable = stable_hash(id);
        let slot = Slot::new(hash, stable, number);
        self.slots[place] = slot;
        self.text.push_str(id);
        self.ends.push(self.text.len() as u64);
        self.hashes.push(stable);
        if self.ends.len() * 2 > self.slots.len() {
            self.grow();
        }
        Ok(slot)
    }

    fn grow(&mut self) {
        let mask = self.slots.len() * 2 - 1;
        let mut slots = vec![Slot::FREE; mask + 1];
        let mut start = 0;
        for (number, (&end, &stable)) in (0..).zip(self.ends.iter().zip(&self.hashes)) {
            let hash = table_hash(&self.text.as_bytes()[start..end as usize]);
            start = end as usize;
            let mut place = hash as usize & mask;
            while slots[place].number != NONE {
                place = (place + 1) & mask;
            }
            slots[place] = Slot::new(hash, stable, number);
        }
        self.slots = slots;
    }

    /// Calls `each` with the number of every id of a column and the top byte of its stable hash; the number is `NONE` for
    /// an empty cell, and for an unknown id unless `add`.
    ///
    /// With many ids a lookup misses the processor's caches three times (slot, end, text). A loop over a block of ids
    /// per kind of miss lets the misses of different ids overlap.
    pub(crate) fn numbers(
        &mut self,
        ids: &StringArray,
        add: bool,
        mut each: impl FnMut(u32, u8),
    ) -> Result<(), PrepareError> {
        let id = |row| ids.is_valid(row).then(|| ids.value(row));
        let (mut hashes, mut found, mut spans) = ([0; BLOCK], [Slot::FREE; BLOCK], [(0, 0); BLOCK]);
        for start in (0..ids.len()).step_by(BLOCK) {
            let rows = start..ids.len().min(start + BLOCK);
            for (row, hash) in rows.clone().zip(&mut hashes) {
                *hash = id(row).map_or(0, |id| table_hash(id.as_bytes()));
            }
            let mask = self.slots.len() - 1;
            for (&hash, found) in hashes.iter().zip(&mut found) {
                let slot = self.slots[hash as usize & mask];
                *found = if slot.fits(hash) { slot } else { Slot::FREE };
            }
            for (found, span) in found.iter().zip(&mut spans) {
                *span = if found.number == NONE { (0, 0) } else { self.span(found.number) };
            }
            for (position, row) in rows.enumerate() {
                let (hash, (from, to)) = (hashes[position], spans[position]);
                let slot = match id(row) {
                    None => Slot::FREE,
                    Some(id) if found[position].number != NONE && self.text.as_bytes()[from..to] == *id.as_bytes() => {
                        found[position]
                    }
                    Some(id) if add => self.intern_hashed(id, hash)?,
                    Some(id) => self.slots[self.slot(id, hash)],
                };
                each(slot.number, slot.tag as u8);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn numbers_are_dense_stable_and_lead_back(ids in proptest::collection::vec("[a-c]{0,3}|[0-9]{1,12}", 0..1200)) {
            let mut interner = Interner::new("users");
            let mut first = Vec::<String>::new();
            for id in &ids {
                let (number, new) = interner.intern(id).unwrap();
                prop_assert_eq!(new, !first.contains(id));
                if new {
                    first.push(id.clone());
                }
                prop_assert_eq!(&first[number as usize], id);
                prop_assert_eq!(interner.intern(id).unwrap(), (number, false));
                prop_assert_eq!(interner.hash(number), stable_hash(id));
            }
            let column: StringArray = ids.iter().map(|id| Some(id.as_str()).filter(|id| !id.is_empty())).collect();
            let mut blocks = Interner::new("users");
            let (mut numbers, mut tops) = (Vec::new(), Vec::new());
            blocks.numbers(&column, true, |number, top| { numbers.push(number); tops.push(top) }).unwrap();
            for (id, &number) in ids.iter().zip(&numbers) {
                let right = if id.is_empty() { number == NONE } else { blocks.get(number) == id };
                prop_assert!(right);
            }
            for (&number, top) in numbers.iter().zip(tops).filter(|(number, _)| **number != NONE) {
                prop_assert_eq!(top, (blocks.hash(number) >> 56) as u8);
            }
            let mut found = Vec::new();
            blocks.numbers(&column, false, |number, _| found.push(number)).unwrap();
            prop_assert_eq!(found, numbers);
            let strange: StringArray = ["unknown", "", "abcdefgh", "abcdefghi"].into_iter().map(Some).collect();
            let mut missing = Vec::new();
            blocks.numbers(&strange, false, |number, _| missing.push(number)).unwrap();
            prop_assert_eq!(missing, [NONE; 4]);
            prop_assert_eq!(interner.len(), first.len());
            prop_assert!(first.iter().enumerate().all(|(n, id)| interner.get(n as u32) == id));
        }
    }

    #[test]
    fn the_hash_never_changes() {
        // The order of users in every dataset depends on these values.
        let hashes = ["", "1", "user-42"].map(stable_hash);
        assert_eq!(hashes, HASHES);
    }

    const HASHES: [u64; 3] = [17_665_956_581_633_026_203, 5_082_256_738_353_065_951, 8_797_103_408_588_478_355];
}
