//! The interactions after reading: sorted, without repeats, and what the filters leave of them.
//!
//! Input: spilled partitions. Users are ranked by (stable hash, id), a rule that depends on the ids alone; each
//! partition holds a consecutive range of ranks. Every pass streams the partitions, several at once, and keeps per
//! user and per item only a flag and a count.
//! Output: [`Store::for_each_user`], the users that are left in rank order with what is left of their interactions.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::error::{FilterStep, PrepareError};
use super::interactions::Gathered;
use super::interner::Interner;
use super::spill::{self, Record, Spilled, item_and_time};
use crate::progress::Progress;

/// Interactions of equal time beyond which a hash set finds repeats, not a search.
const LONG_RUN: usize = 16;

/// A partition, sorted by (rank, time), input order where times are equal.
#[derive(Debug)]
pub(crate) struct Partition {
    spilled: Spilled,
    /// Ranks of its users.
    ranks: Range<u32>,
    /// By rank within the range: the user has interactions and no filter removed it.
    alive: Vec<bool>,
}

/// What of each user counts, besides the alive flags.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lengths {
    pub(crate) min: usize,
    /// Only the latest this many; 0 = all.
    pub(crate) max: usize,
}

/// What is left.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    /// Interactions by item number.
    pub(crate) items: Vec<u64>,
    /// Users by partition.
    pub(crate) users: Vec<u64>,
}

impl Measured {
    pub(crate) fn interactions(&self) -> u64 {
        self.items.iter().sum()
    }

    pub(crate) fn step(&self, name: String) -> FilterStep {
        let items = self.items.iter().filter(|&&count| count > 0).count() as u64;
        FilterStep { name, interactions: self.interactions(), users: self.users.iter().sum(), items }
    }
}

/// All partitions.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) users: Interner,
    /// User number by rank.
    pub(crate) order: Vec<u32>,
    pub(crate) partitions: Vec<Partition>,
    /// By item number: k-core did not remove it.
    pub(crate) item_alive: Vec<bool>,
    pub(crate) lengths: Lengths,
}

impl Store {
    /// Sorts every partition, of at most about `partition_rows` interactions each, and removes exact repeats (same user, item and time).
    pub(crate) fn build(
        gathered: Gathered,
        items: usize,
        partition_rows: u64,
        progress: &dyn Progress,
    ) -> Result<Self, PrepareError> {
        let Gathered { users, spilled, time_scale } = gathered;
        progress.stage("sort", Some(spilled.iter().map(|part| part.count).sum()));
        let spilled = spill::divide(spilled, partition_rows, &users)?;
        let mut order: Vec<u32> = (0..users.len() as u32).collect();
        order.par_sort_unstable_by(|&a, &b| (users.hash(a), users.get(a)).cmp(&(users.hash(b), users.get(b))));
        let mut ranks = vec![0_u32; order.len()];
        for (rank, &user) in order.iter().enumerate() {
            ranks[user as usize] = rank as u32;
        }
        let partitions = spilled
            .into_par_iter()
            .map(|mut spilled| {
                let start = order.partition_point(|&user| users.hash(user) < *spilled.hashes.start()) as u32;
                let end = order.partition_point(|&user| users.hash(user) <= *spilled.hashes.end()) as u32;
                let mut records = spill::read(&spilled)?;
                for record in &mut records {
                    let (item, time) = item_and_time(*record);
                    let at_scale = time.at_scale(time_scale).ok_or_else(|| PrepareError::TimeRange {
                        user: users.get(record.user).to_owned(),
                        time: time.value,
                    })?;
                    let user = ranks[record.user as usize];
                    *record = Record { user, item, time: at_scale, ..*record };
                }
                records.sort_by_key(|record| (record.user, record.time));
                progress.advance(records.len() as u64);
                remove_repeats(&mut records);
                spill::write(&mut spilled, &records)?;
                let mut alive = vec![false; (end - start) as usize];
                for record in &records {
                    alive[(record.user - start) as usize] = true;
                }
                Ok(Partition { spilled, ranks: start..end, alive })
            })
            .collect::<Result<_, PrepareError>>()?;
        let lengths = Lengths { min: 1, max: 0 };
        Ok(Self { users, order, partitions, item_alive: vec![true; items], lengths })
    }

    /// Interactions in the partitions, whatever the filters left of them.
    pub(crate) fn records(&self) -> u64 {
        self.partitions.iter().map(|partition| partition.spilled.count).sum()
    }

