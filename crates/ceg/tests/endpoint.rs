//! `learn-embed` as a real process against a real HTTP server in the test, which injects faults. Each fault test asserts
//! that the fault fired and that the files are those of the run without faults.

#![allow(clippy::unwrap_used)] // Helpers of tests stop the test, as tests do.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use half::f16;
use learn_domain::config::Span;
use serde_json::{Value, json};
use support::{SHARD, Workplace};

const ITEMS: usize = 120;
const DIM: usize = 6;
const BATCH: usize = 8;
/// Requests of a whole run: whole batches of each shard, its rest, and the one that asks for the dimension.
const REQUESTS: usize = 1 + 2 * SHARD.div_ceil(BATCH) + (ITEMS - 2 * SHARD).div_ceil(BATCH);
const KEY: &str = "sk-test-7c1e";

/// What the server does wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// This status, with a `Retry-After` in seconds if there is one.
    Status(u16, Option<u64>),
    /// No answer at all, until the client goes.
    Silence,
    /// An answer that ends in the middle.
    Cut,
    /// The right vectors, the last one first.
    Misordered,
    /// One number more per vector.
    OtherDimension,
    Zeros,
}

#[derive(Default)]
struct Log {
    /// Faults by the number of the request.
    faults: BTreeMap<usize, Fault>,
    fired: Vec<Fault>,
    requests: Vec<(Instant, Value)>,
    most_at_once: usize,
    at_once: usize,
}

#[derive(Clone)]
struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Log>>,
    _runtime: Arc<tokio::runtime::Runtime>,
}

fn vector(text: &str, dim: usize) -> Vec<f32> {
    let digest = blake3::hash(text.as_bytes());
    digest.as_bytes()[..dim].iter().map(|&byte| f32::from(byte) - 100.5).collect()
}

async fn embeddings(State(log): State<Arc<Mutex<Log>>>, headers: HeaderMap, body: Bytes) -> Response {
    let request: Value = serde_json::from_slice(&body).unwrap();
    let fault = {
        let mut log = log.lock().unwrap();
        let fault = log.faults.get(&log.requests.len()).copied();
        log.fired.extend(fault);
        log.requests.push((Instant::now(), request.clone()));
        log.at_once += 1;
        log.most_at_once = log.most_at_once.max(log.at_once);
        fault
    };
    // Others get a turn, so that requests that the client sends at once are seen at once.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let answer = answer(&headers, &request, fault).await;
    log.lock().unwrap().at_once -= 1;
    answer
}

async fn answer(headers: &HeaderMap, request: &Value, fault: Option<Fault>) -> Response {
    let authorization = headers.get(AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
    if authorization.as_deref() != Some(&format!("Bearer {KEY}")) {
        let message = format!("unknown key {}", authorization.unwrap_or_default().trim_start_matches("Bearer "));
        return (StatusCode::UNAUTHORIZED, json!({"error": {"message": message}}).to_string()).into_response();
    }
    match fault {
        Some(Fault::Status(status, retry_after)) => {
            let body = json!({"error": {"message": "injected"}}).to_string();
            let mut response = (StatusCode::from_u16(status).unwrap(), body).into_response();
            if let Some(seconds) = retry_after {
                response.headers_mut().insert(RETRY_AFTER, seconds.into());
            }
            return response;
        }
        Some(Fault::Silence) => std::future::pending::<()>().await,
        _ => {}
    }
    assert_eq!((request["model"].as_str(), request["encoding_format"].as_str()), (Some("tiny"), Some("float")));
    let texts: Vec<&str> = request["input"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let dim = DIM + usize::from(fault == Some(Fault::OtherDimension));
    let embedding = |text| if fault == Some(Fault::Zeros) { vec![0.0; dim] } else { vector(text, dim) };
    let mut data: Vec<Value> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| json!({"object": "embedding", "index": index, "embedding": embedding(text)}))
        .collect();
    if fault == Some(Fault::Misordered) {
        data.reverse();
    }
    let body = json!({"object": "list", "model": "tiny", "data": data}).to_string();
    if fault == Some(Fault::Cut) {
        // The length is announced, half of the bytes come, then the connection breaks.
        let half = Bytes::from(body.as_bytes()[..body.len() / 2].to_vec());
        let parts = [Ok(half), Err(std::io::Error::other("cut"))];
        let stream = Body::from_stream(futures::stream::iter(parts));
        return Response::builder().header("content-length", body.len()).body(stream).unwrap();
    }
    body.into_response()
}

impl Server {
    fn start(faults: &[(usize, Fault)]) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let log = Arc::new(Mutex::new(Log { faults: faults.iter().copied().collect(), ..Log::default() }));
        let router = Router::new().route("/v1/embeddings", post(embeddings)).with_state(Arc::clone(&log));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        // Ends with the runtime.
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self { address, log, _runtime: Arc::new(runtime) }
    }

    fn fired(&self) -> Vec<Fault> {
        self.log.lock().unwrap().fired.clone()
    }

    fn requests(&self) -> usize {
        self.log.lock().unwrap().requests.len()
    }
}

