//! The state of an embed job: who works, on what, and how far it is. No clock, no network.
//!
//! Input: what workers say, and the time since the coordinator started. Output: answers, the status, how it ended.
//! Invariant: all workers make the same rows: the first one's plan decides, and a worker with another is refused.

use std::collections::BTreeMap;
use std::time::Duration;

use learn_domain::lease::{Effect, Event, LeaseSettings, LeaseTable};
use learn_domain::report::{EmbeddingStatus, EmbeddingWorker};
use learn_domain::{Incarnation, WorkerId};

/// Lost leases of one range after which the job fails.
const LOSSES: u32 = 3;
/// Most ranges of a job: a table of them stays small.
const MOST_RANGES: u64 = 1 << 24;
/// Workers that are not heard of any more and still known.
const MOST_SILENT: usize = 256;

/// What a worker would make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Digest over the keys of all shards.
    pub digest: String,
    pub ranges: u64,
    pub items: u64,
    pub range_items: u64,
}

impl Plan {
    fn makes_sense(&self) -> bool {
        self.range_items > 0 && self.ranges <= MOST_RANGES && self.items.div_ceil(self.range_items) == self.ranges
    }

    fn items_of(&self, range: usize) -> u64 {
        self.items.saturating_sub(range as u64 * self.range_items).min(self.range_items)
    }
}

/// A worker that asks to take part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applicant {
    pub incarnation: Incarnation,
    pub host: String,
    pub pid: u32,
}

/// A call that cannot be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EmbeddingError {
    #[error("worker {0} has not joined this job; start it again")]
    UnknownWorker(WorkerId),
    #[error("the plan makes no sense: {0:?}")]
    Nonsense(Plan),
    #[error(
        "this worker would make other embeddings than those before it ({theirs} ranges, digest {their_digest}; the job has \
         {ours} and {our_digest}): are the dataset, the model's files or the server the same everywhere?"
    )]
    OtherPlan { theirs: u64, their_digest: String, ours: u64, our_digest: String },
    #[error("range {range} was never this worker's")]
    Foreign { range: u64 },
    #[error("{0}")]
    Failed(String),
}

/// What a worker that wants a range gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Leased(u64),
    Wait,
    Finished,
}

#[derive(Debug)]
struct Worker {
    applicant: Applicant,
    last_seen: Duration,
    /// Finished items of the range that it holds.
    items_done: u64,
    /// It knows that the job is over.
    told: bool,
}

/// An embed job.
#[derive(Debug)]
pub struct EmbeddingJob {
    settings: LeaseSettings,
    /// Longest time without any worker.
    patience: Duration,
    work: Option<(Plan, LeaseTable)>,
    workers: BTreeMap<WorkerId, Worker>,
    next_worker: u32,
    last_heard: Duration,
    failure: Option<String>,
}

impl EmbeddingJob {
    /// `timeout`: silence after which a worker loses its range; `patience`: longest time without any worker.
    #[must_use]
    pub fn new(timeout: Duration, patience: Duration) -> Self {
        Self {
            settings: LeaseSettings { timeout, losses: LOSSES },
            patience,
            work: None,
            workers: BTreeMap::new(),
            next_worker: 0,
            last_heard: Duration::ZERO,
            failure: None,
        }
    }

    /// Lets a worker in; a repeated request of the same start is the same worker.
    pub fn join(&mut self, now: Duration, applicant: Applicant) -> WorkerId {
        self.last_heard = now;
        let known = self.workers.iter_mut().find(|(_, worker)| worker.applicant.incarnation == applicant.incarnation);
        if let Some((&id, worker)) = known {
            worker.last_seen = now;
            return id;
        }
        let id = WorkerId(self.next_worker);
        self.next_worker += 1;
        self.workers.insert(id, Worker { applicant, last_seen: now, items_done: 0, told: false });
        id
    }

