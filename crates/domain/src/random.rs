//! Counter-based pseudo-random numbers: a value is a pure function of its key, so that any draw of any
//! (seed, epoch, step, user) can be made alone, on any machine, without replaying earlier draws.
//!
//! The mixer is the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
//! OOPSLA 2014).

/// One round of the SplitMix64 finalizer: a bijection of 64 bits whose output bits each depend on all input bits.
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Folds the parts of a key into one 64-bit value; the order of the parts matters.
#[must_use]
pub fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(0x6c65_6172_6e5f_7631, |state, &part| mix(state ^ mix(part)))
}

/// Folds text (a fingerprint) into a key part.
#[must_use]
pub fn text_key(text: &str) -> u64 {
    text.as_bytes().chunks(8).fold(mix(text.len() as u64), |state, chunk| {
        let word = chunk.iter().fold(0_u64, |word, &byte| (word << 8) | u64::from(byte));
        mix(state ^ word)
    })
}

/// A stream of draws that starts at a key.
#[derive(Clone, Debug)]
pub struct Draws {
    state: u64,
}

impl Draws {
    #[must_use]
    pub fn new(parts: &[u64]) -> Self {
        Self { state: key(parts) }
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A uniform integer in `0..bound`; 0 if `bound` is 0. Multiply-shift: the bias is below `bound / 2^64`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// A uniform real in the open interval (0, 1).
    pub fn unit(&mut self) -> f64 {
        ((self.next_u64() >> 11) as f64 + 0.5) * (1.0 / (1_u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_every_part_and_on_their_order() {
        let first = |parts: &[u64]| Draws::new(parts).next_u64();
        assert_ne!(first(&[1, 2]), first(&[2, 1]));
        assert_ne!(first(&[1, 2]), first(&[1, 3]));
        assert_ne!(text_key("ab"), text_key("ba"));
        assert_ne!(text_key("a"), text_key("a\0"));
    }

    #[test]
    fn below_is_uniform_enough() {
        let mut draws = Draws::new(&[7]);
        let mut counts = [0_u32; 10];
        for _ in 0..100_000 {
            counts[draws.below(10) as usize] += 1;
        }
        // 10,000 expected with a standard deviation of 95
        assert!(counts.iter().all(|&count| (9_500..10_500).contains(&count)), "{counts:?}");
    }

    #[test]
    fn unit_stays_inside_the_open_interval() {
        let mut draws = Draws::new(&[3]);
        assert!((0..100_000).map(|_| draws.unit()).all(|x| x > 0.0 && x < 1.0));
    }
}
