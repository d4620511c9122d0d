//! `/api/v1/…` for those who look: see `docs/api.md`. A parameter that makes no sense is refused by name.

use std::collections::BTreeMap;
use std::time::Instant;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use learn_domain::Step;
use learn_domain::curves::{Bucket, Extent, SERIES};
use learn_domain::report::JobStatus;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::overview::{Order, Overview, Part, Show, part, silent_after};
use super::{Shared, gone};
use crate::board::NumberedEvent;

/// Points of a curve if nothing else is said, and most of them.
const POINTS: (usize, usize) = (400, 5000);
/// Rows of a table, likewise.
const ROWS: (usize, usize) = (50, 500);

pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/api/v1/job", get(job))
        .route("/api/v1/overview", get(overview))
        .route("/api/v1/evaluations", get(evaluations))
        .route("/api/v1/ledger", get(ledger))
        .route("/api/v1/config", get(config))
        .route_layer(from_fn(without_parameters))
        .route("/api/v1/workers", get(workers))
        .route("/api/v1/steps", get(steps))
        .route("/api/v1/events", get(events))
}

/// For resources that have none.
async fn without_parameters(request: Request, next: Next) -> Response {
    match request.uri().query().filter(|query| !query.is_empty()) {
        Some(query) => wrong(format!("{} has no parameters, so `{query}` is not understood", request.uri().path())),
        None => next.run(request).await,
    }
}

/// Answers a question with wrong parameters.
fn wrong(problem: impl std::fmt::Display) -> Response {
    (StatusCode::BAD_REQUEST, format!("{problem}\n")).into_response()
}

/// The whole status, as `status.json` has it.
async fn job(State(shared): State<Shared>) -> Response {
    match shared.snapshots.latest().await {
        Ok(status) => {
            let data_servers = shared.directory.servers(Instant::now());
            Json(JobStatus { data_servers, ..JobStatus::clone(&status) }).into_response()
        }
        Err(error) => gone(error),
    }
}

async fn overview(State(shared): State<Shared>) -> Response {
    let status = match shared.snapshots.recent().await {
        Ok(status) => status,
        Err(error) => return gone(error),
    };
    let silent_after = silent_after(shared.config.cluster.heartbeat_interval.0);
    let metric = &shared.config.checkpoint.metric;
    Json(Overview::of(&status, metric, silent_after, shared.board.counts())).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkersQuery {
    #[serde(default)]
    show: Show,
    #[serde(default)]
    order: Order,
    #[serde(default)]
    offset: usize,
    limit: Option<usize>,
}

async fn workers(State(shared): State<Shared>, query: Result<Query<WorkersQuery>, QueryRejection>) -> Response {
    let Query(query) = match query {
        Ok(query) => query,
        Err(error) => return wrong(error),
    };
    let status = match shared.snapshots.recent().await {
        Ok(status) => status,
        Err(error) => return gone(error),
    };
    let limit = query.limit.unwrap_or(ROWS.0).min(ROWS.1);
    let wanted = Part { show: query.show, order: query.order, offset: query.offset, limit };
    let (total, rows) = part(&status.workers, wanted, silent_after(shared.config.cluster.heartbeat_interval.0));
    Json(json!({ "total": total, "offset": query.offset, "workers": rows })).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StepsQuery {
    #[serde(default)]
    from: u64,
    to: Option<u64>,
    points: Option<usize>,
    /// Names, separated by commas; all if there are none.
    series: Option<String>,
}

/// One series, a value a point; none where no step of the point has it.
#[derive(Serialize)]
struct Column {
    mean: Vec<Option<f64>>,
    /// Only if a point is of more than one step.
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<Vec<Option<f64>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<Vec<Option<f64>>>,
}

/// Curves by column.
#[derive(Serialize)]
struct Columns {
    /// The first and the last step of each point.
    first: Vec<Step>,
    last: Vec<Step>,
    series: BTreeMap<&'static str, Column>,
}

impl Columns {
    fn of(buckets: &[Bucket], wanted: impl Fn(&str) -> bool) -> Self {
        let joined = buckets.iter().any(|bucket| bucket.steps > 1);
        let column = |place: usize| {
            let of = |value: fn(Extent) -> Option<f64>| -> Vec<Option<f64>> {
                buckets.iter().map(|bucket| value(bucket.extents[place])).collect()
            };
            Column {
                mean: of(Extent::mean),
                min: joined.then(|| of(Extent::least)),
                max: joined.then(|| of(Extent::greatest)),
            }
        };
        let chosen = SERIES.iter().enumerate().filter(|(_, series)| wanted(series.name));
        let chosen = chosen.map(|(place, series)| (series.name, column(place)));
        // a series that no step has, such as the loss of a head that is not there, is none
        let series =
            chosen.filter(|(_, column)| buckets.is_empty() || column.mean.iter().any(Option::is_some)).collect();
        let (first, last) = buckets.iter().map(|bucket| (bucket.first, bucket.last)).unzip();
        Self { first, last, series }
    }
}

async fn steps(State(shared): State<Shared>, query: Result<Query<StepsQuery>, QueryRejection>) -> Response {
    let Query(query) = match query {
        Ok(query) => query,
        Err(error) => return wrong(error),
    };
    let wanted: Vec<&str> = query.series.iter().flat_map(|names| names.split(',')).map(str::trim).collect();
    if let Some(unknown) = wanted.iter().find(|name| SERIES.iter().all(|series| series.name != **name)) {
        let names: Vec<&str> = SERIES.iter().map(|series| series.name).collect();
        return wrong(format!("there is no series `{unknown}`; there are {}", names.join(", ")));
    }
    let points = query.points.unwrap_or(POINTS.0).clamp(1, POINTS.1);
    let buckets = shared.board.curves(Step(query.from), Step(query.to.unwrap_or(u64::MAX)), points);
    Json(Columns::of(&buckets, |name| wanted.is_empty() || wanted.contains(&name))).into_response()
}

async fn evaluations(State(shared): State<Shared>) -> Response {
    Json(json!({ "evaluations": shared.board.evaluations() })).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    #[serde(default)]
    after: u64,
    before: Option<u64>,
    limit: Option<usize>,
}

async fn events(State(shared): State<Shared>, query: Result<Query<EventsQuery>, QueryRejection>) -> Response {
    let Query(query) = match query {
        Ok(query) => query,
        Err(error) => return wrong(error),
    };
    let limit = query.limit.unwrap_or(ROWS.0).min(ROWS.1);
    let events: Vec<NumberedEvent> = shared.board.events(query.after, query.before.unwrap_or(u64::MAX), limit);
    Json(json!({ "total": shared.board.counts().events, "events": events })).into_response()
}

async fn ledger(State(shared): State<Shared>) -> Response {
    match shared.snapshots.recent().await {
        Ok(status) => Json(&status.ledger).into_response(),
        Err(error) => gone(error),
    }
}

/// The resolved configuration; it has no keys and no secrets in it.
async fn config(State(shared): State<Shared>) -> Response {
    Json(&*shared.config).into_response()
}
