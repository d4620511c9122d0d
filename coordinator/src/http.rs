//! The coordinator over plain HTTP: metrics, health, the job as JSON, and the operator's stop
//! and scale.
//!
//! Reading is open to whoever reaches the port; stopping and scaling need the job's secret.

use std::time::Instant;

use axum::extract::State;
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use learn_domain::report::{JobState, JobStatus};
use learn_proto::auth::Secret;
use learn_telemetry::Exposition;

use crate::data::Directory;
use crate::job::actor::{Command, JobHandle};

/// What the routes answer from.
#[derive(Clone)]
pub struct Shared {
    pub job: JobHandle,
    pub secret: Secret,
    pub directory: Directory,
}

/// All routes.
pub fn router(shared: Shared, exposition: Exposition) -> Router {
    Router::new()
        .route("/readyz", get(ready))
        .route("/api/v1/job", get(status))
        .route("/api/v1/stop", post(stop))
        .route("/api/v1/scale", post(scale))
        .with_state(shared)
        .merge(learn_telemetry::router(exposition))
}

fn gone(error: impl std::fmt::Display) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response()
}

async fn status(State(shared): State<Shared>) -> Response {
    match shared.job.ask(Command::Status).await {
        Ok(status) => {
            let data_servers = shared.directory.servers(Instant::now());
            Json(JobStatus { data_servers, ..status }).into_response()
        }
        Err(error) => gone(error),
    }
}

/// 200 while a generation runs, with all workers that are wanted or fewer.
async fn ready(State(shared): State<Shared>) -> Response {
    match shared.job.ask(Command::Status).await {
        Ok(status) if status.state == JobState::Running => "ready\n".into_response(),
        Ok(status) if status.state == JobState::Gathering => {
            gone(format!("{} of {} workers have joined", status.workers.len(), status.world_size))
        }
        Ok(status) if status.state == JobState::Regrouping => gone("the workers regroup"),
        Ok(status) => gone(status.cause.unwrap_or_else(|| "the job has ended".into())),
        Err(error) => gone(error),
    }
}

async fn stop(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    if let Some(refused) = refused(&shared, &headers) {
        return refused;
    }
    match shared.job.ask(Command::OperatorStop).await {
        Ok(()) => (StatusCode::ACCEPTED, "stopping\n").into_response(),
        Err(error) => gone(error),
    }
}

/// So many workers are wanted.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Scale {
    workers: u32,
}

async fn scale(State(shared): State<Shared>, headers: HeaderMap, Json(wanted): Json<Scale>) -> Response {
    if let Some(refused) = refused(&shared, &headers) {
        return refused;
    }
    match shared.job.ask(|reply| Command::Scale(wanted.workers, reply)).await {
        Ok(workers) => (StatusCode::ACCEPTED, Json(serde_json::json!({ "wanted_workers": workers }))).into_response(),
        Err(error) => gone(error),
    }
}

/// The answer to those who do not know the job's secret.
fn refused(shared: &Shared, headers: &HeaderMap) -> Option<Response> {
    let known = shared.secret.verify(headers.get(AUTHORIZATION).map(|value| value.as_bytes()));
    known.err().map(|error| (StatusCode::UNAUTHORIZED, format!("{error}\n")).into_response())
}
