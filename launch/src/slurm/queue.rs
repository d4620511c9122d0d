//! The Slurm job of a run, as those ask for it who name the run only.

use anyhow::Result;
use learn_domain::report::JobState;
use learn_domain::run_dir::RunDir;
use serde_json::{Value, json};

use super::client::{self, Queued};
use super::run::SlurmJob;
use crate::failure::Failure;
use crate::render::Freshness;

/// The job of a run and what Slurm knows of it.
#[derive(Debug)]
pub struct Queue {
    pub job: SlurmJob,
    /// None: it does not know the job any more.
    pub known: Result<Option<Queued>>,
}

impl Queue {
    /// `None` if the run never was a job of Slurm's.
    #[must_use]
    pub fn of(run: &RunDir) -> Option<Self> {
        let job = SlurmJob::of(run)?;
        Some(Self { job, known: client::queued(job.job_id) })
    }

    fn entry(&self) -> Option<&Queued> {
        self.known.as_ref().ok()?.as_ref()
    }

    #[must_use]
    pub fn waits(&self) -> bool {
        self.entry().is_some_and(Queued::waits)
    }

    #[must_use]
    pub fn runs(&self) -> bool {
        self.entry().is_some_and(Queued::runs)
    }

    /// Nothing more comes of it by itself.
    #[must_use]
    pub fn ended(&self) -> bool {
        matches!(&self.known, Ok(None)) || self.entry().is_some_and(Queued::ended)
    }

    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        let job = self.job.job_id;
        match &self.known {
            Ok(Some(queued)) => queued.describe(),
            Ok(None) => format!("job {job} is not in the queue any more"),
            Err(error) => format!("job {job}; its state is unknown: {error:#}"),
        }
    }

    #[must_use]
    pub fn json(&self) -> Value {
        match &self.known {
            Ok(Some(queued)) => json!(queued),
            Ok(None) => json!({ "job_id": self.job.job_id, "state": null }),
            Err(error) => json!({ "job_id": self.job.job_id, "state": null, "error": format!("{error:#}") }),
        }
    }

    /// How fresh the last status on disk is, with what Slurm knows.
    #[must_use]
    pub fn freshness(&self, state: &JobState, without: Freshness) -> Freshness {
        if self.waits() {
            Freshness::Queued
        } else if self.runs() && !state.ended() {
            // its coordinator cannot be asked from here, but writes the status each second
            Freshness::Live
        } else {
            without
        }
    }
}

/// # Errors
/// The run waits in Slurm's queue, or runs there.
pub fn refuse_queued(run: &RunDir) -> Result<()> {
    match Queue::of(run) {
        Some(queue) if !queue.ended() && queue.known.is_ok() => {
            let shown = run.root().display();
            let message = format!("{shown}: Slurm's {}; `learn-launch stop {shown}` ends it first", queue.describe());
            Err(Failure::Usage(message).into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(state: Option<&str>) -> Queue {
        let known = state.map(|state| Queued {
            job_id: 12,
            state: state.into(),
            reason: "BeginTime".into(),
            nodes: "node1".into(),
            time: "0:10".into(),
            time_limit: "1:00".into(),
        });
        Queue { job: SlurmJob { job_id: 12 }, known: Ok(known) }
    }

    #[test]
    fn what_slurm_knows_makes_the_last_status_fresh() {
        let freshness = |slurm, state| queue(slurm).freshness(&state, Freshness::Stale);
        assert_eq!(freshness(Some("RUNNING"), JobState::Running), Freshness::Live);
        assert_eq!(freshness(Some("PENDING"), JobState::Stopped), Freshness::Queued);
        assert_eq!(freshness(Some("TIMEOUT"), JobState::Running), Freshness::Stale);
        assert_eq!(freshness(None, JobState::Running), Freshness::Stale);
        assert!(queue(None).ended() && queue(Some("CANCELLED")).ended() && !queue(Some("COMPLETING")).ended());
        assert_eq!(queue(None).describe(), "job 12 is not in the queue any more");
        let unknown = Queue { known: Err(anyhow::anyhow!("squeue is not on the PATH")), ..queue(None) };
        assert!(!unknown.ended() && unknown.describe().contains("squeue"));
        assert_eq!(unknown.freshness(&JobState::Running, Freshness::Stale), Freshness::Stale);
    }
}