    /// Removes users and items with fewer than `k` interactions until none is left (the largest such set, which is
    /// the same in whatever order they go).
    pub(crate) fn k_core(&mut self, k: u32, progress: &dyn Progress) -> Result<(), PrepareError> {
        for pass in 1.. {
            progress.stage(&format!("k-core, pass {pass}"), Some(self.records()));
            let counts = counters(self.item_alive.len());
            let item_alive = &self.item_alive;
            let users_left = self
                .partitions
                .par_iter_mut()
                .map(|partition| partition.k_core_pass(k as usize, item_alive, &counts, progress))
                .try_reduce(|| false, |a, b| Ok(a || b))?;
            let mut changed = users_left;
            for (alive, count) in self.item_alive.iter_mut().zip(counts) {
                if *alive && count.into_inner() < u64::from(k) {
                    *alive = false;
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        Ok(())
    }

    /// Counts what is left.
    pub(crate) fn measure(&self) -> Result<Measured, PrepareError> {
        let counts = counters(self.item_alive.len());
        let count = |partition: &Partition| {
            let mut users = 0;
            self.for_each_user(partition, |_, records| {
                users += 1;
                for record in records {
                    counts[record.item as usize].fetch_add(1, Ordering::Relaxed);
                }
            })?;
            Ok::<_, PrepareError>(users)
        };
        let users = self.partitions.par_iter().map(count).collect::<Result<_, _>>()?;
        Ok(Measured { items: counts.into_iter().map(AtomicU64::into_inner).collect(), users })
    }

    /// Calls `each` with the rank and the interactions of every user that is left, in order.
    pub(crate) fn for_each_user(
        &self,
        partition: &Partition,
        mut each: impl FnMut(u32, &[Record]),
    ) -> Result<(), PrepareError> {
        let records = spill::read(&partition.spilled)?;
        let mut kept = Vec::new();
        for run in records.chunk_by(|a, b| a.user == b.user) {
            let rank = run[0].user;
            if !partition.alive[(rank - partition.ranks.start) as usize] {
                continue;
            }
            kept.clear();
            kept.extend(run.iter().copied().filter(|record| self.item_alive[record.item as usize]));
            if kept.len() < self.lengths.min {
                continue;
            }
            let cut = if self.lengths.max == 0 { 0 } else { kept.len().saturating_sub(self.lengths.max) };
            each(rank, &kept[cut..]);
        }
        Ok(())
    }
}

impl Partition {
    /// Marks the users below `k`, counts the items of the others, and says whether a user was marked.
    fn k_core_pass(
        &mut self,
        k: usize,
        item_alive: &[bool],
        counts: &[AtomicU64],
        progress: &dyn Progress,
    ) -> Result<bool, PrepareError> {
        let mut changed = false;
        for run in spill::read(&self.spilled)?.chunk_by(|a, b| a.user == b.user) {
            let alive = &mut self.alive[(run[0].user - self.ranks.start) as usize];
            if !*alive {
                continue;
            }
            let kept = || run.iter().map(|record| record.item as usize).filter(|&item| item_alive[item]);
            if kept().count() < k {
                *alive = false;
                changed = true;
                continue;
            }
            kept().for_each(|item| {
                counts[item].fetch_add(1, Ordering::Relaxed);
            });
        }
        progress.advance(self.spilled.count);
        Ok(changed)
    }
}

fn counters(items: usize) -> Vec<AtomicU64> {
    std::iter::repeat_with(|| AtomicU64::new(0)).take(items).collect()
}

/// Keeps the first of equal (user, item, time) in records sorted by (user, time); it converted if one of them did.
fn remove_repeats(records: &mut Vec<Record>) {
    let mut kept = 0;
    let mut run_start = 0;
    let mut long_run = HashMap::new();
    for position in 0..records.len() {
        let record = records[position];
        let same_run = kept > run_start && {
            let first = records[run_start];
            (first.user, first.time) == (record.user, record.time)
        };
        if !same_run {
            run_start = kept;
            long_run.clear();
        }
        let run = &records[run_start..kept];
        let repeat = if run.len() < LONG_RUN {
            run.iter().position(|earlier| earlier.item == record.item)
        } else {
            if long_run.is_empty() {
                long_run.extend(run.iter().zip(0..).map(|(earlier, place)| (earlier.item, place)));
            }
            let place = *long_run.entry(record.item).or_insert(run.len());
            (place < run.len()).then_some(place)
        };
        match repeat {
            Some(place) => records[run_start + place].converted |= record.converted,
            None => {
                records[kept] = record;
                kept += 1;
            }
        }
    }
    records.truncate(kept);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn repeats_go_and_the_first_stays(
            rows in proptest::collection::vec((0_u32..3, 0_u32..40, 0_i64..2, any::<bool>()), 0..400),
        ) {
            let mut records: Vec<Record> =
                rows.iter().map(|&(user, item, time, converted)| Record { user, item, time, converted }).collect();
            records.sort_by_key(|record| (record.user, record.time));
            let mut expected: Vec<Record> = Vec::new();
            for record in &records {
                let same = |other: &&mut Record| {
                    (other.user, other.item, other.time) == (record.user, record.item, record.time)
                };
                match expected.iter_mut().find(same) {
                    Some(first) => first.converted |= record.converted,
                    None => expected.push(*record),
                }
            }
            remove_repeats(&mut records);
            prop_assert_eq!(records, expected);
        }
    }
}
