//! Parts of an evaluation: rare and popular items, users with short and long histories.
//!
//! An *item's* count is its number of interactions in the training sequences; a *user's* is the length of the history
//! that the split gives (everything before the targets: in test, the valid item too). Segments of items divide a user's
//! targets: a user counts in each of them with the targets that belong there, as if there were no others. Head and long
//! tail cover all items between them; cold items are the end of the tail.

use crate::config::SegmentsConfig;

/// A part of the users, or of their targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Everything.
    All,
    /// Targets with at most `cold_items` training interactions.
    ColdItems,
    /// Targets outside the head.
    TailItems,
    /// Targets among the most popular `head_items` of the catalogue.
    HeadItems,
    /// Users with at most `cold_users` interactions before the targets.
    ColdUsers,
    /// Users with at least `active_users` of them.
    ActiveUsers,
}

impl Segment {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 6] =
        [Self::All, Self::ColdItems, Self::TailItems, Self::HeadItems, Self::ColdUsers, Self::ActiveUsers];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::ColdItems => "cold_items",
            Self::TailItems => "tail_items",
            Self::HeadItems => "head_items",
            Self::ColdUsers => "cold_users",
            Self::ActiveUsers => "active_users",
        }
    }
}

/// What divides a dataset.
#[derive(Clone, Debug)]
pub struct Segments {
    thresholds: SegmentsConfig,
    /// Training interactions of each item.
    counts: Vec<u32>,
    /// An item of the head has at least this many.
    head_from: u32,
}

impl Segments {
    /// The head is the `head_items` share of the catalogue with the most training interactions, and whatever ties with
    /// its last item; an item without any never belongs to it.
    #[must_use]
    pub fn new(thresholds: SegmentsConfig, counts: Vec<u32>) -> Self {
        let mut descending = counts.clone();
        descending.sort_unstable_by(|a, b| b.cmp(a));
        let size = (thresholds.head_items * counts.len() as f64).ceil() as usize;
        let head_from = size.checked_sub(1).and_then(|last| descending.get(last)).copied().unwrap_or(u32::MAX).max(1);
        Self { thresholds, counts, head_from }
    }

    /// Whether one target of a user belongs to a segment; `history` is the number of items before the targets.
    #[must_use]
    pub fn contains(&self, segment: Segment, history: usize, target: u32) -> bool {
        let count = self.counts.get(target as usize).copied().unwrap_or(0);
        match segment {
            Segment::All => true,
            Segment::ColdItems => count <= self.thresholds.cold_items,
            Segment::TailItems => count < self.head_from,
            Segment::HeadItems => count >= self.head_from,
            Segment::ColdUsers => history <= self.thresholds.cold_users as usize,
            Segment::ActiveUsers => history >= self.thresholds.active_users as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(counts: &[u32]) -> Segments {
        let thresholds = SegmentsConfig { cold_items: 1, head_items: 0.4, cold_users: 2, active_users: 4 };
        Segments::new(thresholds, counts.to_vec())
    }

    fn members(segments: &Segments, segment: Segment) -> Vec<u32> {
        (0..segments.counts.len() as u32).filter(|&item| segments.contains(segment, 3, item)).collect()
    }

    #[test]
    fn items_are_divided_by_their_training_interactions() {
        let five = segments(&[9, 0, 5, 1, 5]);
        assert_eq!(members(&five, Segment::ColdItems), [1, 3]);
        assert_eq!(members(&five, Segment::HeadItems), [0, 2, 4], "two of five, and the one that ties");
        assert_eq!(members(&five, Segment::TailItems), [1, 3]);
        assert_eq!(members(&five, Segment::All), [0, 1, 2, 3, 4]);
        assert_eq!(members(&segments(&[0, 0, 0]), Segment::HeadItems), Vec::<u32>::new(), "nobody took any of them");
    }

    #[test]
    fn users_are_divided_by_their_history() {
        let any = segments(&[1]);
        let of = |segment, history| any.contains(segment, history, 0);
        assert_eq!([2, 3, 4].map(|history| of(Segment::ColdUsers, history)), [true, false, false]);
        assert_eq!([2, 3, 4].map(|history| of(Segment::ActiveUsers, history)), [false, false, true]);
    }
}
