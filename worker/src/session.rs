//! A worker's life in a job: join -> wait for a generation -> connect the collective -> do the task -> leave.
//!
//! Input: the coordinator's address and secret. Output: an exit code; everything else goes through the coordinator.
//! Invariants: whatever ends the task, the worker leaves with its reason; a stop from outside reaches a training thread
//! that is blocked in a collective, because the heartbeat task aborts it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use learn_collective::{Aborter, Group};
use learn_domain::config::DeviceKind;
use learn_domain::membership::Departure;
use learn_domain::report::{Task, exit};
use learn_domain::run_dir::RunDir;
use learn_domain::{Generation, Incarnation, WorkerId};
use learn_proto::auth::Secret;
use learn_proto::convert::{Admission, Applicant, Order};
use learn_telemetry::WorkerMetrics;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::control::{Control, ControlError, Member, Place, Progress};
use crate::error::WorkerError;
use crate::evaluate;
use crate::panic;
use crate::train::{self, Exchange};

/// How a worker process is started.
#[derive(Clone, Debug)]
pub struct JoinSettings {
    /// `http://HOST:PORT` of the coordinator.
    pub coordinator: String,
    pub secret_file: PathBuf,
    pub device: DeviceKind,
    /// Number of the GPU.
    pub ordinal: usize,
    /// 0 = libtorch's own choice.
    pub threads: usize,
    /// Address that the collective and the metrics listen on.
    pub bind: String,
}

/// Requests to stop, from the coordinator or a signal, as the training thread sees them.
#[derive(Default)]
pub struct Stops {
    graceful: AtomicBool,
    aborted: Mutex<Option<String>>,
    aborter: Mutex<Option<Aborter>>,
}

impl Stops {
    /// Finish the step, write a checkpoint, leave.
    pub fn request(&self) {
        self.graceful.store(true, Ordering::Relaxed);
    }

    #[must_use]
    pub fn requested(&self) -> bool {
        self.graceful.load(Ordering::Relaxed)
    }

    /// Leave at once: running and later collectives fail.
    pub fn abort(&self, cause: String) {
        self.aborted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(cause);
        if let Some(aborter) = &*self.aborter.lock().unwrap_or_else(PoisonError::into_inner) {
            aborter.abort();
        }
    }

    /// Why the task was aborted, if it was.
    #[must_use]
    pub fn aborted(&self) -> Option<String> {
        self.aborted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn watch(&self, aborter: Aborter) {
        *self.aborter.lock().unwrap_or_else(PoisonError::into_inner) = Some(aborter.clone());
        // an abort that came before there was anything to abort
        if self.aborted().is_some() {
            aborter.abort();
        }
    }
}

/// What the task of a member works with.
pub struct Membership {
    pub member: Member,
    pub admission: Admission,
    pub secret: Secret,
    pub device: tch::Device,
    pub metrics: WorkerMetrics,
    pub progress: Arc<Progress>,
    pub stops: Arc<Stops>,
}

impl Membership {
    #[must_use]
    pub fn run_dir(&self) -> RunDir {
        RunDir::new(&self.admission.run_dir)
    }
}

/// How a task ended without failing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Done,
    /// As a graceful stop asked.
    Stopped,
}

