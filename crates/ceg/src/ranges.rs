//! Which shards this process makes: all that are missing, or the ranges that a coordinator leases to it.
//!
//! Input: the plan (the store's shards). Output: shards, one after another. Invariants: the rows of a shard depend on the
//! shard alone, so it does not matter who makes it; a task of its own gives signs of life and renews the lease;
//! losing it changes nothing here, because a late completion is accepted. The asynchronous client stays in this file.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use learn_domain::Config;
use learn_proto::PROTOCOL;
use learn_proto::auth::BearerInterceptor;
use learn_proto::connect::{ConnectError, Pass, chain, may_pass};
use learn_proto::v1::embedding_client::EmbeddingClient;
use learn_proto::v1::lease_range_response::Answer;
use learn_proto::v1::{
    CompleteRangeRequest, EmbeddingPlan, JoinEmbeddingRequest, LeaseRangeRequest, RenewLeaseRequest,
};
use learn_telemetry::place::{self, Field};
use tokio::runtime::Runtime;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before a call that did not reach the coordinator is made again.
const AGAIN: Duration = Duration::from_millis(500);

/// The coordinator of the embed job cannot be worked with.
#[derive(Debug, thiserror::Error)]
pub enum RangeError {
    #[error(transparent)]
    Client(#[from] ConnectError),
    #[error("the client of the coordinator cannot be started: {0}")]
    Runtime(#[from] std::io::Error),
    #[error("the coordinator at {url} cannot be reached: {reason}; is it running, and is the address right?")]
    Connect { url: String, reason: String },
    #[error("the coordinator at {url} {}", told(status))]
    Call { url: String, status: Box<Status> },
    #[error("the coordinator's configuration cannot be read: {0}; start it and this worker from the same build")]
    Config(String),
    #[error("the coordinator gave an empty answer; start it and this worker from the same build")]
    Empty,
    #[error("the coordinator leased range {range} of {ranges}; start it and this worker from the same build")]
    Beyond { range: u64, ranges: usize },
}

/// Whether the coordinator may answer when the call is made again; otherwise it has refused.
fn passes(status: &Status) -> bool {
    may_pass(status) || status.code() == Code::DeadlineExceeded
}

fn told(status: &Status) -> String {
    if passes(status) {
        format!("does not answer: {}; is it running?", status.message())
    } else {
        format!("refused: {}", status.message())
    }
}

/// What a process would make: the coordinator compares it over all workers.
#[derive(Clone, Debug)]
pub struct Plan {
    pub digest: String,
    pub ranges: usize,
    pub items: usize,
    pub range_items: usize,
}

/// Gives shards to make.
pub enum Ranges {
    /// These, alone.
    Own(VecDeque<usize>),
    Leased(Box<Leases>),
}

impl Ranges {
    /// The next shard; `None` when there is nothing to do any more.
    ///
    /// # Errors
    /// The coordinator refuses, or does not answer.
    pub fn take(&mut self) -> Result<Option<usize>, RangeError> {
        match self {
            Self::Own(shards) => Ok(shards.pop_front()),
            Self::Leased(leases) => leases.take(),
        }
    }

    /// Notes finished items of the shard in work.
    pub fn advance(&self, items: u64) {
        if let Self::Leased(leases) = self {
            leases.member.current.items_done.fetch_add(items, Ordering::Relaxed);
        }
    }

    /// The shard's file is whole and in place.
    ///
    /// # Errors
    /// The coordinator refuses, or does not answer.
    pub fn complete(&mut self, shard: usize) -> Result<(), RangeError> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Leased(leases) => leases.complete(shard),
        }
    }
}

type Client = EmbeddingClient<InterceptedService<Channel, BearerInterceptor>>;

/// What the renewing task reads.
#[derive(Default)]
struct Current {
    range: Mutex<Option<u64>>,
    items_done: AtomicU64,
}

impl Current {
    fn set(&self, range: Option<u64>) {
        self.items_done.store(0, Ordering::Relaxed);
        *self.range.lock().unwrap_or_else(PoisonError::into_inner) = range;
        place::set(Field::Range, range);
    }

