//! A partition of the interactions after sorting: by user, then time, input order where times are equal; exact repeats
//! removed.
//!
//! Input: a spilled partition. On disk are its items, then its times, column by column, since the filters look at items
//! alone. In memory are, by user, how many interactions there are and whether the user is still in.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::error::PrepareError;
use super::interner::Interner;
use super::spill::{self, Spilled, item_and_time};

/// Interactions of equal time beyond which a hash set finds repeats, not a search.
const LONG_RUN: usize = 16;
/// Marks a conversion, in the bit of the item number that [`super::interner::LIMIT`] keeps free.
const CONVERTED: u32 = 1 << 31;
const ITEM: usize = size_of::<u32>();
const TIME: usize = size_of::<i64>();

/// Users by rank, which is the order of (stable hash, id).
#[derive(Debug)]
pub(crate) struct Ranking {
    /// User number by rank.
    pub(crate) order: Vec<u32>,
    /// Rank by user number.
    ranks: Vec<u32>,
}

impl Ranking {
    pub(crate) fn new(users: &Interner) -> Self {
        // hashes beside the numbers: looked up one by one, each comparison would miss the caches twice
        let mut keyed: Vec<(u64, u32)> = users.hashes().iter().copied().zip(0..).collect();
        keyed.par_sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| users.get(a.1).cmp(users.get(b.1))));
        let order: Vec<u32> = keyed.into_iter().map(|(_, user)| user).collect();
        let mut ranks = vec![0_u32; order.len()];
        for (rank, &user) in order.iter().enumerate() {
            ranks[user as usize] = rank as u32;
        }
        Self { order, ranks }
    }
}

/// An interaction of a user, before it is a row of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Event {
    time: i64,
    /// With [`CONVERTED`].
    item: u32,
}

/// What is left of a user's interactions, in order of time: columns of equal length.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct History<'a> {
    /// Item numbers.
    pub(crate) items: &'a [u32],
    pub(crate) times: &'a [i64],
    /// 1 if it converted.
    pub(crate) labels: &'a [u8],
}

impl History<'_> {
    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        Self { items: &self.items[range.clone()], times: &self.times[range.clone()], labels: &self.labels[range] }
    }
}

/// What a user needs to stay, and keeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lengths {
    pub(crate) min: usize,
    /// Only the latest this many; 0 = all.
    pub(crate) max: usize,
}

impl Lengths {
    /// The first interaction of `count` that is kept.
    pub(crate) fn cut(self, count: usize) -> usize {
        if self.max == 0 { 0 } else { count.saturating_sub(self.max) }
    }
}

/// A sorted partition.
#[derive(Debug)]
pub(crate) struct Partition {
    path: PathBuf,
    /// Ranks of its users.
    pub(crate) ranks: Range<u32>,
    /// By rank within the range: interactions in the file.
    counts: Vec<u32>,
    /// By rank within the range: the user has interactions and no filter removed it.
    alive: Vec<bool>,
    /// Interactions in the file.
    pub(crate) count: u64,
    /// Users that are alive.
    pub(crate) users: u64,
}

/// What sorting a partition needs.
pub(crate) struct Sorting<'a> {
    pub(crate) users: &'a Interner,
    pub(crate) ranking: &'a Ranking,
    pub(crate) time_scale: i64,
    /// Interactions by item number, added to.
    pub(crate) items: &'a [AtomicU64],
}

