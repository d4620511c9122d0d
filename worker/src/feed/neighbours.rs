//! The row caches of the other workers of this machine.
//!
//! Input: the items of a request that this worker's own cache has not got. Output: the rows of those that another one has,
//! and the items that nobody here has. What is found is used and not kept, so a machine holds a row about once, and its
//! caches add up. Invariant: nobody is waited for; a row that its owner replaces at that moment counts as not there.

use std::sync::Arc;

use half::f16;
use learn_collective::TheirRows;
use rayon::prelude::*;

/// The caches of one generation's workers, as far as they can be read from here.
#[derive(Clone, Debug, Default)]
pub struct Neighbours(Arc<[TheirRows]>);

impl From<Vec<TheirRows>> for Neighbours {
    fn from(tables: Vec<TheirRows>) -> Self {
        Self(tables.into())
    }
}

impl Neighbours {
    /// Copies what neighbours have of the rows of `missing` to their places in a block `[wanted, dim]`, and gives the items
    /// that are still missing. `missing` are some of the items that are `wanted`, in their order.
    #[must_use]
    pub fn gather(&self, wanted: &[u32], missing: Vec<u32>, block: &mut [f16]) -> Vec<u32> {
        if self.0.is_empty() || missing.is_empty() {
            return missing;
        }
        let dim = block.len() / wanted.len();
        let mut others = missing.iter().peekable();
        let places = wanted.iter().zip(block.chunks_exact_mut(dim));
        let places: Vec<(&u32, &mut [f16])> = places.filter(|(item, _)| others.next_if_eq(item).is_some()).collect();
        let not_here = |(&item, row): (&u32, &mut [f16])| {
            let row: &mut [u8] = bytemuck::cast_slice_mut(row);
            (!self.0.iter().any(|table| table.copy(item, row))).then_some(item)
        };
        places.into_par_iter().with_min_len(64).filter_map(not_here).collect()
    }

    /// Whether one of them seems to have the row of this item.
    #[must_use]
    pub fn hold(&self, item: u32) -> bool {
        self.0.iter().any(|table| table.holds(item))
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use learn_collective::{OwnRows, RowsShape};

    use super::*;

    #[test]
    fn rows_come_to_their_places_from_whoever_has_them() {
        let row = |item: u32| [f16::from_f32(item as f32); 3];
        let shape = RowsShape { items: 9, slots: 2, row_bytes: 6 };
        let mut own = [(); 2].map(|()| OwnRows::new(shape).unwrap());
        for (table, items) in own.iter_mut().zip([[5, 2], [7, 2]]) {
            (0..).zip(items).for_each(|(slot, item)| table.put(slot, item, bytemuck::cast_slice(&row(item))));
        }
        let tables: Vec<TheirRows> = own.iter().map(|own| TheirRows::open(&own.offer()).unwrap()).collect();
        let neighbours = Neighbours::from(tables);
        let mut block = [f16::ONE; 5 * 3];
        // 5 is in this worker's own cache, too
        let missing = neighbours.gather(&[8, 7, 5, 2, 0], vec![8, 7, 2, 0], &mut block);
        assert_eq!(missing, [8, 0]);
        assert_eq!(block[3..6], row(7));
        assert_eq!(block[6..9], [f16::ONE; 3]);
        assert_eq!(block[9..12], row(2));
        assert!(neighbours.hold(7) && !neighbours.hold(8));
        let nobody = Neighbours::default();
        assert_eq!(nobody.gather(&[7], vec![7], &mut block[..3]), [7]);
        assert!(!nobody.hold(7));
    }
}
