//! How sequences of different lengths lie one behind the other, without padding.
//!
//! Input: their lengths. Output: an order, and where each sequence begins. Sequences of equal length are neighbours, so that
//! a *run* of them is a dense `[count, length]` block that attention can take at once.

/// Neighbouring sequences of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub count: usize,
    pub length: usize,
}

impl Run {
    /// Tokens of all its sequences.
    #[must_use]
    pub fn tokens(self) -> usize {
        self.count * self.length
    }
}

/// A layout of sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packing {
    /// Numbers of the sequences in the order in which they lie: shortest first, equal ones in their own order.
    pub order: Vec<usize>,
    pub runs: Vec<Run>,
    /// Place of each sequence's first token, by the sequence's number.
    pub starts: Vec<usize>,
}

impl Packing {
    /// Lays out sequences of these lengths.
    #[must_use]
    pub fn new(lengths: &[usize]) -> Self {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&number| lengths[number]);
        let mut packing = Self { runs: Vec::new(), starts: vec![0; lengths.len()], order };
        let mut place = 0;
        for &number in &packing.order {
            let length = lengths[number];
            packing.starts[number] = place;
            place += length;
            match packing.runs.last_mut() {
                Some(run) if run.length == length => run.count += 1,
                _ => packing.runs.push(Run { count: 1, length }),
            }
        }
        // what has no token is in no block
        packing.runs.retain(|run| run.length > 0);
        packing
    }
}

/// For each token of these runs how many tokens of its sequence follow it.
pub fn ages(runs: &[Run]) -> impl Iterator<Item = usize> {
    runs.iter().flat_map(|run| std::iter::repeat_n((0..run.length).rev(), run.count).flatten())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_lengths_are_neighbours() {
        let packing = Packing::new(&[2, 3, 0, 2, 1]);
        assert_eq!(packing.order, [2, 4, 0, 3, 1]);
        let run = |count, length| Run { count, length };
        assert_eq!(packing.runs, [run(1, 1), run(2, 2), run(1, 3)]);
        assert_eq!(packing.starts, [1, 5, 0, 3, 0]);
        assert_eq!(ages(&packing.runs).collect::<Vec<_>>(), [0, 1, 0, 1, 0, 2, 1, 0]);
        assert_eq!(Packing::new(&[]), Packing::default());
    }

    proptest! {
        #[test]
        fn every_token_has_one_place(lengths in proptest::collection::vec(0_usize..6, 0..12)) {
            let packing = Packing::new(&lengths);
            let places = lengths.iter().zip(&packing.starts).flat_map(|(length, start)| *start..start + length);
            let mut places: Vec<usize> = places.collect();
            places.sort_unstable();
            let total = packing.runs.iter().map(|run| run.tokens()).sum();
            prop_assert_eq!(places, (0..total).collect::<Vec<_>>());
            prop_assert_eq!(ages(&packing.runs).count(), total);
            prop_assert!(packing.runs.is_sorted_by(|a, b| a.length < b.length));
        }
    }
}
