//! Who takes part in a generation, and how its members find each other.

use std::time::Duration;

use crate::call::Call;
use crate::{Aborter, CollectiveError};

/// This rank's view of one generation.
#[derive(Clone)]
pub struct Group {
    pub rank: usize,
    pub world_size: usize,
    pub generation: u64,
    /// The job's secret; it is never sent.
    pub secret: Vec<u8>,
    /// Local IP to listen on.
    pub bind: String,
    /// Host name or IP under which the other workers reach this one.
    pub advertise: String,
    /// Deadline of the set-up and of each operation.
    pub timeout: Duration,
    /// Whether ranks of one machine may move data by memory that both map (TCP backend). It changes no result.
    pub shares_memory: bool,
    /// Ends the set-up and the collective that comes of it.
    pub aborter: Aborter,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("generation", &self.generation)
            .field("bind", &self.bind)
            .field("advertise", &self.advertise)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl Group {
    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        let reason = if self.world_size == 0 || self.world_size > u32::MAX as usize {
            format!("a world size of {} is not possible", self.world_size)
        } else if self.rank >= self.world_size {
            format!("rank {} is not below the world size {}", self.rank, self.world_size)
        } else if self.secret.is_empty() {
            "the job's secret is empty".to_owned()
        } else {
            return Ok(());
        };
        Err(CollectiveError::Usage { op: "connect", reason })
    }

    pub(crate) fn next(&self) -> usize {
        (self.rank + 1) % self.world_size
    }

    pub(crate) fn previous(&self) -> usize {
        (self.rank + self.world_size - 1) % self.world_size
    }
}

/// The key-value store of one generation, kept by the coordinator.
pub trait Rendezvous {
    /// # Errors
    /// A text that says why the value could not be stored.
    fn put(&self, key: &str, value: Vec<u8>) -> Result<(), String>;

    /// Waits at most `wait` until someone has put the key.
    ///
    /// # Errors
    /// A text that says why there is no value.
    fn get(&self, key: &str, wait: Duration) -> Result<Vec<u8>, String>;
}

pub(crate) fn put(rendezvous: &dyn Rendezvous, key: &str, value: Vec<u8>) -> Result<(), CollectiveError> {
    rendezvous.put(key, value).map_err(|reason| CollectiveError::Rendezvous { key: key.to_owned(), reason })
}

/// Gets what rank `peer` puts; a peer that never came is a deadline, anything else the store's own error.
pub(crate) fn get(
    rendezvous: &dyn Rendezvous,
    key: &str,
    peer: usize,
    call: &Call,
) -> Result<Vec<u8>, CollectiveError> {
    let wait = call.left().ok_or_else(|| call.deadline(Some(peer)))?;
    rendezvous.get(key, wait).map_err(|reason| match call.left() {
        None => call.deadline(Some(peer)),
        Some(_) => CollectiveError::Rendezvous { key: key.to_owned(), reason },
    })
}
