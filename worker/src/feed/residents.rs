//! Which rows a cache keeps: the decision alone, for the host's cache and for the device's.
//!
//! Input: requests, each of distinct items, announced ahead as far as the stream of batches has come; and how often each
//! item occurs in the training sequences. Output: the slots of the items that are here, and slots for those that come.
//!
//! A row that an announced request needs is worth more than one that none needs, and the sooner the more (Belady, "A study
//! of replacement algorithms for a virtual-storage computer", 1966). Among the others an item is worth its occurrences:
//! each epoch has every sequence once, in random order. `examples/cache_policies.rs` compares this rule with others.
//! Invariants: at most `capacity` slots; a row makes room only for one that is worth more; a request may be larger than the
//! cache.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

/// The items that are here, and what they are worth.
#[derive(Debug)]
pub struct Residents {
    capacity: usize,
    /// Training interactions by item; without them the first to come stay.
    popularity: Arc<[u32]>,
    slots: HashMap<u32, usize>,
    /// The items that are here, the one of the least worth first.
    by_worth: BTreeSet<(Worth, u32)>,
    /// Numbers of the announced requests that need an item, the next first.
    awaited: HashMap<u32, VecDeque<u64>>,
    announced: u64,
    begun: u64,
}

/// What a row is worth; the greater is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Worth {
    /// No announced request needs it.
    Interactions(u32),
    /// The request of this number does.
    Awaited(Reverse<u64>),
}

impl Residents {
    #[must_use]
    pub fn new(capacity: usize, popularity: Arc<[u32]>) -> Self {
        let (slots, awaited) = (HashMap::new(), HashMap::new());
        Self { capacity, popularity, slots, by_worth: BTreeSet::new(), awaited, announced: 0, begun: 0 }
    }

    /// Announces the request after those that are announced already.
    pub fn announce(&mut self, items: &[u32]) {
        for &item in items {
            let before = self.worth(item);
            self.awaited.entry(item).or_default().push_back(self.announced);
            self.revalue(item, before);
        }
        self.announced += 1;
    }

    /// Begins the next request: the oldest announced one, or one that was not announced if none is left. From here on
    /// its items are worth what they are to the requests after it.
    pub fn begin(&mut self, items: &[u32]) {
        if self.begun == self.announced {
            return;
        }
        for &item in items {
            let before = self.worth(item);
            if let Some(awaited) = self.awaited.get_mut(&item) {
                debug_assert_eq!(awaited.front(), Some(&self.begun), "requests come as they were announced");
                awaited.pop_front();
                if awaited.is_empty() {
                    self.awaited.remove(&item);
                }
            }
            self.revalue(item, before);
        }
        self.begun += 1;
    }

    /// Takes back what was announced and has not begun: other requests will come.
    pub fn forget_announced(&mut self) {
        self.announced = self.begun;
        for (item, requests) in std::mem::take(&mut self.awaited) {
            let Some(&next) = requests.front() else { continue };
            self.revalue(item, Worth::Awaited(Reverse(next)));
        }
    }

    /// Where the row of an item is.
    #[must_use]
    pub fn slot(&self, item: u32) -> Option<usize> {
        self.slots.get(&item).copied()
    }

    /// The slot where the row of an item that is not here shall be kept, if it is worth more than what is there.
    pub fn admit(&mut self, item: u32) -> Option<usize> {
        let worth = self.worth(item);
        let slot = if self.slots.len() < self.capacity {
            self.slots.len()
        } else {
            let &(least, other) = self.by_worth.first()?;
            if worth <= least {
                return None;
            }
            self.by_worth.pop_first();
            self.slots.remove(&other)?
        };
        self.slots.insert(item, slot);
        self.by_worth.insert((worth, item));
        Some(slot)
    }

    fn worth(&self, item: u32) -> Worth {
        match self.awaited.get(&item).and_then(VecDeque::front) {
            Some(&request) => Worth::Awaited(Reverse(request)),
            None => Worth::Interactions(self.popularity.get(item as usize).copied().unwrap_or_default()),
        }
    }

