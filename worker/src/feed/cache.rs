//! The worker's cache of content embedding rows in host memory.
//!
//! Input: requests of items, announced ahead if they are known. Output: their rows, contiguous. A row crosses the network only
//! when it is neither here nor with a [neighbour](super::neighbours); who stays is [`Residents`]' choice. Invariants: at
//! most `capacity` rows; memory is taken as it fills; if others of the machine read it, this worker alone writes to it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::f16;
use learn_collective::{OwnRows, RowsOffer, RowsShape};
use rayon::prelude::*;

use super::residents::Residents;

/// A bounded table of rows of `dim` values.
pub struct RowCache {
    dim: usize,
    residents: Residents,
    rows: Memory,
}

/// Rows by slot.
enum Memory {
    Private(Vec<f16>),
    /// Other workers of the machine read it.
    Shared(OwnRows),
}

impl Memory {
    fn row(&self, slot: usize, dim: usize) -> &[f16] {
        match self {
            Self::Private(rows) => &rows[slot * dim..][..dim],
            Self::Shared(rows) => bytemuck::cast_slice(rows.row(slot)),
        }
    }

    fn put(&mut self, slot: usize, item: u32, row: &[f16]) {
        match self {
            Self::Private(rows) => match rows.get_mut(slot * row.len()..(slot + 1) * row.len()) {
                Some(place) => place.copy_from_slice(row),
                // slots are given out in their order
                None => rows.extend_from_slice(row),
            },
            Self::Shared(rows) => rows.put(slot, item, bytemuck::cast_slice(row)),
        }
    }
}

impl RowCache {
    /// A cache of at most `capacity` rows.
    #[must_use]
    pub fn new(dim: usize, capacity: usize, popularity: Arc<[u32]>) -> Self {
        Self { dim, residents: Residents::new(capacity, popularity), rows: Memory::Private(Vec::new()) }
    }

    /// A cache of as many rows as this memory has room for.
    #[must_use]
    pub fn shared(memory: OwnRows, popularity: Arc<[u32]>) -> Self {
        let RowsShape { slots, row_bytes, .. } = memory.shape();
        let residents = Residents::new(slots, popularity);
        Self { dim: row_bytes / size_of::<f16>(), residents, rows: Memory::Shared(memory) }
    }

    /// As [`Residents::forget_announced`].
    pub fn forget_announced(&mut self) {
        self.residents.forget_announced();
    }

    /// Announces the request after those that are announced already.
    pub fn announce(&mut self, items: &[u32]) {
        self.residents.announce(items);
    }

    /// Begins the next request ([`Residents::begin`]), of which `wanted` are asked for here: those whose rows are not here,
    /// in their order.
    #[must_use]
    pub fn begin(&mut self, request: &[u32], wanted: &[u32]) -> Vec<u32> {
        self.residents.begin(request);
        wanted.iter().copied().filter(|&item| self.residents.slot(item).is_none()).collect()
    }

    /// Copies the rows of distinct `items` into a block `[items, dim]`: those that are here, and those of `missing` that
    /// were `fetched`, in the order of [`RowCache::begin`]. Others are there already.
    pub fn gather(&self, items: &[u32], (missing, fetched): (&[u32], &[f16]), block: &mut [f16]) {
        let mut others = missing.iter().zip(fetched.chunks_exact(self.dim)).peekable();
        let row = |item: &u32| match self.residents.slot(*item) {
            Some(slot) => Some(self.rows.row(slot, self.dim)),
            None => others.next_if(|(other, _)| *other == item).map(|(_, row)| row),
        };
        let sources: Vec<Option<&[f16]>> = items.iter().map(row).collect();
        block.par_chunks_exact_mut(self.dim).zip(sources).with_min_len(64).for_each(|(row, source)| {
            if let Some(source) = source {
                row.copy_from_slice(source);
            }
        });
    }

    /// Keeps those rows of `items`, which were missing, that are `wanted` and worth more than what is here.
    pub fn keep(&mut self, items: &[u32], fetched: &[f16], wanted: impl Fn(u32) -> bool) {
        for (&item, row) in items.iter().zip(fetched.chunks_exact(self.dim)).filter(|&(&item, _)| wanted(item)) {
            if let Some(slot) = self.residents.admit(item) {
                self.rows.put(slot, item, row);
            }
        }
    }
}

/// Where a cache stays between two that use it one after the other, such as the feeds of two generations.
#[derive(Clone, Default)]
pub struct CachePlace {
    left: Arc<Mutex<Left>>,
    /// By which other workers of the machine read the cache, whoever uses it.
    offer: Option<RowsOffer>,
}

