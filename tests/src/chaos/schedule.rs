//! What is done to the job, and when: a list that follows from a seed.
//!
//! Input: a seed, the minutes, the workers and the kinds of fault that this machine allows. Output: the faults in
//! order. Invariants: the same input gives the same list; at least two workers are wanted at any time; faults that come on the
//! heels of one another leave a worker that holds the state; each kind comes once before any comes again.

use std::fmt;
use std::time::Duration;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillFirst,
    KillOther,
    PauseShort,
    PauseLong,
    Scale,
    BreakConnection,
    SlowNetwork,
    StallNetwork,
    FullDisk,
    KillInEvaluation,
    KillInCheckpoint,
    KillCoordinator,
    PauseCoordinator,
}

impl Kind {
    pub const ALL: [Self; 13] = [
        Self::KillFirst,
        Self::KillOther,
        Self::PauseShort,
        Self::PauseLong,
        Self::Scale,
        Self::BreakConnection,
        Self::SlowNetwork,
        Self::StallNetwork,
        Self::FullDisk,
        Self::KillInEvaluation,
        Self::KillInCheckpoint,
        Self::KillCoordinator,
        Self::PauseCoordinator,
    ];

    /// As the report names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KillFirst => "kill -9 of rank 0",
            Self::KillOther => "kill -9 of another rank",
            Self::PauseShort => "pause shorter than the heartbeat timeout",
            Self::PauseLong => "pause longer than the heartbeat timeout",
            Self::Scale => "scale up or down",
            Self::BreakConnection => "broken connection between two workers",
            Self::SlowNetwork => "slow network",
            Self::StallNetwork => "network gone for a moment",
            Self::FullDisk => "full checkpoint disk",
            Self::KillInEvaluation => "kill -9 during an evaluation",
            Self::KillInCheckpoint => "kill -9 during the write of a checkpoint",
            Self::KillCoordinator => "kill -9 of the coordinator",
            Self::PauseCoordinator => "pause of the coordinator",
        }
    }

    /// What it takes with recovery and the quiet time before it, roughly.
    fn nominal(self) -> Duration {
        Duration::from_millis(match self {
            Self::PauseShort | Self::StallNetwork => 2000,
            Self::KillFirst | Self::KillOther | Self::Scale | Self::BreakConnection | Self::KillCoordinator => 2500,
            Self::KillInEvaluation | Self::SlowNetwork => 4000,
            Self::KillInCheckpoint | Self::FullDisk | Self::PauseCoordinator => 5000,
            Self::PauseLong => 6000,
        })
    }

    /// It may cost the job a worker that holds the state.
    fn takes_one(self) -> bool {
        matches!(
            self,
            Self::KillFirst | Self::KillOther | Self::PauseLong | Self::KillInEvaluation | Self::KillInCheckpoint
        )
    }

    /// It needs no running generation, so it may come while the job recovers from the one before.
    fn comes_at_once(self) -> bool {
        matches!(self, Self::KillFirst | Self::KillOther | Self::PauseShort | Self::Scale | Self::KillCoordinator)
    }
}

/// A fault with its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: Kind,
    /// Quiet time before it, after the job has recovered from the one before; none = it does not wait for that.
    pub quiet: Option<Duration>,
    /// Chooses among ranks or connections.
    pub pick: u64,
    /// How long it lasts, where it lasts.
    pub lasts: Duration,
    /// Workers that are wanted after it.
    pub workers: u32,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.quiet {
            Some(quiet) => write!(f, "after {:.1} s: {}", quiet.as_secs_f64(), self.kind.name())?,
            None => write!(f, "at once: {}", self.kind.name())?,
        }
        match self.kind {
            Kind::Scale => write!(f, " to {}", self.workers),
            Kind::PauseShort | Kind::PauseLong | Kind::PauseCoordinator | Kind::SlowNetwork | Kind::StallNetwork => {
                write!(f, ", {:.1} s", self.lasts.as_secs_f64())
            }
            _ => Ok(()),
        }
    }
}

/// Fewest workers that are ever wanted: one that is lost then leaves one.
const FEWEST: u32 = 2;

/// Numbers that look random and follow from the seed (SplitMix64).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From `low` on, below `high`.
    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low).max(1)
    }

    fn shuffle<T>(&mut self, values: &mut [T]) {
        for last in (1..values.len()).rev() {
            let other = self.between(0, last as u64 + 1) as usize;
            values.swap(last, other);
        }
    }
}

