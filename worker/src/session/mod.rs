//! A worker's life in a job: join -> prepare -> (ready -> wait for a place -> take part) again and again -> leave.
//!
//! Input: the coordinator's address and secret. Output: an exit code; everything else goes through the coordinator.
//! Invariants: what the task holds outlives generations, so that a broken collective costs no finished step; whatever ends
//! the task, the worker leaves with its reason; an order from outside reaches a training thread that is blocked in a
//! collective, because the attendance aborts it.

mod attendance;
mod signals;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use learn_collective::Group;
use learn_domain::config::DeviceKind;
use learn_domain::membership::Departure;
use learn_domain::report::{Task, exit};
use learn_domain::run_dir::RunDir;
use learn_domain::{Generation, Incarnation, Phase, WorkerId};
use learn_proto::connect::Pass;
use learn_proto::convert::{Admission, AfterStep, Applicant, Order};
use learn_telemetry::{WorkerMetrics, host};
use tokio::runtime::{Handle, Runtime};

use self::attendance::{Attendance, Heard, Parts};
pub use self::signals::{Abort, Signals};
use crate::control::{Control, ControlError, Member, Place, Progress};
use crate::error::WorkerError;
use crate::evaluate;
use crate::panic;
use crate::retry::Patience;
use crate::train::{Exchange, Trainer};

/// Between two tries to get a place in a job that is full.
const FULL: Duration = Duration::from_secs(1);
/// How often a wait looks whether this process was asked to stop.
const LOOK: Duration = Duration::from_millis(100);

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

/// What a worker's task works with in every generation.
pub struct Session {
    pub admission: Admission,
    pub control: Control,
    pub pass: Pass,
    pub device: tch::Device,
    pub metrics: WorkerMetrics,
    pub progress: Arc<Progress>,
    pub signals: Arc<Signals>,
    /// Address that the collective listens on.
    pub bind: String,
}

impl Session {
    #[must_use]
    pub fn run_dir(&self) -> RunDir {
        RunDir::new(&self.admission.run_dir)
    }

    #[must_use]
    pub fn handle(&self) -> &Handle {
        self.control.handle()
    }
}

/// One generation, as its task sees it.
pub struct Turn {
    pub member: Member,
    pub exchange: Exchange,
}

impl Turn {
    /// This is rank 0, which writes and speaks for the whole batch.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.member.is_first()
    }
}

/// How a task's part in a generation ended without failing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Done,
    /// As a graceful stop asked.
    Stopped,
    /// At a step's end, for a new generation.
    Regroup,
}

/// Joins a job, takes part, leaves; returns the exit code.
///
/// # Errors
/// If the job could not be joined or the task failed; the coordinator has been told if it could be.
pub fn join(settings: &JoinSettings) -> Result<i32, WorkerError> {
    let pass = Pass::read(&settings.secret_file)?;
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
    let control = Control::connect(runtime.handle().clone(), &settings.coordinator, &pass)?;
    let applicant = Applicant {
        incarnation: Incarnation(String::new()),
        host: host::name(),
        pid: std::process::id(),
        device: device_name(device),
        metrics_url: format!(
            "http://{}:{}/metrics",
            host::in_url(&host::advertised(&settings.bind)),
            metrics_address.port()
        ),
    };
    let admission = enter(&control, &applicant)?;
    learn_telemetry::place::set_run(&admission.config.job.name);
    tracing::info!(worker = %admission.worker, coordinator = settings.coordinator, "joined");
    let (progress, signals) = (Arc::new(Progress::default()), Arc::new(Signals::default()));
    let grace = admission.config.cluster.stop_within();
    spawn_signals(&runtime, signals.clone(), control.patience().clone(), grace);
    let worker = admission.worker;
    let session = Session { admission, control, pass, device, metrics, progress, signals, bind: settings.bind.clone() };
    let mut life = Life { session: &session, applicant, attendance: attend(&session, worker), left: Generation(0) };
    let ended = life.live();
    life.leave(ended)
}

