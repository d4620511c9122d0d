//! Waiting for the previous rank on a port that anyone can reach.
//!
//! All connections are watched at once: one that is silent, slow or sends rubbish costs a slot for a few seconds and
//! never the place of the peer. Only a connection whose first message carries the job's tag is spoken with further.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::handshake::{self, HELLO_BYTES, Hello, PROOF_BYTES, Terms, Verdict};
use super::poll;
use crate::call::Call;
use crate::secret::Key;
use crate::{Aborter, CollectiveError};

/// How long a connection may take with its side of the handshake.
const PATIENCE: Duration = Duration::from_secs(5);
/// How soon an abort is noticed.
const ABORT_LOOK: Duration = Duration::from_millis(50);
/// Connections watched at a time; the oldest makes room.
const SLOTS: usize = 64;

struct Visitor {
    stream: TcpStream,
    address: SocketAddr,
    hello: Hello,
    got: usize,
    until: Instant,
}

impl Visitor {
    /// Reads what is there. `None`: it has closed or failed; `Some(true)`: the first message is complete.
    fn read(&mut self) -> Option<bool> {
        loop {
            match self.stream.read(&mut self.hello[self.got..]) {
                Ok(0) => return None,
                Ok(count) => self.got += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
            if self.got == HELLO_BYTES {
                return Some(true);
            }
        }
    }
}

/// The place of the previous rank, still empty.
pub(super) struct Door<'a> {
    pub(super) listener: TcpListener,
    pub(super) terms: Terms,
    pub(super) peer: usize,
    pub(super) call: &'a Call,
    pub(super) aborter: &'a Aborter,
}

impl Door<'_> {
    /// Waits for the peer; `None` when `give_up` became readable first.
    ///
    /// # Errors
    /// `Refused` when the wait ended and a worker had been turned away, `Deadline` when nobody came, `Aborted`.
    pub(super) fn wait(self, give_up: &UnixStream) -> Result<Option<(TcpStream, Key)>, CollectiveError> {
        let failed = |error: io::Error| CollectiveError::Listen {
            address: self.listener.local_addr().map_or_else(|_| "its port".to_owned(), |address| address.to_string()),
            reason: error.to_string(),
        };
        self.listener.set_nonblocking(true).map_err(failed)?;
        let mut visitors: Vec<Visitor> = Vec::new();
        let mut turned_away = None;
        loop {
            let mut entries = vec![poll::readable(give_up.as_fd()), poll::readable(self.listener.as_fd())];
            entries.extend(visitors.iter().map(|visitor| poll::readable(visitor.stream.as_fd())));
            let until = self.call.until().min(Instant::now() + ABORT_LOOK);
            let until = visitors.iter().map(|visitor| visitor.until).fold(until, Instant::min);
            poll::wait(&mut entries, until).map_err(failed)?;
            self.aborter.check()?;
            if entries[0].revents != 0 {
                return turned_away
                    .map_or(Ok(None), |reason| Err(CollectiveError::Refused { peer: self.peer, reason }));
            }
            if self.call.left().is_none() {
                return Err(match turned_away {
                    Some(reason) => CollectiveError::Refused { peer: self.peer, reason },
                    None => self.call.deadline(Some(self.peer)),
                });
            }
            let now = Instant::now();
            let mut ready = entries[2..].iter().map(|entry| entry.revents != 0);
            for mut visitor in std::mem::take(&mut visitors) {
                let state = if ready.next() == Some(true) { visitor.read() } else { Some(false) };
                match state {
                    Some(true) => match self.speak(visitor) {
                        Ok(Some(done)) => return Ok(Some(done)),
                        Ok(None) => {}
                        Err(reason) => turned_away = Some(reason),
                    },
                    Some(false) if visitor.until > now => visitors.push(visitor),
                    _ => tracing::debug!(address = %visitor.address, "a connection ended before it said who it is"),
                }
            }
            if entries[1].revents != 0
                && let Some(visitor) = self.accept(now)
            {
                if visitors.len() == SLOTS {
                    visitors.remove(0);
                }
                visitors.push(visitor);
            }
        }
    }

    /// A connection that fails while it is accepted is a visitor that left.
    fn accept(&self, now: Instant) -> Option<Visitor> {
        let (stream, address) = self.listener.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        Some(Visitor { stream, address, hello: [0; HELLO_BYTES], got: 0, until: now + PATIENCE })
    }

    /// Answers a complete first message; `Err` says why a worker was turned away.
    fn speak(&self, mut visitor: Visitor) -> Result<Option<(TcpStream, Key)>, String> {
        let address = visitor.address;
        match self.terms.judge(&visitor.hello) {
            Verdict::Stranger => {
                tracing::debug!(%address, "a connection from something that is not a worker");
                Ok(None)
            }
            Verdict::Refused(refusal, reason) => {
                tracing::warn!(%address, reason, "refused a worker");
                // The answer fits in any socket buffer; one that does not get it sees the connection end.
                let _ = visitor.stream.write_all(&self.terms.reply(&visitor.hello, Some(refusal), &[0; 32]));
                Err(format!("a worker at {address} came instead and was turned away: {reason}"))
            }
            Verdict::Peer => match self.finish(&mut visitor) {
                Ok(key) => Ok(Some((visitor.stream, key))),
                Err(error) => {
                    tracing::warn!(%address, %error, "a worker left during the handshake");
                    Ok(None)
                }
            },
        }
    }

    fn finish(&self, visitor: &mut Visitor) -> io::Result<Key> {
        let patience = self.call.left().unwrap_or(Duration::from_millis(1)).min(PATIENCE);
        let (stream, hello) = (&mut visitor.stream, &visitor.hello);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let reply = self.terms.reply(hello, None, &handshake::nonce()?);
        stream.write_all(&reply)?;
        let mut confirm = [0; PROOF_BYTES];
        stream.read_exact(&mut confirm)?;
        if handshake::proof(&confirm) != handshake::proof(&self.terms.confirm(hello, &reply)) {
            return Err(io::Error::other("it repeated someone else's first message"));
        }
        stream.write_all(&self.terms.accepted(hello, &reply))?;
        Ok(self.terms.frames(hello, &reply))
    }
}
