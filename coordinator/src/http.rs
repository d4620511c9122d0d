//! The coordinator over plain HTTP: metrics, health, the job as JSON, and the operator's stop.
//!
//! Reading is open to whoever reaches the port; stopping needs the job's secret.

use axum::extract::State;
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use learn_domain::report::JobState;
use learn_proto::auth::Secret;
use learn_telemetry::Exposition;

use crate::job::actor::{Command, JobHandle};

#[derive(Clone)]
struct Shared {
    job: JobHandle,
    secret: Secret,
}

/// All routes.
pub fn router(job: JobHandle, secret: Secret, exposition: Exposition) -> Router {
    Router::new()
        .route("/readyz", get(ready))
        .route("/api/v1/job", get(status))
        .route("/api/v1/stop", post(stop))
        .with_state(Shared { job, secret })
        .merge(learn_telemetry::router(exposition))
}

fn gone(error: impl std::fmt::Display) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response()
}

async fn status(State(shared): State<Shared>) -> Response {
    match shared.job.ask(Command::Status).await {
        Ok(status) => Json(status).into_response(),
        Err(error) => gone(error),
    }
}

/// 200 while all workers are there.
async fn ready(State(shared): State<Shared>) -> Response {
    match shared.job.ask(Command::Status).await {
        Ok(status) if status.state == JobState::Running => "ready\n".into_response(),
        Ok(status) if status.state == JobState::Gathering => {
            gone(format!("{} of {} workers have joined", status.workers.len(), status.world_size))
        }
        Ok(status) => gone(status.cause.unwrap_or_else(|| "the job has ended".into())),
        Err(error) => gone(error),
    }
}

async fn stop(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    if let Err(error) = shared.secret.verify(headers.get(AUTHORIZATION).map(|value| value.as_bytes())) {
        return (StatusCode::UNAUTHORIZED, format!("{error}\n")).into_response();
    }
    match shared.job.ask(Command::OperatorStop).await {
        Ok(()) => (StatusCode::ACCEPTED, "stopping\n").into_response(),
        Err(error) => gone(error),
    }
}
