//! What a person wants to know of a job.

use std::time::Duration;

use learn_domain::membership::{Outcome, State, StopCause};
use learn_domain::report::{Evaluation, JobState, JobStatus, Split, WorkerStatus};

use super::Job;

/// Newest evaluations that a status has: it is written each second, and `evaluations.jsonl` has them all.
const EVALUATIONS: usize = 100;

impl Job {
    #[must_use]
    pub fn state(&self) -> JobState {
        match self.membership.state() {
            State::Gathering { .. } => JobState::Gathering,
            State::Stopping { .. } => JobState::Stopping,
            State::Running { .. } | State::Regrouping { .. } if self.membership.stop_cause().is_some() => {
                JobState::Stopping
            }
            State::Running { .. } => JobState::Running,
            State::Regrouping { .. } => JobState::Regrouping,
            State::Ended(Outcome::Finished) => JobState::Finished,
            State::Ended(Outcome::Stopped(StopCause::Operator)) => JobState::Stopped,
            State::Ended(Outcome::Stopped(_)) => JobState::Failed,
        }
    }

    /// Times that a scheduler has started the job again.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        self.settings.restarts
    }

    /// The best evaluation on valid by `checkpoint.metric`.
    #[must_use]
    pub fn best(&self) -> Option<&Evaluation> {
        let metric = |evaluation: &Evaluation| evaluation.metrics.get(&self.settings.config.checkpoint.metric).copied();
        let valid = self.evaluations.iter().filter(|evaluation| evaluation.split == Split::Valid);
        // of equals the first: it needed fewer steps
        valid
            .filter(|evaluation| metric(evaluation).is_some())
            .reduce(|best, other| if metric(other) > metric(best) { other } else { best })
    }

    /// Everything there is to know now.
    #[must_use]
    pub fn status(&self, now: Duration) -> JobStatus {
        let cause = self.membership.stop_cause().map(ToString::to_string);
        let workers = self.workers.iter().map(|(&id, worker)| WorkerStatus {
            worker: id,
            rank: worker.rank,
            host: worker.applicant.host.clone(),
            pid: worker.applicant.pid,
            device: worker.applicant.device.clone(),
            step: worker.step,
            phase: worker.phase,
            metrics_url: worker.applicant.metrics_url.clone(),
            work_ratio: worker.rank.and_then(|rank| self.vigil.work_ratio(rank)),
            seconds_in_phase: (worker.since + now.saturating_sub(worker.seen)).as_secs_f64(),
            seconds_since_heartbeat: now.saturating_sub(worker.seen).as_secs_f64(),
            left: worker.left,
        });
        JobStatus {
            name: self.settings.config.job.name.clone(),
            task: self.settings.task.clone(),
            state: self.state(),
            cause,
            stall: self.vigil.stall().map(ToString::to_string),
            generation: self.generation(),
            world_size: match self.membership.world_size() {
                0 => self.wanted(),
                ranks => ranks,
            },
            wanted_workers: self.wanted(),
            most_workers: self.settings.most_workers,
            dataset: self.settings.dataset.clone(),
            steps_per_epoch: self.settings.plan.steps_per_epoch(),
            total_steps: self.settings.total_steps,
            last_step: self.last_step.clone(),
            last_checkpoint: self.last_checkpoint,
            best: self.best().cloned(),
            evaluations: self.evaluations[self.evaluations.len().saturating_sub(EVALUATIONS)..].to_vec(),
            workers: workers.collect(),
            data_servers: Vec::new(),
            ledger: self.books.summary(),
            restarts: self.settings.restarts,
            operator_stop: self.operator_stop,
            seconds: now.as_secs_f64(),
        }
    }
}
