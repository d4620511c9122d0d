//! The interactions after reading: sorted, without repeats, and what the filters leave of them.
//!
//! Input: spilled partitions. Users are ranked by (stable hash, id), a rule that depends on the ids alone; each
//! partition holds a consecutive range of ranks. Every pass streams the partitions, several at once, and keeps per
//! user and per item only a flag and a count; counts are kept up to date by what each pass removes, so only the first
//! counts everything.
//! Output: [`Store::for_each_user`], the users that are left in rank order with what is left of their interactions.

use std::sync::atomic::AtomicU64;

use rayon::prelude::*;

use super::error::{FilterStep, PrepareError};
use super::interactions::Gathered;
use super::interner::Interner;
use super::partition::{History, Lengths, Partition, Ranking, Sorting};
use super::spill;
use crate::progress::{Progress, Unit};

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
    /// By item number: interactions that are left.
    item_counts: Vec<AtomicU64>,
    lengths: Lengths,
}

impl Store {
    /// Sorts every partition, of at most about `partition_rows` interactions each, and removes exact repeats (same user, item and time).
    pub(crate) fn build(
        gathered: Gathered,
        items: usize,
        partition_rows: u64,
        progress: &dyn Progress,
    ) -> Result<Self, PrepareError> {
        let Gathered { users, spilled, time_scale, .. } = gathered;
        let spilled = spill::divide(spilled, partition_rows, &users, progress)?;
        progress.stage("sort", Some(spilled.iter().map(|part| part.count).sum()), Unit::Rows);
        let ranking = Ranking::new(&users);
        let item_counts: Vec<AtomicU64> = std::iter::repeat_with(|| AtomicU64::new(0)).take(items).collect();
        let sorting = Sorting { users: &users, ranking: &ranking, time_scale, items: &item_counts };
        let sort = |spilled: spill::Spilled| {
            super::refuse_stop(progress)?;
            let count = spilled.count;
            let partition = Partition::sort(spilled, &sorting)?;
            progress.advance(count);
            Ok(partition)
        };
        let partitions = spilled.into_par_iter().map(sort).collect::<Result<_, PrepareError>>()?;
        let (order, lengths) = (ranking.order, Lengths { min: 1, max: 0 });
        Ok(Self { users, order, partitions, item_alive: vec![true; items], item_counts, lengths })
    }

    /// Interactions in the partitions, whatever the filters left of them.
    pub(crate) fn records(&self) -> u64 {
        self.partitions.iter().map(|partition| partition.count).sum()
    }

    /// Removes users and items with fewer than `k` interactions until none is left (the largest such set, which is
    /// the same in whatever order they go).
    pub(crate) fn k_core(&mut self, k: u32, progress: &dyn Progress) -> Result<(), PrepareError> {
        for pass in 1.. {
            self.filter(&format!("k-core, pass {pass}"), Lengths { min: k as usize, max: 0 }, progress)?;
            let mut changed = false;
            for (alive, count) in self.item_alive.iter_mut().zip(&mut self.item_counts) {
                if *alive && *count.get_mut() < u64::from(k) {
                    *alive = false;
                    changed |= std::mem::take(count.get_mut()) > 0;
                }
            }
            // users fall below `k` only when items go
            if !changed {
                break;
            }
        }
        Ok(())
    }

    /// Removes users with fewer interactions than `lengths.min`, and all but the latest `lengths.max` of the others.
    pub(crate) fn limit(&mut self, lengths: Lengths, progress: &dyn Progress) -> Result<(), PrepareError> {
        self.lengths = lengths;
        self.filter("check lengths", lengths, progress)
    }

    /// One pass of [`Partition::filter`] over all partitions.
    fn filter(&mut self, stage: &str, lengths: Lengths, progress: &dyn Progress) -> Result<(), PrepareError> {
        progress.stage(stage, Some(self.records()), Unit::Rows);
        let (item_alive, item_counts) = (&self.item_alive, &self.item_counts);
        self.partitions.par_iter_mut().try_for_each(|partition| {
            super::refuse_stop(progress)?;
            partition.filter(lengths, item_alive, item_counts)?;
            progress.advance(partition.count);
            Ok(())
        })
    }

    /// What is left.
    pub(crate) fn measure(&mut self) -> Measured {
        let users = self.partitions.iter().map(|partition| partition.users).collect();
        Measured { items: self.item_counts.iter_mut().map(|count| *count.get_mut()).collect(), users }
    }

    /// Calls `each` with the rank and the interactions of every user that is left, in order.
    pub(crate) fn for_each_user(
        &self,
        partition: &Partition,
        each: impl FnMut(u32, History),
    ) -> Result<(), PrepareError> {
        partition.for_each_user(&self.item_alive, self.lengths, each)
    }
}