    fn heard(&mut self, now: Duration, id: WorkerId) -> Result<&mut Worker, EmbeddingError> {
        self.last_heard = now;
        let worker = self.workers.get_mut(&id).ok_or(EmbeddingError::UnknownWorker(id))?;
        worker.last_seen = now;
        Ok(worker)
    }

    /// A worker wants a range.
    ///
    /// # Errors
    /// It is not known, its plan is another one, or the job has failed.
    pub fn lease(&mut self, now: Duration, id: WorkerId, plan: Plan) -> Result<Answer, EmbeddingError> {
        self.heard(now, id)?.items_done = 0;
        if !plan.makes_sense() {
            return Err(EmbeddingError::Nonsense(plan));
        }
        let settings = self.settings;
        let (ours, table) =
            self.work.get_or_insert_with(|| (plan.clone(), LeaseTable::new(plan.ranges as usize, settings)));
        if *ours != plan {
            return Err(EmbeddingError::OtherPlan {
                theirs: plan.ranges,
                their_digest: plan.digest,
                ours: ours.ranges,
                our_digest: ours.digest.clone(),
            });
        }
        let answer = match table.step(now, Event::Ask(id)) {
            Effect::Leased(range) => Answer::Leased(range as u64),
            Effect::Finished => Answer::Finished,
            Effect::Exhausted { range, losses } => {
                self.failure = Some(format!(
                    "range {range} was given up after {losses} workers were lost at it; look at their logs, then start \
                     again: finished ranges are kept"
                ));
                Answer::Wait
            }
            // `Ask` has no other effect.
            _ => Answer::Wait,
        };
        let failure = self.failure.clone();
        if failure.is_some() || answer == Answer::Finished {
            self.heard(now, id)?.told = true;
        }
        failure.map_or(Ok(answer), |failure| Err(EmbeddingError::Failed(failure)))
    }

    /// A sign of life of a worker; whether the range that it makes is still its own.
    ///
    /// # Errors
    /// It is not known.
    pub fn renew(
        &mut self,
        now: Duration,
        id: WorkerId,
        range: Option<u64>,
        items_done: u64,
    ) -> Result<bool, EmbeddingError> {
        self.heard(now, id)?.items_done = items_done;
        let (Some((_, table)), Some(range)) = (&mut self.work, range) else { return Ok(false) };
        Ok(table.step(now, Event::Renew(id, range as usize)) == Effect::Renewed)
    }

    /// A worker has made a range; `true` if it is the first to say so.
    ///
    /// # Errors
    /// It is not known, or never had the range.
    pub fn complete(&mut self, now: Duration, id: WorkerId, range: u64) -> Result<bool, EmbeddingError> {
        self.heard(now, id)?.items_done = 0;
        let Some((_, table)) = &mut self.work else { return Err(EmbeddingError::Foreign { range }) };
        match table.step(now, Event::Complete(id, range as usize)) {
            Effect::Completed => Ok(true),
            Effect::AlreadyDone => Ok(false),
            _ => Err(EmbeddingError::Foreign { range }),
        }
    }

    /// It has lost its range, if it had one.
    fn is_silent(&self, now: Duration, worker: &Worker) -> bool {
        now.saturating_sub(worker.last_seen) > self.settings.timeout
    }

    /// Forgets those that are not heard of any more, but for the latest: one that has only slept goes on where it was, and
    /// what it has made is taken.
    pub fn tick(&mut self, now: Duration) {
        let silent = self.workers.iter().filter(|(_, worker)| self.is_silent(now, worker));
        let mut silent: Vec<(Duration, WorkerId)> = silent.map(|(&id, worker)| (worker.last_seen, id)).collect();
        silent.sort_unstable();
        let surplus = silent.len().saturating_sub(MOST_SILENT);
        for (_, id) in &silent[..surplus] {
            self.workers.remove(id);
        }
    }

