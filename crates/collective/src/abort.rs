//! Ending a collective from another thread.
//!
//! The flag is what operations look at; shutting the sockets down wakes an operation that waits in `poll`. The NCCL
//! backend only ever waits in a loop of queries, so there the flag is enough and no foreign handle crosses threads.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::CollectiveError;

/// Ends a collective: running and later operations fail with [`CollectiveError::Aborted`].
#[derive(Clone, Debug)]
pub struct Aborter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    aborted: AtomicBool,
    sockets: Vec<Arc<TcpStream>>,
}

impl Aborter {
    pub(crate) fn new(sockets: Vec<Arc<TcpStream>>) -> Self {
        Self(Arc::new(Inner { aborted: AtomicBool::new(false), sockets }))
    }

    /// Aborts; again is harmless.
    pub fn abort(&self) {
        self.0.aborted.store(true, Ordering::SeqCst);
        self.hang_up();
    }

    /// Closes the connections for both sides, so that the peers learn at once that this rank is gone.
    pub(crate) fn hang_up(&self) {
        for socket in &self.0.sockets {
            // A connection that the peer has already closed answers with an error; closed is what is wanted.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        if self.0.aborted.load(Ordering::SeqCst) { Err(CollectiveError::Aborted) } else { Ok(()) }
    }
}
