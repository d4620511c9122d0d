//! The worker's cache of content embedding rows in host memory.
//!
//! Input: item indices, and how often each item occurs in the training sequences. Output: their rows, contiguous. A row crosses
//! the network only when it is not here. Who stays: the items that occur most, which is known before the job begins. Each epoch
//! has every sequence once, in random order, so an item's requests are as frequent as its occurrences, and no other choice
//! of as many items gets more hits; `examples/cache_policies.rs` compares it with others. Invariants: at most `capacity`
//! rows; a row makes room only for one of an item that occurs more often; a request may be larger than the cache.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

/// A bounded table of rows of `dim` values.
pub struct RowCache {
    dim: usize,
    capacity: usize,
    /// Training interactions by item; without them the first to come stay.
    popularity: Arc<[u32]>,
    slots: HashMap<u32, usize>,
    /// The items that are here, the least popular first.
    least: BinaryHeap<Reverse<(u32, u32)>>,
    rows: Vec<f16>,
}

impl RowCache {
    /// A cache of at most `bytes` of rows; memory is taken as it fills.
    #[must_use]
    pub fn new(dim: usize, bytes: u64, popularity: Arc<[u32]>) -> Self {
        let capacity = usize::try_from(bytes / (2 * dim.max(1)) as u64).unwrap_or(usize::MAX);
        Self { dim, capacity, popularity, slots: HashMap::new(), least: BinaryHeap::new(), rows: Vec::new() }
    }

    /// Those of `items` (distinct) whose rows are not here, in their order.
    #[must_use]
    pub fn missing(&self, items: &[u32]) -> Vec<u32> {
        items.iter().copied().filter(|item| !self.slots.contains_key(item)).collect()
    }

    /// Copies the rows of `items` into one `[items, dim]` block; `fetched` has those that were missing, in the order of
    /// [`RowCache::missing`].
    #[must_use]
    pub fn gather(&self, items: &[u32], fetched: &[f16]) -> Vec<f16> {
        let mut others = fetched.chunks_exact(self.dim);
        let row = |item| match self.slots.get(item) {
            Some(&slot) => Some(&self.rows[slot * self.dim..][..self.dim]),
            None => others.next(),
        };
        let sources: Vec<Option<&[f16]>> = items.iter().map(row).collect();
        let mut block = vec![f16::ZERO; items.len() * self.dim];
        block.par_chunks_exact_mut(self.dim).zip(sources).with_min_len(64).for_each(|(row, source)| {
            if let Some(source) = source {
                row.copy_from_slice(source);
            }
        });
        block
    }

    /// Keeps those rows of `items`, which were missing, that are worth more than what is here.
    pub fn keep(&mut self, items: &[u32], fetched: &[f16]) {
        for (&item, row) in items.iter().zip(fetched.chunks_exact(self.dim)) {
            let popularity = self.popularity.get(item as usize).copied().unwrap_or_default();
            if self.slots.len() < self.capacity {
                self.slots.insert(item, self.slots.len());
                self.rows.extend_from_slice(row);
            } else {
                let Some(mut least) = self.least.peek_mut() else { return };
                let Reverse((least_popularity, least_item)) = *least;
                if popularity <= least_popularity {
                    continue;
                }
                *least = Reverse((popularity, item));
                // what is in the heap has a slot
                let Some(slot) = self.slots.remove(&least_item) else { continue };
                self.slots.insert(item, slot);
                self.rows[slot * self.dim..][..self.dim].copy_from_slice(row);
                continue;
            }
            self.least.push(Reverse((popularity, item)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(item: u32) -> Vec<f16> {
        vec![f16::from_f32(item as f32), f16::from_f32(-(item as f32))]
    }

    fn rows(items: &[u32]) -> Vec<f16> {
        items.iter().flat_map(|&item| row(item)).collect()
    }

    /// Serves a request; what had to be fetched for it.
    fn request(cache: &mut RowCache, items: &[u32]) -> Vec<u32> {
        let missing = cache.missing(items);
        let fetched = rows(&missing);
        assert_eq!(cache.gather(items, &fetched), rows(items));
        cache.keep(&missing, &fetched);
        missing
    }

    #[test]
    fn the_popular_stay_and_a_request_may_be_larger_than_the_cache() {
        let mut cache = RowCache::new(2, 2 * 4, Arc::from([9, 1, 5, 7, 1]));
        assert_eq!(request(&mut cache, &[1, 2, 4]), [1, 2, 4]);
        assert_eq!(request(&mut cache, &[4, 2, 1]), [4], "1 and 2 came first, and 4 is not worth more than 1");
        assert_eq!(request(&mut cache, &[3, 0, 1]), [3, 0], "3 takes the place of 1, 0 that of 2");
        assert_eq!(request(&mut cache, &[0, 1, 2, 3, 4]), [1, 2, 4]);
    }

    #[test]
    fn no_memory_is_no_cache_and_without_popularity_the_first_stay() {
        let mut cache = RowCache::new(2, 0, Arc::default());
        assert_eq!(request(&mut cache, &[1, 2]), [1, 2]);
        assert_eq!(request(&mut cache, &[1, 2]), [1, 2]);
        let mut cache = RowCache::new(2, 4, Arc::default());
        assert_eq!(request(&mut cache, &[1, 2]), [1, 2]);
        assert_eq!(request(&mut cache, &[1, 2]), [2]);
    }

    proptest! {
        #[test]
        fn rows_are_right_and_in_the_end_the_most_popular_are_held(
            popularity in prop::collection::vec(0_u32..50, 1..40), capacity in 0_usize..20,
            seeds in prop::collection::vec(any::<u64>(), 0..8),
        ) {
            let items = popularity.len() as u32;
            let mut cache = RowCache::new(2, 4 * capacity as u64, popularity.clone().into());
            for seed in seeds {
                let wanted: Vec<u32> = (0..items).filter(|item| seed >> (item % 64) & 1 == 1).collect();
                request(&mut cache, &wanted);
                prop_assert!(cache.slots.len() <= capacity && cache.rows.len() == 2 * cache.slots.len());
                prop_assert_eq!(cache.least.len(), cache.slots.len());
            }
            let all: Vec<u32> = (0..items).collect();
            request(&mut cache, &all);
            let mut held: Vec<u32> = cache.slots.keys().map(|&item| popularity[item as usize]).collect();
            let mut best = popularity.clone();
            held.sort_unstable_by_key(|&count| Reverse(count));
            best.sort_unstable_by_key(|&count| Reverse(count));
            best.truncate(capacity);
            prop_assert_eq!(held, best);
        }
    }
}
