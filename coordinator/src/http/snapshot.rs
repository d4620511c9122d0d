//! The job's status for any number of those who look: one question at a time, whose answer all share that came before it was
//! asked.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use learn_domain::report::JobStatus;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::job::actor::{AskError, Command, JobHandle};

/// A status that is older is asked for again.
const FRESH: Duration = Duration::from_millis(250);

/// A status, and when it was asked for.
type Snapshot = (Instant, Arc<JobStatus>);

/// The last status.
#[derive(Clone)]
pub struct Snapshots {
    job: JobHandle,
    kept: Arc<Mutex<Option<Snapshot>>>,
    /// Of the one who asks.
    turn: Arc<Semaphore>,
}

impl Snapshots {
    pub fn new(job: JobHandle) -> Self {
        Self { job, kept: Arc::default(), turn: Arc::new(Semaphore::new(1)) }
    }

    /// A status that is hardly older than [`FRESH`].
    ///
    /// # Errors
    /// [`AskError::Gone`] when the job has ended.
    pub async fn recent(&self) -> Result<Arc<JobStatus>, AskError> {
        match Instant::now().checked_sub(FRESH) {
            Some(oldest) => self.since(oldest).await,
            None => self.latest().await,
        }
    }

    /// The status now.
    ///
    /// # Errors
    /// As [`Snapshots::recent`].
    pub async fn latest(&self) -> Result<Arc<JobStatus>, AskError> {
        self.since(Instant::now()).await
    }

    async fn since(&self, oldest: Instant) -> Result<Arc<JobStatus>, AskError> {
        if let Some(status) = self.known(oldest) {
            return Ok(status);
        }
        let _turn = self.turn.acquire().await.map_err(|_| AskError::Gone)?;
        if let Some(status) = self.known(oldest) {
            return Ok(status);
        }
        let asked = Instant::now();
        let status = Arc::new(self.job.ask(Command::Status).await?);
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some((asked, status.clone()));
        Ok(status)
    }

    fn known(&self, oldest: Instant) -> Option<Arc<JobStatus>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().filter(|(asked, _)| *asked >= oldest).map(|(_, status)| status.clone())
    }
}