    /// Puts an item that is here to its new place in the order.
    fn revalue(&mut self, item: u32, before: Worth) {
        let worth = self.worth(item);
        if worth != before && self.by_worth.remove(&(before, item)) {
            self.by_worth.insert((worth, item));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Serves a request; which items were not here.
    fn request(residents: &mut Residents, items: &[u32]) -> Vec<u32> {
        residents.begin(items);
        let missing: Vec<u32> = items.iter().copied().filter(|&item| residents.slot(item).is_none()).collect();
        for &item in &missing {
            residents.admit(item);
        }
        missing
    }

    fn held(residents: &Residents) -> Vec<u32> {
        let mut items: Vec<u32> = residents.slots.keys().copied().collect();
        items.sort_unstable();
        items
    }

    #[test]
    fn what_is_awaited_soonest_stays_then_what_occurs_most() {
        let mut residents = Residents::new(2, Arc::from([9, 8, 1, 1]));
        for items in [&[2, 3][..], &[0, 1], &[3], &[2]] {
            residents.announce(items);
        }
        assert_eq!(request(&mut residents, &[2, 3]), [2, 3]);
        assert_eq!(request(&mut residents, &[0, 1]), [0, 1], "nobody awaits them: 2 and 3 stay");
        assert_eq!(held(&residents), [2, 3]);
        assert!(request(&mut residents, &[3]).is_empty());
        assert!(request(&mut residents, &[2]).is_empty());
        assert_eq!(request(&mut residents, &[0, 1]), [0, 1], "not announced");
        assert_eq!(held(&residents), [0, 1]);
    }

    #[test]
    fn what_was_announced_in_vain_is_worth_its_occurrences_again() {
        let mut residents = Residents::new(2, Arc::from([9, 8, 1, 1]));
        for items in [&[2, 3][..], &[0, 1], &[3], &[2]] {
            residents.announce(items);
        }
        assert_eq!(request(&mut residents, &[2, 3]), [2, 3]);
        residents.forget_announced();
        assert_eq!(request(&mut residents, &[2, 3]), [0_u32; 0], "they are still here");
        assert_eq!(request(&mut residents, &[0, 1]), [0, 1]);
        assert_eq!(held(&residents), [0, 1], "and make room");
        residents.announce(&[2]);
        residents.announce(&[3]);
        assert_eq!(request(&mut residents, &[2]), [2], "the first of the new ones");
        assert_eq!(request(&mut residents, &[3]), [3]);
    }

    /// Misses of the best that a cache can do, by trying: the sum over all requests, if it may keep any rows.
    fn fewest_misses(requests: &[Vec<u32>], here: &[u32], capacity: usize) -> usize {
        let [now, later @ ..] = requests else { return 0 };
        let misses = now.iter().filter(|item| !here.contains(item)).count();
        let mut all = [here, now].concat();
        all.sort_unstable();
        all.dedup();
        let choices = (0..1_u32 << all.len()).filter(|choice| choice.count_ones() as usize <= capacity);
        let kept = |choice: u32| -> Vec<u32> {
            all.iter().enumerate().filter(|(place, _)| choice >> place & 1 == 1).map(|(_, &item)| item).collect()
        };
        misses + choices.map(|choice| fewest_misses(later, &kept(choice), capacity)).min().unwrap_or(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn no_choice_misses_less_if_all_requests_are_announced(
            requests in prop::collection::vec(prop::collection::btree_set(0_u32..5, 0..4), 1..5), capacity in 0_usize..4,
        ) {
            let requests: Vec<Vec<u32>> = requests.into_iter().map(|items| items.into_iter().collect()).collect();
            let mut residents = Residents::new(capacity, Arc::default());
            requests.iter().for_each(|items| residents.announce(items));
            let misses: usize = requests.iter().map(|items| request(&mut residents, items).len()).sum();
            prop_assert_eq!(misses, fewest_misses(&requests, &[], capacity));
        }

        #[test]
        fn slots_are_distinct_and_announcements_are_used_up(
            popularity in prop::collection::vec(0_u32..9, 12), capacity in 0_usize..9, ahead in 0_usize..6,
            requests in prop::collection::vec(prop::collection::btree_set(0_u32..12, 0..8), 1..20),
        ) {
            let requests: Vec<Vec<u32>> = requests.into_iter().map(|items| items.into_iter().collect()).collect();
            let mut residents = Residents::new(capacity, popularity.into());
            for number in 0..requests.len() + ahead {
                if let Some(items) = requests.get(number).filter(|_| ahead > 0) {
                    residents.announce(items);
                }
                if let Some(items) = number.checked_sub(ahead.saturating_sub(1)).and_then(|due| requests.get(due)) {
                    request(&mut residents, items);
                }
                let mut slots: Vec<usize> = residents.slots.values().copied().collect();
                slots.sort_unstable();
                prop_assert_eq!(slots, (0..residents.slots.len()).collect::<Vec<_>>());
                prop_assert!(residents.slots.len() <= capacity);
                let order: Vec<u32> = residents.by_worth.iter().map(|&(_, item)| item).collect();
                prop_assert!(residents.by_worth.iter().all(|&(worth, item)| worth == residents.worth(item)));
                prop_assert_eq!(order.len(), residents.slots.len());
            }
            prop_assert!(residents.awaited.is_empty());
        }
    }
}
