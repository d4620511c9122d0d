//! The coordinator of an embed job: leases item ranges to `learn-embed` processes until all are done.
//!
//! Input: a job directory with its configuration and secret, an operator's stop (a signal, or a call). Output: the lease
//! service (gRPC) and the status (HTTP), and how the job ended. Invariants: rules are in `learn_domain::lease`; nothing here reads the
//! dataset or links libtorch, because what is to be made is the workers' plan, and which of it is finished is on disk,
//! where each worker looks before it makes a range.

pub mod job;
mod service;

use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use job::EmbeddingJob;
use learn_domain::Config;
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;
use learn_proto::auth::Secret;
use learn_proto::v1::embedding_server::EmbeddingServer;
use learn_proto::v1::operator_server::OperatorServer;
use learn_telemetry::EmbeddingMetrics;
use learn_telemetry::server::{Limits, serve};
use service::{EmbeddingService, Shared, SharedJob};
use tokio::sync::watch;
use tonic::service::interceptor::InterceptedService;

use crate::connections::{self, Gate, MAX_REQUEST_BYTES};
use crate::files::read_json;
use crate::http::access::Access;
use crate::operator::EmbeddingOperator;
use crate::sd::{self, Origin};
use crate::serve::{Ports, announced, certificates, close, lock, on_stop};
use crate::settings::{SettingsError, read_token};
use crate::{CoordinatorError, ServeError};

/// How often the end is looked for.
const TICK: Duration = Duration::from_millis(100);

/// How an embed job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every range is done.
    Finished,
    /// By its operator; finished ranges are kept.
    Stopped,
    Failed(String),
}

/// A coordinator of an embed job that listens already.
pub struct EmbeddingCoordinator {
    run_dir: RunDir,
    config: Config,
    secret: Secret,
    token: Option<Secret>,
    ports: Ports,
    /// Holds the lock on the job directory.
    _lock: File,
}

impl EmbeddingCoordinator {
    /// Reads the job directory and binds the ports.
    ///
    /// # Errors
    /// A file is missing or makes no sense, another coordinator serves the directory, or a port is taken.
    pub async fn bind(run_dir: &Path) -> Result<Self, CoordinatorError> {
        let run_dir = RunDir::new(run_dir);
        let config: Config = read_json(&run_dir.config()).map_err(SettingsError::Unreadable)?;
        config.validate().map_err(SettingsError::from)?;
        let dataset = config.data.dataset.file_name().unwrap_or_default();
        learn_telemetry::place::set_run(&dataset.to_string_lossy());
        let secret = Secret::read(&run_dir.secret()).map_err(SettingsError::from)?;
        let token = read_token(&run_dir).map_err(SettingsError::from)?;
        let lock = lock(&run_dir).await?;
        let ports = Ports::bind(&config.cluster, certificates(&config.cluster, &run_dir)?.as_ref()).await?;
        Ok(Self { run_dir, config, secret, token, ports, _lock: lock })
    }

    #[must_use]
    pub fn address(&self) -> &CoordinatorAddress {
        &self.ports.address
    }

    /// Serves until every range is done and the workers know; `shutdown` is the operator's stop.
    ///
    /// # Errors
    /// A server fails, or the address cannot be written.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<Ended, CoordinatorError> {
        let (run_dir, address) = (self.run_dir.clone(), self.ports.address.clone());
        announced(&run_dir, &address, self.serve(shutdown)).await
    }

    async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<Ended, CoordinatorError> {
        let cluster = &self.config.cluster;
        let job = SharedJob::new(EmbeddingJob::new(cluster.heartbeat_timeout.0, cluster.join_timeout.0));
        let (stop, stopped) = watch::channel(false);
        let origin = Origin::new(&self.config.job.name, &self.ports.address);
        let service = EmbeddingService { job: job.clone(), config: Arc::new(self.config) };
        let shared = Shared {
            job: job.clone(),
            access: Access::new(self.secret.clone(), self.token, self.ports.tls.is_some()),
            stop: Arc::default(),
            metrics: EmbeddingMetrics::new(),
        };
        let stopping = Arc::clone(&shared.stop);
        let operator = EmbeddingOperator { stop: Arc::clone(&stopping) };
        let service = EmbeddingServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES);
        let operator = OperatorServer::new(operator).max_decoding_message_size(MAX_REQUEST_BYTES);
        let gate = Gate(self.secret);
        let grpc = connections::server()
            .add_service(InterceptedService::new(service, gate.clone()))
            .add_service(InterceptedService::new(operator, gate))
            .serve_with_incoming_shutdown(
                connections::connections(self.ports.grpc, connections::Limits::default(), self.ports.tls),
                on_stop(stopped.clone()),
            );
        let router = origin.sign(service::router(shared.clone())).merge(sd::alone(origin));
        let http = serve(self.ports.http, router, Limits::default(), on_stop(stopped));
        let mut servers = tokio::task::JoinSet::new();
        servers.spawn(async move { ("gRPC", grpc.await.map_err(|error| error.to_string())) });
        servers.spawn(async move { ("HTTP", http.await.map_err(|error| error.to_string())) });
        let mut ticks = tokio::time::interval(TICK);
        let mut shutdown = std::pin::pin!(shutdown);
        let ended = loop {
            tokio::select! {
                _ = ticks.tick() => match job.outcome() {
                    None => shared.measure(),
                    Some(Ok(())) => break Ended::Finished,
                    Some(Err(failure)) => break Ended::Failed(failure),
                },
                () = &mut shutdown => break Ended::Stopped,
                () = stopping.notified() => break Ended::Stopped,
                Some(server) = servers.join_next() => {
                    let (name, result) = server.map_err(ServeError::Task)?;
                    let how = result.err().unwrap_or_else(|| "it was told to stop".into());
                    return Err(ServeError::Server(name, how).into());
                }
            }
        };
        close(&stop, &mut servers).await;
        Ok(ended)
    }
}
