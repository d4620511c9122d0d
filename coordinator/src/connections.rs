//! The gRPC port as strangers meet it: who may stay connected, and how much one connection may ask for.
//!
//! Input: a listening socket, the job's secret, its certificates if there are any. Output: connections for tonic, and the
//! verdict on each call. A connection is a
//! *stranger's* until a call on it has carried the secret. Invariants: there are at most [`Limits::strangers`] of those, the
//! oldest makes room, and none lasts longer than [`Limits::patience`], however it drips; a connection that was refused too
//! often ends; an accept that fails (too many open files, say) is tried again and never ends the server.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, Stream};
use futures::task::AtomicWaker;
use learn_proto::auth::{Secret, check};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::service::Interceptor;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Extensions, Request, Status};

/// Largest message that a client may send, the gRPC default.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Largest headers of a call.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Calls that one connection may have open at once; HTTP/2 makes more of them wait.
const MAX_OPEN_CALLS: u32 = 256;
/// What is still read of a client whose certificate was refused, and for how long, so that it learns why.
const MAX_REST_BYTES: u64 = 64 << 10;
const REST: Duration = Duration::from_secs(1);
/// Before the next try to accept, when the last has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What connections may do. The defaults are far beyond what a worker does.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections that have not proved the secret yet.
    pub strangers: usize,
    /// Within this a connection must have proved it.
    pub patience: Duration,
    /// Refused calls after which a stranger's connection ends.
    pub refusals: u32,
    /// Calls of a connection in a second, on average; twice as many at once.
    pub calls_per_second: u32,
    /// Flight streams that one connection may have open at once.
    pub streams: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { strangers: 256, patience: Duration::from_secs(10), refusals: 16, calls_per_second: 5000, streams: 32 }
    }
}

/// A gRPC server with the limits of this port; those of HTTP/2 itself are set here.
#[must_use]
pub fn server() -> Server {
    Server::builder().http2_max_header_list_size(MAX_HEADER_BYTES).max_concurrent_streams(MAX_OPEN_CALLS)
}

/// The other end of a connection, as the calls on it know it.
#[derive(Clone, Debug)]
pub struct Peer(Arc<PeerState>);

#[derive(Debug)]
struct PeerState {
    address: SocketAddr,
    limits: Limits,
    known: AtomicBool,
    ended: AtomicBool,
    refusals: AtomicU32,
    waker: AtomicWaker,
    calls: Mutex<Allowance>,
    streams: Arc<Semaphore>,
}

impl Peer {
    fn new(address: SocketAddr, limits: Limits) -> Self {
        Self(Arc::new(PeerState {
            address,
            limits,
            known: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            refusals: AtomicU32::new(0),
            waker: AtomicWaker::new(),
            calls: Mutex::new(Allowance::full(limits.calls_per_second, Instant::now())),
            streams: Arc::new(Semaphore::new(limits.streams)),
        }))
    }

    /// The peer of a call, if it came over [`connections`].
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<&Self> {
        extensions.get()
    }

