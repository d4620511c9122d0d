//! What follows a start of a Slurm job that has not finished the job: pure.
//!
//! Input: how it ended ([`End`]) and what was heard meanwhile ([`Heard`]). Output: [`Next`]. Invariants: what an operator has
//! stopped stays stopped; what Slurm has cut short goes on, by itself where that is possible.

use learn_domain::report::exit;

/// How a start has ended, as far as its successor is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The exit code of the job.
    pub code: i32,
    /// A step was finished in this start.
    pub advanced: bool,
}

/// What was heard during a start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// SIGUSR1: Slurm's notice.
    pub notice: bool,
    /// SIGTERM, SIGINT or SIGHUP: by Slurm at a limit or a preemption, by `scancel`, or by a person.
    pub asked: bool,
    /// An operator stops the job, says its coordinator or `learn-launch stop`.
    pub operator: bool,
    /// Why Slurm ends the job; `None` if it could not be asked.
    pub reason: Option<Reason>,
}

/// Why Slurm ends a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    TimeLimit,
    Preempted,
    /// Neither: somebody has cancelled it, or it is not ended by Slurm at all.
    Other,
}

/// What becomes of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It stays as it is; the exit code of the job says why.
    Stay,
    /// It goes back into the queue; where that is refused, as [`Next::Resubmit`].
    Requeue,
    /// It is to be submitted again from outside ([`exit::RESUBMIT`]), if Slurm does not start it again by itself.
    Resubmit,
}

/// What follows depends on what was heard: other ends would be the next start's as well.
#[must_use]
pub fn depends(code: i32) -> bool {
    [exit::STOPPED, exit::WORKER_LOST].contains(&code)
}

/// What follows.
#[must_use]
pub fn next(end: End, heard: Heard) -> Next {
    let Heard { notice, asked, operator, reason } = heard;
    let lost = end.code == exit::WORKER_LOST;
    match reason {
        _ if operator || !depends(end.code) => Next::Stay,
        Some(Reason::TimeLimit) => Next::Requeue,
        // a checkpoint that took longer than the time between the notice and the end
        Some(Reason::Preempted) if notice => Next::Requeue,
        // Slurm itself does, or else must not be asked to: the site says PreemptMode=CANCEL
        Some(Reason::Preempted) => Next::Resubmit,
        Some(Reason::Other) if asked => Next::Stay,
        // after a notice it is the limit, most likely, and an operator without one
        None if asked && !notice => Next::Stay,
        // one that loses its workers before its first step loses them again
        _ if notice || lost && end.advanced => Next::Requeue,
        _ => Next::Stay,
    }
}

#[cfg(test)]
mod tests {
    use Next::{Requeue, Resubmit, Stay};
    use Reason::{Other, Preempted, TimeLimit};

    use super::*;

    #[test]
    fn what_slurm_cuts_short_goes_on_and_what_an_operator_stops_does_not() {
        let heard = |notice, asked, reason| Heard { notice, asked, reason, operator: false };
        let stopped = End { code: exit::STOPPED, advanced: true };
        for (heard, expected, why) in [
            (heard(true, false, Some(Other)), Requeue, "notice before the time limit, and the checkpoint in time"),
            (heard(true, false, None), Requeue, "the same where squeue is not"),
            (heard(true, true, Some(TimeLimit)), Requeue, "a checkpoint slower than the notice"),
            (heard(false, true, Some(TimeLimit)), Requeue, "a script without --signal"),
            (heard(true, true, Some(Preempted)), Requeue, "send_user_signal, and then the end of the grace time"),
            (heard(false, true, Some(Preempted)), Resubmit, "PreemptMode=CANCEL, or REQUEUE, which Slurm does"),
            (heard(false, true, Some(Other)), Stay, "scancel"),
            (heard(true, true, Some(Other)), Stay, "scancel after a notice"),
            (heard(false, true, None), Stay, "somebody, and squeue is not there"),
            (heard(true, true, None), Requeue, "after a notice it is the limit, most likely"),
            (heard(false, false, Some(Other)), Stay, "a stop of the tasks by a person"),
            (heard(false, false, None), Stay, "the same where squeue is not"),
            (heard(false, false, Some(Preempted)), Resubmit, "Slurm has asked the tasks alone"),
            (heard(false, false, Some(TimeLimit)), Requeue, "the same at the limit"),
        ] {
            assert_eq!(next(stopped, heard), expected, "{why}");
            let operator = Heard { operator: true, ..heard };
            assert_eq!(next(stopped, operator), Stay, "an operator, though: {why}");
        }
    }

    #[test]
    fn losses_are_mended_once_a_step_is_finished_and_failures_never() {
        let lost = |advanced| End { code: exit::WORKER_LOST, advanced };
        let silent = Heard { reason: Some(Other), ..Heard::default() };
        assert_eq!(next(lost(true), silent), Requeue, "a node is lost");
        assert_eq!(next(lost(false), silent), Stay, "it would fail again");
        assert_eq!(next(lost(false), Heard { asked: true, reason: Some(TimeLimit), ..silent }), Requeue);
        assert_eq!(next(lost(true), Heard { asked: true, reason: Some(Preempted), ..silent }), Resubmit);
        assert_eq!(next(lost(true), Heard { asked: true, ..silent }), Stay, "scancel has killed the workers");
        assert_eq!(next(lost(true), Heard { operator: true, ..silent }), Stay);
        assert_eq!(next(lost(true), Heard { reason: None, ..silent }), Requeue, "where squeue is not");
        let all = Heard { notice: true, asked: true, operator: false, reason: Some(TimeLimit) };
        for code in [exit::FAILED, exit::USAGE, exit::DIVERGED, exit::UNSAVED, exit::NO_PROGRESS, exit::RESTARTS] {
            assert_eq!(next(End { code, advanced: true }, all), Stay, "{code}");
        }
    }
}
