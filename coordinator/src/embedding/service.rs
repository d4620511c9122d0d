//! `learn.v1.Embedding` and the status page over the state of an embed job: messages in, answers out.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use learn_domain::report::EmbeddingStatus;
use learn_domain::{Config, Incarnation, WorkerId};
use learn_proto::PROTOCOL;
use learn_proto::convert::{ConvertError, bounded};
use learn_proto::v1::embedding_server::Embedding;
use learn_proto::v1::lease_range_response::{self, Finished, Leased};
use learn_proto::v1::{
    CompleteRangeRequest, CompleteRangeResponse, EmbeddingPlan, JoinEmbeddingRequest, JoinEmbeddingResponse,
    LeaseRangeRequest, LeaseRangeResponse, RenewLeaseRequest, RenewLeaseResponse,
};
use learn_telemetry::EmbeddingMetrics;
use tokio::sync::Notify;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::job::{Answer, Applicant, EmbeddingError, EmbeddingJob, Plan};
use crate::http::access::{Access, required};

/// Pause of a worker that has to wait for others.
const WAIT: Duration = Duration::from_millis(500);

/// The job with its clock; every method is one short step, so the lock is never held for long.
#[derive(Clone)]
pub struct SharedJob {
    job: Arc<Mutex<EmbeddingJob>>,
    started: Instant,
}

impl SharedJob {
    #[must_use]
    pub fn new(job: EmbeddingJob) -> Self {
        Self { job: Arc::new(Mutex::new(job)), started: Instant::now() }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    // A step either happens or panics before it changes anything that matters; the next one goes on.
    fn lock(&self) -> MutexGuard<'_, EmbeddingJob> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the job has ended, if it has.
    pub fn outcome(&self) -> Option<Result<(), String>> {
        let (mut job, now) = (self.lock(), self.now());
        job.tick(now);
        job.outcome(now)
    }

    pub fn status(&self) -> EmbeddingStatus {
        self.lock().status(self.now())
    }
}

/// The HTTP side of an embed job.
#[derive(Clone)]
pub struct Shared {
    pub job: SharedJob,
    pub access: Access,
    /// Told when the operator stops the job.
    pub stop: Arc<Notify>,
    pub metrics: EmbeddingMetrics,
}

impl Shared {
    /// Brings the metrics up to date.
    pub fn measure(&self) {
        let status = self.job.status();
        self.metrics.planned_rows.set(status.items as i64);
        self.metrics.finished_rows.set(status.items_done as i64);
        self.metrics.workers.set(status.workers.len() as i64);
    }
}

/// `/metrics`, open to whoever reaches the port, `GET /api/v1/embedding`, which needs the job's token, and `POST
/// /api/v1/stop`, which needs its secret and is there without `cluster.tls` alone, as for a training.
pub fn router(shared: Shared) -> Router {
    let metrics = learn_telemetry::router(shared.metrics.exposition.clone());
    let status = |State(shared): State<Shared>| async move { Json(shared.job.status()) };
    let status = Router::new()
        .route("/api/v1/embedding", get(status))
        .route_layer(from_fn_with_state(shared.access.clone(), required));
    let routes = Router::new().route("/api/v1/stop", post(stop)).merge(status);
    routes.with_state(shared).merge(metrics)
}

async fn stop(State(shared): State<Shared>, headers: HeaderMap) -> axum::response::Response {
    match shared.access.operates(&headers) {
        Err(refusal) => refusal.into_response(),
        Ok(()) => {
            tracing::info!("the job is asked to stop");
            shared.stop.notify_one();
            (StatusCode::ACCEPTED, "stopping\n").into_response()
        }
    }
}

/// The service.
pub struct EmbeddingService {
    pub job: SharedJob,
    pub config: Arc<Config>,
}

impl From<EmbeddingError> for Status {
    fn from(error: EmbeddingError) -> Self {
        let text = error.to_string();
        match error {
            EmbeddingError::UnknownWorker(_) => Self::not_found(text),
            EmbeddingError::Nonsense(_) => Self::invalid_argument(text),
            EmbeddingError::OtherPlan { .. } | EmbeddingError::Failed(_) | EmbeddingError::Foreign { .. } => {
                Self::failed_precondition(text)
            }
        }
    }
}

fn plan(message: Option<EmbeddingPlan>) -> Result<Plan, ConvertError> {
    let EmbeddingPlan { digest, ranges, items, range_items } = message.ok_or(ConvertError::Missing("plan"))?;
    Ok(Plan { digest: bounded("plan.digest", digest)?, ranges, items, range_items })
}

#[tonic::async_trait]
impl Embedding for EmbeddingService {
    async fn join_embedding(
        &self,
        request: Request<JoinEmbeddingRequest>,
    ) -> Result<Response<JoinEmbeddingResponse>, Status> {
        let JoinEmbeddingRequest { protocol, incarnation, host, pid } = request.into_inner();
        if protocol != PROTOCOL {
            return Err(ConvertError::Protocol { theirs: protocol, ours: PROTOCOL }.into());
        }
        if incarnation.is_empty() {
            return Err(ConvertError::Missing("incarnation").into());
        }
        let incarnation = Incarnation(bounded("incarnation", incarnation)?);
        let applicant = Applicant { incarnation, host: bounded("host", host)?, pid };
        let worker = self.job.lock().join(self.job.now(), applicant.clone());
        tracing::info!(%worker, host = applicant.host, pid, "worker joined");
        let config_json = serde_json::to_string(&*self.config)
            .map_err(|source| ConvertError::Json { field: "config_json", source })?;
        let lease = self.config.cluster.heartbeat_timeout.0.as_millis();
        let lease_millis = u32::try_from(lease).unwrap_or(u32::MAX);
        Ok(Response::new(JoinEmbeddingResponse { worker_id: worker.0, config_json, lease_millis }))
    }

    async fn lease_range(&self, request: Request<LeaseRangeRequest>) -> Result<Response<LeaseRangeResponse>, Status> {
        let LeaseRangeRequest { worker_id, plan: message } = request.into_inner();
        let answer = self.job.lock().lease(self.job.now(), WorkerId(worker_id), plan(message)?)?;
        tracing::debug!(worker = worker_id, ?answer, "asked for a range");
        let answer = match answer {
            Answer::Leased(range) => lease_range_response::Answer::Leased(Leased { range }),
            Answer::Wait => {
                lease_range_response::Answer::Wait(lease_range_response::Wait { millis: WAIT.as_millis() as u32 })
            }
            Answer::Finished => lease_range_response::Answer::Finished(Finished {}),
        };
        Ok(Response::new(LeaseRangeResponse { answer: Some(answer) }))
    }

    async fn renew_lease(&self, request: Request<RenewLeaseRequest>) -> Result<Response<RenewLeaseResponse>, Status> {
        let RenewLeaseRequest { worker_id, range, items_done } = request.into_inner();
        let held = self.job.lock().renew(self.job.now(), WorkerId(worker_id), range, items_done)?;
        Ok(Response::new(RenewLeaseResponse { held }))
    }

    async fn complete_range(
        &self,
        request: Request<CompleteRangeRequest>,
    ) -> Result<Response<CompleteRangeResponse>, Status> {
        let CompleteRangeRequest { worker_id, range } = request.into_inner();
        let first = self.job.lock().complete(self.job.now(), WorkerId(worker_id), range)?;
        tracing::info!(worker = worker_id, range, late = !first, "range done");
        Ok(Response::new(CompleteRangeResponse {}))
    }
}
