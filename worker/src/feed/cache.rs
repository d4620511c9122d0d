//! The worker's cache of content embedding rows in host memory.
//!
//! Input: item indices. Output: their rows, contiguous. A row crosses the network only when it is not here; the least
//! recently used rows make room. Invariant: rows of the request being served are never evicted by it.

use half::f16;
use lru::LruCache;
use rayon::prelude::*;

/// A request does not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "a step needs {needed} distinct items at once, but the row cache holds {capacity}; raise cluster.row_cache or lower \
     training.micro_batch"
)]
pub struct CacheTooSmall {
    needed: usize,
    capacity: usize,
}

/// A bounded table of rows of `dim` values.
pub struct RowCache {
    dim: usize,
    capacity: usize,
    slots: LruCache<u32, usize>,
    rows: Vec<f16>,
}

impl RowCache {
    /// A cache of at most `bytes` of rows; memory is taken as it fills.
    #[must_use]
    pub fn new(dim: usize, bytes: u64) -> Self {
        let capacity = usize::try_from(bytes / (2 * dim.max(1)) as u64).unwrap_or(usize::MAX).max(1);
        Self { dim, capacity, slots: LruCache::unbounded(), rows: Vec::new() }
    }

    /// Marks `items` (distinct) as used and returns those whose rows are missing.
    ///
    /// # Errors
    /// If they cannot all be held at once.
    pub fn missing(&mut self, items: &[u32]) -> Result<Vec<u32>, CacheTooSmall> {
        if items.len() > self.capacity {
            return Err(CacheTooSmall { needed: items.len(), capacity: self.capacity });
        }
        Ok(items.iter().copied().filter(|item| self.slots.get(item).is_none()).collect())
    }

    /// Stores the rows of `items`, which [`RowCache::missing`] has just returned.
    pub fn insert(&mut self, items: &[u32], rows: &[f16]) {
        for (item, row) in items.iter().zip(rows.chunks_exact(self.dim)) {
            let slot = if self.slots.len() < self.capacity {
                self.rows.extend_from_slice(row);
                self.slots.len()
            } else {
                // full, so there is a least recently used entry
                let Some((_, slot)) = self.slots.pop_lru() else { return };
                self.rows[slot * self.dim..][..self.dim].copy_from_slice(row);
                slot
            };
            self.slots.put(*item, slot);
        }
    }

    /// Copies the rows of `items`, all present, into one `[items, dim]` block.
    #[must_use]
    pub fn gather(&self, items: &[u32]) -> Vec<f16> {
        let mut block = vec![f16::ZERO; items.len() * self.dim];
        block.par_chunks_exact_mut(self.dim).zip(items.par_iter()).with_min_len(64).for_each(|(row, item)| {
            if let Some(&slot) = self.slots.peek(item) {
                row.copy_from_slice(&self.rows[slot * self.dim..][..self.dim]);
            }
        });
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(item: u32) -> Vec<f16> {
        vec![f16::from_f32(item as f32), f16::from_f32(-(item as f32))]
    }

    fn request(cache: &mut RowCache, items: &[u32]) -> usize {
        let missing = cache.missing(items).unwrap();
        let rows: Vec<f16> = missing.iter().flat_map(|&item| row(item)).collect();
        cache.insert(&missing, &rows);
        assert_eq!(cache.gather(items), items.iter().flat_map(|&item| row(item)).collect::<Vec<_>>());
        missing.len()
    }

    #[test]
    fn rows_are_fetched_once_and_the_oldest_make_room() {
        let mut cache = RowCache::new(2, 4 * 4);
        assert_eq!(request(&mut cache, &[1, 2, 3]), 3);
        assert_eq!(request(&mut cache, &[2, 3]), 0);
        assert_eq!(request(&mut cache, &[4, 5]), 2, "1 is the least recently used of four");
        assert_eq!(request(&mut cache, &[2, 3, 4, 5]), 0);
        assert_eq!(request(&mut cache, &[1, 2, 3, 4]), 1, "a request never evicts its own rows");
    }

    #[test]
    fn a_request_beyond_the_capacity_is_refused_with_the_remedy() {
        let error = RowCache::new(2, 8).missing(&[1, 2, 3]).unwrap_err().to_string();
        assert!(error.contains("cluster.row_cache"), "{error}");
    }
}
