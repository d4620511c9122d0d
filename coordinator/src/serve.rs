//! From settings to listening sockets, and from there to the end of the job.

use std::fs::{File, TryLockError};
use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use learn_dataset::{Dataset, Progress};
use learn_domain::WorkerId;
use learn_domain::config::{ClusterConfig, TlsMode};
use learn_domain::membership::Outcome;
use learn_domain::report::{CoordinatorAddress, Task};
use learn_domain::run_dir::RunDir;
use learn_proto::convert::Admission;
use learn_proto::tls::{Tls, TlsError};
use learn_proto::v1::control_server::ControlServer;
use learn_proto::v1::operator_server::OperatorServer;
use learn_telemetry::{CoordinatorMetrics, host};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tonic::service::interceptor::InterceptedService;

use crate::board::Follower;
use crate::connections::{self, Gate, MAX_REQUEST_BYTES};
use crate::control::ControlService;
use crate::data::{self, DataServer, DataService, Directory, Source, SourceError, catalogues};
use crate::files::{FileError, read_json, write_json};
use crate::http::access::Access;
use crate::job::actor::{Command, JobHandle, JobOwner, OwnerError, OwnerParts, STATES};
use crate::job::{Asked, History, Job, JobSettings, Keeping, LedgerFile, TakeOverError};
use crate::journal::{Journal, Kept, mend};
use crate::operator::OperatorService;
use crate::sd::Origin;
use crate::state::{StateFile, Turn};
use crate::store::Store;
use crate::{CoordinatorError, Settings, http};

/// Calls that are still open when the job has ended may take this long.
const GRACE: Duration = Duration::from_secs(2);
/// The ports of a process that was killed are free this soon.
const PORTS_WITHIN: Duration = Duration::from_secs(2);
/// Those who only look whether a run is free have given its lock back this soon.
const LOCK_WITHIN: Duration = Duration::from_secs(1);
/// Name of [`Identity`] in the state.
const IDENTITY: &str = "identity";

/// What a coordinator that takes over must have in common with the one before.
#[derive(Debug, Serialize, Deserialize)]
struct Identity {
    task: Task,
    /// Of the dataset.
    fingerprint: String,
    /// Of its content embeddings; empty where the model reads none, and in states of older versions.
    #[serde(default)]
    embeddings_fingerprint: String,
    /// Where the workers look for their coordinator.
    grpc_port: u16,
    http_port: u16,
    #[serde(default)]
    restarts: u32,
    #[serde(default)]
    most_workers: Option<u32>,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen on {host}:{port}: {source}; {}", way_out(.source, .key))]
    Bind { host: String, port: u16, key: &'static str, source: std::io::Error },
    #[error(
        "{0} is not free: another coordinator serves it now, and `learn-launch stop` ends that; or another one is being started"
    )]
    Locked(PathBuf),
    #[error("cannot lock {path}: {source}")]
    Lock { path: PathBuf, source: std::io::Error },
    #[error(
        "cannot lock {path}: {source}; this file system has no locks: mount it with them (Lustre: `-o flock`), or set \
         job.runs_dir to one that has"
    )]
    NoLocks { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cluster.tls is on, but there is no {0}; start the job with `learn-launch`, which writes it")]
    NoCertificates(PathBuf),
    #[error("the {0} server ended before the job: {1}")]
    Server(&'static str, String),
    #[error("a part of the coordinator failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Owner(#[from] OwnerError),
}

/// What to change where one cannot listen.
fn way_out(error: &std::io::Error, key: &str) -> String {
    match error.kind() {
        ErrorKind::AddrInUse | ErrorKind::PermissionDenied => {
            format!("choose another cluster.{key}, or 0 for any free port")
        }
        _ => {
            "set cluster.bind to an address of this machine, or to 127.0.0.1 if nobody comes from elsewhere".to_owned()
        }
    }
}

/// A coordinator that listens already.
pub struct Coordinator {
    settings: Settings,
    ports: Ports,
    source: Arc<Source>,
    metrics: CoordinatorMetrics,
    job: JobHandle,
    owner: JobOwner,
    journal: Journal,
    /// On the run directory; the journal holds it to its end, and [`Coordinator::run`] until nothing of it is left there.
    lock: Arc<File>,
}

/// One coordinator a run: an advisory lock on its secret, a file that is never replaced; the system drops it with the
/// process. `learn-launch` takes it, too, while it looks whether a run is free, and while it makes one ready.
pub(crate) async fn lock(run_dir: &RunDir) -> Result<File, ServeError> {
    let started = Instant::now();
    loop {
        match try_lock(run_dir) {
            Err(ServeError::Locked(_)) if started.elapsed() < LOCK_WITHIN => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tried => return tried,
        }
    }
}

fn try_lock(run_dir: &RunDir) -> Result<File, ServeError> {
    let path = run_dir.secret();
    // NFS locks for one writer only what is open for writing
    let opened = File::options().read(true).write(true).open(&path).map_err(TryLockError::Error);
    let locked = opened.and_then(|file| file.try_lock().map(|()| file));
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => ServeError::Locked(run_dir.root().to_owned()),
        TryLockError::Error(source) if source.kind() == ErrorKind::Unsupported => ServeError::NoLocks { path, source },
        TryLockError::Error(source) => ServeError::Lock { path, source },
    })
}