impl Partition {
    /// Sorts a partition.
    pub(crate) fn sort(spilled: Spilled, sorting: &Sorting) -> Result<Self, PrepareError> {
        let Sorting { users, ranking, time_scale, items } = *sorting;
        let place = |hash: u64, before: fn(&u64, &u64) -> bool| {
            ranking.order.partition_point(|&user| before(&users.hash(user), &hash)) as u32
        };
        let ranks = place(*spilled.hashes.start(), u64::lt)..place(*spilled.hashes.end(), u64::le);
        let bytes = spill::bytes(&spilled)?;
        // where each user's events begin, then, while they are placed, where the next one goes
        let mut next = vec![0_usize; ranks.len() + 1];
        let place = |user: u32| (ranking.ranks[user as usize] - ranks.start) as usize;
        for record in spill::records(&bytes) {
            next[place(record.user) + 1] += 1;
        }
        let mut counts: Vec<u32> = Vec::with_capacity(ranks.len());
        for user in 0..ranks.len() {
            let count = u32::try_from(next[user + 1]);
            let limit = u64::from(u32::MAX);
            counts.push(count.map_err(|_| PrepareError::TooMany { what: "interactions of one user", limit })?);
            next[user + 1] += next[user];
        }
        let mut events = vec![Event { time: 0, item: 0 }; spilled.count as usize];
        for record in spill::records(&bytes) {
            let (item, time) = item_and_time(record);
            let time = time
                .at_scale(time_scale)
                .ok_or_else(|| PrepareError::TimeRange { user: users.get(record.user).to_owned(), time: time.value })?;
            let item = if record.converted { item | CONVERTED } else { item };
            let next = &mut next[place(record.user)];
            events[*next] = Event { time, item };
            *next += 1;
        }
        drop(bytes);
        let (mut from, mut kept) = (0, 0);
        for count in &mut counts {
            let to = from + *count as usize;
            let run = &mut events[from..to];
            run.sort_by_key(|event| event.time);
            let left = remove_repeats(run);
            for event in &run[..left] {
                items[(event.item & !CONVERTED) as usize].fetch_add(1, Ordering::Relaxed);
            }
            events.copy_within(from..from + left, kept);
            *count = left as u32;
            (from, kept) = (to, kept + left);
        }
        events.truncate(kept);
        let alive: Vec<bool> = counts.iter().map(|&count| count > 0).collect();
        let users = alive.iter().filter(|alive| **alive).count() as u64;
        let this = Self { path: spilled.path, ranks, counts, alive, count: kept as u64, users };
        this.write(&events).map_err(PrepareError::io(&this.path))?;
        Ok(this)
    }

    fn write(&self, events: &[Event]) -> std::io::Result<()> {
        let mut bytes = Vec::with_capacity(events.len() * TIME);
        bytes.extend(events.iter().flat_map(|event| event.item.to_le_bytes()));
        let mut file = File::create(&self.path)?;
        file.write_all(&bytes)?;
        bytes.clear();
        bytes.extend(events.iter().flat_map(|event| event.time.to_le_bytes()));
        file.write_all(&bytes)
    }

    /// The items column, and the file behind it.
    fn read_items(&self) -> Result<(Vec<u8>, File), PrepareError> {
        let failed = || PrepareError::io(&self.path);
        let mut file = File::open(&self.path).map_err(failed())?;
        let mut items = vec![0; self.count as usize * ITEM];
        file.read_exact(&mut items).map_err(failed())?;
        Ok((items, file))
    }

