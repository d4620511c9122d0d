//! The proof that an epoch used every user exactly once.
//!
//! Input: the users that the ranks report they have trained, one call a step. Output: counts per epoch. An epoch is
//! closed after its last step, whether or not another follows. The ledger
//! trusts the reports and nothing else: it never asks the plan, so a wrong plan or a wrong split shows here.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::UserIndex;

/// Counts of one epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochCount {
    pub epoch: u32,
    /// Users of the dataset.
    pub users: u32,
    /// Users reported at least once.
    pub seen: u32,
    /// Reports of a user beyond its first in this epoch.
    pub repeated: u64,
    /// Reports of a user that the dataset does not have.
    pub unknown: u64,
}

impl EpochCount {
    /// Every user exactly once.
    #[must_use]
    pub fn exact(&self) -> bool {
        self.seen == self.users && self.repeated == 0 && self.unknown == 0
    }
}

/// What is wrong in a ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case")]
pub enum Fault {
    /// An epoch came again, or after one that was left out.
    OutOfTurn { epoch: u32 },
    /// It is over and has missed users, or it has repeated some or had some that are not there.
    NotOnce {
        #[serde(flatten)]
        count: EpochCount,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfTurn { epoch } => write!(f, "epoch {} came when it was not its turn", epoch + 1),
            Self::NotOnce { count: EpochCount { epoch, users, seen, repeated, unknown } } => write!(
                f,
                "epoch {} has used {seen} of {users} users, {repeated} times one again, {unknown} times one that is not there",
                epoch + 1
            ),
        }
    }
}

/// The ledger of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    users: u32,
    steps_per_epoch: u64,
    finished: Vec<EpochCount>,
    current: Option<OpenEpoch>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct OpenEpoch {
    count: EpochCount,
    steps: u64,
    /// One bit a user.
    seen: Vec<u64>,
}

/// The ledger as reports show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerSummary {
    /// Each epoch came once and in its turn, every closed one used every user exactly once, and no open one repeats one.
    pub exact: bool,
    /// Counts of each epoch so far, the open one last.
    pub epochs: Vec<EpochCount>,
}

impl Ledger {
    #[must_use]
    pub fn new(users: u32, steps_per_epoch: u64) -> Self {
        Self { users, steps_per_epoch, finished: Vec::new(), current: None }
    }

    /// Records that one step of `epoch` has trained `users`. The epoch's last step closes it, and so does a step of
    /// another epoch.
    pub fn record(&mut self, epoch: u32, users: &[UserIndex]) {
        if self.current.as_ref().is_none_or(|open| open.count.epoch != epoch) {
            self.close();
            let count = EpochCount { epoch, users: self.users, ..EpochCount::default() };
            self.current = Some(OpenEpoch { count, steps: 0, seen: vec![0; (self.users as usize).div_ceil(64)] });
        }
        let Some(OpenEpoch { count, steps, seen }) = &mut self.current else { return };
        *steps += 1;
        for user in users {
            if user.0 >= self.users {
                count.unknown += 1;
                continue;
            }
            let (word, bit) = (user.0 as usize / 64, 1_u64 << (user.0 % 64));
            if seen[word] & bit == 0 {
                seen[word] |= bit;
                count.seen += 1;
            } else {
                count.repeated += 1;
            }
        }
        if *steps >= self.steps_per_epoch {
            self.close();
        }
    }

    fn close(&mut self) {
        if let Some(open) = self.current.take() {
            self.finished.push(open.count);
        }
    }

    /// What is wrong, in the order of the epochs.
    pub fn faults(&self) -> impl Iterator<Item = Fault> {
        let closed = self.finished.iter().map(|count| (*count, count.exact()));
        let open =
            self.current.as_ref().map(|OpenEpoch { count, .. }| (*count, count.repeated == 0 && count.unknown == 0));
        (0..).zip(closed.chain(open)).filter_map(|(turn, (count, once))| {
            let out_of_turn = (count.epoch != turn).then_some(Fault::OutOfTurn { epoch: count.epoch });
            out_of_turn.or_else(|| (!once).then_some(Fault::NotOnce { count }))
        })
    }

    #[must_use]
    pub fn summary(&self) -> LedgerSummary {
        let open = self.current.iter().map(|open| open.count);
        LedgerSummary {
            exact: self.faults().next().is_none(),
            epochs: self.finished.iter().copied().chain(open).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(range: std::ops::Range<u32>) -> Vec<UserIndex> {
        range.map(UserIndex).collect()
    }

    #[test]
    fn an_exact_epoch_is_exact() {
        let mut ledger = Ledger::new(100, 2);
        ledger.record(0, &users(50..100));
        ledger.record(0, &users(0..50));
        assert!(ledger.summary().exact && ledger.summary().epochs[0].exact());
        ledger.record(1, &users(0..10));
        let summary = ledger.summary();
        assert!(summary.exact && !summary.epochs[1].exact() && summary.epochs[1].seen == 10);
    }

    #[test]
    fn a_repeat_a_gap_and_a_stranger_show() {
        let mut repeat = Ledger::new(10, 3);
        repeat.record(0, &users(0..10));
        repeat.record(0, &users(9..10));
        assert_eq!((repeat.summary().exact, repeat.summary().epochs[0].repeated), (false, 1));

        let mut gap = Ledger::new(10, 2);
        gap.record(0, &users(0..9));
        assert!(gap.summary().exact, "an open epoch may still be completed");
        gap.record(0, &[]);
        assert!(!gap.summary().exact, "its last step is over and one user is missing");

        let mut stranger = Ledger::new(10, 2);
        stranger.record(0, &users(10..11));
        assert_eq!((stranger.summary().exact, stranger.summary().epochs[0].unknown), (false, 1));
        assert_eq!(stranger.faults().collect::<Vec<_>>(), [Fault::NotOnce { count: stranger.summary().epochs[0] }]);
    }

    #[test]
    fn an_epoch_that_comes_again_or_is_left_out_shows() {
        for (epochs, wrong) in [([0, 1, 2], &[][..]), ([0, 0, 2], &[0]), ([0, 2, 3], &[2, 3]), ([1, 1, 2], &[1])] {
            let mut ledger = Ledger::new(10, 1);
            epochs.iter().for_each(|epoch| ledger.record(*epoch, &users(0..10)));
            assert!(ledger.summary().epochs.iter().all(EpochCount::exact));
            let expected: Vec<Fault> = wrong.iter().map(|&epoch| Fault::OutOfTurn { epoch }).collect();
            assert_eq!(ledger.faults().collect::<Vec<_>>(), expected);
            assert_eq!(ledger.summary().exact, wrong.is_empty());
        }
    }
}