struct Work(Workplace);

impl Work {
    fn new(server: &Server) -> Self {
        let mut work = Workplace::new(ITEMS);
        work.config.embed.model = "/no/such/encoder".into();
        let endpoint = &mut work.config.embed.endpoint;
        endpoint.url = Some(format!("http://{}/v1", server.address));
        endpoint.model = "tiny".into();
        endpoint.key_variable = Some("LEARN_TEST_KEY".into());
        endpoint.batch_items = BATCH as u32;
        endpoint.concurrency = 1;
        endpoint.timeout = Span(Duration::from_secs(2));
        Self(work)
    }

    /// Exit code, and all that was said.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = self.0.command(arguments);
        for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        let output = command.env("LEARN_TEST_KEY", KEY).output().unwrap();
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap()).concat();
        assert!(!said.contains(KEY), "the key was shown: {said}");
        (output.status.code(), said)
    }

    fn done(&self, arguments: &[&str]) {
        let (code, said) = self.run(arguments);
        assert_eq!(code, Some(0), "{said}");
    }

    fn refused(&self) -> String {
        let (code, said) = self.run(&[]);
        assert_eq!(code, Some(1), "{said}");
        said
    }

    /// The shard files by name.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let shards = self.0.shards().into_keys();
        shards.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
    }
}

/// The run without faults on the same address: its files, rows and number of requests.
fn undisturbed(server: &Server) -> BTreeMap<PathBuf, Vec<u8>> {
    let faults = std::mem::take(&mut server.log.lock().unwrap().faults);
    let work = Work::new(server);
    assert!(work.0.refused(&["--commit"]).contains("not done"));
    work.done(&[]);
    // without a key in the environment
    work.0.done(&["--commit"]);
    let items = learn_dataset::Dataset::open(&work.0.config.data.dataset).unwrap().items().unwrap();
    let template = learn_domain::prompt::PromptTemplate::new(&work.0.config.embed.prompt).unwrap();
    for (item, row) in items.iter().zip(work.0.rows()) {
        let vector = vector(&learn_ceg::prompt::prompt(&template, item), DIM);
        let norm = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        assert_eq!(row, vector.iter().map(|&x| f16::from_f64(f64::from(x) / norm)).collect::<Vec<_>>(), "{}", item.id);
    }
    let mut log = server.log.lock().unwrap();
    assert_eq!((log.requests.len(), log.fired.len()), (REQUESTS, 0), "commit asks for nothing");
    *log = Log { faults, ..Log::default() };
    work.files()
}

#[test]
fn passing_trouble_changes_nothing() {
    let faults = [
        (0, Fault::Status(503, None)),
        (2, Fault::Status(429, Some(1))),
        (3, Fault::Status(500, None)),
        (4, Fault::Status(408, None)),
        (6, Fault::Silence),
        (8, Fault::Cut),
        (10, Fault::Misordered),
    ];
    let server = Server::start(&faults);
    let files = undisturbed(&server);
    let work = Work::new(&server);
    work.done(&[]);
    assert_eq!(server.fired(), faults.map(|(_, fault)| fault), "each fault once, in order");
    assert_eq!(work.files(), files);
    let log = server.log.lock().unwrap();
    let failures = faults.len() - 1;
    assert_eq!(
        log.requests.len(),
        REQUESTS + failures,
        "what failed was asked again, what was only misordered was not"
    );
    let waited = log.requests[3].0 - log.requests[2].0;
    assert!(waited >= Duration::from_secs(1), "Retry-After: 1 was followed by {waited:?}");
    assert_eq!(log.requests[2].1, log.requests[3].1, "the same texts again");
}

