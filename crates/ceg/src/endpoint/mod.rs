//! Vectors from a server with the OpenAI-compatible `POST /v1/embeddings` (vLLM, TEI, SGLang, OpenAI).
//!
//! Input: texts. Output: f16 rows at unit length, in the order of the texts. Invariants: texts are cut into requests by
//! their place alone, so the rows do not depend on concurrency; passing trouble (no connection, no answer, status 408,
//! 429, 5xx) is tried again until `embed.endpoint.patience` ends, anything else stops at once with the server's own
//! message; the dimension is that of the first answer, and a vector of another one is refused; the key is read from the
//! environment and is in no message, file or digest.

mod retry;
mod wire;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant, SystemTime};

use half::f16;
use learn_domain::config::EndpointConfig;
use learn_domain::random::Draws;
use retry::Failed;
use ureq::Agent;
use ureq::tls::{RootCerts, TlsConfig};

/// Largest answer that is read, in bytes.
const LARGEST_ANSWER: u64 = 256 << 20;
/// Most of a refusal that is read, in bytes.
const LARGEST_REFUSAL: u64 = 64 << 10;
/// The text whose vector tells the dimension.
const PROBE: &str = "dimension";

/// The server gives no vectors.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("embed.endpoint.key_variable names {0}, which is not set; export the key there")]
    NoKey(String),
    #[error("the key in {0} has characters that a header cannot carry")]
    BadKey(String),
    #[error("{url} refused with status {status}: {message}")]
    Refused { url: String, status: u16, message: String },
    #[error("{url} did not answer well in {} s: {last}; run embed again when it does, finished shards are kept", tried.as_secs())]
    GaveUp { url: String, tried: Duration, last: String },
    #[error("the answer of {url} {problem}")]
    Answer { url: String, problem: String },
    #[error("{url} cannot be asked: {problem}")]
    Request { url: String, problem: String },
    #[error("another request failed first")]
    Stopped,
}

/// Why one attempt failed.
enum Attempt {
    /// It may go better next time.
    Passing {
        problem: String,
        asked: Option<Duration>,
    },
    Final(EndpointError),
}

/// A server that was asked once and has answered.
pub struct Endpoint {
    config: EndpointConfig,
    url: String,
    /// `Bearer KEY`.
    bearer: Option<String>,
    agent: Agent,
    dim: usize,
}

impl Endpoint {
    /// Reads the key and asks the server for the dimension, if the configuration does not say it.
    ///
    /// # Errors
    /// There is no key where one should be, or the server gives no vector.
    pub fn open(base: &str, config: &EndpointConfig) -> Result<Self, EndpointError> {
        let mut endpoint = Self::answered(base, config, 0);
        endpoint.bearer = config.key_variable.as_deref().map(bearer).transpose()?;
        endpoint.dim = match config.dimensions {
            Some(dim) => dim as usize,
            None => endpoint.persist(&[PROBE.to_owned()], 0, &Stop::default(), &wire::dimension)?,
        };
        Ok(endpoint)
    }

    /// A server that has given its vectors, of `dim` numbers each: it is not asked, and no key is read.
    #[must_use]
    pub fn answered(base: &str, config: &EndpointConfig, dim: usize) -> Self {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections_per_host(config.concurrency as usize)
            .timeout_global(Some(config.timeout.0))
            .tls_config(tls)
            .user_agent(concat!("learn-embed/", env!("CARGO_PKG_VERSION")))
            .build();
        let url = format!("{}/embeddings", base.trim_end_matches('/'));
        Self { config: config.clone(), url, bearer: None, agent: agent.into(), dim }
    }

    /// Numbers per vector.
    #[must_use]
    pub const fn dim(&self) -> usize {
        self.dim
    }

    /// The model, as the server calls it.
    #[must_use]
    pub fn name(&self) -> String {
        self.config.model.clone()
    }

