//! The coordinator's HTTP interface as a client that looks, and shows the run's token by itself.
//!
//! Invariant: HTTP is not encrypted, so the secret of a job with certificates does not go over it; what changes a job goes
//! another way ([`crate::operator`]).

use std::time::Duration;

use learn_domain::report::{CoordinatorAddress, EmbeddingStatus, JobStatus};
use learn_domain::run_dir::RunDir;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::http::HeaderValue;

use crate::runs;

/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for a sign of life.
const SHORT_TIMEOUT: Duration = Duration::from_secs(2);

/// The coordinator did not answer as it should.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator at {url} did not answer: {source}{}", way_out(source))]
pub struct ApiError {
    url: String,
    source: Box<ureq::Error>,
}

fn way_out(error: &ureq::Error) -> &'static str {
    match error {
        ureq::Error::StatusCode(401) => {
            "; it wants the token that the run had at its start, and the file `token` of the run directory has another one or is not \
             there: stop the job and resume it, which makes one"
        }
        _ => "",
    }
}

/// A client of one coordinator.
pub struct Api {
    base: String,
    /// Of the coordinator that is meant; empty if it was not told.
    incarnation: String,
    agent: Agent,
    /// What opens the coordinator's answers; none if this user may read neither token nor secret.
    token: Option<String>,
}

impl Api {
    /// For the coordinator of `run`, which listens at `address`.
    #[must_use]
    pub fn new(run: &RunDir, address: &CoordinatorAddress) -> Self {
        // Jobs are reached directly: a proxy of the environment is for the outside.
        let agent = Agent::config_builder().timeout_global(Some(TIMEOUT)).proxy(None).build().into();
        let token = runs::token(run).ok().or_else(|| if run.tls().exists() { None } else { runs::secret(run).ok() });
        let base = address.http.trim_end_matches('/').to_owned();
        Self { base, incarnation: address.incarnation.clone(), agent, token }
    }

    /// Where the job stands.
    ///
    /// # Errors
    /// No answer, or one that is no status.
    pub fn job(&self) -> Result<JobStatus, ApiError> {
        self.get("job")
    }

    /// Where an embed job stands.
    ///
    /// # Errors
    /// No answer, or one that is no status.
    pub fn embedding(&self) -> Result<EmbeddingStatus, ApiError> {
        self.get("embedding")
    }

    /// Whether the coordinator is there, and not another one at its address; found out fast, without showing anything.
    #[must_use]
    pub fn answers(&self) -> bool {
        let request = self.agent.get(format!("{}/healthz", self.base));
        let answer = request.config().timeout_global(Some(SHORT_TIMEOUT)).build().call();
        let same = |said: &HeaderValue| said.as_bytes() == self.incarnation.as_bytes();
        answer.is_ok_and(|answer| {
            self.incarnation.is_empty() || answer.headers().get(CoordinatorAddress::INCARNATION).is_some_and(same)
        })
    }

    fn get<T: DeserializeOwned>(&self, what: &str) -> Result<T, ApiError> {
        let url = format!("{}/api/v1/{what}", self.base);
        let mut request = self.agent.get(&url);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let answer = request.call().and_then(|mut response| response.body_mut().read_json());
        answer.map_err(|source| ApiError { url, source: Box::new(source) })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use learn_domain::Config;
    use learn_domain::config::TlsMode;

    use super::*;

    #[test]
    fn who_has_no_token_is_told_how_to_get_one() {
        let error = |source| ApiError { url: "http://h:1/api/v1/job".into(), source: Box::new(source) }.to_string();
        assert!(error(ureq::Error::StatusCode(401)).contains("`token` of the run directory"));
        assert!(error(ureq::Error::StatusCode(503)).ends_with("503"));
    }

    #[test]
    fn who_listens_where_a_coordinator_was_is_not_taken_for_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let http = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            for header in ["", "learn-incarnation: b\r\n", "learn-incarnation: a\r\n", ""] {
                let (mut stream, _) = listener.accept().unwrap();
                let _request = stream.read(&mut [0_u8; 4096]).unwrap();
                let answer = format!("HTTP/1.1 200 OK\r\n{header}content-length: 0\r\nconnection: close\r\n\r\n");
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let run = RunDir::new("runs/one");
        let answers = |incarnation: &str| {
            let (http, incarnation) = (http.clone(), incarnation.to_owned());
            Api::new(&run, &CoordinatorAddress { http, incarnation, ..CoordinatorAddress::default() }).answers()
        };
        assert_eq!(["a", "a", "a"].map(answers), [false, false, true]);
        assert!(answers(""), "an older version did not write it down");
        server.join().unwrap();
    }

    #[test]
    fn a_run_without_a_token_shows_its_secret_only_where_everything_is_in_plain_text() {
        let folder = tempfile::tempdir().unwrap();
        for (mode, shown) in [(TlsMode::Off, true), (TlsMode::Auto, false)] {
            let mut config = Config::default();
            config.cluster.tls.mode = mode;
            let run = runs::create(&folder.path().join(format!("{mode:?}")), &config).unwrap();
            let shows = || Api::new(&run, &CoordinatorAddress::default()).token;
            assert_eq!(shows(), runs::token(&run).ok());
            std::fs::remove_file(run.token()).unwrap();
            assert_eq!(shows(), shown.then(|| runs::secret(&run).unwrap()));
        }
    }
}
