//! Ids to dense numbers, in order of first appearance.
//!
//! One arena of text and one open-addressing table, since a string object per user would cost more than the user.
//! The hash is stable: it decides the order of users and which partition holds them, so it depends on the id alone.

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

/// The table.
#[derive(Debug)]
pub(crate) struct Interner {
    what: &'static str,
    text: String,
    /// End of each id in `text`.
    ends: Vec<u64>,
    hashes: Vec<u64>,
    /// (upper half of the hash, number); a power of two in size, at most half full.
    slots: Vec<(u32, u32)>,
}

impl Interner {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, text: String::new(), ends: Vec::new(), hashes: Vec::new(), slots: vec![(0, NONE); 1 << 10] }
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

    pub(crate) fn hash(&self, number: u32) -> u64 {
        self.hashes[number as usize]
    }

    /// The slot that holds the id, or the free one where it belongs.
    fn slot(&self, id: &str, hash: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            let (tag, number) = self.slots[slot];
            if number == NONE || (tag == (hash >> 32) as u32 && self.get(number) == id) {
                return slot;
            }
            slot = (slot + 1) & mask;
        }
    }

    /// The number of an id, `NONE` if it has none.
    pub(crate) fn find(&self, id: &str) -> u32 {
        self.slots[self.slot(id, stable_hash(id))].1
    }

    /// The number of an id, a new one if it has none; and whether it is new.
    pub(crate) fn intern(&mut self, id: &str) -> Result<(u32, bool), PrepareError> {
        let hash = stable_hash(id);
        let slot = self.slot(id, hash);
        if self.slots[slot].1 != NONE {
            return Ok((self.slots[slot].1, false));
        }
        let number = self.ends.len() as u32;
        if number >= LIMIT {
            return Err(PrepareError::TooMany { what: self.what, limit: u64::from(LIMIT) });
        }
        self.slots[slot] = ((hash >> 32) as u32, number);
        self.text.push_str(id);
        self.ends.push(self.text.len() as u64);
        self.hashes.push(hash);
        if self.ends.len() * 2 > self.slots.len() {
            self.grow();
        }
        Ok((number, true))
    }

    fn grow(&mut self) {
        let mask = self.slots.len() * 2 - 1;
        self.slots = vec![(0, NONE); mask + 1];
        for (number, &hash) in self.hashes.iter().enumerate() {
            let mut slot = hash as usize & mask;
            while self.slots[slot].1 != NONE {
                slot = (slot + 1) & mask;
            }
            self.slots[slot] = ((hash >> 32) as u32, number as u32);
        }
    }

    /// Calls `each` with the number and the hash of every id of a column; the number is `NONE` for an empty cell, and
    /// for an unknown id unless `add`.
    ///
    /// With many ids a lookup misses the processor's caches three times (slot, end, text). A loop over a block of ids
    /// per kind of miss lets the misses of different ids overlap.
    pub(crate) fn numbers(
        &mut self,
        ids: &StringArray,
        add: bool,
        mut each: impl FnMut(u32, u64),
    ) -> Result<(), PrepareError> {
        let id = |row| ids.is_valid(row).then(|| ids.value(row));
        let (mut hashes, mut found, mut spans) = ([0; BLOCK], [NONE; BLOCK], [(0, 0); BLOCK]);
        for start in (0..ids.len()).step_by(BLOCK) {
            let rows = start..ids.len().min(start + BLOCK);
            for (row, hash) in rows.clone().zip(&mut hashes) {
                *hash = id(row).map_or(0, stable_hash);
            }
            let mask = self.slots.len() - 1;
            for (&hash, found) in hashes.iter().zip(&mut found) {
                let (tag, number) = self.slots[hash as usize & mask];
                *found = if tag == (hash >> 32) as u32 { number } else { NONE };
            }
            for (&found, span) in found.iter().zip(&mut spans) {
                *span = if found == NONE { (0, 0) } else { self.span(found) };
            }
            for (position, row) in rows.enumerate() {
                let (hash, (from, to)) = (hashes[position], spans[position]);
                let number = match id(row) {
                    None => NONE,
                    Some(id) if found[position] != NONE && self.text.as_bytes()[from..to] == *id.as_bytes() => {
                        found[position]
                    }
                    Some(id) if add => self.intern(id)?.0,
                    Some(id) => self.find(id),
                };
                each(number, hash);
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
                prop_assert_eq!(interner.find(id), number);
            }
            let column: StringArray = ids.iter().map(|id| Some(id.as_str()).filter(|id| !id.is_empty())).collect();
            let mut blocks = Interner::new("users");
            let mut numbers = Vec::new();
            blocks.numbers(&column, true, |number, _| numbers.push(number)).unwrap();
            for (id, &number) in ids.iter().zip(&numbers) {
                let right = if id.is_empty() { number == NONE } else { blocks.get(number) == id };
                prop_assert!(right);
            }
            let mut found = Vec::new();
            blocks.numbers(&column, false, |number, _| found.push(number)).unwrap();
            prop_assert_eq!(found, numbers);
            prop_assert_eq!(interner.len(), first.len());
            prop_assert!(first.iter().enumerate().all(|(n, id)| interner.get(n as u32) == id));
            prop_assert_eq!(interner.find("unknown"), NONE);
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