#[test]
fn requests_run_side_by_side_and_give_the_same_files() {
    let server = Server::start(&[]);
    let files = undisturbed(&server);
    let mut work = Work::new(&server);
    work.0.config.embed.endpoint.concurrency = 4;
    work.done(&[]);
    assert_eq!(work.files(), files);
    let most = server.log.lock().unwrap().most_at_once;
    assert!((2..=4).contains(&most), "{most} at once");
}

#[test]
fn another_dimension_stops_and_the_finished_shards_stay() {
    let at = 1 + SHARD.div_ceil(BATCH) + 1; // in the second shard
    let server = Server::start(&[(at, Fault::OtherDimension)]);
    let files = undisturbed(&server);
    let work = Work::new(&server);
    let said = work.refused();
    assert!(said.contains("dimension 7 where all before had 6") && said.contains("(item indexes 58 to 65"), "{said}");
    assert_eq!((server.fired(), server.requests()), (vec![Fault::OtherDimension], at + 1));
    assert_eq!(work.0.shards().len(), 1);
    work.done(&[]);
    assert_eq!(server.requests(), at + 1 + REQUESTS - SHARD.div_ceil(BATCH), "the first shard is not asked for again");
    assert_eq!(work.files(), files);
}

#[test]
fn a_server_that_has_changed_its_dimension_replaces_what_it_gave_before() {
    let server = Server::start(&[]);
    let work = Work::new(&server);
    let dim = || {
        work.done(&[]);
        work.done(&["--commit"]);
        work.0.rows()[0].len()
    };
    assert_eq!(dim(), DIM);
    let asked = server.requests();
    server.log.lock().unwrap().faults =
        (asked..asked + REQUESTS).map(|request| (request, Fault::OtherDimension)).collect();
    assert_eq!(dim(), DIM + 1);
}

#[test]
fn what_cannot_go_better_stops_at_once_with_the_servers_words() {
    let server = Server::start(&[(1, Fault::Status(404, None))]);
    let mut work = Work::new(&server);
    let said = work.refused();
    assert!(said.contains("refused with status 404: injected"), "{said}");
    assert_eq!(server.requests(), 2);

    let server = Server::start(&[(1, Fault::Zeros)]);
    work.0.config.embed.endpoint.url = Some(format!("http://{}/v1/", server.address));
    assert!(work.refused().contains("a vector for text 0 that is all zeros"));
    assert_eq!(server.requests(), 2);

    work.0.config.embed.endpoint.key_variable = Some("LEARN_TEST_NO_SUCH_KEY".into());
    assert!(work.refused().contains("LEARN_TEST_NO_SUCH_KEY, which is not set"));
    work.0.config.embed.endpoint.key_variable = None;
    assert!(work.refused().contains("status 401: unknown key"));
}

#[test]
fn patience_ends() {
    let busy = (0..50).map(|request| (request, Fault::Status(503, None))).collect::<Vec<_>>();
    let server = Server::start(&busy);
    let mut work = Work::new(&server);
    work.0.config.embed.endpoint.patience = Span(Duration::from_secs(1));
    let said = work.refused();
    assert!(said.contains("did not answer well") && said.contains("status 503: injected"), "{said}");
    assert!(server.requests() >= 2);
    // A server that asks for more time than there is patience is not waited for.
    let server = Server::start(&[(0, Fault::Status(429, Some(3600)))]);
    work.0.config.embed.endpoint.url = Some(format!("http://{}/v1", server.address));
    assert!(work.refused().contains("status 429"));
    assert_eq!(server.requests(), 1);
}

#[test]
fn a_key_that_the_server_repeats_is_not_shown() {
    let server = Server::start(&[]);
    let work = Work::new(&server);
    let output = work.0.command(&[]).env("LEARN_TEST_KEY", "sk-wrong-5d2").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("unknown key [key]") && !said.contains("sk-wrong-5d2"), "{said}");
    assert!(!fs::read_to_string(work.0.folder.path().join("config.json")).unwrap().contains("sk-wrong-5d2"));
}

#[test]
fn another_server_or_model_starts_anew() {
    let server = Server::start(&[]);
    let mut work = Work::new(&server);
    work.done(&[]);
    work.done(&[]);
    assert_eq!(server.requests(), REQUESTS + 1, "the second run asks for nothing but the dimension");
    work.0.config.embed.endpoint.url = Some(format!("http://localhost:{}/v1", server.address.port()));
    work.done(&[]);
    assert_eq!(server.requests(), 2 * REQUESTS + 1);
}
