//! What goes over a worker's open call: heartbeats one way, orders the other.

use std::sync::atomic::Ordering;

use learn_domain::WorkerId;
use learn_proto::convert::{self, Order};
use learn_proto::v1;
use tokio::sync::mpsc;
use tonic::Streaming;

use super::{ControlError, Progress, failed};

/// A sign of life.
#[derive(Clone, Debug)]
pub struct Heartbeat(pub(super) v1::HeartbeatRequest);

impl Heartbeat {
    /// Of `worker`, which is so far.
    #[must_use]
    pub fn of(worker: WorkerId, progress: &Progress) -> Self {
        let heartbeat = convert::Heartbeat {
            worker,
            generation: progress.generation(),
            step: progress.step(),
            phase: progress.phase(),
            entered: progress.entered.load(Ordering::Relaxed),
            inside: progress.inside.load(Ordering::Relaxed),
            since: progress.since(),
        };
        Self(heartbeat.into())
    }
}

/// The worker's side of its open call.
#[derive(Clone, Debug)]
pub struct Beats(pub(super) mpsc::Sender<v1::HeartbeatRequest>);

impl Beats {
    /// Sends a heartbeat; its answer is among the orders. `false` if the call has ended.
    pub async fn say(&self, heartbeat: Heartbeat) -> bool {
        self.0.send(heartbeat.0).await.is_ok()
    }
}

/// Orders as they come.
pub struct Orders(pub(super) Streaming<v1::HeartbeatResponse>);

impl Orders {
    /// The next order; `None` when the coordinator has no more.
    ///
    /// # Errors
    /// If the call breaks, or the coordinator does not know the worker.
    pub async fn next(&mut self) -> Result<Option<Order>, ControlError> {
        let Some(message) = self.0.message().await.map_err(failed("attend"))? else { return Ok(None) };
        message.try_into().map(Some).map_err(|source| ControlError::Answer { call: "attend", source })
    }
}
