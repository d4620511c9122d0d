//! The coordinator's HTTP interface as a client, which shows the run's token by itself.

use std::time::Duration;

use learn_domain::report::{CoordinatorAddress, EmbeddingStatus, JobStatus};
use learn_domain::run_dir::RunDir;
use serde::de::DeserializeOwned;
use ureq::Agent;

use crate::runs;

/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for a sign of life.
const SHORT_TIMEOUT: Duration = Duration::from_secs(2);

/// The coordinator did not answer as it should.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator at {url} did not answer: {source}")]
pub struct ApiError {
    url: String,
    source: Box<ureq::Error>,
}

/// A client of one coordinator.
pub struct Api {
    base: String,
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
        let token = runs::token(run).or_else(|_| runs::secret(run)).ok();
        Self { base: address.http.trim_end_matches('/').to_owned(), agent, token }
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

    /// Whether anybody is there, found out fast.
    #[must_use]
    pub fn answers(&self) -> bool {
        let request = self.agent.get(format!("{}/healthz", self.base));
        request.config().timeout_global(Some(SHORT_TIMEOUT)).build().call().is_ok()
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

    /// Asks for so many workers; gives how many are wanted now.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn scale(&self, secret: &str, workers: u32) -> Result<u32, ApiError> {
        #[derive(serde::Deserialize)]
        struct Wanted {
            wanted_workers: u32,
        }
        let url = format!("{}/api/v1/scale", self.base);
        let request = self.agent.post(&url).header("authorization", format!("Bearer {secret}"));
        let answer = request.send_json(serde_json::json!({ "workers": workers }));
        let wanted = answer.and_then(|mut response| response.body_mut().read_json::<Wanted>());
        wanted.map(|wanted| wanted.wanted_workers).map_err(|source| ApiError { url, source: Box::new(source) })
    }

    /// Asks the job to stop after the step it is in, with a checkpoint.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn stop(&self, secret: &str) -> Result<(), ApiError> {
        let url = format!("{}/api/v1/stop", self.base);
        let request = self.agent.post(&url).header("authorization", format!("Bearer {secret}"));
        let answer = request.send_empty();
        answer.map(|_| ()).map_err(|source| ApiError { url, source: Box::new(source) })
    }
}