    /// Removes the users that have fewer than `lengths.min` items which are alive, cuts the others, and takes what
    /// goes off the counts by item.
    pub(crate) fn filter(
        &mut self,
        lengths: Lengths,
        item_alive: &[bool],
        items: &[AtomicU64],
    ) -> Result<(), PrepareError> {
        let (column, _) = self.read_items()?;
        let mut rest = column.as_slice();
        for (alive, &count) in self.alive.iter_mut().zip(&self.counts) {
            let (own, after) = rest.split_at(count as usize * ITEM);
            rest = after;
            if !*alive {
                continue;
            }
            let kept = || numbers(own).filter(|&item| item_alive[item as usize]);
            let left = kept().count();
            *alive = left >= lengths.min;
            let gone = if *alive { lengths.cut(left) } else { left };
            self.users -= u64::from(!*alive);
            for item in kept().take(gone) {
                items[item as usize].fetch_sub(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Calls `each` with the rank and the interactions of every user that is alive, in order.
    pub(crate) fn for_each_user(
        &self,
        item_alive: &[bool],
        lengths: Lengths,
        mut each: impl FnMut(u32, History),
    ) -> Result<(), PrepareError> {
        let (item_column, mut file) = self.read_items()?;
        let mut time_column = vec![0; self.count as usize * TIME];
        file.read_exact(&mut time_column).map_err(PrepareError::io(&self.path))?;
        let (mut rest_items, mut rest_times) = (item_column.as_slice(), time_column.as_slice());
        let (mut items, mut times, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for ((rank, &count), &alive) in self.ranks.clone().zip(&self.counts).zip(&self.alive) {
            let (own_items, after_items) = rest_items.split_at(count as usize * ITEM);
            let (own_times, after_times) = rest_times.split_at(count as usize * TIME);
            (rest_items, rest_times) = (after_items, after_times);
            if !alive {
                continue;
            }
            items.clear();
            times.clear();
            labels.clear();
            for (item, time) in own_items.as_chunks::<ITEM>().0.iter().zip(own_times.as_chunks::<TIME>().0) {
                let item = u32::from_le_bytes(*item);
                let number = item & !CONVERTED;
                if item_alive[number as usize] {
                    items.push(number);
                    times.push(i64::from_le_bytes(*time));
                    labels.push(u8::from(item & CONVERTED != 0));
                }
            }
            let history = History { items: &items, times: &times, labels: &labels };
            each(rank, history.slice(lengths.cut(history.len())..history.len()));
        }
        Ok(())
    }
}

/// The item numbers of a column.
fn numbers(items: &[u8]) -> impl Iterator<Item = u32> {
    items.as_chunks::<ITEM>().0.iter().map(|item| u32::from_le_bytes(*item) & !CONVERTED)
}

/// Moves the first of equal (item, time) among a user's events in order of time to the front, and says how many there
/// are; it converted if one of them did.
fn remove_repeats(events: &mut [Event]) -> usize {
    if events.windows(2).all(|pair| pair[0].time < pair[1].time) {
        return events.len();
    }
    let (mut kept, mut run_start) = (0, 0);
    let mut long_run = HashMap::new();
    for position in 0..events.len() {
        let event = events[position];
        let item = event.item & !CONVERTED;
        if kept == run_start || events[run_start].time != event.time {
            run_start = kept;
            long_run.clear();
        }
        let run = &events[run_start..kept];
        let repeat = if run.len() < LONG_RUN {
            run.iter().position(|earlier| earlier.item & !CONVERTED == item)
        } else {
            if long_run.is_empty() {
                long_run.extend(run.iter().zip(0..).map(|(earlier, place)| (earlier.item & !CONVERTED, place)));
            }
            let place = *long_run.entry(item).or_insert(run.len());
            (place < run.len()).then_some(place)
        };
        match repeat {
            Some(place) => events[run_start + place].item |= event.item & CONVERTED,
            None => {
                events[kept] = event;
                kept += 1;
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn repeats_go_and_the_first_stays(
            rows in proptest::collection::vec((0_u32..40, 0_i64..8, any::<bool>()), 0..400),
        ) {
            let event = |(item, time, converted)| Event { time, item: if converted { item | CONVERTED } else { item } };
            let mut events: Vec<Event> = rows.into_iter().map(event).collect();
            events.sort_by_key(|event| event.time);
            let mut expected: Vec<Event> = Vec::new();
            for event in &events {
                let same = |other: &&mut Event| {
                    (other.item & !CONVERTED, other.time) == (event.item & !CONVERTED, event.time)
                };
                match expected.iter_mut().find(same) {
                    Some(first) => first.item |= event.item & CONVERTED,
                    None => expected.push(*event),
                }
            }
            let kept = remove_repeats(&mut events);
            prop_assert_eq!(&events[..kept], expected);
        }
    }

    #[test]
    fn a_cut_leaves_the_latest() {
        assert_eq!(
            [(0, 5), (3, 5), (5, 5), (9, 5)].map(|(max, count)| Lengths { min: 1, max }.cut(count)),
            [0, 2, 0, 0]
        );
    }
}