/// The faults of a run of about so many minutes, at least one; none if there are no kinds or fewer than two workers.
#[must_use]
pub fn plan(seed: u64, length: Duration, workers: u32, kinds: &[Kind]) -> Vec<Fault> {
    let mut draws = Draws(seed);
    let (mut faults, mut bag): (Vec<Fault>, Vec<Kind>) = (Vec::new(), Vec::new());
    let (mut wanted, mut used) = (workers, Duration::ZERO);
    if kinds.is_empty() || workers < FEWEST {
        return faults;
    }
    loop {
        if bag.is_empty() {
            bag = kinds.to_vec();
            draws.shuffle(&mut bag);
        }
        let Some(kind) = bag.pop() else { return faults };
        used += kind.nominal();
        if used > length && !faults.is_empty() {
            return faults;
        }
        let before = faults.last();
        let taken = u32::from(kind.takes_one()) + u32::from(before.is_some_and(|before| before.kind.takes_one()));
        let may_hurry = kind.comes_at_once() && taken < wanted && before.is_some_and(|before| before.quiet.is_some());
        let hurries = may_hurry && draws.between(0, 3) == 0;
        let quiet = (!hurries).then(|| Duration::from_millis(draws.between(200, 2500)));
        let lasts = Duration::from_millis(match kind {
            Kind::PauseShort => draws.between(100, 1000),
            Kind::StallNetwork => draws.between(100, 700),
            Kind::PauseLong => draws.between(100, 2000),
            _ => draws.between(1000, 4000),
        });
        if kind == Kind::Scale && workers > FEWEST {
            let others: Vec<u32> = (FEWEST..=workers).filter(|&other| other != wanted).collect();
            wanted = others[draws.between(0, others.len() as u64) as usize];
        }
        faults.push(Fault { kind, quiet, pick: draws.next(), lasts, workers: wanted });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_plan_keeps_its_promises(
            seed: u64,
            seconds in 0_u64..2000,
            workers in 2_u32..9,
            kinds in proptest::sample::subsequence(&Kind::ALL[..], 1..13),
        ) {
            let length = Duration::from_secs(seconds);
            let faults = plan(seed, length, workers, &kinds);
            prop_assert_eq!(&faults, &plan(seed, length, workers, &kinds), "it follows from its input");
            prop_assert!(!faults.is_empty());
            prop_assert!(faults.iter().all(|fault| kinds.contains(&fault.kind)));
            prop_assert!(faults.iter().all(|fault| (FEWEST..=workers).contains(&fault.workers)));
            let nominal: Duration = faults.iter().map(|fault| fault.kind.nominal()).sum();
            prop_assert!(nominal <= length.max(Duration::from_secs(6)));
            for round in faults.chunks(kinds.len()) {
                let mut seen: Vec<Kind> = round.iter().map(|fault| fault.kind).collect();
                seen.sort_unstable();
                seen.dedup();
                prop_assert_eq!(seen.len(), round.len(), "each once before any comes again");
            }
            prop_assert!(faults[0].quiet.is_some());
            for pair in faults.windows(2) {
                if pair[1].quiet.is_none() {
                    prop_assert!(pair[0].quiet.is_some(), "at most two without a recovery between");
                    let taken = pair.iter().filter(|fault| fault.kind.takes_one()).count();
                    prop_assert!(taken < pair[0].workers as usize, "somebody who holds the state is left");
                }
            }
        }
    }

    #[test]
    fn seeds_give_different_plans_and_long_ones_hold_every_kind() {
        let [one, other] = [1, 2].map(|seed| plan(seed, Duration::from_secs(300), 4, &Kind::ALL));
        assert_ne!(one, other);
        assert!(Kind::ALL.iter().all(|kind| one.iter().any(|fault| fault.kind == *kind)));
        assert!(one.iter().any(|fault| fault.quiet.is_none()), "some come on the heels of others");
    }

    #[test]
    fn without_kinds_or_with_one_worker_there_is_nothing_to_do() {
        assert!(plan(1, Duration::from_secs(60), 4, &[]).is_empty());
        assert!(plan(1, Duration::from_secs(60), 1, &Kind::ALL).is_empty());
    }
}