#[derive(Default)]
struct Left {
    cache: Option<RowCache>,
    /// For the first cache.
    memory: Option<OwnRows>,
}

impl CachePlace {
    /// For a cache of this shape that other workers of the machine read, if the system lets them.
    #[must_use]
    pub fn shared(shape: RowsShape) -> Self {
        let why_not = |error: &std::io::Error| tracing::debug!(%error, "the row cache is not shared");
        let memory = OwnRows::new(shape).inspect_err(why_not).ok();
        let offer = memory.as_ref().map(OwnRows::offer);
        Self { left: Arc::new(Mutex::new(Left { cache: None, memory })), offer }
    }

    /// What the other workers are told, if they shall read the cache.
    #[must_use]
    pub fn offer(&self) -> Option<&RowsOffer> {
        self.offer.as_ref()
    }

    /// The cache that was left here last, if nobody has it.
    #[must_use]
    pub fn take(&self) -> Option<RowCache> {
        self.left().cache.take()
    }

    /// The memory that a first cache shall have, if others are to read it.
    #[must_use]
    pub fn take_memory(&self) -> Option<OwnRows> {
        self.left().memory.take()
    }

    /// Leaves a cache here for the next one; what was announced was so for the last one alone.
    pub fn leave(&self, mut cache: RowCache) {
        cache.forget_announced();
        self.left().cache = Some(cache);
    }

    fn left(&self) -> MutexGuard<'_, Left> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for CachePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CachePlace")
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

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
        let missing = cache.begin(items, items);
        let fetched = rows(&missing);
        let mut block = rows(&vec![0; items.len()]);
        cache.gather(items, (&missing, &fetched), &mut block);
        assert_eq!(block, rows(items));
        cache.keep(&missing, &fetched, |_| true);
        missing
    }

    #[test]
    fn the_popular_stay_and_a_request_may_be_larger_than_the_cache() {
        popular_stay(RowCache::new(2, 2, Arc::from([9, 1, 5, 7, 1])));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_that_others_read_makes_no_difference() {
        let shape = RowsShape { items: 5, slots: 2, row_bytes: 4 };
        popular_stay(RowCache::shared(OwnRows::new(shape).unwrap(), Arc::from([9, 1, 5, 7, 1])));
    }

    fn popular_stay(mut cache: RowCache) {
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
        let mut cache = RowCache::new(2, 1, Arc::default());
        assert_eq!(request(&mut cache, &[1, 2]), [1, 2]);
        assert_eq!(request(&mut cache, &[1, 2]), [2]);
    }

    #[test]
    fn a_part_of_an_announced_request_is_enough() {
        let mut cache = RowCache::new(2, 1, Arc::from([5, 1, 1]));
        for items in [&[0, 1][..], &[1, 2], &[1]] {
            cache.announce(items);
        }
        assert_eq!(request(&mut cache, &[0, 1]), [0, 1], "0 comes first, but 1 is needed again");
        assert_eq!(cache.begin(&[1, 2], &[2]), [2]);
        assert!(request(&mut cache, &[1]).is_empty());
    }

    proptest! {
        #[test]
        fn rows_are_right_and_in_the_end_the_most_popular_are_held(
            popularity in prop::collection::vec(0_u32..50, 1..40), capacity in 0_usize..20,
            seeds in prop::collection::vec(any::<u64>(), 0..8), announced in any::<bool>(),
        ) {
            let items = popularity.len() as u32;
            let mut cache = RowCache::new(2, capacity, popularity.clone().into());
            let wanted = |seed: u64| -> Vec<u32> { (0..items).filter(|item| seed >> (item % 64) & 1 == 1).collect() };
            let requests: Vec<Vec<u32>> = seeds.into_iter().map(wanted).collect();
            if announced {
                requests.iter().for_each(|items| cache.announce(items));
            }
            for items in requests {
                request(&mut cache, &items);
                prop_assert!(matches!(&cache.rows, Memory::Private(rows) if rows.len() <= 2 * capacity));
            }
            let all: Vec<u32> = (0..items).collect();
            request(&mut cache, &all);
            let missing = cache.begin(&all, &all);
            let held = all.iter().filter(|item| !missing.contains(item));
            let mut held: Vec<u32> = held.map(|&item| popularity[item as usize]).collect();
            let mut best = popularity.clone();
            held.sort_unstable_by_key(|&count| Reverse(count));
            best.sort_unstable_by_key(|&count| Reverse(count));
            best.truncate(capacity);
            prop_assert_eq!(held, best);
        }
    }
}
