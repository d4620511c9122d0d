//! A data server beside the coordinator: the same dataset, plan and sampling, and nothing of the job's state.
//!
//! Input: a dataset directory, the coordinator's address and the job's secret. Output: the data service of [`crate::data`]
//! and its metrics, until the job is over. Invariants: the job's configuration comes from its coordinator, so that any
//! number of servers answers a ticket alike; a dataset that is not the job's is refused by the coordinator before anything is
//! served; who is told that this server is there, is the coordinator's affair ([`crate::data::Directory`]).

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use learn_dataset::{Dataset, Progress};
use learn_domain::Config;
use learn_domain::config::ClusterConfig;
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;
use learn_proto::auth::BearerInterceptor;
use learn_proto::connect::{Pass, may_pass};
use learn_proto::convert::{DataOffer, OfferedServer};
use learn_proto::v1::control_client::ControlClient;
use learn_proto::v1::{OfferDataRequest, OfferDataResponse};
use learn_telemetry::DataMetrics;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use crate::CoordinatorError;
use crate::connections::{self, Gate};
use crate::data::{self, DataServer, DataService, Directory, Source, SourceError, catalogues};
use crate::files::{FileError, read_json};
use crate::serve::{Ports, ServeError, close, ending, on_stop};

/// Pause before a coordinator that is away is asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// Patience until the coordinator has told its own (`cluster.coordinator_timeout`).
const FIRST_PATIENCE: Duration = Duration::from_secs(60);

/// How a data server is started.
#[derive(Clone, Debug)]
pub struct ReplicaSettings {
    /// None: where the job's configuration has it.
    pub dataset: Option<PathBuf>,
    /// `http://HOST:PORT` of the coordinator's gRPC.
    pub coordinator: String,
    /// The job's secret, and its certificates if it has any.
    pub pass: Pass,
    /// None: as the job's configuration says.
    pub bind: Option<String>,
    /// 0 = any free one.
    pub grpc_port: u16,
    /// 0 = any free one.
    pub http_port: u16,
    /// Every byte is read and compared with its checksum first.
    pub verify: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error(
        "`{url}` is no address of a coordinator: {reason}; it looks like http://HOST:PORT, see RUN/coordinator.json"
    )]
    Address { url: String, reason: String },
    #[error("{run} has no live coordinator: its job has ended or has not begun; `learn-launch status {run}` tells")]
    NoCoordinator { run: String },
    #[error("the coordinator at {url} has not answered for {waited:?}: {status}")]
    Away { url: String, waited: Duration, status: Box<Status> },
    #[error("the coordinator refused this data server: {0}")]
    Refused(String),
    #[error("the coordinator's configuration cannot be read: {0}; start all processes of a job from the same build")]
    Config(#[from] serde_json::Error),
}

