//! An HTTP server with limits: what a stranger sends, or does not send, takes neither memory nor places for long.
//!
//! Input: a listener and the routes. Output: answers, until it is told to stop. Invariants: no more than
//! [`Limits::connections`] are open; when the last place is taken, the oldest [`Visitor`] that nobody knows makes room for
//! the next, and if all are known, others wait in the system's queue; a connection that says nothing, or one that is open for
//! too long, is closed, and clients open another one without noticing; no connection outlives [`serve`].

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Pause after the system had no file handle left for a connection.
const BREATH: Duration = Duration::from_millis(100);
/// What a connection that is to be closed may take to finish the answer it is at.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open at once.
    pub connections: usize,
    /// For the head of the next request; a connection that is kept open is silent for no longer either.
    pub head: Duration,
    pub head_bytes: usize,
    pub headers: usize,
    /// Of a request.
    pub body_bytes: usize,
    /// From the first byte to the last, however many requests.
    pub connection: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            head: Duration::from_secs(15),
            head_bytes: 16 << 10,
            headers: 64,
            body_bytes: 16 << 10,
            connection: Duration::from_secs(300),
        }
    }
}

/// A connection, as requests carry it (an extension of each).
#[derive(Clone, Debug, Default)]
pub struct Visitor(Arc<Visit>);

#[derive(Debug, Default)]
struct Visit {
    known: AtomicBool,
    leave: Notify,
}

impl Visitor {
    /// A request has shown who this is: its connection makes room for nobody.
    pub fn is_known(&self) {
        self.0.known.store(true, Ordering::Relaxed);
    }
}

/// Connections in the order of their coming, of which some have ended or are known by now.
#[derive(Default)]
struct Strangers(VecDeque<Weak<Visit>>);

impl Strangers {
    fn admit(&mut self, limits: &Limits) -> Visitor {
        if self.0.len() > 2 * limits.connections {
            self.forget();
        }
        let visitor = Visitor::default();
        self.0.push_back(Arc::downgrade(&visitor.0));
        visitor
    }

    fn forget(&mut self) {
        self.0.retain(|visit| visit.upgrade().is_some_and(|visit| !visit.known.load(Ordering::Relaxed)));
    }

    /// Asks the oldest to leave.
    fn make_room(&mut self) {
        self.forget();
        if let Some(oldest) = self.0.pop_front().and_then(|oldest| oldest.upgrade()) {
            tracing::warn!("too many HTTP connections that have shown no token; the oldest is closed");
            oldest.leave.notify_one();
        }
    }
}

/// Serves `routes` until `shutdown` resolves; answers that are under way are finished then.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    limits: Limits,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let routes = routes.layer(DefaultBodyLimit::max(limits.body_bytes));
    let places = Arc::new(Semaphore::new(limits.connections));
    let (stop, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut strangers = Strangers::default();
    // it has come, and has no place yet
    let mut newest = None;
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => gone(ended),
            accepted = accept(&listener), if newest.is_none() => {
                newest = Some(accepted);
                if places.available_permits() == 0 {
                    strangers.make_room();
                }
            }
            place = places.clone().acquire_owned(), if newest.is_some() => {
                // it is never closed
                let place = place.map_err(io::Error::other)?;
                let Some(stream) = newest.take() else { continue };
                let (visitor, stopped) = (strangers.admit(&limits), stopped.clone());
                let routes = routes.clone().layer(Extension(visitor.clone()));
                connections.spawn(async move {
                    tokio::select! {
                        () = converse(stream, routes, limits, stopped) => {}
                        () = visitor.0.leave.notified() => {}
                    }
                    drop(place);
                });
            }
        }
    }
    drop(listener);
    stop.send_replace(true);
    while let Some(ended) = connections.join_next().await {
        gone(ended);
    }
    Ok(())
}

/// The next connection.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) if passing(&error) => {}
            Err(error) => {
                // most likely too many open files: others have to close theirs first
                tracing::warn!(%error, "cannot take an HTTP connection");
                sleep(BREATH).await;
            }
        }
    }
}

/// It is about the client alone.
fn passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Answers one client until it leaves, has said nothing for too long, or the server ends.
async fn converse(stream: TcpStream, routes: Router, limits: Limits, mut stopped: watch::Receiver<bool>) {
    // small answers go out at once; without it they only go out a little later
    let _ = stream.set_nodelay(true);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_headers(limits.headers)
        .max_buf_size(limits.head_bytes)
        .keep_alive(true);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        _ = stopped.wait_for(|stopped| *stopped) => None,
        () = sleep(limits.connection) => None,
    };
    let ended = match ended {
        Some(ended) => Ok(ended),
        None => {
            connection.as_mut().graceful_shutdown();
            timeout(LAST_WORDS, connection).await
        }
    };
    if let Ok(Err(error)) = ended {
        tracing::debug!(%error, "an HTTP connection broke");
    }
}

