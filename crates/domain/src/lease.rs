//! Which worker makes which range of items: leases that expire, without clock or network.
//!
//! Input: an [`Event`] and the time since the coordinator started. Output: one [`Effect`], and the state of each range.
//!
//! | range | event | range afterwards | effect |
//! |---|---|---|---|
//! | free | a worker asks | leased to it until its deadline | `Leased` |
//! | leased | its holder asks again | as before, a new deadline | `Leased`, the same range |
//! | leased | its holder renews | as before, a new deadline | `Renewed` |
//! | leased | the deadline passes | free; one loss more | (seen at the next event) |
//! | free, leased | any worker that ever held it completes it | done | `Completed` |
//! | done | a worker that ever held it completes it | done | `AlreadyDone` |
//!
//! Invariants: a range is leased to one worker at a time and completed exactly once; done stays done; free ranges go
//! out in order. A *late* completion, by a worker whose lease has gone to another one, is accepted and not fenced: the
//! rows of a range are a function of the range alone and its file is renamed into place whole, so whoever wrote it wrote
//! the same. A range whose leases are lost again and again is given up ([`Effect::Exhausted`]), so that one that kills
//! its workers does not kill all of them for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::WorkerId;

/// How long leases last and how often they may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseSettings {
    /// Silence after which a lease is lost.
    pub timeout: Duration,
    /// Lost leases of one range after which nobody gets it any more.
    pub losses: u32,
}

/// What happens to the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker wants a range.
    Ask(WorkerId),
    /// A worker is still at a range.
    Renew(WorkerId, usize),
    /// A worker has made a range; its file is there.
    Complete(WorkerId, usize),
}

/// What the worker is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Leased(usize),
    /// Others have all that is left; one of them may fail.
    Wait,
    /// Every range is done.
    Finished,
    Renewed,
    /// The lease has gone; what the worker makes of the range is taken all the same.
    Lapsed,
    Completed,
    AlreadyDone,
    /// The range was never this worker's.
    Foreign,
    /// This many leases of the range were lost.
    Exhausted {
        range: usize,
        losses: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Free,
    Leased { worker: WorkerId, deadline: Duration },
    Done,
}

/// The ranges of one job.
#[derive(Clone, Debug)]
pub struct LeaseTable {
    settings: LeaseSettings,
    ranges: Vec<State>,
    /// Who ever held a range that is not done, and how often a lease of it was lost.
    holders: BTreeMap<usize, BTreeSet<WorkerId>>,
    losses: BTreeMap<usize, u32>,
    done: usize,
}

impl LeaseTable {
    #[must_use]
    pub fn new(ranges: usize, settings: LeaseSettings) -> Self {
        let (holders, losses) = (BTreeMap::new(), BTreeMap::new());
        Self { settings, ranges: vec![State::Free; ranges], holders, losses, done: 0 }
    }

    /// Finished ranges.
    #[must_use]
    pub const fn done(&self) -> usize {
        self.done
    }

    #[must_use]
    pub fn ranges(&self) -> usize {
        self.ranges.len()
    }

    #[must_use]
    pub fn finished(&self) -> bool {
        self.done == self.ranges.len()
    }

    #[must_use]
    pub fn is_done(&self, range: usize) -> bool {
        self.ranges.get(range) == Some(&State::Done)
    }

    /// The range that a worker holds.
    #[must_use]
    pub fn held_by(&self, worker: WorkerId) -> Option<usize> {
        self.ranges.iter().position(|state| matches!(state, State::Leased { worker: holder, .. } if *holder == worker))
    }

    /// Takes one event at time `now` (since the coordinator started).
    pub fn step(&mut self, now: Duration, event: Event) -> Effect {
        self.expire(now);
        match event {
            Event::Ask(worker) => self.ask(now, worker),
            Event::Renew(worker, range) => match self.ranges.get_mut(range) {
                Some(State::Leased { worker: holder, deadline }) if *holder == worker => {
                    *deadline = now + self.settings.timeout;
                    Effect::Renewed
                }
                _ => Effect::Lapsed,
            },
            Event::Complete(worker, range) => self.complete(worker, range),
        }
    }

