//! `GET /sd`: what Prometheus' `http_sd_configs` scrapes of a job.
//!
//! Input: the workers and data servers that are there, and this coordinator's own address. Output: one group for each
//! process that lives, with the labels `job`, `role`, `host` and, for a worker that has one, `rank`. Invariant: whoever has left or was lost is not
//! in it.

use std::collections::BTreeMap;
use std::time::Instant;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use learn_domain::report::{CoordinatorAddress, DataServerStatus, WorkerStatus};
use learn_telemetry::host;
use serde::Serialize;

use crate::data::Directory;
use crate::http::snapshot::Snapshots;

/// One process, as Prometheus wants it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    targets: [String; 1],
    labels: BTreeMap<&'static str, String>,
}

const NAME: HeaderName = HeaderName::from_static(CoordinatorAddress::INCARNATION);

/// The name of a job, and its coordinator.
#[derive(Clone, Debug)]
pub struct Origin {
    job: String,
    address: CoordinatorAddress,
}

impl Origin {
    #[must_use]
    pub fn new(job: &str, address: &CoordinatorAddress) -> Self {
        Self { job: job.to_owned(), address: address.clone() }
    }

    /// Answers say by a header which coordinator they are from: the address of one that is gone may be another's now.
    pub fn sign<S: Clone + Send + Sync + 'static>(&self, router: Router<S>) -> Router<S> {
        let incarnation = HeaderValue::from_str(&self.address.incarnation).ok();
        router.layer(map_response(move |mut answer: Response| {
            answer.headers_mut().extend(incarnation.clone().map(|value| (NAME, value)));
            std::future::ready(answer)
        }))
    }

    /// The coordinator alone.
    #[must_use]
    pub fn coordinator(&self, host: String) -> Group {
        let address = self.address.http.trim_start_matches("http://").to_owned();
        self.group("coordinator", address, host)
    }

    /// None of one that has gone, or has no metrics.
    fn worker(&self, worker: &WorkerStatus) -> Option<Group> {
        if worker.left {
            return None;
        }
        let mut group = self.group("worker", address(&worker.metrics_url)?, worker.host.clone());
        if let Some(rank) = worker.rank {
            group.labels.insert("rank", rank.to_string());
        }
        Some(group)
    }

    fn data_server(&self, server: DataServerStatus) -> Option<Group> {
        Some(self.group("data", address(&server.metrics_url)?, server.host))
    }

    fn group(&self, role: &str, address: String, host: String) -> Group {
        let labels = [("job", self.job.clone()), ("role", role.into()), ("host", host)];
        Group { targets: [address], labels: labels.into() }
    }
}

/// `HOST:PORT` of `http://HOST:PORT/metrics`.
fn address(metrics_url: &str) -> Option<String> {
    Some(metrics_url.strip_prefix("http://")?.strip_suffix("/metrics")?.to_owned())
}

/// `/sd` of a training.
pub(crate) fn router(snapshots: Snapshots, directory: Directory, origin: Origin) -> Router {
    Router::new().route("/sd", get(targets)).with_state((snapshots, directory, origin))
}

async fn targets(State((snapshots, directory, origin)): State<(Snapshots, Directory, Origin)>) -> Response {
    match snapshots.recent().await {
        Ok(status) => {
            let own = origin.coordinator(host::name());
            let workers = status.workers.iter().filter_map(|worker| origin.worker(worker));
            let servers = directory.servers(Instant::now()).into_iter().filter_map(|server| origin.data_server(server));
            Json(std::iter::once(own).chain(workers).chain(servers).collect::<Vec<_>>()).into_response()
        }
        // Prometheus keeps the targets of its last good answer
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

/// `/sd` of an embed job, whose processes tell their coordinator what there is to know.
pub fn alone(origin: Origin) -> Router {
    let answer = move || async move { Json([origin.coordinator(host::name())]) };
    Router::new().route("/sd", get(answer))
}

#[cfg(test)]
mod tests {
    use learn_domain::{Phase, Rank, Step, WorkerId};

    use super::*;

    fn origin() -> Origin {
        let http = "http://login:8080".into();
        Origin::new("shop", &CoordinatorAddress { http, ..CoordinatorAddress::default() })
    }

    fn worker(rank: Option<u32>, url: &str) -> WorkerStatus {
        WorkerStatus {
            worker: WorkerId(3),
            rank: rank.map(Rank),
            host: "node1".into(),
            pid: 1,
            device: "cpu".into(),
            step: Step(0),
            phase: Phase::Forward,
            metrics_url: url.into(),
            seconds_since_heartbeat: 0.0,
            seconds_in_phase: 0.0,
            work_ratio: None,
            left: false,
        }
    }

    #[test]
    fn the_answer_is_what_prometheus_reads() {
        let ranked = origin().worker(&worker(Some(1), "http://node1:4711/metrics"));
        let unranked = origin().worker(&worker(None, "http://[::1]:4712/metrics"));
        let server = DataServerStatus {
            location: "http://node2:4713".into(),
            metrics_url: "http://node2:4714/metrics".into(),
            host: "node2".into(),
            pid: 7,
        };
        let groups = [Some(origin().coordinator("login".into())), ranked, unranked, origin().data_server(server)];
        let expected = serde_json::json!([
            {"targets": ["login:8080"], "labels": {"job": "shop", "role": "coordinator", "host": "login"}},
            {"targets": ["node1:4711"], "labels": {"job": "shop", "role": "worker", "host": "node1", "rank": "1"}},
            {"targets": ["[::1]:4712"], "labels": {"job": "shop", "role": "worker", "host": "node1"}},
            {"targets": ["node2:4714"], "labels": {"job": "shop", "role": "data", "host": "node2"}},
        ]);
        assert_eq!(serde_json::to_value(groups).unwrap(), expected);
    }

    #[test]
    fn a_worker_that_has_gone_or_has_no_metrics_is_no_target() {
        for url in ["", "http://node1:4711/", "https://node1:4711/metrics"] {
            assert_eq!(origin().worker(&worker(Some(0), url)), None, "{url}");
        }
        let gone = WorkerStatus { left: true, ..worker(Some(0), "http://node1:4711/metrics") };
        assert_eq!(origin().worker(&gone), None);
    }
}