    /// A place for one more stream of data, free again when it is dropped.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` if the connection has as many open as it may.
    pub fn stream(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.0.streams).try_acquire_owned().map_err(|_| {
            let most = self.0.limits.streams;
            Status::resource_exhausted(format!("this connection reads {most} streams already; end one first"))
        })
    }

    fn known(&self) -> bool {
        self.0.known.load(Ordering::Acquire)
    }

    fn end(&self) {
        self.0.ended.store(true, Ordering::Release);
        self.0.waker.wake();
    }

    /// A call has carried the secret.
    fn passed(&self, now: Instant) -> Result<(), Status> {
        if !self.0.known.swap(true, Ordering::AcqRel) {
            // its patience ends to matter
            self.0.waker.wake();
        }
        if lock(&self.0.calls).take(now) {
            return Ok(());
        }
        let most = self.0.limits.calls_per_second;
        Err(Status::resource_exhausted(format!("this connection makes more than {most} calls a second; make fewer")))
    }

    /// A call has not.
    fn refused(&self) {
        let before = self.0.refusals.fetch_add(1, Ordering::AcqRel);
        if before == 0 {
            tracing::warn!(address = %self.0.address, "refused a call without the job's secret");
        }
        if !self.known() && before + 1 >= self.0.limits.refusals {
            self.end();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // what it guards is whole between any two statements
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls that may still be made: refilled at a steady rate, up to two seconds' worth.
#[derive(Debug)]
struct Allowance {
    per_second: f64,
    left: f64,
    at: Instant,
}

impl Allowance {
    fn full(per_second: u32, now: Instant) -> Self {
        let per_second = f64::from(per_second);
        Self { per_second, left: 2.0 * per_second, at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let refill = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.left = (self.left + refill).min(2.0 * self.per_second);
        self.at = now;
        let some = self.left >= 1.0;
        if some {
            self.left -= 1.0;
        }
        some
    }
}

/// Before every call of a service: the secret, and what the connection may still ask for.
#[derive(Clone, Debug)]
pub struct Gate(pub Secret);

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let verdict = check(request.metadata(), &self.0);
        if let Some(peer) = Peer::of(request.extensions()) {
            match &verdict {
                Ok(()) => peer.passed(Instant::now())?,
                Err(_) => peer.refused(),
            }
        }
        verdict.map(|()| request)
    }
}

/// Strangers in the order of their coming.
struct Strangers {
    limits: Limits,
    waiting: Mutex<VecDeque<Weak<PeerState>>>,
}

impl Strangers {
    /// Lets one more in; the oldest make room.
    fn admit(&self, stream: TcpStream, address: SocketAddr) -> Guarded {
        let peer = Peer::new(address, self.limits);
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= self.limits.strangers {
            waiting.retain(|other| other.upgrade().is_some_and(|other| !Peer(other).known()));
        }
        while waiting.len() >= self.limits.strangers {
            if let Some(oldest) = waiting.pop_front().and_then(|oldest| oldest.upgrade()) {
                tracing::warn!(address = %oldest.address, "too many connections without a call; the oldest is closed");
                Peer(oldest).end();
            }
        }
        waiting.push_back(Arc::downgrade(&peer.0));
        let patience = Some(Box::pin(tokio::time::sleep(self.limits.patience)));
        Guarded { stream, peer, patience }
    }
}

/// The connections that come to a port; with `tls` those whose certificate is good.
pub fn connections(
    listener: TcpListener,
    limits: Limits,
    tls: Option<TlsAcceptor>,
) -> impl Stream<Item = io::Result<Connection>> + Unpin {
    let strangers = Strangers { limits, waiting: Mutex::default() };
    let accepted = stream::unfold((listener, strangers), |(listener, strangers)| async move {
        loop {
            match listener.accept().await {
                Ok((stream, address)) => {
                    // latency is all that it costs when it fails
                    let _ = stream.set_nodelay(true);
                    let connection = strangers.admit(stream, address);
                    return Some((connection, (listener, strangers)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    let secured = accepted.map(move |connection| {
        let tls = tls.clone();
        async move {
            match tls {
                None => Some(Connection::Plain(connection)),
                Some(tls) => secure(&tls, connection).await.map(|stream| Connection::Encrypted(Box::new(stream))),
            }
        }
    });
    // a handshake ends with its stranger: one more place than there are strangers, and none waits for another
    let ready = secured.buffer_unordered(limits.strangers + 1);
    Box::pin(ready.filter_map(|connection| std::future::ready(connection.map(Ok))))
}

/// The TLS handshake; `None` if the other side is turned away.
async fn secure(tls: &TlsAcceptor, connection: Guarded) -> Option<TlsStream<Guarded>> {
    let address = connection.peer.0.address;
    match tls.accept(connection).into_fallible().await {
        Ok(stream) => Some(stream),
        Err((error, mut connection)) => {
            tracing::warn!(%address, %error, "refused a connection: only clients with a certificate of this job are let in");
            // Closing over unread bytes would reset the connection, and the reason would be lost on the way.
            let _ = connection.shutdown().await;
            let mut rest = connection.take(MAX_REST_BYTES);
            let _ = tokio::time::timeout(REST, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
            None
        }
    }
}

/// One that may be encrypted.
#[derive(Debug)]
pub enum Connection {
    Plain(Guarded),
    Encrypted(Box<TlsStream<Guarded>>),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        match self {
            Self::Plain(connection) => connection.peer.clone(),
            Self::Encrypted(stream) => stream.get_ref().0.peer.clone(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(connection) => Pin::new(connection).poll_read(context, into),
            Self::Encrypted(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(connection) => Pin::new(connection).poll_write(context, bytes),
            Self::Encrypted(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(connection) => Pin::new(connection).poll_flush(context),
            Self::Encrypted(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(connection) => Pin::new(connection).poll_shutdown(context),
            Self::Encrypted(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(connection) => Pin::new(connection).poll_write_vectored(context, parts),
            Self::Encrypted(stream) => Pin::new(stream).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(connection) => connection.is_write_vectored(),
            Self::Encrypted(stream) => stream.is_write_vectored(),
        }
    }
}

/// A connection that ends when its peer has not proved the secret in time, or has to make room.
#[derive(Debug)]
pub struct Guarded {
    stream: TcpStream,
    peer: Peer,
    /// `None` once the peer is known.
    patience: Option<Pin<Box<Sleep>>>,
}

impl Guarded {
    /// Whether this connection has to end, and the place where it is woken for it.
    fn poll_end(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(patience) = &mut self.patience else { return Ok(()) };
        self.peer.0.waker.register(context.waker());
        if self.peer.known() {
            self.patience = None;
            return Ok(());
        }
        if self.peer.0.ended.load(Ordering::Acquire) {
            return Err(io::Error::new(ErrorKind::ConnectionAborted, "it did not prove the job's secret"));
        }
        match patience.as_mut().poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => {
                tracing::debug!(address = %self.peer.0.address, "a connection did not prove the job's secret in time");
                Err(io::Error::new(ErrorKind::TimedOut, "it did not prove the job's secret in time"))
            }
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_end(context)?;
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { strangers: 2, patience: Duration::from_secs(10), refusals: 3, calls_per_second: 5, streams: 1 };

    /// A port and what comes to it.
    struct Port<S> {
        address: SocketAddr,
        incoming: S,
    }

    async fn port(limits: Limits) -> Port<impl Stream<Item = io::Result<Connection>> + Unpin> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Port { address: listener.local_addr().unwrap(), incoming: connections(listener, limits, None) }
    }

    impl<S: Stream<Item = io::Result<Connection>> + Unpin> Port<S> {
        async fn visit(&mut self) -> (TcpStream, Guarded) {
            let client = TcpStream::connect(self.address).await.unwrap();
            match self.incoming.next().await.unwrap().unwrap() {
                Connection::Plain(connection) => (client, connection),
                Connection::Encrypted(_) => unreachable!("there are no certificates"),
            }
        }
    }

    async fn read_error(connection: &mut Guarded) -> ErrorKind {
        connection.read(&mut [0; 8]).await.unwrap_err().kind()
    }

    #[tokio::test]
    async fn the_oldest_stranger_makes_room_and_who_is_known_stays() {
        let mut port = port(LIMITS).await;
        let (mut worker, mut known) = port.visit().await;
        known.peer.passed(Instant::now()).unwrap();
        let mut strangers = Vec::new();
        for _ in 0..5 {
            strangers.push(port.visit().await);
        }
        for (_, connection) in &mut strangers[..3] {
            assert_eq!(read_error(connection).await, ErrorKind::ConnectionAborted);
        }
        for (client, connection) in &mut strangers[3..] {
            client.write_all(b"new").await.unwrap();
            assert_eq!(connection.read(&mut [0; 8]).await.unwrap(), 3);
        }
        worker.write_all(b"known").await.unwrap();
        assert_eq!(known.read(&mut [0; 8]).await.unwrap(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stranger_that_only_drips_is_cut_off_in_time() {
        let (mut client, mut served) = port(LIMITS).await.visit().await;
        let started = Instant::now();
        let dripping = tokio::spawn(async move {
            while client.write_all(b"P").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(900)).await;
            }
        });
        let kind = loop {
            if let Err(error) = served.read(&mut [0; 8]).await {
                break error.kind();
            }
        };
        assert_eq!(kind, ErrorKind::TimedOut);
        dripping.abort();
        assert_eq!(started.elapsed().as_secs(), 10);
    }

    #[tokio::test]
    async fn a_stranger_that_is_refused_again_and_again_is_closed() {
        let (_client, mut served) = port(LIMITS).await.visit().await;
        let mut gate = Gate(Secret::new("secret").unwrap());
        let mut call = |header: &'static str| {
            let mut request = Request::new(());
            request.metadata_mut().insert("authorization", header.parse().unwrap());
            request.extensions_mut().insert(served.peer.clone());
            gate.call(request).map(drop).map_err(|status| status.code())
        };
        for _ in 0..LIMITS.refusals {
            assert_eq!(call("Bearer wrong"), Err(tonic::Code::Unauthenticated));
        }
        assert_eq!(read_error(&mut served).await, ErrorKind::ConnectionAborted);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_makes_so_many_calls_a_second_and_reads_so_many_streams() {
        let (_client, served) = port(LIMITS).await.visit().await;
        let mut gate = Gate(Secret::new("secret").unwrap());
        let peer = &served.peer;
        let mut call = || {
            let mut request = Request::new(());
            request.metadata_mut().insert("authorization", "Bearer secret".parse().unwrap());
            request.extensions_mut().insert(peer.clone());
            gate.call(request).map(drop)
        };
        for _ in 0..10 {
            call().unwrap();
        }
        let refused = call().unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(refused.message().contains("5 calls a second"), "{refused}");
        tokio::time::advance(Duration::from_millis(401)).await;
        assert!(call().is_ok() && call().is_ok() && call().is_err());

        let first = peer.stream().unwrap();
        assert_eq!(peer.stream().unwrap_err().code(), tonic::Code::ResourceExhausted);
        drop(first);
        drop(peer.stream().unwrap());
    }
}
