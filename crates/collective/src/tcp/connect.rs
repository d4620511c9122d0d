//! Forming the ring: publish the own address, dial the next rank, let the previous rank in, share memory where it can be.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::duplex::{Duplex, Link};
use super::handshake::{self, PROOF_BYTES, REPLY_BYTES, Terms};
use super::listen::Door;
use crate::call::Call;
use crate::secret::Key;
use crate::{Aborter, CollectiveError, Group, Rendezvous, group};

/// One attempt to reach an address that does not answer; an abort is noticed between two.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Between two attempts to reach a worker whose connection failed.
const RETRY: Duration = Duration::from_millis(100);

/// Connects to both neighbours within the group's timeout.
pub(super) fn ring(group: &Group, rendezvous: &dyn Rendezvous) -> Result<Duplex, CollectiveError> {
    let call = Call::start("connect", group.timeout);
    let (next, previous) = (group.next(), group.previous());
    let (listener, port) = listen(group)?;
    let own = address(&group.advertise, port);
    group::put(rendezvous, &format!("tcp/{}", group.rank), own.into_bytes())?;
    let key = format!("tcp/{next}");
    let target = String::from_utf8(group::get(rendezvous, &key, next, &call)?)
        .map_err(|_| CollectiveError::Rendezvous { key, reason: "the value is not an address".to_owned() })?;

    let (call, aborter) = (&call, &group.aborter);
    let dial = Dial { target, terms: Terms::new(group, group.rank, next), peer: next, call, aborter };
    let door = Door { listener, terms: Terms::new(group, previous, group.rank), peer: previous, call, aborter };
    let (mut failed, give_up) = UnixStream::pair().map_err(|error| local(error, group))?;
    let (dialled, came) = std::thread::scope(|scope| {
        let dialling = scope.spawn(|| {
            let result = dial.run();
            if result.is_err() {
                // Wakes the other half, which would otherwise wait for the deadline. It cannot fail: both ends live.
                let _ = failed.write_all(&[1]);
            }
            result
        });
        let came = door.wait(&give_up);
        (dialling.join(), came)
    });
    // A panic of the dialling half goes on in this thread.
    let dialled = dialled.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    if let (Err(CollectiveError::Deadline { .. } | CollectiveError::PeerLost { .. }), Err(refused)) = (&dialled, &came)
        && matches!(refused, CollectiveError::Refused { .. })
    {
        // Someone with a wrong secret or generation came; that explains why the next rank is silent or gone.
        return Err(refused.clone());
    }
    let (outward, outward_key) = dialled?;
    // The door gives up only when dialling failed, which has returned above.
    let (inward, inward_key) = came?.ok_or_else(|| call.deadline(Some(previous)))?;
    let link = |peer, stream: Arc<TcpStream>, key| -> Result<Link, CollectiveError> {
        prepare(&stream).map_err(|error| local(error, group))?;
        Ok(Link { peer, stream, key, generation: group.generation, frames: 0 })
    };
    let mut duplex = Duplex::new(link(next, outward, outward_key)?, link(previous, Arc::new(inward), inward_key)?);
    // the other one is watched since it was dialled
    aborter.watch(&duplex.previous.stream);
    // whoever fails hangs up, for its neighbours wait for its word
    duplex.share(group.shares_memory, call, aborter).inspect_err(|_| aborter.hang_up())?;
    Ok(duplex)
}

fn local(error: io::Error, group: &Group) -> CollectiveError {
    CollectiveError::Listen { address: group.bind.clone(), reason: error.to_string() }
}

fn listen(group: &Group) -> Result<(TcpListener, u16), CollectiveError> {
    let listener = TcpListener::bind((group.bind.as_str(), 0)).map_err(|error| local(error, group))?;
    let port = listener.local_addr().map_err(|error| local(error, group))?.port();
    Ok((listener, port))
}

/// `host:port`, with brackets around an IPv6 address.
fn address(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Frames go out as they are written, and nothing blocks: the duplex waits in `poll`.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)
}

struct Dial<'a> {
    target: String,
    terms: Terms,
    peer: usize,
    call: &'a Call,
    aborter: &'a Aborter,
}

enum Attempt {
    Refused(String),
    Failed(io::Error),
}