    fn expire(&mut self, now: Duration) {
        for (range, state) in self.ranges.iter_mut().enumerate() {
            if matches!(state, State::Leased { deadline, .. } if *deadline < now) {
                *state = State::Free;
                *self.losses.entry(range).or_default() += 1;
            }
        }
    }

    fn ask(&mut self, now: Duration, worker: WorkerId) -> Effect {
        if self.finished() {
            return Effect::Finished;
        }
        let exhausted = self
            .losses
            .iter()
            .find(|(range, losses)| **losses >= self.settings.losses && self.ranges.get(**range) == Some(&State::Free));
        if let Some((&range, &losses)) = exhausted {
            return Effect::Exhausted { range, losses };
        }
        let free = || self.ranges.iter().position(|state| *state == State::Free);
        let Some(range) = self.held_by(worker).or_else(free) else { return Effect::Wait };
        self.ranges[range] = State::Leased { worker, deadline: now + self.settings.timeout };
        self.holders.entry(range).or_default().insert(worker);
        Effect::Leased(range)
    }

    fn complete(&mut self, worker: WorkerId, range: usize) -> Effect {
        if !self.holders.get(&range).is_some_and(|holders| holders.contains(&worker)) {
            return Effect::Foreign;
        }
        if self.is_done(range) {
            return Effect::AlreadyDone;
        }
        self.ranges[range] = State::Done;
        self.losses.remove(&range);
        self.done += 1;
        Effect::Completed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SETTINGS: LeaseSettings = LeaseSettings { timeout: Duration::from_secs(10), losses: 3 };
    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn ranges_go_out_in_order_and_come_back_once() {
        let mut table = LeaseTable::new(2, SETTINGS);
        assert_eq!(table.step(at(0), Event::Ask(A)), Effect::Leased(0));
        assert_eq!(table.step(at(1), Event::Ask(A)), Effect::Leased(0), "a repeated request is the same one");
        assert_eq!(table.step(at(1), Event::Ask(B)), Effect::Leased(1));
        assert_eq!(table.step(at(2), Event::Complete(A, 0)), Effect::Completed);
        assert_eq!(table.step(at(2), Event::Complete(A, 0)), Effect::AlreadyDone);
        assert_eq!(table.step(at(2), Event::Ask(A)), Effect::Wait);
        assert_eq!(table.step(at(3), Event::Complete(B, 1)), Effect::Completed);
        assert_eq!((table.step(at(3), Event::Ask(A)), table.done()), (Effect::Finished, 2));
    }

    #[test]
    fn a_silent_holder_loses_its_range_and_one_that_renews_keeps_it() {
        let mut table = LeaseTable::new(1, SETTINGS);
        assert_eq!(table.step(at(0), Event::Ask(A)), Effect::Leased(0));
        assert_eq!(table.step(at(10), Event::Renew(A, 0)), Effect::Renewed);
        assert_eq!(table.step(at(20), Event::Ask(B)), Effect::Wait, "the deadline itself is in time");
        assert_eq!(table.step(at(21), Event::Ask(B)), Effect::Leased(0));
        assert_eq!(table.step(at(22), Event::Renew(A, 0)), Effect::Lapsed);
        assert_eq!((table.held_by(A), table.held_by(B)), (None, Some(0)));
    }

    #[test]
    fn a_late_completion_counts_once_whoever_is_first() {
        for first in [A, B] {
            let second = if first == A { B } else { A };
            let mut table = LeaseTable::new(1, SETTINGS);
            table.step(at(0), Event::Ask(A));
            table.step(at(11), Event::Ask(B));
            assert_eq!(table.step(at(12), Event::Complete(first, 0)), Effect::Completed);
            assert_eq!(table.step(at(13), Event::Complete(second, 0)), Effect::AlreadyDone);
            assert_eq!(table.done(), 1);
        }
        // Also when nobody has taken the range over yet.
        let mut table = LeaseTable::new(1, SETTINGS);
        table.step(at(0), Event::Ask(A));
        assert_eq!(table.step(at(60), Event::Complete(A, 0)), Effect::Completed);
    }

    #[test]
    fn a_range_of_others_or_none_is_not_completed() {
        let mut table = LeaseTable::new(2, SETTINGS);
        table.step(at(0), Event::Ask(A));
        assert_eq!(table.step(at(0), Event::Complete(B, 0)), Effect::Foreign);
        assert_eq!(table.step(at(0), Event::Complete(A, 1)), Effect::Foreign);
        assert_eq!(table.step(at(0), Event::Complete(A, 7)), Effect::Foreign);
        assert_eq!(table.step(at(0), Event::Renew(A, 7)), Effect::Lapsed);
        assert_eq!(table.done(), 0);
    }

    #[test]
    fn a_range_that_loses_every_worker_is_given_up_by_name() {
        let mut table = LeaseTable::new(2, SETTINGS);
        assert_eq!(table.step(at(0), Event::Ask(WorkerId(9))), Effect::Leased(0));
        table.step(at(1), Event::Complete(WorkerId(9), 0));
        for (worker, seconds) in [(1, 0), (2, 20), (3, 40)] {
            assert_eq!(table.step(at(seconds + 1), Event::Ask(WorkerId(worker))), Effect::Leased(1));
        }
        assert_eq!(table.step(at(60), Event::Ask(A)), Effect::Exhausted { range: 1, losses: 3 });
        // The last of them was only slow.
        assert_eq!(table.step(at(61), Event::Complete(WorkerId(3), 1)), Effect::Completed);
        assert_eq!(table.step(at(61), Event::Ask(A)), Effect::Finished);
    }

    #[test]
    fn no_ranges_are_done_at_once() {
        assert_eq!(LeaseTable::new(0, SETTINGS).step(at(0), Event::Ask(A)), Effect::Finished);
    }

    /// A worker of the simulation below: what it holds, and when it is done with it.
    #[derive(Clone, Copy, Debug)]
    enum Life {
        Idle,
        At(usize),
        Dead,
    }

    proptest! {
        /// Workers that die, freeze beyond their lease, and come back late: as long as one lives, every range is done
        /// exactly once, and no range is leased to two workers at a time.
        #[test]
        fn every_range_is_done_exactly_once(
            ranges in 1_usize..12,
            moves in prop::collection::vec((0_u32..4, 0_u64..8, 0_u8..10), 0..200),
        ) {
            let settings = LeaseSettings { timeout: at(5), losses: u32::MAX };
            let mut table = LeaseTable::new(ranges, settings);
            let mut lives = [Life::Idle; 5];
            let mut completed = vec![0_u32; ranges];
            let mut now = 0;
            // The fifth worker always answers, so that the job can end.
            let tail = (0..20 * ranges as u64 + 20).map(|_| (4_u32, 3_u64, 9_u8));
            for (worker, pause, what) in moves.into_iter().chain(tail) {
                now += pause;
                let id = WorkerId(worker);
                let life = &mut lives[worker as usize];
                match (*life, what) {
                    (Life::Dead, _) => {}
                    (_, 0) => *life = Life::Dead,
                    (Life::Idle, _) => {
                        if let Effect::Leased(range) = table.step(at(now), Event::Ask(id)) {
                            *life = Life::At(range);
                            let holders = (0..5).filter(|&other| table.held_by(WorkerId(other)) == Some(range)).count();
                            prop_assert_eq!(holders, 1);
                        }
                    }
                    (Life::At(range), 1..=3) => {
                        let renewed = table.step(at(now), Event::Renew(id, range));
                        prop_assert_eq!(renewed == Effect::Renewed, table.held_by(id) == Some(range));
                    }
                    // The worker of 4 and 5 is frozen.
                    (Life::At(_), 4 | 5) => {}
                    (Life::At(range), _) => {
                        match table.step(at(now), Event::Complete(id, range)) {
                            Effect::Completed => completed[range] += 1,
                            Effect::AlreadyDone => prop_assert_eq!(completed[range], 1),
                            other => prop_assert!(false, "{other:?}"),
                        }
                        prop_assert!(table.is_done(range));
                        *life = Life::Idle;
                    }
                }
                prop_assert_eq!(table.done(), completed.iter().filter(|&&times| times > 0).count());
            }
            prop_assert!(table.finished());
            prop_assert_eq!(completed, vec![1; ranges]);
        }
    }
}