/// The bound ports of a coordinator, and the address by which others reach them.
pub(crate) struct Ports {
    pub grpc: TcpListener,
    pub http: TcpListener,
    /// Of gRPC and HTTP.
    pub ports: (u16, u16),
    pub address: CoordinatorAddress,
    /// With certificates only calls that are encrypted, from clients that have one.
    pub tls: Option<TlsAcceptor>,
}

impl Ports {
    /// As [`Ports::bind`], but waits a moment for ports that a killed process had.
    async fn inherit(cluster: &ClusterConfig, tls: Option<&Tls>) -> Result<Self, ServeError> {
        let started = Instant::now();
        loop {
            match Self::bind(cluster, tls).await {
                Err(ServeError::Bind { source, .. })
                    if source.kind() == ErrorKind::AddrInUse && started.elapsed() < PORTS_WITHIN =>
                {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                bound => return bound,
            }
        }
    }

    /// # Errors
    /// A port is taken, or the certificates cannot be used.
    pub async fn bind(cluster: &ClusterConfig, tls: Option<&Tls>) -> Result<Self, ServeError> {
        let tls = tls.map(Tls::server).transpose()?.map(TlsAcceptor::from);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (grpc, grpc_port) = listen(&cluster.bind, cluster.grpc_port, "grpc_port").await?;
        let (http, http_port) = listen(&cluster.bind, cluster.http_port, "http_port").await?;
        let host = host::in_url(&host::advertised(&cluster.bind));
        let ports = (grpc_port, http_port);
        let address = CoordinatorAddress {
            pid: std::process::id(),
            host: host::name(),
            grpc: format!("{scheme}://{host}:{grpc_port}"),
            http: format!("http://{host}:{http_port}"),
            // the standard library keys each anew
            incarnation: format!("{:016x}", RandomState::new().hash_one(http_port)),
        };
        Ok(Self { grpc, http, ports, address, tls })
    }
}

/// The certificates of a run, if its configuration wants any.
///
/// # Errors
/// They are not there, or cannot be used.
pub(crate) fn certificates(cluster: &ClusterConfig, run_dir: &RunDir) -> Result<Option<Tls>, ServeError> {
    match cluster.tls.mode {
        TlsMode::Off => Ok(None),
        TlsMode::Auto | TlsMode::Files => match Tls::beside(&run_dir.secret())? {
            None => Err(ServeError::NoCertificates(run_dir.tls())),
            found => Ok(found),
        },
    }
}

/// Writes the address into the run directory for as long as `serving` takes. One that another coordinator has written in its
/// place stays.
///
/// # Errors
/// The address cannot be written, or serving fails.
pub(crate) async fn announced<T>(
    run_dir: &RunDir,
    address: &CoordinatorAddress,
    serving: impl Future<Output = Result<T, CoordinatorError>>,
) -> Result<T, CoordinatorError> {
    let file = run_dir.coordinator();
    write_json(&file, address)?;
    tracing::info!(grpc = address.grpc, http = address.http, "serving");
    let ended = serving.await;
    let own = read_json::<CoordinatorAddress>(&file).is_ok_and(|there| there.incarnation == address.incarnation);
    if own && let Err(error) = std::fs::remove_file(&file) {
        tracing::warn!(%error, path = %file.display(), "cannot remove the address of this coordinator");
    }
    ended
}

async fn listen(bind: &str, port: u16, key: &'static str) -> Result<(TcpListener, u16), ServeError> {
    let error = |source| ServeError::Bind { host: bind.to_owned(), port, key, source };
    let listener = TcpListener::bind((bind, port)).await.map_err(error)?;
    let port = listener.local_addr().map_err(error)?.port();
    Ok((listener, port))
}

/// Ends when the servers are to stop.
pub(crate) async fn on_stop(mut stopped: watch::Receiver<bool>) {
    // the sender outlives the servers
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Tells the servers to stop, and cuts calls off that are open for too long.
pub(crate) async fn close<T: 'static>(stop: &watch::Sender<bool>, servers: &mut JoinSet<T>) {
    stop.send_replace(true);
    let all = async { while servers.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, all).await.is_err() {
        tracing::debug!("calls were still open; they are cut off");
        servers.shutdown().await;
    }
}

/// `verify`: every byte is read and compared with its checksum.
async fn open_source(settings: &Settings, verify: bool) -> Result<Arc<Source>, CoordinatorError> {
    let config = settings.config.clone();
    let open = move |progress: &dyn Progress| -> Result<Source, SourceError> {
        let dataset = Dataset::open(&config.data.dataset)?;
        let source = Source::new(dataset, &config)?;
        if verify {
            data::verify(&source.dataset, progress)?;
        }
        Ok(source)
    };
    Ok(Arc::new(data::opened(open).await?))
}

fn job_settings(settings: &Settings, source: &Source, history: History) -> JobSettings {
    JobSettings {
        config: settings.config.clone(),
        task: settings.task.clone(),
        dataset: source.facts.clone(),
        plan: source.plan.clone(),
        total_steps: source.total_steps,
        restarts: settings.restarts,
        most_workers: settings.most_workers,
        history,
    }
}

impl Coordinator {
    /// Checks everything that can be checked and binds the ports.
    ///
    /// # Errors
    /// If dataset, configuration and history do not go together, or a port is taken.
    pub async fn bind(settings: Settings) -> Result<Self, CoordinatorError> {
        let lock = Arc::new(lock(&settings.run_dir).await?);
        let source = open_source(&settings, settings.verify).await?;
        let Settings { run_dir, config, task, .. } = &settings;
        let history = History::load(run_dir, task, &source.facts.fingerprint)?;
        // a machine that went down may have cut a last line
        mend(run_dir, &[])?;
        let (entries, journal) = Journal::open(run_dir.clone(), source.facts.fingerprint.clone(), config)?;
        let ports = Ports::bind(&config.cluster, certificates(&config.cluster, run_dir)?.as_ref()).await?;
        let mut state = StateFile::create(&run_dir.coordinator_state())?;
        let mut identity = Turn::default();
        let (grpc_port, http_port) = ports.ports;
        let known = Identity {
            task: task.clone(),
            fingerprint: source.facts.fingerprint.clone(),
            embeddings_fingerprint: source.facts.embeddings_fingerprint.clone(),
            grpc_port,
            http_port,
            restarts: settings.restarts,
            most_workers: settings.most_workers,
        };
        identity.value(IDENTITY, &known)?;
        state.write(identity)?;
        let job = Job::new(job_settings(&settings, &source, history));
        let metrics = CoordinatorMetrics::new(STATES);
        let parts = OwnerParts {
            task: task.clone(),
            keeping: Keeping { state, journal: entries, written: journal.written() },
            metrics: metrics.clone(),
            store: Store::default(),
            earlier: Duration::ZERO,
            taken_over: false,
        };
        let (job, owner) = JobOwner::new(job, parts).await.map_err(ServeError::Owner)?;
        Ok(Self { ports, source, metrics, job, owner, journal, lock, settings })
    }

