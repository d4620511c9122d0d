//! Who is chosen together with whom, and how much of its neighbours' content an item takes over.
//!
//! Input: training sequences of item indices. Output: for each item its neighbours with weights
//!
//! `K_ij = A_ij / sqrt((n_i + 1) (n_j + 1))`, `A_ij = sum over pairs of one user of decay^(distance - 1)`, `n_i = sum_j A_ij`,
//!
//! one step of symmetric propagation over the co-occurrence graph (as in LightGCN, He et al. 2020), with the + 1 as a prior
//! that keeps items with few interactions near their own content. Only training interactions count. Pure; memory is that
//! of the entries of the items that are asked for, so a large catalogue is done range by range.

use std::ops::Range;

use rayon::prelude::*;

/// Pairs whose strength would be below this are left out.
const FAINTEST: f64 = 1e-3;

/// One item next to another, and how strongly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbour {
    pub item: u32,
    pub weight: f32,
}

/// Strength of co-occurrence in a set of sequences.
pub struct Cooccurrence<'a> {
    sequences: Vec<&'a [u32]>,
    /// `decay^(distance - 1)` for distances from 1 on.
    strengths: Vec<f64>,
    /// `n_i`.
    totals: Vec<f64>,
}

impl<'a> Cooccurrence<'a> {
    /// Counts over sequences whose items are below `items`; `decay` lies between 0 and 1.
    #[must_use]
    pub fn measure(sequences: Vec<&'a [u32]>, items: usize, decay: f64) -> Self {
        let strengths: Vec<f64> =
            (0..).map(|distance| decay.powi(distance)).take_while(|&strength| strength >= FAINTEST).collect();
        let mut this = Self { sequences, strengths, totals: Vec::new() };
        let mut totals = vec![0.0; items];
        for sequence in &this.sequences {
            this.pairs(sequence, |one, other, strength| {
                totals[one as usize] += strength;
                totals[other as usize] += strength;
            });
        }
        this.totals = totals;
        this
    }

    /// Every pair of different items of a sequence that are near enough.
    fn pairs(&self, sequence: &[u32], mut found: impl FnMut(u32, u32, f64)) {
        for (at, &one) in sequence.iter().enumerate() {
            for (&other, &strength) in sequence[at + 1..].iter().zip(&self.strengths) {
                if one != other {
                    found(one, other, strength);
                }
            }
        }
    }

    /// Pairs of all sequences, at most: what bounds the memory of [`Self::neighbours`] over all items.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.sequences.iter().map(|sequence| 2 * sequence.len() * self.strengths.len().min(sequence.len())).sum()
    }

    /// The neighbours of each item of a range, by item index.
    #[must_use]
    pub fn neighbours(&self, items: Range<u32>) -> Vec<Vec<Neighbour>> {
        let mut entries: Vec<(u32, u32, f64)> = self
            .sequences
            .par_iter()
            .flat_map_iter(|sequence| {
                let mut own = Vec::new();
                self.pairs(sequence, |one, other, strength| {
                    own.extend(items.contains(&one).then_some((one, other, strength)));
                    own.extend(items.contains(&other).then_some((other, one, strength)));
                });
                own
            })
            .collect();
        // stable: equal pairs stay in the order of the sequences, so that their sum does not depend on threads
        entries.par_sort_by_key(|&(item, other, _)| (item, other));
        let mut all = vec![Vec::new(); items.len()];
        for same in entries.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let (item, other, _) = same[0];
            let strength: f64 = same.iter().map(|entry| entry.2).sum();
            let prior = (self.totals[item as usize] + 1.0) * (self.totals[other as usize] + 1.0);
            let weight = (strength / prior.sqrt()) as f32;
            all[(item - items.start) as usize].push(Neighbour { item: other, weight });
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn weights_by_hand() {
        // pairs: (0,1) 1, (0,2) 0.5, (1,2) 1; a repeat of an item is no pair
        let found = Cooccurrence::measure(vec![&[0, 1, 2], &[3, 3]], 5, 0.5);
        let (n0, n1, n2) = (1.5, 2.0, 1.5);
        let weight = |strength: f64, a: f64, b: f64| (strength / ((a + 1.0) * (b + 1.0)).sqrt()) as f32;
        let all = found.neighbours(0..5);
        assert_eq!(
            all[0],
            [Neighbour { item: 1, weight: weight(1.0, n0, n1) }, Neighbour { item: 2, weight: weight(0.5, n0, n2) }]
        );
        assert_eq!(all[1][1], Neighbour { item: 2, weight: weight(1.0, n1, n2) });
        assert!(all[3].is_empty() && all[4].is_empty());
    }

    proptest! {
        #[test]
        fn the_graph_is_symmetric_and_the_same_in_any_ranges(
            sequences in prop::collection::vec(prop::collection::vec(0_u32..12, 0..9), 0..12),
            cut in 0_u32..12,
        ) {
            let found = Cooccurrence::measure(sequences.iter().map(Vec::as_slice).collect(), 12, 0.7);
            let all = found.neighbours(0..12);
            prop_assert_eq!(&[found.neighbours(0..cut), found.neighbours(cut..12)].concat(), &all);
            for (item, neighbours) in (0..).zip(&all) {
                prop_assert!(neighbours.windows(2).all(|pair| pair[0].item < pair[1].item));
                for neighbour in neighbours {
                    prop_assert!(neighbour.item != item && neighbour.weight > 0.0 && neighbour.weight < 1.0);
                    let back = all[neighbour.item as usize].iter().find(|back| back.item == item).unwrap();
                    prop_assert!((back.weight - neighbour.weight).abs() < 1e-6);
                }
            }
        }
    }
}
