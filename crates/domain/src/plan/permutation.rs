//! A keyed permutation of `0..n` with O(1) memory and random access.
//!
//! A balanced Feistel network over the smallest even number of bits that holds `n`, with cycle walking for values
//! that fall outside (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). The domain is at most
//! four times `n`, so a walk takes fewer than four steps on average.

use crate::random;

const ROUNDS: u64 = 6;

#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    size: u32,
    half_bits: u32,
    round_keys: [u64; ROUNDS as usize],
}

impl Permutation {
    pub fn new(size: u32, key: u64) -> Self {
        let bits = 32 - size.saturating_sub(1).leading_zeros();
        let mut round_keys = [0; ROUNDS as usize];
        for (round, round_key) in round_keys.iter_mut().enumerate() {
            *round_key = random::key(&[key, round as u64]);
        }
        Self { size, half_bits: bits.div_ceil(2).max(1), round_keys }
    }

    /// The image of `place`, which must be below the size.
    pub fn apply(&self, place: u32) -> u32 {
        debug_assert!(place < self.size);
        let mut value = u64::from(place);
        loop {
            value = self.encrypt(value);
            if value < u64::from(self.size) {
                return value as u32;
            }
        }
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round_key in self.round_keys {
            (left, right) = (right, left ^ (random::mix(right ^ round_key) & mask));
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_value_is_hit_once(size in 1_u32..5000, key: u64) {
            let permutation = Permutation::new(size, key);
            let mut image: Vec<u32> = (0..size).map(|place| permutation.apply(place)).collect();
            image.sort_unstable();
            prop_assert_eq!(image, (0..size).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_largest_domain_works() {
        let permutation = Permutation::new(u32::MAX, 5);
        let image: std::collections::HashSet<u32> = (0..10_000).map(|place| permutation.apply(place)).collect();
        assert_eq!(image.len(), 10_000);
    }

    #[test]
    fn neighbours_do_not_stay_neighbours() {
        let permutation = Permutation::new(100_000, 11);
        let near = (0..99_999).filter(|&i| permutation.apply(i).abs_diff(permutation.apply(i + 1)) < 10).count();
        // about 2 * 10 / 100,000 of the pairs are near by chance, that is 20
        assert!(near < 60, "{near}");
    }
}
