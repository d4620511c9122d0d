//! Waits of all ranks for one of them that take as long as they take.
//!
//! Input: the rendezvous of a generation. Output: what that rank has said. Invariants: nobody is inside a collective
//! meanwhile, so no deadline of one runs; the wait ends with the generation; a key is said once in a generation.

use std::time::Duration;

use learn_collective::{CollectiveError, Rendezvous};

/// As long as a generation lasts.
pub(super) const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What one rank says, on every rank: `mine` is it on the rank that says it, and the others wait so long for it at most.
///
/// # Errors
/// If the generation ends before, or the coordinator stays away.
pub(super) fn one_says(
    rendezvous: &dyn Rendezvous,
    key: &str,
    mine: Option<Vec<u8>>,
    wait: Duration,
) -> Result<Vec<u8>, CollectiveError> {
    let failed = |reason| CollectiveError::Rendezvous { key: key.to_owned(), reason };
    match mine {
        Some(said) => {
            rendezvous.put(key, said.clone()).map_err(failed)?;
            Ok(said)
        }
        None => rendezvous.get(key, wait).map_err(failed),
    }
}
