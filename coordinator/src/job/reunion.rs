//! The time after a coordinator was away (it took a job over, or stood still), until it is clear who is still there.
//!
//! Input: signs of life, attendances that end, the time. Output: whether an end tells of a loss, and when to look for those
//! that are missing. Invariant: a connection that broke because nobody answered costs no worker, if that comes back in time;
//! one that does not is told of at the end of the reunion, heard of before or not: what was heard may have been said before.

use std::collections::BTreeSet;
use std::time::Duration;

use learn_domain::WorkerId;

/// Members of a job whose coordinator was away are heard of within this, from the first one on; who is not went meanwhile.
const REUNION: Duration = Duration::from_secs(3);

/// Some of the members were not heard of yet.
#[derive(Debug)]
pub struct Reunion {
    /// When the coordinator came back.
    pub since: Duration,
    /// When the first one was heard of.
    first: Option<Duration>,
    /// The first attendance that is newer; an older one may have ended for no other reason than that nobody answered.
    attendance: u64,
    /// Those whose older attendance has ended meanwhile.
    gone: BTreeSet<WorkerId>,
}

impl Reunion {
    pub fn new(since: Duration, attendance: u64) -> Self {
        Self { since, first: None, attendance, gone: BTreeSet::new() }
    }

    /// The coordinator was away again.
    #[must_use]
    pub fn again(self, since: Duration, attendance: u64) -> Self {
        Self { gone: self.gone, ..Self::new(since, attendance) }
    }

    /// A worker was heard of.
    pub fn heard(&mut self, now: Duration) {
        self.first.get_or_insert(now);
    }

    /// Takes note of an attendance that has ended; whether that may be because nobody answered, so that the worker has
    /// until the end of the reunion to come back.
    pub fn excuses(&mut self, worker: WorkerId, attendance: u64) -> bool {
        let excused = attendance < self.attendance;
        if excused {
            self.gone.insert(worker);
        }
        excused
    }

    #[must_use]
    pub fn is_over(&self, now: Duration) -> bool {
        self.first.is_some_and(|first| now.saturating_sub(first) > REUNION)
    }

    /// Those that are lost, if they do not attend now: members that were not heard of since, and those whose attendance
    /// has ended.
    #[must_use]
    pub fn missing(self, unheard: Vec<WorkerId>) -> BTreeSet<WorkerId> {
        let mut missing = self.gone;
        missing.extend(unheard);
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);

    #[test]
    fn an_attendance_of_before_may_end_and_one_of_after_may_not() {
        let mut reunion = Reunion::new(9 * SECOND, 5);
        assert!(reunion.excuses(A, 4) && !reunion.excuses(B, 5));
        assert_eq!(reunion.missing(vec![]), BTreeSet::from([A]), "the other one is lost already");
    }

    #[test]
    fn it_is_over_some_time_after_the_first_was_heard_of() {
        let mut reunion = Reunion::new(9 * SECOND, 0);
        assert!(!reunion.is_over(90 * SECOND), "nobody is there yet");
        reunion.heard(90 * SECOND);
        reunion.heard(92 * SECOND);
        assert!(!reunion.is_over(90 * SECOND + REUNION) && reunion.is_over(91 * SECOND + REUNION));
    }

    #[test]
    fn who_was_gone_when_it_began_anew_is_still_gone() {
        let mut reunion = Reunion::new(9 * SECOND, 5);
        reunion.heard(9 * SECOND);
        reunion.excuses(A, 4);
        let again = reunion.again(20 * SECOND, 7);
        assert!(!again.is_over(90 * SECOND), "the first is waited for anew");
        assert_eq!(again.missing(vec![B, A]), BTreeSet::from([A, B]));
    }
}
