//! Ending a collective from another thread.
//!
//! The flag is what operations look at; shutting the sockets down wakes an operation that waits in `poll`. The NCCL
//! backend only ever waits in a loop of queries, so there the flag is enough and no foreign handle crosses threads.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::CollectiveError;

/// Ends a collective, also while it is being connected: running and later operations fail with
/// [`CollectiveError::Aborted`]. One for each collective; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Aborter(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    aborted: AtomicBool,
    /// Those that whoever uses them has dropped are closed, and go with the next one that comes.
    sockets: Mutex<Vec<Weak<TcpStream>>>,
}

impl Aborter {
    /// A connection that an abort is to close, as long as somebody uses it; at once, if the abort came before.
    pub(crate) fn watch(&self, socket: &Arc<TcpStream>) {
        let mut sockets = self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.retain(|known| known.strong_count() > 0);
        sockets.push(Arc::downgrade(socket));
        drop(sockets);
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
        for socket in self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            // A connection that the peer has already closed answers with an error; closed is what is wanted.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// # Errors
    /// [`CollectiveError::Aborted`] after an abort.
    pub fn check(&self) -> Result<(), CollectiveError> {
        if self.0.aborted.load(Ordering::SeqCst) { Err(CollectiveError::Aborted) } else { Ok(()) }
    }

    /// Connections that are watched, closed ones that no other has come after included.
    #[cfg(test)]
    pub(crate) fn watched(&self) -> usize {
        self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    fn pair(listener: &TcpListener) -> (Arc<TcpStream>, TcpStream) {
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Arc::new(ours), listener.accept().unwrap().0)
    }

    #[test]
    fn a_connection_that_nobody_uses_is_closed_and_forgotten() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let aborter = Aborter::default();
        let (kept, mut peer) = pair(&listener);
        aborter.watch(&kept);
        for _ in 0..20 {
            let (ours, mut theirs) = pair(&listener);
            aborter.watch(&ours);
            drop(ours);
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "it is closed with its last user");
            assert_eq!(aborter.watched(), 2, "this one, and the one that is used");
        }
        aborter.abort();
        assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the abort closes what is used");
        let (late, mut peer) = pair(&listener);
        aborter.watch(&late);
        assert_eq!(peer.read(&mut [0]).unwrap(), 0, "also what comes after it");
    }
}