    fn get(&self) -> Option<u64> {
        *self.range.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member of an embed job, before it knows its plan.
pub struct Member {
    runtime: Runtime,
    client: Client,
    url: String,
    worker: u32,
    lease: Duration,
    current: Arc<Current>,
    pub config: Config,
}

impl Member {
    /// Joins the job of the coordinator at `url`.
    ///
    /// # Errors
    /// The secret cannot be read, or the coordinator cannot be reached or refuses.
    pub fn join(url: &str, secret: &Path) -> Result<Self, RangeError> {
        let pass = Pass::read(secret)?;
        let bearer = pass.bearer().map_err(ConnectError::from)?;
        // One thread beside the one that computes: it renews the lease.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let failed = |reason: String| RangeError::Connect { url: url.into(), reason };
        let endpoint = pass.endpoint(url)?.timeout(TIMEOUT);
        let channel = runtime.block_on(endpoint.connect()).map_err(|error| failed(chain(&error)))?;
        let client = EmbeddingClient::with_interceptor(channel, bearer);
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
        let request =
            JoinEmbeddingRequest { protocol: PROTOCOL, incarnation: incarnation(), host, pid: std::process::id() };
        let joined = runtime.block_on(client.clone().join_embedding(request));
        let joined =
            joined.map_err(|status| RangeError::Call { url: url.into(), status: Box::new(status) })?.into_inner();
        let config: Config =
            serde_json::from_str(&joined.config_json).map_err(|error| RangeError::Config(error.to_string()))?;
        place::set(Field::Worker, u64::from(joined.worker_id));
        let lease = Duration::from_millis(joined.lease_millis.max(3).into());
        let member =
            Self { runtime, client, url: url.into(), worker: joined.worker_id, lease, current: Arc::default(), config };
        member.keep_alive();
        Ok(member)
    }

    /// Signs of life, from now on: reading a large model takes long, too.
    fn keep_alive(&self) {
        let (mut client, watched, worker) = (self.client.clone(), Arc::clone(&self.current), self.worker);
        let pause = self.config.cluster.heartbeat_interval.0.clamp(Duration::from_millis(1), self.lease / 3);
        // Ends with the runtime, which the member owns.
        self.runtime.spawn(async move {
            let mut ticks = tokio::time::interval(pause);
            loop {
                ticks.tick().await;
                let range = watched.get();
                let items_done = watched.items_done.load(Ordering::Relaxed);
                match client.renew_lease(RenewLeaseRequest { worker_id: worker, range, items_done }).await {
                    Ok(answer) if range.is_some() && !answer.get_ref().held && watched.get() == range => {
                        tracing::warn!(range, "the lease was lost; the range is finished all the same");
                    }
                    Ok(_) => {}
                    Err(status) => tracing::warn!(range, message = status.message(), "no sign of life came through"),
                }
            }
        });
    }

    /// Works by this plan from now on.
    #[must_use]
    pub fn with_plan(self, plan: &Plan) -> Leases {
        let message = EmbeddingPlan {
            digest: plan.digest.clone(),
            ranges: plan.ranges as u64,
            items: plan.items as u64,
            range_items: plan.range_items as u64,
        };
        Leases { member: self, plan: message }
    }
}

/// The leases of this process.
pub struct Leases {
    member: Member,
    plan: EmbeddingPlan,
}

impl Leases {
    /// Calls until there is an answer, or the coordinator has been silent for as long as a lease.
    fn call<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, RangeError>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let start = Instant::now();
        loop {
            let status = match self.member.runtime.block_on(call(self.member.client.clone())) {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            if !passes(&status) || start.elapsed() > self.member.lease {
                return Err(RangeError::Call { url: self.member.url.clone(), status: Box::new(status) });
            }
            std::thread::sleep(AGAIN);
        }
    }

    fn take(&self) -> Result<Option<usize>, RangeError> {
        let request = LeaseRangeRequest { worker_id: self.member.worker, plan: Some(self.plan.clone()) };
        loop {
            let answer = self.call(|mut client| {
                let request = request.clone();
                async move { client.lease_range(request).await }
            })?;
            match answer.answer.ok_or(RangeError::Empty)? {
                Answer::Finished(_) => return Ok(None),
                Answer::Wait(wait) => std::thread::sleep(Duration::from_millis(wait.millis.into())),
                Answer::Leased(leased) if leased.range < self.plan.ranges => {
                    self.member.current.set(Some(leased.range));
                    return Ok(Some(leased.range as usize));
                }
                Answer::Leased(leased) => {
                    return Err(RangeError::Beyond { range: leased.range, ranges: self.plan.ranges as usize });
                }
            }
        }
    }

    fn complete(&self, shard: usize) -> Result<(), RangeError> {
        self.member.current.set(None);
        let request = CompleteRangeRequest { worker_id: self.member.worker, range: shard as u64 };
        self.call(|mut client| async move { client.complete_range(request).await }).map(drop)
    }
}

/// Unique for this start of the process.
fn incarnation() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}-{:016x}", std::process::id(), since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_connection_is_not_told_as_a_refusal() {
        let broken = Status::from_error(Box::new(std::io::Error::other("broken pipe")));
        for status in [broken, Status::unavailable("away"), Status::deadline_exceeded("late")] {
            assert!(told(&status).starts_with("does not answer: "), "{status}");
        }
        let refused = Status::unauthenticated("the secret of this run is another one");
        assert_eq!(told(&refused), "refused: the secret of this run is another one");
    }
}
