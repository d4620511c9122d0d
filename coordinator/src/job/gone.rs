//! Workers that have gone: the latest stay to be looked at, so that a job whose workers come and go without end stays small.
//!
//! Input: the workers. Output: which of them are forgotten, here and in the state. Invariants: a member, and whoever had a
//! rank of the present generation, is never forgotten; a number is never given out again, since the membership counts on.

use std::time::Duration;

use learn_domain::WorkerId;

use super::Job;

/// Workers that have left or were lost, and are still told of.
pub const MOST_GONE: usize = 256;

/// All but the latest `most` of those that have gone, each with when it was heard of last.
fn surplus(mut gone: Vec<(Duration, WorkerId)>, most: usize) -> impl Iterator<Item = WorkerId> {
    gone.sort_unstable();
    let surplus = gone.len().saturating_sub(most);
    gone.into_iter().take(surplus).map(|(_, worker)| worker)
}

impl Job {
    /// Forgets the oldest of those that have gone.
    pub(super) fn forget_gone(&mut self) {
        if self.workers.len() <= MOST_GONE {
            return;
        }
        let members = self.membership.members();
        let is_member = |id: &WorkerId| members.is_some_and(|members| members.contains_key(id));
        let gone = self.workers.iter().filter(|(id, worker)| worker.left && worker.rank.is_none() && !is_member(id));
        let gone: Vec<(Duration, WorkerId)> = gone.map(|(&id, worker)| (worker.seen, id)).collect();
        for id in surplus(gone, MOST_GONE) {
            self.workers.remove(&id);
            self.unsaved.forgotten.insert(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use learn_domain::membership::{Departure, Directive};
    use learn_domain::{Generation, Phase};
    use learn_proto::convert::Heartbeat;
    use proptest::prelude::*;

    use super::*;
    use crate::job::{JobError, tests};
    use crate::state::{StateFile, Turn};

    /// Newcomers of a job that two run, the first of which is worker 2, join and go one after another, a second each.
    fn come_and_go(job: &mut Job, newcomers: std::ops::Range<u32>) {
        for number in newcomers {
            let now = Duration::from_secs(u64::from(number));
            let (worker, _) = job.join(now, tests::applicant(&format!("newcomer {number}"))).unwrap();
            assert_eq!(worker, WorkerId(number), "a number is not given out again");
            match number % 3 {
                0 => drop(job.disconnected(now, worker)),
                1 => drop(job.leave(now, worker, Departure::Crashed("it broke".into())).unwrap()),
                _ => drop(job.leave(now, worker, Departure::Stopped).unwrap()),
            }
            assert!(job.workers.len() <= 2 + MOST_GONE, "after {number}");
        }
    }

    fn job_of_two() -> Job {
        let mut job = tests::running(2);
        job.scale(Duration::from_secs(1), 3).unwrap();
        job
    }

    #[test]
    fn the_latest_that_have_gone_stay_and_nobody_misses_the_others() {
        let mut job = job_of_two();
        come_and_go(&mut job, 2..602);
        let now = Duration::from_secs(602);
        let ids = |job: &Job| -> Vec<u32> { job.status(now).workers.iter().map(|worker| worker.worker.0).collect() };
        assert_eq!(ids(&job), (0..2).chain(602 - MOST_GONE as u32..602).collect::<Vec<_>>());

        let forgotten = Heartbeat { worker: WorkerId(7), ..Heartbeat::default() };
        assert_eq!(job.heartbeat(now, forgotten), (Directive::Unknown, vec![]));
        assert_eq!(job.ready(now, WorkerId(7), (Generation(0), None)), Ok(vec![]));
        assert_eq!(job.leave(now, WorkerId(7), Departure::Stopped), Ok(vec![]));
        assert_eq!(job.leave(now, WorkerId(602), Departure::Stopped), Err(JobError::UnknownWorker(WorkerId(602))));

        // a rank that is lost now is later than all of them
        job.heartbeat(now, Heartbeat { worker: WorkerId(1), generation: Generation(1), ..Heartbeat::default() });
        job.disconnected(now, WorkerId(1));
        assert_eq!(ids(&job), (0..2).chain(603 - MOST_GONE as u32..602).collect::<Vec<_>>());
        assert_eq!(job.status(now).workers[1].phase, Phase::Lost);
    }

    #[test]
    fn who_has_a_rank_of_the_present_generation_stays_however_long_ago_it_has_left() {
        let mut job = job_of_two();
        job.leave(Duration::from_secs(1), WorkerId(1), Departure::Done).unwrap();
        come_and_go(&mut job, 2..402);
        let status = job.status(Duration::from_secs(402));
        assert_eq!((status.workers[1].worker, status.workers[1].phase), (WorkerId(1), Phase::Done));
        job.leave(Duration::from_secs(402), WorkerId(0), Departure::Done).unwrap();
        assert!(job.outcome().is_some());
        assert_eq!(job.status(Duration::from_secs(402)).workers.len(), 2 + MOST_GONE);
    }

    #[test]
    fn rows_of_the_forgotten_go_and_a_take_over_forgets_as_well() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = StateFile::create(&folder.path().join("coordinator.redb")).unwrap();
        let now = Duration::from_secs(402);
        let save = |job: &mut Job, state: &mut StateFile| -> Vec<(u64, serde_json::Value)> {
            let mut turn = Turn::default();
            job.save(now, &mut turn).unwrap();
            state.write(turn).unwrap();
            state.rows().unwrap()
        };
        let mut job = job_of_two();
        come_and_go(&mut job, 2..202);
        assert_eq!(save(&mut job, &mut state).len(), 202);
        come_and_go(&mut job, 202..402);
        let rows = save(&mut job, &mut state);
        assert_eq!(rows.len(), 2 + MOST_GONE);
        assert_eq!((rows[1].0, rows[2].0), (1, 402 - MOST_GONE as u64));

        // a coordinator of an older version has kept all of them
        let mut turn = Turn::default();
        (2..100).for_each(|number| turn.row(number, &rows[2].1).unwrap());
        state.write(turn).unwrap();
        let (mut job, _) = Job::take_over(tests::settings(2), &state).unwrap();
        assert_eq!(job.workers.len(), 2 + MOST_GONE);
        assert_eq!(save(&mut job, &mut state), rows);
        assert_eq!(job.join(now, tests::applicant("next")).unwrap().0, WorkerId(402));
    }

    proptest! {
        #[test]
        fn those_that_stay_are_the_latest(
            seen in prop::collection::vec(0_u64..20, 0..60),
            most in 0_usize..40,
        ) {
            let one = |(id, &seconds): (usize, &u64)| (Duration::from_secs(seconds), WorkerId(id as u32));
            let gone: Vec<_> = seen.iter().enumerate().map(one).collect();
            let forgotten: Vec<WorkerId> = surplus(gone.clone(), most).collect();
            prop_assert_eq!(forgotten.len(), gone.len().saturating_sub(most));
            let (went, stay): (Vec<_>, Vec<_>) = gone.into_iter().partition(|(_, id)| forgotten.contains(id));
            prop_assert!(went.iter().all(|one| stay.iter().all(|other| one < other)));
        }
    }
}