    /// Goes on with the job of a coordinator that was killed, on the same ports. The bytes of the dataset, which were verified
    /// when the job began, are not read again.
    ///
    /// # Errors
    /// If there is no such job, its state is damaged, or its ports are taken.
    pub async fn take_over(run_dir: &Path) -> Result<Self, CoordinatorError> {
        let run_dir = RunDir::new(run_dir);
        let lock = Arc::new(lock(&run_dir).await?);
        let state = StateFile::open(&run_dir.coordinator_state())?;
        let identity: Identity = state.value(IDENTITY)?.ok_or(TakeOverError::Incomplete(IDENTITY))?;
        let Identity { restarts, most_workers, .. } = identity;
        let settings = Settings { restarts, most_workers, ..Settings::load(run_dir.root(), None, identity.task)? };
        let source = open_source(&settings, false).await?;
        if source.facts.fingerprint != identity.fingerprint {
            return Err(TakeOverError::Dataset(settings.config.data.dataset.clone()).into());
        }
        let (before, now) = (identity.embeddings_fingerprint, &source.facts.embeddings_fingerprint);
        if !before.is_empty() && before != *now {
            let (dataset, now) = (settings.config.data.dataset.clone(), now.clone());
            return Err(TakeOverError::Embeddings { dataset, before, now }.into());
        }
        let (job, earlier) = Job::take_over(job_settings(&settings, &source, History::default()), &state)?;
        mend(&run_dir, &state.lines::<Kept>()?)?;
        if let Some((step, ledger)) = job.committed().filter(|(step, _)| !run_dir.ledger(*step).exists()) {
            LedgerFile::write(&run_dir, step, &identity.fingerprint, ledger.clone())?;
        }
        let (entries, journal) = Journal::open(run_dir.clone(), identity.fingerprint, &settings.config)?;
        let (grpc_port, http_port) = (identity.grpc_port, identity.http_port);
        let cluster = ClusterConfig { grpc_port, http_port, ..settings.config.cluster.clone() };
        let ports = Ports::inherit(&cluster, certificates(&cluster, &run_dir)?.as_ref()).await?;
        let metrics = CoordinatorMetrics::new(STATES);
        let parts = OwnerParts {
            task: settings.task.clone(),
            store: Store::kept(state.keys()?),
            keeping: Keeping { state, journal: entries, written: journal.written() },
            metrics: metrics.clone(),
            earlier,
            taken_over: true,
        };
        let (job, owner) = JobOwner::new(job, parts).await.map_err(ServeError::Owner)?;
        Ok(Self { ports, source, metrics, job, owner, journal, lock, settings })
    }

