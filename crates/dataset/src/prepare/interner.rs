//! Ids to dense numbers, in order of first appearance.
//!
//! One arena of text and one open-addressing table, since a string object per user would cost more than the user.
//! The hash is stable: it decides the order of users and which partition holds them, so it depends on the id alone.

use arrow_array::Array;

use super::error::PrepareError;
use super::input::Cells;

/// Numbers stop here: the spill file uses the bit above.
pub(crate) const LIMIT: u32 = (1 << 31) - 1;
/// No number: the cell is empty, or the id unknown.
pub(crate) const NONE: u32 = u32::MAX;

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
        let number = number as usize;
        let start = if number == 0 { 0 } else { self.ends[number - 1] };
        &self.text[start as usize..self.ends[number] as usize]
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

    /// The numbers of a column's ids; `NONE` for an empty cell, and for an unknown id unless `add`.
    pub(crate) fn numbers(&mut self, cells: &Cells, add: bool) -> Result<Vec<u32>, PrepareError> {
        let mut one = |id: &str| if add { Ok(self.intern(id)?.0) } else { Ok(self.find(id)) };
        let mut digits = [0; DIGITS];
        match cells {
            Cells::Text(cells) => {
                (0..cells.len()).map(|i| if cells.is_null(i) { Ok(NONE) } else { one(cells.value(i)) }).collect()
            }
            Cells::Int(cells) => (0..cells.len())
                .map(|i| if cells.is_null(i) { Ok(NONE) } else { one(decimal(cells.value(i), &mut digits)) })
                .collect(),
            // Columns of ids are read as integers or text, never as real numbers.
            Cells::Real(cells) => Ok(vec![NONE; cells.len()]),
        }
    }
}

/// Room for the longest `i64`.
const DIGITS: usize = 20;

/// Writes a number without the formatting machinery, which would cost more than the rest of a row.
fn decimal(value: i64, digits: &mut [u8; DIGITS]) -> &str {
    let mut rest = value.unsigned_abs();
    let mut start = DIGITS;
    loop {
        start -= 1;
        digits[start] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if value < 0 {
        start -= 1;
        digits[start] = b'-';
    }
    // Digits and a sign are ASCII, so this cannot fail; an empty id would be reported as missing.
    std::str::from_utf8(&digits[start..]).unwrap_or_default()
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
            prop_assert_eq!(interner.len(), first.len());
            prop_assert!(first.iter().enumerate().all(|(n, id)| interner.get(n as u32) == id));
            prop_assert_eq!(interner.find("unknown"), NONE);
        }

        #[test]
        fn decimals_are_what_format_writes(value: i64) {
            let mut digits = [0; DIGITS];
            prop_assert_eq!(decimal(value, &mut digits), value.to_string());
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
