//! `learn.v1.Operator`: what `learn-launch stop` and `scale` ask of a job, of a training ([`OperatorService`]) as of an embed
//! job ([`EmbeddingOperator`]).
//!
//! Input: calls that have proved the secret. Output: commands to the owner of the job, answers. Invariant: every decision is
//! the owner's; a request that comes twice changes nothing more.

use std::sync::Arc;

use learn_proto::v1::operator_server::Operator;
use learn_proto::v1::{ScaleRequest, ScaleResponse, StopRequest, StopResponse};
use learn_telemetry::CoordinatorMetrics;
use tokio::sync::Notify;
use tonic::{Request, Response, Status};

use crate::control::timed;
use crate::job::Asked;
use crate::job::actor::{Command, JobHandle};

/// Of a training or an evaluation.
pub struct OperatorService {
    pub job: JobHandle,
    pub metrics: CoordinatorMetrics,
}

/// How many workers are asked for.
fn workers(request: ScaleRequest) -> Result<u32, Status> {
    match request.workers {
        0 => Err(Status::invalid_argument("`workers` is 0; ask for 1 or more, or stop the job")),
        workers => Ok(workers),
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    async fn stop(&self, request: Request<StopRequest>) -> Result<Response<StopResponse>, Status> {
        timed(&self.metrics, "stop", async {
            let StopRequest { never_joined } = request.into_inner();
            let command = |reply| match never_joined.is_empty() {
                true => Command::Stop(Asked::ByCall, reply),
                false => Command::NeverJoined(never_joined, reply),
            };
            self.job.ask(command).await?;
            Ok(StopResponse {})
        })
        .await
    }

    async fn scale(&self, request: Request<ScaleRequest>) -> Result<Response<ScaleResponse>, Status> {
        timed(&self.metrics, "scale", async {
            let workers = workers(request.into_inner())?;
            let wanted_workers = self.job.ask(|reply| Command::Scale(workers, reply)).await??;
            Ok(ScaleResponse { wanted_workers })
        })
        .await
    }
}

/// Of an embed job.
pub struct EmbeddingOperator {
    /// Told when the job is to end.
    pub stop: Arc<Notify>,
}

#[tonic::async_trait]
impl Operator for EmbeddingOperator {
    async fn stop(&self, _request: Request<StopRequest>) -> Result<Response<StopResponse>, Status> {
        tracing::info!("an operator has asked the job to stop");
        self.stop.notify_one();
        Ok(Response::new(StopResponse {}))
    }

    async fn scale(&self, _request: Request<ScaleRequest>) -> Result<Response<ScaleResponse>, Status> {
        Err(Status::failed_precondition(
            "an embed job has no number of workers: start more `learn-embed` processes, or end some; others take their ranges over",
        ))
    }
}