    #[must_use]
    pub fn address(&self) -> &CoordinatorAddress {
        &self.ports.address
    }

    /// Serves until the job has ended; `shutdown` is the operator's stop.
    ///
    /// # Errors
    /// If a server fails, or the run's files cannot be written any more.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<Outcome, CoordinatorError> {
        let (from, to) = (&self.settings.config_file, self.settings.run_dir.config());
        if *from != to {
            std::fs::rename(from, &to).map_err(|source| FileError::Write { action: "replace", path: to, source })?;
        }
        let (run_dir, address) = (self.settings.run_dir.clone(), self.ports.address.clone());
        // whoever comes next has files of the same names
        let _lock = Arc::clone(&self.lock);
        let ended = announced(&run_dir, &address, self.serve(shutdown)).await?;
        let state = run_dir.coordinator_state();
        if let Err(error) = std::fs::remove_file(&state) {
            tracing::warn!(%error, path = %state.display(), "cannot remove the state of a job that has ended");
        }
        Ok(ended)
    }

    async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<Outcome, CoordinatorError> {
        let (stop, stopped) = watch::channel(false);
        let (end, over) = watch::channel(false);
        let directory = Directory::new(&self.ports.address.grpc, self.settings.config.cluster.heartbeat_timeout.0);
        let (control, data) = (self.control(&directory, &over)?, self.data(&directory));
        let operator = OperatorService { job: self.job.clone(), metrics: self.metrics.clone() };
        let gate = Gate(self.settings.secret.clone());
        let origin = Origin::new(&self.settings.config.job.name, &self.ports.address);
        let pages = http::Parts {
            job: self.job.clone(),
            access: Access::new(self.settings.secret.clone(), self.settings.token.clone(), self.ports.tls.is_some()),
            exposition: self.metrics.exposition.clone(),
            origin,
            directory: directory.clone(),
            config: self.settings.config.clone(),
            follower: Follower::new(&self.settings.run_dir),
        };
        let interval = self.settings.config.cluster.heartbeat_interval.0;
        let Self { ports: Ports { grpc, http, tls, .. }, job, owner, journal, lock, .. } = self;

        let mut servers = JoinSet::new();
        let control = ControlServer::new(control).max_decoding_message_size(MAX_REQUEST_BYTES);
        let operator = OperatorServer::new(operator).max_decoding_message_size(MAX_REQUEST_BYTES);
        let data = DataServer::new(data);
        let grpc = connections::server()
            .add_service(InterceptedService::new(control, gate.clone()))
            .add_service(InterceptedService::new(operator, gate.clone()))
            .add_service(InterceptedService::new(data, gate))
            .serve_with_incoming_shutdown(
                connections::connections(grpc, connections::Limits::default(), tls),
                on_stop(stopped.clone()),
            );
        servers.spawn(async move { ("gRPC", ending(grpc.await)) });
        servers.spawn(async move { ("HTTP", ending(http::serve(http, pages, on_stop(stopped)).await)) });
        // whoever comes next must not meet a thread that still writes
        let journal = tokio::task::spawn_blocking(move || {
            let _lock = lock;
            journal.write_all()
        });
        let mut owner = tokio::spawn(owner.run());
        let mut shutdown = std::pin::pin!(shutdown);
        let mut asked = false;
        let (outcome, broken) = loop {
            tokio::select! {
                outcome = &mut owner => break (Some(outcome), None),
                () = &mut shutdown, if !asked => {
                    asked = true;
                    if let Err(error) = job.ask(|reply| Command::Stop(Asked::BySignal, reply)).await {
                        tracing::debug!(%error, "asked to stop at the very end");
                    }
                }
                Some(ended) = servers.join_next() => break (None, Some(match ended {
                    Ok((name, result)) => ServeError::Server(name, result),
                    Err(error) => ServeError::Task(error),
                })),
            }
        };
        end.send_replace(true);
        if outcome.is_some() && !directory.servers(Instant::now()).is_empty() {
            // a data server hears of it by the call that it has open, or by its next one
            tokio::time::sleep(interval).await;
        }
        close(&stop, &mut servers).await;
        // without servers and this handle nobody can ask any more, so that an owner that still works ends
        drop(job);
        let outcome = match outcome {
            Some(outcome) => outcome,
            None => owner.await,
        };
        // a file that could not be written is the cause of what the owner says then
        journal.await.map_err(ServeError::Task)??;
        match broken {
            Some(error) => Err(error.into()),
            None => Ok(outcome.map_err(ServeError::Task)?.map_err(ServeError::Owner)?),
        }
    }