/// Asks for a place until there is one, or the job has had time enough to make one.
fn enter(control: &Control, applicant: &Applicant) -> Result<Admission, ControlError> {
    let started = Instant::now();
    // each try of a process that was lost is another worker
    let incarnation = Incarnation(format!("{}-{:016x}", std::process::id(), start_nonce()));
    let applicant = Applicant { incarnation, ..applicant.clone() };
    loop {
        match control.join(applicant.clone()) {
            Err(ControlError::Full(reason)) if started.elapsed() < control.patience().limit() => {
                tracing::warn!(reason, "no place yet; trying again");
                std::thread::sleep(FULL);
            }
            result => return result,
        }
    }
}

fn attend(session: &Session, worker: WorkerId) -> Attendance {
    let cluster = &session.admission.config.cluster;
    let parts = Parts {
        control: session.control.clone(),
        worker,
        interval: cluster.heartbeat_interval.0,
        timeout: cluster.heartbeat_timeout.0,
        grace: cluster.stop_within(),
        progress: session.progress.clone(),
        signals: session.signals.clone(),
    };
    Attendance::begin(session.handle(), parts)
}

/// What there is to do after a wait.
enum Next {
    TakePart(Place, AfterStep),
    Leave,
    Dismissed,
    Rejoin,
}

/// A worker from its admission to its leave.
struct Life<'a> {
    session: &'a Session,
    applicant: Applicant,
    attendance: Attendance,
    /// The generation that it took part in last; 0 = none of its present admission.
    left: Generation,
}

/// How a life ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    Stopped,
    /// Nobody wants it any more.
    Dismissed,
}

