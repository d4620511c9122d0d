//! Ending a collective from another thread.
//!
//! The flag is what operations look at; shutting the sockets down wakes an operation that waits in `poll`. The NCCL
//! backend only ever waits in a loop of queries, so there the flag is enough and no foreign handle crosses threads.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::CollectiveError;

/// Ends a collective, also while it is being connected: running and later operations fail with
/// [`CollectiveError::Aborted`]. One for each collective; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Aborter(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    aborted: AtomicBool,
    sockets: Mutex<Vec<Arc<TcpStream>>>,
}

impl Aborter {
    /// A connection that an abort is to close; at once, if the abort came before.
    pub(crate) fn watch(&self, socket: Arc<TcpStream>) {
        self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
        if self.check().is_err() {
            self.hang_up();
        }
    }

    /// Aborts; again is harmless.
    pub fn abort(&self) {
        self.0.aborted.store(true, Ordering::SeqCst);
        self.hang_up();
    }

    /// Closes the connections for both sides, so that the peers learn at once that this rank is gone.
    pub(crate) fn hang_up(&self) {
        for socket in &*self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner) {
            // A connection that the peer has already closed answers with an error; closed is what is wanted.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// # Errors
    /// [`CollectiveError::Aborted`] after an abort.
    pub fn check(&self) -> Result<(), CollectiveError> {
        if self.0.aborted.load(Ordering::SeqCst) { Err(CollectiveError::Aborted) } else { Ok(()) }
    }
}