fn gone(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "an HTTP connection failed");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    use super::*;

    const SMALL: Limits = Limits {
        connections: 2,
        head: Duration::from_millis(300),
        head_bytes: 8 << 10,
        headers: 16,
        body_bytes: 1000,
        connection: Duration::from_secs(600),
    };

    async fn start(limits: Limits) -> (std::net::SocketAddr, oneshot::Sender<()>, JoinHandle<io::Result<()>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let routes = Router::new()
            .route("/", get(|| async { "ok" }))
            .route("/", post(|body: String| async move { body }))
            .route("/known", get(|Extension(visitor): Extension<Visitor>| async move { visitor.is_known() }));
        let served = serve(listener, routes, limits, async { drop(stopped.await) });
        (address, stop, tokio::spawn(served))
    }

    /// Everything that comes until the server closes the connection.
    async fn said(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // a reset is an end, too
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused_and_who_is_silent_is_let_go() {
        let (address, stop, server) = start(SMALL).await;
        assert!(said(address, "GET / HTTP/1.1\r\nConnection: close\r\n\r\n").await.starts_with("HTTP/1.1 200"));
        let many: String = (0..40).map(|number| format!("x-{number}: 1\r\n")).collect();
        assert!(said(address, &format!("GET / HTTP/1.1\r\n{many}\r\n")).await.starts_with("HTTP/1.1 431"));
        let long = "a".repeat(9 << 10);
        let refused = said(address, &format!("GET / HTTP/1.1\r\nx: {long}\r\n\r\n")).await;
        assert!(refused.starts_with("HTTP/1.1 431"), "{refused}");
        let body = format!("POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 1001\r\n\r\n{}", "b".repeat(1001));
        assert!(said(address, &body).await.starts_with("HTTP/1.1 413"));
        // neither half a head nor silence holds a place, be it before the first request or after one
        for silent in ["", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\n\r\n"] {
            let heard = said(address, silent).await;
            assert_eq!(heard.starts_with("HTTP/1.1 200"), silent.ends_with("\r\n\r\n"), "{silent:?}: {heard}");
        }
        assert!(said(address, "nonsense\r\n\r\n").await.starts_with("HTTP/1.1 400"));
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_oldest_that_nobody_knows_makes_room() {
        let patient = Limits { head: Duration::from_secs(600), ..SMALL };
        let (address, stop, server) = start(patient).await;
        let mut known = TcpStream::connect(address).await.unwrap();
        known.write_all(b"GET /known HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        known.read_exact(&mut answer).await.unwrap();
        // strangers that would stay for ever do not keep others out
        let mut strangers = Vec::new();
        for _ in 0..5 {
            strangers.push(TcpStream::connect(address).await.unwrap());
            assert!(said(address, "GET / HTTP/1.1\r\nConnection: close\r\n\r\n").await.starts_with("HTTP/1.1 200"));
        }
        for mut stranger in strangers {
            assert_eq!(stranger.read(&mut answer).await.unwrap_or_default(), 0, "it was closed");
        }
        known.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut rest = Vec::new();
        known.read_to_end(&mut rest).await.unwrap();
        assert!(rest.ends_with(b"ok"), "it is still there");
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_comes_when_all_places_are_those_of_known_ones_waits_for_one() {
        let (address, stop, server) = start(SMALL).await;
        let mut known = Vec::new();
        for _ in 0..SMALL.connections {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /known HTTP/1.1\r\n\r\n").await.unwrap();
            stream.read_exact(&mut [0; 12]).await.unwrap();
            known.push(stream);
        }
        let started = tokio::time::Instant::now();
        assert!(said(address, "GET / HTTP/1.1\r\nConnection: close\r\n\r\n").await.starts_with("HTTP/1.1 200"));
        assert!(started.elapsed() >= Duration::from_millis(200), "a place became free when a silent one was let go");
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_connection_ends_after_its_time_and_with_its_server() {
        let (address, stop, server) = start(Limits { connection: Duration::from_millis(100), ..SMALL }).await;
        let started = tokio::time::Instant::now();
        said(address, "GET / HTTP/1.1\r\n\r\n").await;
        assert!(started.elapsed() < Duration::from_millis(290), "before silence would have ended it");
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();

        let patient = Duration::from_secs(600);
        let (address, stop, server) = start(Limits { head: patient, ..SMALL }).await;
        let kept = tokio::spawn(said(address, "GET / HTTP/1.1\r\n\r\n"));
        said(address, "GET / HTTP/1.1\r\nConnection: close\r\n\r\n").await;
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
        assert!(kept.await.unwrap().ends_with("ok"));
    }
}