impl From<io::Error> for Attempt {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl Dial<'_> {
    /// Tries until the deadline; being refused ends it at once, since it would be refused again.
    fn run(&self) -> Result<(Arc<TcpStream>, Key), CollectiveError> {
        loop {
            let attempt = self.attempt();
            // what failed by the abort is not to be told as something else
            self.aborter.check()?;
            match attempt {
                Ok(connection) => return Ok(connection),
                Err(Attempt::Refused(reason)) => return Err(CollectiveError::Refused { peer: self.peer, reason }),
                // A worker publishes its address after it listens, and listens until its neighbour came or it failed.
                Err(Attempt::Failed(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    let reason =
                        format!("nothing listens on {}: the worker is gone, or a firewall is between", self.target);
                    return Err(CollectiveError::PeerLost { op: self.call.name, peer: Some(self.peer), reason });
                }
                Err(Attempt::Failed(error)) => {
                    let left = self.call.left().ok_or_else(|| self.call.deadline(Some(self.peer)))?;
                    tracing::debug!(peer = self.peer, target = self.target, %error, "trying again to reach a worker");
                    std::thread::sleep(RETRY.min(left));
                }
            }
        }
    }

    fn attempt(&self) -> Result<(Arc<TcpStream>, Key), Attempt> {
        let left = || self.call.left().ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut));
        let mut last = io::Error::other("the host name has no address");
        let mut stream = None;
        for address in self.target.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, left()?.min(ATTEMPT)) {
                Ok(connected) => {
                    stream = Some(connected);
                    break;
                }
                Err(error) => last = error,
            }
        }
        // an attempt that fails closes its connection
        let connection = Arc::new(stream.ok_or(last)?);
        self.aborter.watch(&connection);
        let mut stream = &*connection;
        // The listener may still wait for its own rendezvous, so the answer may take until the deadline.
        stream.set_read_timeout(Some(left()?))?;
        stream.set_write_timeout(Some(left()?))?;
        let hello = self.terms.hello(&handshake::nonce()?);
        stream.write_all(&hello)?;
        let mut reply = [0; REPLY_BYTES];
        stream.read_exact(&mut reply)?;
        self.terms.read_reply(&hello, &reply).map_err(Attempt::Refused)?;
        stream.write_all(&self.terms.confirm(&hello, &reply))?;
        let mut accepted = [0; PROOF_BYTES];
        stream.read_exact(&mut accepted)?;
        if handshake::proof(&accepted) != handshake::proof(&self.terms.accepted(&hello, &reply)) {
            return Err(Attempt::Refused("it could not prove that it knows the job's secret".to_owned()));
        }
        Ok((connection, self.terms.frames(&hello, &reply)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_that_fail_leave_no_connection_behind() {
        let aborter = Aborter::default();
        let group = Group {
            rank: 0,
            world_size: 2,
            generation: 1,
            secret: b"secret".to_vec(),
            bind: "127.0.0.1".to_owned(),
            advertise: "127.0.0.1".to_owned(),
            timeout: Duration::from_millis(450),
            shares_memory: false,
            aborter: aborter.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap().to_string();
        // accepts and closes, until it is called by one that says nothing
        let peer = std::thread::spawn(move || {
            let mut failed = 0;
            for stream in listener.incoming() {
                let mut hello = [0; handshake::HELLO_BYTES];
                if stream.unwrap().read_exact(&mut hello).is_err() {
                    break;
                }
                failed += 1;
            }
            failed
        });
        let call = Call::start("connect", group.timeout);
        let terms = Terms::new(&group, 0, 1);
        let dial = Dial { target: target.clone(), terms, peer: 1, call: &call, aborter: &aborter };
        assert!(matches!(dial.run(), Err(CollectiveError::Deadline { peer: Some(1), .. })));
        drop(TcpStream::connect(target));
        let failed = peer.join().unwrap();
        assert!(failed > 1, "it was tried again");
        assert_eq!(aborter.watched(), 1, "of {failed} attempts only the last was not cleared away yet");
    }

    #[test]
    fn addresses_of_either_family_can_be_dialled() {
        for (host, text) in [("10.0.0.1", "10.0.0.1:7"), ("::1", "[::1]:7"), ("[::1]", "[::1]:7"), ("a.b", "a.b:7")] {
            assert_eq!(address(host, 7), text);
        }
    }
}
