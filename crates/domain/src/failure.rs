//! How far a failure of a worker reaches: whether it may pass, whether another process in the worker's place may do better, or
//! whether any would come to the same.
//!
//! Input: a failure, classified once where it is known best ([`Reach`]), or the exit code that a process has left. Output: how
//! the worker leaves, its exit code, and whether somebody may take its place. Pure functions.

use crate::membership::{Departure, GiveUp};
use crate::report::exit;

/// What a failure ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// A generation and not the worker: what it holds is as it was, and the next generation has other members, or another
    /// network.
    Generation,
    /// The process: it says nothing of another in its place. A defect, a broken device.
    Process,
    /// The worker's place: another process in it would fail in the same way.
    Place,
    /// The job: every rank comes to the same.
    Job(GiveUp),
}

impl Reach {
    /// It may pass: the worker takes part in the next generation.
    #[must_use]
    pub fn passes(self) -> bool {
        self == Self::Generation
    }

    /// How a worker leaves that ends by it, and says why.
    #[must_use]
    pub fn departure(self, message: String) -> Departure {
        match self {
            Self::Generation | Self::Process => Departure::Crashed(message),
            Self::Place => Departure::Failed(message),
            Self::Job(why) => Departure::GaveUp(why, message),
        }
    }

    /// The exit code of a process that ends by it.
    #[must_use]
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Generation | Self::Process | Self::Place => exit::FAILED,
            Self::Job(why) => why.exit_code(),
        }
    }
}

impl GiveUp {
    pub const ALL: [Self; 2] = [Self::Diverged, Self::Unsaved];

    /// The exit code of a job that is given up for this, and of its workers.
    #[must_use]
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Diverged => exit::DIVERGED,
            Self::Unsaved => exit::UNSAVED,
        }
    }
}

/// Whether a process has failed, so that another may be worth a try in its place, by its exit code (`None`: it was killed by a
/// signal). It has not if it has done its part, stopped as it was asked to, or given the job up.
#[must_use]
pub fn is_failure(code: Option<i32>) -> bool {
    let gives_up = |code| GiveUp::ALL.into_iter().any(|why| why.exit_code() == code);
    code.is_none_or(|code| ![exit::OK, exit::STOPPED].contains(&code) && !gives_up(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EACH: [Reach; 5] =
        [Reach::Generation, Reach::Process, Reach::Place, Reach::Job(GiveUp::Diverged), Reach::Job(GiveUp::Unsaved)];

    #[test]
    fn who_leaves_says_whether_another_may_do_better() {
        let said = || "why".to_owned();
        let departures = [
            Departure::Crashed(said()),
            Departure::Crashed(said()),
            Departure::Failed(said()),
            Departure::GaveUp(GiveUp::Diverged, said()),
            Departure::GaveUp(GiveUp::Unsaved, said()),
        ];
        assert_eq!(EACH.map(|reach| reach.departure(said())), departures);
        assert_eq!(EACH.map(Reach::passes), [true, false, false, false, false]);
    }

    #[test]
    fn nobody_takes_the_place_of_one_that_has_given_the_job_up() {
        for reach in EACH {
            assert_eq!(is_failure(Some(reach.exit_code())), !matches!(reach, Reach::Job(_)), "{reach:?}");
        }
        for (code, fails) in [(None, true), (Some(exit::OK), false), (Some(exit::STOPPED), false), (Some(101), true)] {
            assert_eq!(is_failure(code), fails, "{code:?}");
        }
        assert!(is_failure(Some(exit::USAGE)));
    }
}
