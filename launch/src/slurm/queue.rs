//! The Slurm job of a run, as those ask for it who name the run only.

use std::time::{Duration, Instant};

use anyhow::Result;
use learn_domain::report::JobState;
use learn_domain::run_dir::RunDir;
use serde_json::{Value, json};

use super::client::{self, ClientError, Queued};
use super::run::SlurmJob;
use crate::failure::Failure;
use crate::render::Freshness;

/// Pause between two questions to Slurm, whose controller has other things to do.
pub const ASK: Duration = Duration::from_secs(3);

/// The job of a run and what Slurm knows of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    pub job: SlurmJob,
    /// None: it does not know the job any more.
    pub known: Result<Option<Queued>, ClientError>,
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

    /// Slurm still has something to do with the job, as far as can be known: one that cannot be asked for the moment may, one
    /// whose programs are not here is left out of account.
    #[must_use]
    pub fn may_go_on(&self) -> bool {
        match &self.known {
            Ok(_) => !self.ended(),
            Err(ClientError::Missing(_)) => false,
            Err(_) => true,
        }
    }

    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        let job = self.job.job_id;
        match &self.known {
            Ok(Some(queued)) => queued.describe(),
            Ok(None) => format!("job {job} is not in the queue any more"),
            Err(error) => format!("job {job}; its state is unknown: {error}"),
        }
    }

    #[must_use]
    pub fn json(&self) -> Value {
        match &self.known {
            Ok(Some(queued)) => json!(queued),
            Ok(None) => json!({ "job_id": self.job.job_id, "state": null }),
            Err(error) => json!({ "job_id": self.job.job_id, "state": null, "error": error.to_string() }),
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
        } else if self.ended() && without == Freshness::Unknown {
            // Slurm has ended what nobody else can tell of
            Freshness::Stale
        } else {
            without
        }
    }
}

/// Asks Slurm about the job of a run, at most every [`ASK`]: for those who look again and again.
#[derive(Debug, Default)]
pub struct Inquiry(Option<(Instant, Option<Queue>)>);

impl Inquiry {
    /// What Slurm knew when it was last asked; `None` if the run never was a job of Slurm's.
    pub fn of(&mut self, run: &RunDir) -> Option<Queue> {
        match &self.0 {
            Some((at, queue)) if at.elapsed() < ASK => queue.clone(),
            _ => {
                let queue = Queue::of(run);
                self.0 = Some((Instant::now(), queue.clone()));
                queue
            }
        }
    }
}

/// # Errors
/// The run waits in Slurm's queue, or runs there, or Slurm is here and does not say.
pub fn refuse_queued(run: &RunDir) -> Result<()> {
    Queue::of(run).map_or(Ok(()), |queue| refuse(run, &queue))
}

fn refuse(run: &RunDir, queue: &Queue) -> Result<()> {
    let shown = run.root().display();
    let message = match &queue.known {
        Ok(_) if queue.ended() => return Ok(()),
        Ok(_) => format!("{shown}: Slurm's {}; `learn-launch stop {shown}` ends it first", queue.describe()),
        // a run that has left its cluster
        Err(ClientError::Missing(_)) => return Ok(()),
        Err(_) => format!(
            "{shown} is Slurm's {}. Try again once Slurm answers: the job may be waiting, and would begin to work on the run \
             at any time. If it is gone for certain, remove {}",
            queue.describe(),
            SlurmJob::file(run).display()
        ),
    };
    Err(Failure::Usage(message).into())
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
        let unknown = Queue { known: Err(ClientError::Missing("squeue".into())), ..queue(None) };
        assert!(!unknown.ended() && unknown.describe().contains("squeue"));
        assert_eq!(unknown.freshness(&JobState::Running, Freshness::Stale), Freshness::Stale);
        let hidden = |queue: Queue| queue.freshness(&JobState::Running, Freshness::Unknown);
        assert_eq!(hidden(queue(Some("RUNNING"))), Freshness::Live);
        assert_eq!(hidden(queue(Some("COMPLETING"))), Freshness::Unknown);
        assert_eq!((hidden(queue(Some("NODE_FAIL"))), hidden(queue(None))), (Freshness::Stale, Freshness::Stale));
        assert_eq!(hidden(unknown), Freshness::Unknown);
    }

    #[test]
    fn who_waits_runs_or_cannot_be_asked_about_is_refused() {
        let run = RunDir::new("/runs/shop");
        let silent = ClientError::Failed { name: "squeue".into(), how: "exit code 1".into(), said: "timed out".into() };
        let silent = Queue { known: Err(silent), ..queue(None) };
        for state in ["PENDING", "RUNNING", "COMPLETING"] {
            let text = refuse(&run, &queue(Some(state))).unwrap_err().to_string();
            assert!(text.contains(state) && text.contains("learn-launch stop"), "{text}");
            assert!(queue(Some(state)).may_go_on());
        }
        let text = refuse(&run, &silent).unwrap_err().to_string();
        assert!(text.contains("timed out") && text.contains("/runs/shop/slurm/job.json"), "{text}");
        assert!(silent.may_go_on());
        for over in
            [queue(None), queue(Some("FAILED")), Queue { known: Err(ClientError::Missing("squeue".into())), ..silent }]
        {
            refuse(&run, &over).unwrap();
            assert!(!over.may_go_on());
        }
    }
}
