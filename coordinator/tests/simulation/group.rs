//! The collective of one generation: all its ranks meet, again and again, or it breaks.
//!
//! Input: arrivals and departures. Output: who goes on, and with what all have said. Invariants: an operation needs every
//! rank; all ranks do the same operations in the same order; when a rank goes, an operation that all had entered may still
//! come to its end for some of the others, and a later one cannot.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use learn_domain::random::Draws;
use learn_domain::recovery::Holding;
use learn_domain::report::Split;
use learn_proto::convert::AfterStep;

use crate::process::State;

/// What the ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Connect,
    /// Tell each other what each holds.
    Agree,
    /// Take over the state of the most advanced rank.
    Transfer,
    /// Whether what follows the last step is done again; the generation has begun.
    Again,
    Step(u64),
    Evaluate(Split, u64),
    /// The first rank's evaluation has been heard.
    Heard(Split, u64),
}

/// A rank at an operation, with what it says there.
#[derive(Clone, Debug)]
pub struct Entry {
    pub process: usize,
    pub op: Op,
    pub state: State,
    pub after: AfterStep,
    pub again: bool,
}

impl Entry {
    pub fn holding(&self) -> Holding {
        let State { held, finished, followed_up, .. } = self.state;
        Holding { state: held, finished, followed_up }
    }
}

/// What all ranks have said, by rank.
pub type Said = Rc<Vec<Entry>>;

#[derive(Debug)]
pub struct Group {
    world_size: usize,
    broken: bool,
    arrived: BTreeMap<u32, Entry>,
    /// Processes that have not heard yet how their operation ended.
    open: BTreeSet<usize>,
    /// Those of them to which the operation fails.
    cut: BTreeSet<usize>,
}

impl Group {
    pub fn new(world_size: usize) -> Self {
        Self { world_size, broken: false, arrived: BTreeMap::new(), open: BTreeSet::new(), cut: BTreeSet::new() }
    }

    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Gives what all have said when the last one arrives.
    pub fn arrive(&mut self, rank: u32, entry: Entry) -> Option<Said> {
        assert!(!self.broken);
        if let Some(other) = self.arrived.values().next() {
            assert_eq!(other.op, entry.op, "ranks of one generation do the same");
        }
        assert!(self.arrived.insert(rank, entry).is_none(), "a rank is one process");
        if self.arrived.len() < self.world_size {
            return None;
        }
        let said: Vec<Entry> = std::mem::take(&mut self.arrived).into_values().collect();
        self.open.extend(said.iter().map(|entry| entry.process));
        Some(Rc::new(said))
    }

    /// Whether the operation came to its end for `process`.
    pub fn hear(&mut self, process: usize) -> bool {
        self.open.remove(&process);
        !self.cut.remove(&process)
    }

    /// Gives the processes that wait for others in vain, and whether an operation ended for some ranks alone. What a rank has
    /// sent before it leaves in peace arrives: then there are no `draws`.
    pub fn break_up(&mut self, draws: Option<&mut Draws>) -> (Vec<usize>, bool) {
        if std::mem::replace(&mut self.broken, true) {
            return (Vec::new(), false);
        }
        if let Some(draws) = draws {
            self.cut = self.open.iter().copied().filter(|_| draws.below(2) == 0).collect();
        }
        let waiting = std::mem::take(&mut self.arrived).into_values().map(|entry| entry.process);
        (waiting.collect(), !self.cut.is_empty() && self.cut != self.open)
    }
}