/// Joins a job, takes part, leaves; returns the exit code.
///
/// # Errors
/// If the job could not be joined or the task failed; the coordinator has been told if it could be.
pub fn join(settings: &JoinSettings) -> Result<i32, WorkerError> {
    let secret = Secret::read(&settings.secret_file)?;
    let device = learn_torch::device(settings.device, settings.ordinal)?;
    if settings.threads > 0 {
        learn_torch::set_threads(settings.threads);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(WorkerError::Runtime)?;
    let metrics = WorkerMetrics::new();
    let metrics_address = serve_metrics(&runtime, &settings.bind, &metrics)?;
    let control = Control::connect(runtime.handle().clone(), &settings.coordinator, &secret)?;
    let admission = control.join(Applicant {
        incarnation: Incarnation(format!("{}-{:016x}", std::process::id(), start_nonce())),
        host: host_name(),
        pid: std::process::id(),
        device: device_name(device),
        metrics_url: format!("http://{}:{}/metrics", advertised(&settings.bind), metrics_address.port()),
    })?;
    let worker = admission.worker;
    tracing::info!(%worker, coordinator = settings.coordinator, "joined");

    let stops = Arc::new(Stops::default());
    let progress = Arc::new(Progress::default());
    spawn_signals(&runtime, stops.clone(), admission.config.cluster.stop_within());
    let (orders, watched) = watch::channel(Order::Wait);
    let heartbeats = Heartbeats {
        control: control.clone(),
        worker,
        interval: admission.config.cluster.heartbeat_interval.0,
        timeout: admission.config.cluster.heartbeat_timeout.0,
        progress: progress.clone(),
        stops: stops.clone(),
        orders,
    };
    runtime.spawn(heartbeats.run());

    let Some(place) = wait_for_place(&runtime, watched, &stops)? else {
        control.leave(worker, Generation(0), Departure::Stopped)?;
        return Ok(exit::STOPPED);
    };
    metrics.generation.set(place.generation.0 as i64);
    metrics.exposition.set_label("rank", place.rank);
    let member = control.member(worker, place);
    let membership = Membership { member, admission, secret, device, metrics, progress, stops };
    let span = tracing::info_span!("member", generation = place.generation.0, rank = place.rank.0);
    let ended = span.in_scope(|| panic::caught(|| take_part(&membership, settings), || membership.progress.phase()));
    let ended = ended.map_err(|error| match membership.stops.aborted() {
        Some(cause) => WorkerError::Aborted { cause, error: error.to_string() },
        None => error,
    });
    let departure = match &ended {
        Ok(Ended::Done) => Departure::Done,
        Ok(Ended::Stopped) => Departure::Stopped,
        Err(error) => match error.gives_up() {
            Some(why) => Departure::GaveUp(why, error.to_string()),
            None => Departure::Failed(error.to_string()),
        },
    };
    let reported = membership.member.finish();
    if ended.is_ok() {
        reported?;
    }
    let left = control.leave(worker, place.generation, departure);
    let ended = ended?;
    left?;
    Ok(if ended == Ended::Done { exit::OK } else { exit::STOPPED })
}

fn take_part(membership: &Membership, settings: &JoinSettings) -> Result<Ended, WorkerError> {
    let Place { generation, rank, world_size } = membership.member.place;
    let cluster = &membership.admission.config.cluster;
    let group = Group {
        rank: rank.0 as usize,
        world_size: world_size as usize,
        generation: generation.0,
        secret: membership.secret.as_bytes().to_vec(),
        bind: settings.bind.clone(),
        advertise: advertised(&settings.bind),
        timeout: cluster.collective_timeout.0,
    };
    let connected = match membership.device {
        tch::Device::Cuda(ordinal) => learn_collective::connect_nccl(group, ordinal as i32, &membership.member),
        _ => learn_collective::connect_tcp(group, &membership.member),
    };
    let collective = match connected {
        Ok(collective) => collective,
        // a rank that was told to stop did not come
        Err(_) if membership.stops.requested() && membership.stops.aborted().is_none() => return Ok(Ended::Stopped),
        Err(error) => return Err(error.into()),
    };
    membership.stops.watch(collective.aborter());
    let exchange = Exchange::new(collective, membership.metrics.clone());
    match &membership.admission.task {
        Task::Train { resume_from } => train::run(membership, exchange, resume_from.as_deref()),
        Task::Evaluate { checkpoint, split } => evaluate::run(membership, exchange, checkpoint, *split),
    }
}

struct Heartbeats {
    control: Control,
    worker: WorkerId,
    interval: Duration,
    timeout: Duration,
    progress: Arc<Progress>,
    stops: Arc<Stops>,
    orders: watch::Sender<Order>,
}

impl Heartbeats {
    /// Runs until the process ends: a worker is alive as long as it says so.
    async fn run(self) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut generation = Generation(0);
        let mut last_answer = Instant::now();
        loop {
            ticks.tick().await;
            let heartbeat = self.control.heartbeat(self.worker, generation, &self.progress);
            let answer = tokio::time::timeout(self.timeout, heartbeat).await;
            match answer.unwrap_or(Err(ControlError::Silent)) {
                Ok(order) => {
                    last_answer = Instant::now();
                    match &order {
                        Order::Run { generation: current, .. } => generation = *current,
                        Order::Stop { graceful: true, .. } => self.stops.request(),
                        Order::Stop { graceful: false, cause } => self.stops.abort(cause.clone()),
                        Order::Wait => {}
                    }
                    self.orders.send_replace(order);
                }
                Err(error) if last_answer.elapsed() > self.control.patience().limit() => {
                    let cause = format!("the coordinator has not answered for {:?}: {error}", last_answer.elapsed());
                    self.stops.abort(cause.clone());
                    self.orders.send_replace(Order::Stop { graceful: false, cause });
                }
                Err(error) => tracing::warn!(%error, "heartbeat failed"),
            }
        }
    }
}

