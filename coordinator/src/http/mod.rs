//! The coordinator over plain HTTP: metrics, health, the status page, the job as JSON, and stop and scale for scripts on this host
//! where nothing of the job is encrypted.
//!
//! Input: requests. Output: what the job's owner and the run's files say. Invariants: metrics and health are open to whoever
//! reaches the port, page and API need the run's token ([`access`]), stopping and scaling the job's secret; what the page
//! asks for again and again is small, whatever the size of the job, and its cost for the job's owner, as that of what is open,
//! does not grow with the number of those who look.

pub mod access;
mod api;
mod assets;
mod overview;
pub(crate) mod snapshot;

use std::future::Future;
use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;

use access::Access;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use learn_domain::Config;
use learn_domain::report::JobState;
use learn_telemetry::Exposition;
use learn_telemetry::server::{Limits, serve as serve_within};
use snapshot::Snapshots;
use tokio::net::TcpListener;

use crate::board::{Board, Follower};
use crate::data::Directory;
use crate::job::Asked;
use crate::job::actor::{Command, JobHandle};
use crate::sd::{self, Origin};

/// What there is to show.
pub struct Parts {
    pub job: JobHandle,
    pub access: Access,
    pub exposition: Exposition,
    /// What `/sd` says of this coordinator.
    pub origin: Origin,
    /// Who serves the job's data.
    pub directory: Directory,
    pub config: Config,
    /// Follows the files of the run.
    pub follower: Follower,
}

#[derive(Clone)]
struct Shared {
    job: JobHandle,
    access: Access,
    snapshots: Snapshots,
    directory: Directory,
    board: Board,
    config: Arc<Config>,
}

/// Serves all routes until `stop` resolves.
///
/// # Errors
/// The listener failed.
pub async fn serve(listener: TcpListener, parts: Parts, stop: impl Future<Output = ()> + Send) -> io::Result<()> {
    let Parts { job, access, exposition, origin, directory, config, follower } = parts;
    let (snapshots, board) = (Snapshots::new(job.clone()), follower.board());
    let metrics = origin.sign(learn_telemetry::router(exposition));
    let machines = metrics.merge(sd::router(snapshots.clone(), directory.clone(), origin));
    let shared = Shared { job, access, snapshots, directory, board, config: Arc::new(config) };
    let served = serve_within(listener, router(shared).merge(machines), Limits::default(), stop);
    tokio::select! {
        served = served => served,
        never = follower.follow() => match never {},
    }
}

/// What people and the operator ask for.
fn router(shared: Shared) -> Router {
    let for_readers = Router::new()
        .route("/", get(assets::page))
        .merge(api::routes())
        .route_layer(middleware::from_fn_with_state(shared.access.clone(), access::required));
    let entrance = Router::new().route("/token", post(access::enter)).with_state(shared.access.clone());
    Router::new()
        .route("/readyz", get(ready))
        .route("/api/v1/stop", post(stop))
        .route("/api/v1/scale", post(scale))
        .merge(for_readers)
        .merge(assets::routes())
        .with_state(shared)
        .merge(entrance)
        .layer(middleware::map_response(assets::guarded))
}

fn gone(error: impl std::fmt::Display) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response()
}

/// 200 while a generation runs, with all workers that are wanted or fewer.
async fn ready(State(shared): State<Shared>) -> Response {
    match shared.snapshots.recent().await {
        Ok(status) if status.state == JobState::Running => "ready\n".into_response(),
        Ok(status) if status.state == JobState::Gathering => {
            let there = status.workers.iter().filter(|worker| !worker.left).count();
            gone(format!("{there} of {} workers have joined", status.world_size))
        }
        Ok(status) if status.state == JobState::Regrouping => gone("the workers regroup"),
        Ok(status) => gone(status.cause.as_deref().unwrap_or("the job has ended")),
        Err(error) => gone(error),
    }
}

async fn stop(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    if let Some(refused) = refused(&shared, &headers) {
        return refused;
    }
    match shared.job.ask(|reply| Command::Stop(Asked::ByCall, reply)).await {
        Ok(()) => (StatusCode::ACCEPTED, "stopping\n").into_response(),
        Err(error) => gone(error),
    }
}

/// So many workers are wanted.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Scale {
    workers: NonZeroU32,
}

async fn scale(State(shared): State<Shared>, headers: HeaderMap, Json(wanted): Json<Scale>) -> Response {
    if let Some(refused) = refused(&shared, &headers) {
        return refused;
    }
    match shared.job.ask(|reply| Command::Scale(wanted.workers.get(), reply)).await {
        Ok(Ok(workers)) => {
            (StatusCode::ACCEPTED, Json(serde_json::json!({ "wanted_workers": workers }))).into_response()
        }
        Ok(Err(error)) => (StatusCode::CONFLICT, format!("{error}\n")).into_response(),
        Err(error) => gone(error),
    }
}

/// The answer to those who may not change the job.
fn refused(shared: &Shared, headers: &HeaderMap) -> Option<Response> {
    Some(shared.access.operates(headers).err()?.into_response())
}