/// The URL of the gRPC of a run's coordinator.
///
/// # Errors
/// If there is none, or its address cannot be read.
pub fn coordinator_of(run: &RunDir) -> Result<String, CoordinatorError> {
    match read_json::<CoordinatorAddress>(&run.coordinator()) {
        Ok(address) => Ok(address.grpc),
        Err(FileError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound && run.root().is_dir() => {
            Err(ReplicaError::NoCoordinator { run: run.root().display().to_string() }.into())
        }
        Err(error) => Err(error.into()),
    }
}

type Client = ControlClient<InterceptedService<Channel, BearerInterceptor>>;

/// The way to the coordinator.
struct Coordinator {
    url: String,
    client: Client,
    patience: Duration,
}

impl Coordinator {
    fn new(url: &str, pass: &Pass) -> Result<Self, ReplicaError> {
        let wrong = |reason: String| ReplicaError::Address { url: url.to_owned(), reason };
        let channel = pass.endpoint(url).map_err(|error| wrong(error.to_string()))?.connect_lazy();
        let bearer = pass.bearer().map_err(|error| wrong(error.to_string()))?;
        Ok(Self {
            url: url.to_owned(),
            client: ControlClient::with_interceptor(channel, bearer),
            patience: FIRST_PATIENCE,
        })
    }

    /// Asks until there is an answer, a refusal, or no patience left.
    async fn offer(&self, offer: &DataOffer) -> Result<OfferDataResponse, ReplicaError> {
        let started = Instant::now();
        loop {
            let request = OfferDataRequest::from(offer.clone());
            let status = match self.client.clone().offer_data(request).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            let waited = started.elapsed();
            if !may_pass(&status) {
                return Err(ReplicaError::Refused(status.message().to_owned()));
            }
            if waited > self.patience {
                return Err(ReplicaError::Away { url: self.url.clone(), waited, status: Box::new(status) });
            }
            tracing::debug!(%status, "the coordinator does not answer; asking again");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// What is served, and as what.
struct Replica {
    coordinator: Coordinator,
    offer: DataOffer,
    directory: Directory,
    service: DataService,
    ports: Ports,
    pass: Pass,
}

impl Replica {
    async fn bind(settings: ReplicaSettings) -> Result<Self, CoordinatorError> {
        let mut coordinator = Coordinator::new(&settings.coordinator, &settings.pass)?;
        let mut offer = DataOffer { fingerprint: String::new(), embeddings_fingerprint: String::new(), server: None };
        // the coordinator says where the dataset is, if nobody else has
        let dataset = match settings.dataset {
            Some(dataset) => dataset,
            None => parse(&coordinator.offer(&offer).await?.config_json)?.data.dataset,
        };
        let verify = settings.verify;
        let open = move |progress: &dyn Progress| -> Result<Dataset, SourceError> {
            let dataset = Dataset::open(&dataset)?;
            if verify {
                data::verify(&dataset, progress)?;
            }
            Ok(dataset)
        };
        let dataset = data::opened(open).await?;
        let facts = dataset.facts();
        offer.fingerprint = facts.fingerprint;
        offer.embeddings_fingerprint = facts.embeddings_fingerprint;
        let terms = coordinator.offer(&offer).await?;
        let config = parse(&terms.config_json)?;
        coordinator.patience = config.cluster.coordinator_timeout.0;
        let source = Arc::new(Source::new(dataset, &config)?);

        let bind = settings.bind.unwrap_or_else(|| config.cluster.bind.clone());
        let (grpc_port, http_port) = (settings.grpc_port, settings.http_port);
        let cluster = ClusterConfig { bind, grpc_port, http_port, ..ClusterConfig::default() };
        let ports = Ports::bind(&cluster, settings.pass.tls()).await?;
        // under the name that the others know it by
        let named = terms.data_locations.last().unwrap_or(&settings.coordinator);
        let directory = Directory::new(named, config.cluster.coordinator_timeout.0);
        directory.replace(terms.data_locations, Instant::now());
        offer.server = Some(OfferedServer {
            location: ports.address.grpc.clone(),
            metrics_url: format!("{}/metrics", ports.address.http),
            host: learn_telemetry::host::name(),
            pid: std::process::id(),
            config_json: terms.config_json,
        });
        let service = DataService {
            source,
            metrics: DataMetrics::new(),
            world_size: config.cluster.workers,
            directory: directory.clone(),
            catalogues: catalogues(),
        };
        Ok(Self { coordinator, offer, directory, service, ports, pass: settings.pass })
    }

    async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), CoordinatorError> {
        let Self { coordinator, offer, directory, service, ports, pass } = self;
        let (stop, stopped) = watch::channel(false);
        let exposition = service.metrics.exposition.clone();
        let data = DataServer::new(service);
        let grpc = connections::server()
            .add_service(InterceptedService::new(data, Gate(pass.secret().clone())))
            .serve_with_incoming_shutdown(
                connections::connections(ports.grpc, connections::Limits::default(), ports.tls),
                on_stop(stopped.clone()),
            );
        let http = learn_telemetry::serve(ports.http, exposition, on_stop(stopped));
        let mut servers = JoinSet::new();
        servers.spawn(async move { ("gRPC", ending(grpc.await)) });
        servers.spawn(async move { ("HTTP", ending(http.await)) });
        tracing::info!(location = ports.address.grpc, metrics = ports.address.http, "serving data");

        let offers = async {
            loop {
                let terms = coordinator.offer(&offer).await?;
                if terms.over {
                    tracing::info!("the job is over");
                    return Ok(());
                }
                directory.replace(terms.data_locations, Instant::now());
            }
        };
        let ended = tokio::select! {
            ended = offers => ended.map_err(|error: ReplicaError| error.into()),
            // the offer ends with its call, so nobody is sent here any more
            () = shutdown => Ok(()),
            Some(server) = servers.join_next() => Err(match server {
                Ok((name, how)) => ServeError::Server(name, how).into(),
                Err(error) => ServeError::Task(error).into(),
            }),
        };
        close(&stop, &mut servers).await;
        ended
    }
}

fn parse(config_json: &str) -> Result<Config, ReplicaError> {
    Ok(serde_json::from_str(config_json)?)
}

/// Serves data until the job is over; `shutdown` is the operator's stop.
///
/// # Errors
/// If the dataset is not the job's, the coordinator stays away, or a port is taken.
pub async fn serve(
    settings: ReplicaSettings,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), CoordinatorError> {
    let mut shutdown = std::pin::pin!(shutdown);
    let replica = tokio::select! {
        replica = Replica::bind(settings) => replica?,
        () = &mut shutdown => return Ok(()),
    };
    replica.serve(shutdown).await
}

#[cfg(test)]
mod tests {
    use learn_domain::report::exit;

    use super::*;
    use crate::files::write_json;

    #[test]
    fn a_run_without_a_coordinator_is_named_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        let error = coordinator_of(&run).unwrap_err();
        assert_eq!(error.exit_code(), exit::FAILED);
        let text = error.to_string();
        assert!(text.contains("has no live coordinator") && text.contains("learn-launch status"), "{text}");
        let absent = coordinator_of(&RunDir::new(folder.path().join("none"))).unwrap_err().to_string();
        assert!(absent.contains("none/coordinator.json"), "a run that is not there is something else: {absent}");
        let address = CoordinatorAddress { grpc: "http://h:1".into(), ..CoordinatorAddress::default() };
        write_json(&run.coordinator(), &address).unwrap();
        assert_eq!(coordinator_of(&run).unwrap(), "http://h:1");
    }
}
