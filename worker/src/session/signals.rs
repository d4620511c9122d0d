//! What the coordinator or a signal wants of the training thread.
//!
//! Input: orders from the attendance, signals of the system. Output: what a running generation is to do after its step, and
//! why its collective was aborted. Invariants: an abort reaches a thread that is blocked in a collective; what was meant
//! for one generation does nothing to the next.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use learn_collective::Aborter;
use learn_domain::Generation;
use learn_proto::convert::{AfterStep, Order};

/// Why a generation's collective was aborted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Abort {
    /// Another generation is to be formed.
    Regroup,
    /// The job wants nothing more of this worker: the cause.
    Leave(String),
    /// The coordinator does not know this worker any more.
    Rejoin,
}

#[derive(Debug, Default)]
struct State {
    /// That of the present collective; 0 = none.
    generation: Generation,
    after: AfterStep,
    /// This process was asked to stop.
    stopped_here: bool,
    abort: Option<Abort>,
    aborted_at: Option<Instant>,
    aborter: Aborter,
}

/// Shared between the attendance, the signal handler and the training thread.
#[derive(Debug, Default)]
pub struct Signals(Mutex<State>);

impl Signals {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A generation begins; gives what ends its collective.
    pub fn begin(&self, generation: Generation, after: AfterStep) -> Aborter {
        let mut state = self.state();
        state.generation = generation;
        state.aborted_at = None;
        state.after = after;
        state.aborter = Aborter::default();
        match state.abort {
            // whoever is to leave does not begin anything
            Some(Abort::Leave(_) | Abort::Rejoin) => state.aborter.abort(),
            Some(Abort::Regroup) | None => state.abort = None,
        }
        state.aborter.clone()
    }

    /// The training thread is out of its generation.
    pub fn end(&self) {
        self.state().generation = Generation(0);
    }

    /// The training thread was told to leave its generation longer than `limit` ago, and has not.
    #[must_use]
    pub fn overdue(&self, limit: Duration) -> bool {
        let state = self.state();
        state.generation != Generation(0) && state.aborted_at.is_some_and(|at| at.elapsed() > limit)
    }

    /// Does what an order means to the running generation.
    pub fn obey(&self, order: &Order) {
        let mut state = self.state();
        match order {
            Order::Run { generation, after, .. } if *generation == state.generation => {
                state.after = state.after.max(*after);
            }
            Order::Regroup(generation) if *generation == state.generation => state.give_up(Abort::Regroup),
            Order::Stop { cause } => state.give_up(Abort::Leave(cause.clone())),
            Order::Wait | Order::Run { .. } | Order::Regroup(_) | Order::Dismissed => {}
        }
    }

    /// The coordinator does not know this worker.
    pub fn forgotten(&self) {
        self.state().give_up(Abort::Rejoin);
    }

    /// The worker has joined anew, as another one.
    pub fn rejoined(&self) {
        let mut state = self.state();
        if state.abort == Some(Abort::Rejoin) {
            state.abort = None;
        }
    }

    /// Finish the step, write a checkpoint, leave.
    pub fn stop_here(&self) {
        self.state().stopped_here = true;
    }

    /// This process was asked to stop.
    #[must_use]
    pub fn stopped_here(&self) -> bool {
        self.state().stopped_here
    }

    /// What this rank wants after the step that the generation is at.
    #[must_use]
    pub fn after(&self) -> AfterStep {
        let state = self.state();
        if state.stopped_here { AfterStep::Stop } else { state.after }
    }

    /// Why the generation was aborted, if it was.
    #[must_use]
    pub fn aborted(&self) -> Option<Abort> {
        self.state().abort.clone()
    }
}

impl State {
    fn give_up(&mut self, why: Abort) {
        // leaving is final
        if !matches!(self.abort, Some(Abort::Leave(_))) {
            self.abort = Some(why);
        }
        self.aborted_at.get_or_insert_with(Instant::now);
        self.aborter.abort();
    }
}

#[cfg(test)]
mod tests {
    use learn_domain::Rank;

    use super::*;

    fn run(generation: u64, after: AfterStep) -> Order {
        Order::Run { generation: Generation(generation), rank: Rank(0), world_size: 2, after }
    }

    #[test]
    fn orders_of_another_generation_do_nothing() {
        let signals = Signals::default();
        let _aborter = signals.begin(Generation(2), AfterStep::Continue);
        signals.obey(&Order::Regroup(Generation(1)));
        signals.obey(&run(1, AfterStep::Stop));
        assert_eq!((signals.aborted(), signals.after()), (None, AfterStep::Continue));
        signals.obey(&run(2, AfterStep::Stop));
        signals.obey(&run(2, AfterStep::Continue));
        assert_eq!(signals.after(), AfterStep::Stop, "an answer that was overtaken takes nothing back");
        signals.obey(&Order::Regroup(Generation(2)));
        assert_eq!(signals.aborted(), Some(Abort::Regroup));
        let _aborter = signals.begin(Generation(3), AfterStep::Continue);
        assert_eq!((signals.aborted(), signals.after()), (None, AfterStep::Continue));
    }

    #[test]
    fn leaving_is_final_and_rejoining_is_not() {
        let signals = Signals::default();
        signals.forgotten();
        signals.rejoined();
        assert_eq!(signals.aborted(), None);
        signals.obey(&Order::Stop { cause: "failed".into() });
        signals.forgotten();
        let _aborter = signals.begin(Generation(4), AfterStep::Continue);
        assert_eq!(signals.aborted(), Some(Abort::Leave("failed".into())));
        signals.stop_here();
        assert_eq!(signals.after(), AfterStep::Stop);
    }

    #[test]
    fn one_that_does_not_leave_is_overdue() {
        let signals = Signals::default();
        let _aborter = signals.begin(Generation(4), AfterStep::Continue);
        assert!(!signals.overdue(Duration::ZERO));
        signals.obey(&Order::Regroup(Generation(4)));
        assert!(signals.overdue(Duration::ZERO) && !signals.overdue(Duration::from_secs(60)));
        signals.end();
        assert!(!signals.overdue(Duration::ZERO));
    }
}
