//! Where a new generation goes on from.
//!
//! Input: what each of its ranks holds. Output: whose state all take, and what is to be done again. Invariants: the same
//! on every rank, because all know the same; no finished step is lost as long as one rank that finished it is there. An
//! update is applied after everything of its step was summed over all ranks, so the step that some rank has finished is the
//! whole one, and ranks of one generation are at most one step apart.

use crate::ids::Step;

/// What a rank brings into a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// It has a state: it took part in a generation of this job, or has made the one that the job starts with.
    pub state: bool,
    /// Finished steps of that state.
    pub finished: Step,
    /// It has done what follows the last finished step (an evaluation, a checkpoint).
    pub followed_up: bool,
}

/// What the ranks of a generation do before its first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreement {
    /// Nobody has a state: rank 0 makes the one that the job starts with, and the others take it over.
    Start,
    /// All go on from `finished` steps.
    GoOn {
        finished: Step,
        /// The rank whose state the others take, if some of them need it.
        source: Option<usize>,
        /// What follows the last finished step was not done by all, and is done (again).
        follow_up: bool,
    },
}

/// What the ranks that hold `holdings` agree on; in rank order.
#[must_use]
pub fn agree(holdings: &[Holding]) -> Agreement {
    let with_state = || holdings.iter().enumerate().filter(|(_, holding)| holding.state);
    let Some(finished) = with_state().map(|(_, holding)| holding.finished).max() else { return Agreement::Start };
    let most_advanced = || with_state().filter(|(_, holding)| holding.finished == finished);
    // of equals one that has done more knows more: which checkpoint is the best
    let source = most_advanced().min_by_key(|(rank, holding)| (!holding.followed_up, *rank)).map(|(rank, _)| rank);
    let alike = holdings.iter().all(|holding| Some(holding) == source.map(|rank| &holdings[rank]));
    let follow_up = most_advanced().any(|(_, holding)| !holding.followed_up);
    Agreement::GoOn { finished, source: source.filter(|_| !alike), follow_up }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(finished: u64, followed_up: bool) -> Holding {
        Holding { state: true, finished: Step(finished), followed_up }
    }

    const NEWCOMER: Holding = Holding { state: false, finished: Step(0), followed_up: false };

    fn go_on(finished: u64, source: Option<usize>, follow_up: bool) -> Agreement {
        Agreement::GoOn { finished: Step(finished), source, follow_up }
    }

    #[test]
    fn the_most_advanced_rank_gives_its_state() {
        assert_eq!(agree(&[NEWCOMER, NEWCOMER]), Agreement::Start);
        assert_eq!(agree(&[holds(7, true), holds(7, true)]), go_on(7, None, false));
        assert_eq!(agree(&[holds(6, true), holds(7, true), holds(6, true)]), go_on(7, Some(1), false));
        assert_eq!(agree(&[NEWCOMER, holds(7, true)]), go_on(7, Some(1), false));
        assert_eq!(agree(&[holds(0, true), NEWCOMER]), go_on(0, Some(0), false));
    }

    #[test]
    fn what_follows_a_step_is_done_unless_all_that_finished_it_have_done_it() {
        assert_eq!(agree(&[holds(7, false), holds(7, true)]), go_on(7, Some(1), true));
        assert_eq!(agree(&[holds(7, false), holds(7, false)]), go_on(7, None, true));
        assert_eq!(agree(&[holds(6, true), holds(7, false)]), go_on(7, Some(1), true));
        assert_eq!(agree(&[holds(6, false), holds(7, true)]), go_on(7, Some(1), false));
    }
}
