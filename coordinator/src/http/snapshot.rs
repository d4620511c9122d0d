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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::job::{Job, tests};

    #[tokio::test(start_paused = true)]
    async fn those_who_look_within_a_moment_share_an_answer_and_no_older_one() {
        let (job, mut commands) = JobHandle::channel();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        tokio::spawn(async move {
            let shown = Job::new(tests::settings(1));
            while let Some(command) = commands.recv().await {
                if let Command::Status(reply) = command {
                    count.fetch_add(1, Ordering::Relaxed);
                    reply.send(shown.status(Duration::ZERO)).unwrap();
                }
            }
        });
        let snapshots = Snapshots::new(job);
        let times = || asked.load(Ordering::Relaxed);
        for _ in 0..20 {
            snapshots.clone().recent().await.unwrap();
        }
        assert_eq!(times(), 1);
        tokio::time::advance(FRESH).await;
        snapshots.recent().await.unwrap();
        assert_eq!(times(), 1, "it is as old as it may be");
        tokio::time::advance(Duration::from_millis(1)).await;
        snapshots.recent().await.unwrap();
        assert_eq!(times(), 2);
        snapshots.latest().await.unwrap();
        tokio::time::advance(Duration::from_millis(1)).await;
        snapshots.latest().await.unwrap();
        assert!(times() >= 3, "who wants the latest asks");
    }
}
