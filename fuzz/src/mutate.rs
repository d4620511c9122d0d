//! Changes of an input, by a row of numbers: the same numbers make the same input.

use crate::MOST_BYTES;

/// Numbers that break parsers.
const NUMBERS: [u64; 14] = [
    0,
    1,
    7,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_fff8,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];
/// Most changes of one input.
const MOST_CHANGES: u64 = 6;

/// A row of numbers (xorshift); a seed names it.
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `end`, which is at least 1.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// A changed copy of one of `seeds`, of [`MOST_BYTES`] at most.
#[must_use]
pub fn mutated(seeds: &[Vec<u8>], words: &[&str], numbers: &mut Numbers) -> Vec<u8> {
    let Some(seed) = seeds.get(numbers.below(seeds.len())) else { return Vec::new() };
    let mut bytes = seed.clone();
    for _ in 0..=numbers.next() % MOST_CHANGES {
        change(&mut bytes, seeds, words, numbers);
    }
    bytes.truncate(MOST_BYTES);
    bytes
}

fn change(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str], numbers: &mut Numbers) {
    let at = numbers.below(bytes.len() + 1);
    let rest = bytes.len() - at;
    match numbers.below(10) {
        0 | 1 if rest > 0 => bytes[at] ^= 1 << numbers.below(8),
        2 if rest > 0 => bytes[at] = numbers.next() as u8,
        3 | 4 => {
            let number = NUMBERS[numbers.below(NUMBERS.len())].wrapping_add(numbers.below(3) as u64);
            let width = [1, 2, 4, 8][numbers.below(4)].min(rest);
            bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        5 => drop(bytes.drain(at..at + numbers.below(rest.min(64) + 1))),
        6 => {
            let piece = bytes[at..at + numbers.below(rest.min(64) + 1)].to_vec();
            let to = numbers.below(bytes.len() + 1);
            bytes.splice(to..to, piece);
        }
        7 => {
            let other = &seeds[numbers.below(seeds.len())];
            let from = numbers.below(other.len() + 1);
            let to = from + numbers.below(other.len() - from + 1);
            bytes.splice(at.., other[from..to].iter().copied());
        }
        8 => bytes.truncate(at),
        _ if !words.is_empty() => {
            let word = words[numbers.below(words.len())].bytes();
            let over = numbers.below(2) * word.len().min(rest);
            bytes.splice(at..at + over, word);
        }
        _ => bytes.push(numbers.next() as u8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_names_its_inputs_and_they_differ() {
        let seeds = [b"{\"version\":1}".to_vec(), vec![0; 40]];
        let row = |seed| {
            let mut numbers = Numbers::new(seed);
            (0..200).map(|_| mutated(&seeds, &["rank"], &mut numbers)).collect::<Vec<_>>()
        };
        let first = row(7);
        assert_eq!(first, row(7));
        let different: std::collections::BTreeSet<_> = first.iter().collect();
        assert!(different.len() > 150, "{} of 200 inputs differ", different.len());
        assert!(first.iter().all(|bytes| bytes.len() <= MOST_BYTES));
        assert!(mutated(&[], &[], &mut Numbers::new(1)).is_empty());
    }
}