    fn control(&self, directory: &Directory, over: &watch::Receiver<bool>) -> Result<ControlService, CoordinatorError> {
        let admission = Admission {
            worker: WorkerId(0),
            config: self.settings.config.clone(),
            dataset: self.source.facts.clone(),
            task: self.settings.task.clone(),
            data_locations: Vec::new(),
            run_dir: self.settings.run_dir.root().to_owned(),
        };
        let path = self.settings.run_dir.config();
        let config_json =
            serde_json::to_string(&self.settings.config).map_err(|source| FileError::Json { path, source })?;
        Ok(ControlService {
            job: self.job.clone(),
            metrics: self.metrics.clone(),
            admission,
            config_json,
            directory: directory.clone(),
            over: over.clone(),
        })
    }

    fn data(&self, directory: &Directory) -> DataService {
        DataService {
            source: Arc::clone(&self.source),
            metrics: self.metrics.data.clone(),
            world_size: self.settings.config.cluster.workers,
            directory: directory.clone(),
            catalogues: catalogues(),
        }
    }
}

/// How a server ended, for people.
pub(crate) fn ending<E: std::error::Error>(result: Result<(), E>) -> String {
    match result {
        Ok(()) => "it was told to stop".into(),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_address_of_another_coordinator_stays() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let address =
            |incarnation: &str| CoordinatorAddress { incarnation: incarnation.into(), ..CoordinatorAddress::default() };
        announced(&run_dir, &address("a"), async { Ok::<_, CoordinatorError>(()) }).await.unwrap();
        assert!(!run_dir.coordinator().exists(), "its own goes");
        let replaced = async { write_json(&run_dir.coordinator(), &address("b")).map_err(CoordinatorError::from) };
        announced(&run_dir, &address("a"), replaced).await.unwrap();
        assert_eq!(read_json::<CoordinatorAddress>(&run_dir.coordinator()).unwrap(), address("b"));
    }

    #[tokio::test]
    async fn who_cannot_listen_is_told_whether_the_port_or_the_address_is_to_be_changed() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let text = listen("127.0.0.1", port, "grpc_port").await.unwrap_err().to_string();
        assert!(text.contains("cluster.grpc_port, or 0") && !text.contains("cluster.bind"), "{text}");
        // an address for documentation, which no machine has
        let text = listen("203.0.113.7", 0, "grpc_port").await.unwrap_err().to_string();
        assert!(text.contains("set cluster.bind") && !text.contains("grpc_port"), "{text}");
    }

    #[tokio::test]
    async fn who_only_looks_whether_a_run_is_free_keeps_no_coordinator_from_it() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        std::fs::write(run_dir.secret(), "secret").unwrap();
        let looks = try_lock(&run_dir).unwrap();
        let (locked, ()) = tokio::join!(lock(&run_dir), async {
            // it has been tried in vain by now
            looks.unlock().unwrap();
        });
        let _coordinator = locked.unwrap();
        assert!(matches!(try_lock(&run_dir), Err(ServeError::Locked(_))));
        let refused = lock(&run_dir).await.unwrap_err();
        assert!(matches!(refused, ServeError::Locked(_)), "its patience ends");
        let text = refused.to_string();
        assert!(text.contains("learn-launch stop") && text.contains("being started"), "{text}");
    }
}