impl Life<'_> {
    fn live(&mut self) -> Result<End, WorkerError> {
        let session = self.session;
        let mut trainer = match &session.admission.task {
            // made before this worker is ready, so that nobody waits for it
            Task::Train { resume_from } => {
                Some(panic::caught(|| Trainer::prepare(session, resume_from.as_deref()), || session.progress.phase())?)
            }
            Task::Evaluate { .. } => None,
        };
        let mut broken = None;
        loop {
            match session.control.ready(self.attendance.worker, self.left, broken.take()) {
                // the order to join again comes by the attendance
                Ok(()) | Err(ControlError::Unknown { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            let holds_state = trainer.as_ref().is_some_and(Trainer::has_state);
            let (place, after) = match self.wait(holds_state)? {
                Next::TakePart(place, after) => (place, after),
                Next::Leave => return Ok(End::Stopped),
                Next::Dismissed => return Ok(End::Dismissed),
                Next::Rejoin => {
                    self.rejoin()?;
                    continue;
                }
            };
            self.left = place.generation;
            learn_telemetry::place::set_rank(place.generation.0, place.rank.0);
            tracing::info!(world_size = place.world_size, "takes part in a generation");
            let ended = panic::caught(|| self.take_part(place, after, trainer.as_mut()), || session.progress.phase());
            session.signals.end();
            match (ended, session.signals.aborted()) {
                (Ok(Ended::Done), _) => {
                    tracing::info!("all is done");
                    return Ok(End::Done);
                }
                (Ok(Ended::Stopped), _) => return Ok(End::Stopped),
                (Ok(Ended::Regroup), _) => {}
                (Err(error), Some(Abort::Leave(cause))) => {
                    return Err(WorkerError::Aborted { cause, error: error.to_string() });
                }
                (Err(error), Some(Abort::Rejoin)) if error.reach().passes() => self.rejoin()?,
                (Err(error), _) if error.reach().passes() => {
                    tracing::warn!(%error, "the generation has ended");
                    broken = Some(error.to_string());
                }
                (Err(error), _) => return Err(error),
            }
            session.progress.enter(Phase::Regrouping);
        }
    }

    /// Waits for a place in a generation after the one that was left.
    fn wait(&mut self, holds_state: bool) -> Result<Next, WorkerError> {
        let (left, signals) = (self.left, &self.session.signals);
        let heard = &mut self.attendance.heard;
        self.session.handle().block_on(async {
            loop {
                let now = heard.borrow_and_update().clone();
                match now {
                    Heard::Order(Order::Run { generation, rank, world_size, after }) if generation > left => {
                        return Ok(Next::TakePart(Place { generation, rank, world_size }, after));
                    }
                    Heard::Order(Order::Stop { cause }) | Heard::Nothing(cause) => {
                        return Err(WorkerError::Refused(cause));
                    }
                    Heard::Order(Order::Dismissed) => return Ok(Next::Dismissed),
                    Heard::Unknown => return Ok(Next::Rejoin),
                    // one that holds the state stays: the next generation writes it down, and leaves
                    Heard::Order(_) if signals.stopped_here() && !holds_state => return Ok(Next::Leave),
                    Heard::Order(_) => {}
                }
                if let Ok(Err(_)) = tokio::time::timeout(LOOK, heard.changed()).await {
                    return Err(WorkerError::Refused("the attendance has ended".into()));
                }
            }
        })
    }

    /// Joins anew, as another worker with the same state.
    fn rejoin(&mut self) -> Result<(), WorkerError> {
        tracing::warn!(worker = %self.attendance.worker, "the coordinator has gone on without this worker; joining again");
        // what the old place hears from here on is nothing to the new one
        self.attendance.end();
        let admission = enter(&self.session.control, &self.applicant)?;
        self.session.signals.rejoined();
        self.attendance = attend(self.session, admission.worker);
        self.left = Generation(0);
        tracing::info!(worker = %admission.worker, "joined again");
        Ok(())
    }

    fn take_part(
        &self,
        place: Place,
        after: AfterStep,
        trainer: Option<&mut Trainer<'_>>,
    ) -> Result<Ended, WorkerError> {
        let session = self.session;
        session.metrics.generation.set(place.generation.0 as i64);
        session.metrics.exposition.set_label("rank", place.rank);
        session.progress.begin(place.generation);
        let member = session.control.member(self.attendance.worker, place);
        let cluster = &session.admission.config.cluster;
        let group = Group {
            rank: place.rank.0 as usize,
            world_size: place.world_size as usize,
            generation: place.generation.0,
            secret: session.pass.secret().as_bytes().to_vec(),
            bind: session.bind.clone(),
            advertise: host::advertised(&session.bind),
            timeout: cluster.collective_timeout.0,
            shares_memory: cluster.shared_memory,
            aborter: session.signals.begin(place.generation, after),
        };
        let collective = match session.device {
            tch::Device::Cuda(ordinal) => learn_collective::connect_nccl(group, ordinal as i32, &member)?,
            _ => learn_collective::connect_tcp(group, &member)?,
        };
        let exchange = Exchange::new(collective, session.metrics.clone(), session.progress.clone());
        let mut turn = Turn { member, exchange };
        let ended = match (&session.admission.task, trainer) {
            (Task::Evaluate { checkpoint, split }, _) => evaluate::run(session, &mut turn, checkpoint, *split),
            (Task::Train { .. }, Some(trainer)) => trainer.take_part(&mut turn),
            (Task::Train { .. }, None) => Err(WorkerError::Defect("a training without its trainer".into())),
        };
        let Turn { member, exchange } = turn;
        // the peers learn at once that this rank has left
        drop(exchange);
        let reported = member.flush();
        let ended = ended?;
        reported?;
        Ok(ended)
    }

    /// Tells the coordinator how it ended; gives the exit code.
    fn leave(&self, ended: Result<End, WorkerError>) -> Result<i32, WorkerError> {
        let departure = match &ended {
            Ok(End::Done | End::Dismissed) => Departure::Done,
            Ok(End::Stopped) => Departure::Stopped,
            Err(error) => error.reach().departure(error.to_string()),
        };
        let left = self.session.control.leave(self.attendance.worker, self.left, departure);
        match ended? {
            // a job that has finished need not be there any more
            End::Dismissed => return Ok(exit::OK),
            End::Done => left?,
            End::Stopped => {
                left?;
                return Ok(exit::STOPPED);
            }
        }
        Ok(exit::OK)
    }
}

/// SIGTERM and SIGUSR1 (a scheduler's notice) ask for a graceful stop; a worker that is stuck ends after `grace` all the
/// same, so that none is left over when nobody is there to kill it. SIGINT is left to the launcher: a terminal sends it to every process of the job.
fn spawn_signals(runtime: &Runtime, signals: Arc<Signals>, patience: Patience, grace: Duration) {
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
        signals.stop_here();
        patience.hurry();
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
