//! Opening a dataset before anything of it is served.
//!
//! Input: what is to be opened and checked. Output: the same, from a thread that may wait for the disk. Invariant: a check of
//! every byte ends soon after nobody waits for it any more, so that a process that is asked to stop meanwhile can end.

use std::sync::{Arc, Weak};

use learn_dataset::{Dataset, DatasetError, Progress, Unit};

use super::SourceError;
use crate::{CoordinatorError, ServeError};

/// Stops a check that nobody waits for.
struct Waited(Weak<()>);

impl Progress for Waited {
    fn stage(&self, _name: &str, _total: Option<u64>, _unit: Unit) {}

    fn advance(&self, _amount: u64) {}

    fn stopped(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// Does `work` off the threads of the servers; it is stopped when this future is dropped.
///
/// # Errors
/// Those of the work.
pub(crate) async fn opened<T: Send + 'static>(
    work: impl FnOnce(&dyn Progress) -> Result<T, SourceError> + Send + 'static,
) -> Result<T, CoordinatorError> {
    // lives as long as somebody waits
    let waits = Arc::new(());
    let waited = Waited(Arc::downgrade(&waits));
    Ok(tokio::task::spawn_blocking(move || work(&waited)).await.map_err(ServeError::Task)??)
}

/// Compares every byte of a dataset with its checksum.
///
/// # Errors
/// A file is damaged, or the check was stopped.
pub(crate) fn verify(dataset: &Dataset, progress: &dyn Progress) -> Result<(), DatasetError> {
    tracing::info!(dataset = %dataset.dir().display(), "comparing every byte with its checksum");
    dataset.verify(progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_nobody_waits_for_is_stopped() {
        let (ends, ended) = std::sync::mpsc::channel();
        let work = move |progress: &dyn Progress| {
            while !progress.stopped() {
                std::thread::yield_now();
            }
            ends.send(()).unwrap();
            Ok(())
        };
        tokio::select! {
            biased;
            _ = opened(work) => panic!("it is waited for"),
            () = std::future::ready(()) => {}
        }
        ended.recv().unwrap();
    }
}