/// The place in the first generation; `None` after a graceful stop that came before.
fn wait_for_place(
    runtime: &Runtime,
    mut orders: watch::Receiver<Order>,
    stops: &Stops,
) -> Result<Option<Place>, WorkerError> {
    runtime.block_on(async {
        loop {
            match orders.borrow_and_update().clone() {
                Order::Run { generation, rank, world_size } => {
                    return Ok(Some(Place { generation, rank, world_size }));
                }
                Order::Stop { graceful: true, .. } => return Ok(None),
                Order::Stop { cause, .. } => return Err(WorkerError::Refused(cause)),
                Order::Wait if stops.requested() => return Ok(None),
                Order::Wait => {}
            }
            if orders.changed().await.is_err() {
                return Err(WorkerError::Refused("the heartbeat task has ended".into()));
            }
        }
    })
}

/// SIGTERM and SIGUSR1 (a scheduler's notice) ask for a graceful stop; a worker that is stuck ends after `grace` all the
/// same, so that none is left over when nobody is there to kill it. SIGINT is left to the launcher: a terminal sends it to every process of the job.
fn spawn_signals(runtime: &Runtime, stops: Arc<Stops>, grace: Duration) {
    use tokio::signal::unix::{SignalKind, signal};
    runtime.spawn(async move {
        let kinds = [SignalKind::terminate(), SignalKind::user_defined1(), SignalKind::interrupt()];
        let [Ok(mut terminate), Ok(mut notice), Ok(mut interrupt)] = kinds.map(signal) else {
            tracing::error!("signals cannot be handled; SIGTERM will end this worker without a checkpoint");
            return;
        };
        let asked = async {
            loop {
                tokio::select! {
                    _ = terminate.recv() => break,
                    _ = notice.recv() => break,
                    _ = interrupt.recv() => {}
                }
            }
        };
        asked.await;
        stops.request();
        tokio::time::sleep(grace).await;
        tracing::error!(
            "asked to stop {grace:?} ago, and still at it (cluster.stop_timeout); ending without a checkpoint"
        );
        std::process::exit(exit::FAILED);
    });
}

fn serve_metrics(runtime: &Runtime, bind: &str, metrics: &WorkerMetrics) -> Result<SocketAddr, WorkerError> {
    let failed = |source| WorkerError::Bind { address: bind.to_owned(), source };
    let listener = runtime.block_on(tokio::net::TcpListener::bind((bind, 0))).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let exposition = metrics.exposition.clone();
    runtime.spawn(async move {
        // served as long as the process lives
        if let Err(error) = learn_telemetry::serve(listener, exposition, std::future::pending()).await {
            tracing::error!(%error, "metrics are no longer served");
        }
    });
    Ok(address)
}

/// The address that other ranks dial: the bound one, or this host's name if that is a wildcard.
fn advertised(bind: &str) -> String {
    if matches!(bind, "0.0.0.0" | "::") { host_name() } else { bind.to_owned() }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "localhost".into() } else { name.trim().into() }
}

fn device_name(device: tch::Device) -> String {
    match device {
        tch::Device::Cuda(ordinal) => format!("cuda:{ordinal}"),
        _ => "cpu".into(),
    }
}

/// Tells two starts with the same process number apart.
fn start_nonce() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos())
}