    /// A digest of what decides the vectors besides the text, as far as a client can know: address, model, dimensions.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("learn-ceg endpoint 1");
        for part in [self.url.as_bytes(), self.config.model.as_bytes()] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.update(&self.config.dimensions.unwrap_or_default().to_le_bytes());
        hasher.finalize().to_hex().to_string()
    }

    /// The rows of the texts, `[texts, dim]`; `finished` hears how many more texts are done.
    ///
    /// # Errors
    /// The texts of the request that failed first (by place), and why.
    pub fn rows(
        &self,
        texts: &[String],
        finished: &mut dyn FnMut(usize),
    ) -> Result<Vec<f16>, (Range<usize>, EndpointError)> {
        let size = self.config.batch_items as usize;
        let requests: Vec<Range<usize>> =
            (0..texts.len()).step_by(size).map(|start| start..texts.len().min(start + size)).collect();
        let (next, stop) = (AtomicUsize::new(0), Stop::default());
        let (sender, answers) = mpsc::channel();
        let mut rows = vec![f16::ZERO; texts.len() * self.dim];
        let mut failed: Option<(Range<usize>, EndpointError)> = None;
        std::thread::scope(|scope| {
            for _ in 0..requests.len().min(self.config.concurrency as usize) {
                let sender = sender.clone();
                scope.spawn(|| {
                    let sender = sender;
                    while let Some(range) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let read = |body: &[u8]| wire::rows(body, range.len(), self.dim);
                        let answer = self.persist(&texts[range.clone()], range.start as u64, &stop, &read);
                        if answer.is_err() {
                            stop.set();
                        }
                        // The receiver lives as long as this scope.
                        let _ = sender.send((range.clone(), answer));
                    }
                });
            }
            drop(sender);
            for (range, answer) in answers {
                match answer {
                    Ok(part) => {
                        rows[range.start * self.dim..range.end * self.dim].copy_from_slice(&part);
                        finished(range.len());
                    }
                    Err(EndpointError::Stopped) => {}
                    Err(error) if failed.as_ref().is_none_or(|(first, _)| range.start < first.start) => {
                        failed = Some((range, error));
                    }
                    Err(_) => {}
                }
            }
        });
        failed.map_or(Ok(rows), Err)
    }

    /// Asks until the answer is good, or cannot become so.
    fn persist<T>(
        &self,
        texts: &[String],
        number: u64,
        stop: &Stop,
        read: &dyn Fn(&[u8]) -> Result<T, String>,
    ) -> Result<T, EndpointError> {
        let (start, mut failures) = (Instant::now(), 0);
        let mut draws = Draws::new(&[number, u64::from(std::process::id())]);
        loop {
            if stop.is_set() {
                return Err(EndpointError::Stopped);
            }
            let (problem, asked) = match self.ask(texts) {
                Ok(body) => {
                    return read(&body).map_err(|problem| EndpointError::Answer { url: self.url.clone(), problem });
                }
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Passing { problem, asked }) => (problem, asked),
            };
            failures += 1;
            let failed = Failed { failures, tried: start.elapsed(), asked };
            let Some(pause) = failed.pause(self.config.patience.0, draws.unit()) else {
                return Err(EndpointError::GaveUp { url: self.url.clone(), tried: start.elapsed(), last: problem });
            };
            tracing::warn!(url = self.url, problem, failures, pause = ?pause, "an embeddings request is tried again");
            stop.wait(pause);
        }
    }

    /// One request and its whole answer.
    fn ask(&self, texts: &[String]) -> Result<Vec<u8>, Attempt> {
        let passing = |error: ureq::Error| Attempt::Passing { problem: error.to_string(), asked: None };
        let request = wire::Request {
            model: &self.config.model,
            input: texts,
            encoding_format: "float",
            dimensions: self.config.dimensions,
        };
        let unasked = |problem: String| Attempt::Final(EndpointError::Request { url: self.url.clone(), problem });
        let body = serde_json::to_vec(&request).map_err(|error| unasked(error.to_string()))?;
        let mut post = self.agent.post(&self.url).header("content-type", "application/json");
        if let Some(bearer) = &self.bearer {
            post = post.header("authorization", bearer);
        }
        let mut answer = post.send(&body[..]).map_err(|error| match error {
            ureq::Error::Http(_) | ureq::Error::BadUri(_) | ureq::Error::InvalidProxyUrl => unasked(error.to_string()),
            error => passing(error),
        })?;
        let status = answer.status().as_u16();
        if status == 200 {
            return answer.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec().map_err(|error| match error {
                ureq::Error::BodyExceedsLimit(limit) => {
                    let problem = format!("is larger than {limit} bytes; lower embed.endpoint.batch_items");
                    Attempt::Final(EndpointError::Answer { url: self.url.clone(), problem })
                }
                error => passing(error),
            });
        }
        let header = answer.headers().get("retry-after").and_then(|header| header.to_str().ok());
        let asked = header.and_then(|header| wire::retry_after(header, SystemTime::now()));
        // A refusal without a readable message is still that refusal.
        let said = answer.body_mut().with_config().limit(LARGEST_REFUSAL).read_to_vec().unwrap_or_default();
        let key = self.bearer.as_deref().and_then(|bearer| bearer.strip_prefix(BEARER));
        let message = wire::message(&said, key);
        if matches!(status, 408 | 429) || status >= 500 {
            return Err(Attempt::Passing { problem: format!("status {status}: {message}"), asked });
        }
        Err(Attempt::Final(EndpointError::Refused { url: self.url.clone(), status, message }))
    }
}

const BEARER: &str = "Bearer ";

/// The `authorization` header of the key in an environment variable.
fn bearer(variable: &str) -> Result<String, EndpointError> {
    let key = std::env::var(variable).map_err(|error| match error {
        std::env::VarError::NotPresent => EndpointError::NoKey(variable.into()),
        std::env::VarError::NotUnicode(_) => EndpointError::BadKey(variable.into()),
    })?;
    let key = key.trim();
    if key.is_empty() {
        return Err(EndpointError::NoKey(variable.into()));
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(EndpointError::BadKey(variable.into()));
    }
    Ok(format!("{BEARER}{key}"))
}

/// Tells requests that are pausing that another one has failed for good.
#[derive(Default)]
struct Stop {
    stopped: Mutex<bool>,
    changed: Condvar,
}

// A flag has no state between that a panic could leave, so a poisoned lock is as good as another.
impl Stop {
    fn set(&self) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    fn is_set(&self) -> bool {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the time, or until it is set.
    fn wait(&self, time: Duration) {
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_timeout_while(stopped, time, |stopped| !*stopped));
    }
}