    /// How the job has ended, once every worker that still speaks knows.
    pub fn outcome(&mut self, now: Duration) -> Option<Result<(), String>> {
        let finished = self.work.as_ref().is_some_and(|(_, table)| table.finished());
        if !finished && now.saturating_sub(self.last_heard) > self.patience {
            let seconds = self.patience.as_secs();
            return Some(Err(format!("no worker was heard from for {seconds} s (cluster.join_timeout)")));
        }
        let all_know = self.workers.values().all(|worker| worker.told || self.is_silent(now, worker));
        match &self.failure {
            Some(failure) if all_know => Some(Err(failure.clone())),
            None if finished && all_know => Some(Ok(())),
            _ => None,
        }
    }

    #[must_use]
    pub fn status(&self, now: Duration) -> EmbeddingStatus {
        let mut status = EmbeddingStatus { failure: self.failure.clone(), ..EmbeddingStatus::default() };
        let table = self.work.as_ref().map(|(_, table)| table);
        if let Some((plan, table)) = &self.work {
            (status.items, status.ranges, status.ranges_done) = (plan.items, plan.ranges, table.done() as u64);
            let done = (0..table.ranges()).filter(|&range| table.is_done(range));
            status.items_done = done.map(|range| plan.items_of(range)).sum();
        }
        let there = |worker: &Worker| !worker.told && !self.is_silent(now, worker);
        for (id, worker) in self.workers.iter().filter(|(_, worker)| there(worker)) {
            let range = table.and_then(|table| table.held_by(*id));
            if range.is_some() {
                status.items_done += worker.items_done;
            }
            status.workers.push(EmbeddingWorker {
                worker: *id,
                host: worker.applicant.host.clone(),
                pid: worker.applicant.pid,
                range: range.map(|range| range as u64),
                seconds_since_heard: now.saturating_sub(worker.last_seen).as_secs_f64(),
            });
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn plan(digest: &str) -> Plan {
        Plan { digest: digest.into(), ranges: 2, items: 7, range_items: 4 }
    }

    fn applicant(name: &str) -> Applicant {
        Applicant { incarnation: Incarnation(name.into()), host: "h".into(), pid: 1 }
    }

    fn job_of_two() -> (EmbeddingJob, WorkerId, WorkerId) {
        let mut job = EmbeddingJob::new(at(10), at(60));
        let (a, b) = (job.join(at(0), applicant("a")), job.join(at(0), applicant("b")));
        assert_eq!(job.join(at(1), applicant("a")), a, "a repeated request is the same worker");
        assert_ne!(a, b);
        (job, a, b)
    }

    #[test]
    fn two_workers_share_the_ranges_and_the_job_ends_when_both_know() {
        let (mut job, a, b) = job_of_two();
        assert_eq!(job.lease(at(1), a, plan("x")), Ok(Answer::Leased(0)));
        assert_eq!(job.lease(at(1), b, plan("x")), Ok(Answer::Leased(1)));
        assert_eq!(job.renew(at(2), a, Some(0), 3), Ok(true));
        assert_eq!(job.complete(at(2), b, 1), Ok(true));
        let status = job.status(at(2));
        assert_eq!((status.items, status.items_done, status.ranges_done), (7, 3 + 3, 1));
        assert_eq!(job.lease(at(2), b, plan("x")), Ok(Answer::Wait));
        assert_eq!(job.complete(at(3), a, 0), Ok(true));
        assert_eq!(job.complete(at(3), a, 0), Ok(false));
        assert_eq!(job.lease(at(3), a, plan("x")), Ok(Answer::Finished));
        assert_eq!(job.outcome(at(3)), None, "b does not know yet");
        assert_eq!(job.lease(at(4), b, plan("x")), Ok(Answer::Finished));
        assert_eq!(job.outcome(at(4)), Some(Ok(())));
    }

    #[test]
    fn a_silent_worker_does_not_hold_up_the_end() {
        let (mut job, a, b) = job_of_two();
        assert_eq!(job.lease(at(1), a, plan("x")), Ok(Answer::Leased(0)));
        assert_eq!(job.lease(at(2), b, plan("x")), Ok(Answer::Leased(1)));
        job.complete(at(3), b, 1).unwrap();
        assert_eq!(job.lease(at(11), b, plan("x")), Ok(Answer::Wait));
        assert_eq!(job.lease(at(12), b, plan("x")), Ok(Answer::Leased(0)), "a was silent for longer than its lease");
        job.complete(at(13), b, 0).unwrap();
        assert_eq!(job.lease(at(13), b, plan("x")), Ok(Answer::Finished));
        assert_eq!(job.outcome(at(13)), Some(Ok(())));
    }

    #[test]
    fn a_silent_worker_is_not_shown_and_what_it_made_is_taken_when_it_wakes() {
        let (mut job, a, b) = job_of_two();
        let shown = |job: &EmbeddingJob, seconds| -> Vec<WorkerId> {
            job.status(at(seconds)).workers.iter().map(|worker| worker.worker).collect()
        };
        assert_eq!(job.lease(at(1), a, plan("x")), Ok(Answer::Leased(0)));
        assert_eq!(job.renew(at(2), a, Some(0), 3), Ok(true));
        assert_eq!(job.renew(at(12), b, None, 0), Ok(false));
        assert_eq!((shown(&job, 12), job.status(at(12)).items_done), (vec![a, b], 3));
        job.tick(at(13));
        assert_eq!((shown(&job, 13), job.status(at(13)).items_done), (vec![b], 0), "its range is free again");
        assert_eq!(job.lease(at(14), b, plan("x")), Ok(Answer::Leased(0)));
        job.tick(at(15));
        assert_eq!(job.complete(at(15), a, 0), Ok(true), "it had only slept");
        assert_eq!((shown(&job, 15), job.status(at(15)).ranges_done), (vec![a, b], 1));
    }

    #[test]
    fn workers_that_come_and_go_without_end_are_forgotten() {
        let mut job = EmbeddingJob::new(at(10), at(60));
        let (all, heard) = (1000, 11);
        for number in 0..all {
            let id = job.join(at(number), applicant(&number.to_string()));
            assert_eq!(u64::from(id.0), number, "a number is not given out again");
            job.tick(at(number));
            assert!(job.workers.len() <= MOST_SILENT + heard, "{} after {number}", job.workers.len());
            assert!(job.status(at(number)).workers.len() <= heard);
        }
        let known = |job: &mut EmbeddingJob, id: u32| job.renew(at(all), WorkerId(id), None, 0).is_ok();
        assert!(!known(&mut job, 0) && known(&mut job, all as u32 - MOST_SILENT as u32), "the latest stay");
    }

    #[test]
    fn a_worker_that_would_make_other_rows_is_refused() {
        let (mut job, a, b) = job_of_two();
        job.lease(at(1), a, plan("x")).unwrap();
        let refused = job.lease(at(1), b, plan("y")).unwrap_err();
        assert!(refused.to_string().contains("other embeddings"), "{refused}");
        let nonsense = Plan { ranges: 3, ..plan("x") };
        assert_eq!(job.lease(at(1), b, nonsense.clone()), Err(EmbeddingError::Nonsense(nonsense)));
        assert_eq!(job.lease(at(1), WorkerId(9), plan("x")), Err(EmbeddingError::UnknownWorker(WorkerId(9))));
        assert_eq!(job.complete(at(1), b, 0), Err(EmbeddingError::Foreign { range: 0 }));
    }

    #[test]
    fn a_job_without_workers_ends() {
        let (mut job, a, _) = job_of_two();
        assert_eq!(job.renew(at(50), a, None, 0), Ok(false), "it reads its model and has no range yet");
        assert_eq!(job.outcome(at(110)), None);
        assert!(job.outcome(at(111)).unwrap().is_err());
        let mut job = EmbeddingJob::new(at(10), at(60));
        assert_eq!(job.outcome(at(60)), None);
        assert!(job.outcome(at(61)).unwrap().unwrap_err().contains("join_timeout"));
    }
}
