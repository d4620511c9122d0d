//! The worker's side of the control plane.
//!
//! Input: what the training thread has to say. Output: the coordinator's directives. Calls that training waits for
//! (join, rendezvous, leave) block; step reports and checkpoint commits go through a queue that one task drains in
//! order, so that a slow network does not hold the step back until the queue is full. Every call but the heartbeat, which
//! comes again anyway, waits patiently for a coordinator that is away: all of them may be repeated.

mod attend;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use learn_collective::Rendezvous;
use learn_domain::event::Happening;
use learn_domain::membership::Departure;
use learn_domain::progress::Work;
use learn_domain::report::{Evaluation, StepRecord};
use learn_domain::{Generation, Phase, Rank, Step, UserIndex, WorkerId};
use learn_proto::auth::BearerInterceptor;
use learn_proto::connect::{Pass, chain};
use learn_proto::convert::{
    Admission, Applicant, Beginning, ConvertError, Order, StepReport, cut, evaluation_json, event_json,
};
use learn_proto::tls::is_refusal;
use learn_proto::v1;
use learn_proto::v1::control_client::ControlClient;
use learn_telemetry::place::{self, Field};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

pub use attend::{Beats, Heartbeat, Orders};

use crate::retry::{Passing, Patience};

/// Patience until the coordinator has told its own (`cluster.coordinator_timeout`).
const FIRST_PATIENCE: Duration = Duration::from_secs(30);

const JOIN: &str = "join";

/// Messages of the report queue; a full queue holds the training thread back.
pub const REPORT_QUEUE: usize = 256;

/// The coordinator could not be talked to.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("the coordinator at {url} cannot be reached: {reason}; is it running, and is the address right?")]
    Connect { url: String, reason: String },
    #[error(
        "this worker and the coordinator do not take each other's certificates: {0}; start it with the `secret` of the run \
         that the coordinator serves, whose tls.json lies beside it"
    )]
    Certificates(String),
    #[error("the coordinator has not answered {call} for too long (cluster.coordinator_timeout): {reason}")]
    Away { call: &'static str, reason: String },
    #[error("the coordinator does not know this worker (any more), says its answer to {call}")]
    Unknown { call: &'static str },
    #[error("the generation had ended before {call}: {message}")]
    Ended { call: &'static str, message: String },
    #[error("there is no place in the job: {0}")]
    Full(String),
    #[error("the coordinator refused {call}: {message}")]
    Refused { call: &'static str, message: String },
    #[error("{call}: {source}; are the coordinator and this worker of the same version?")]
    Answer { call: &'static str, source: ConvertError },
    #[error("the coordinator does not answer")]
    Silent,
    #[error("the report queue has ended before the job: {0}")]
    Reports(String),
}

fn failed(call: &'static str) -> impl Fn(Status) -> ControlError {
    move |status| {
        let text = told(&status);
        match status.code() {
            _ if is_refusal(&status) => ControlError::Certificates(text),
            Code::NotFound => ControlError::Unknown { call },
            Code::Aborted => ControlError::Ended { call, message: status.message().to_owned() },
            Code::ResourceExhausted if call == JOIN => ControlError::Full(status.message().to_owned()),
            _ if status.may_pass() => ControlError::Away { call, reason: text },
            _ => ControlError::Refused { call, message: text },
        }
    }
}

/// What a status says, with what lies behind it.
pub(crate) fn told(status: &Status) -> String {
    let causes = std::error::Error::source(status).map(|source| format!(": {}", chain(source))).unwrap_or_default();
    format!("{}{causes} ({})", status.message(), status.code())
}

/// A worker's place in a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub generation: Generation,
    pub rank: Rank,
    pub world_size: u32,
}

/// Where the training thread is, readable from the heartbeat task.
#[derive(Debug, Default)]
pub struct Progress {
    generation: AtomicU64,
    step: AtomicU64,
    /// Number of the phase; 0 = starting.
    phase: AtomicU8,
    /// Collective operations that were entered in this generation.
    entered: AtomicU64,
    inside: AtomicBool,
    /// When the phase or the collective was entered, in milliseconds after `start`.
    since_millis: AtomicU64,
    start: Start,
}

/// When the process began to count.
#[derive(Debug)]
struct Start(Instant);

impl Default for Start {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Progress {
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.mark();
    }

    /// The training thread enters a collective.
    pub fn enter_collective(&self) {
        self.entered.fetch_add(1, Ordering::Relaxed);
        self.inside.store(true, Ordering::Relaxed);
        self.mark();
    }

    pub fn leave_collective(&self) {
        self.inside.store(false, Ordering::Relaxed);
        self.mark();
    }

    fn mark(&self) {
        self.since_millis.store(self.start.0.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Since the phase or the collective was entered.
    fn since(&self) -> Duration {
        let entered = Duration::from_millis(self.since_millis.load(Ordering::Relaxed));
        self.start.0.elapsed().saturating_sub(entered)
    }

    /// A generation begins.
    pub fn begin(&self, generation: Generation) {
        self.entered.store(0, Ordering::Relaxed);
        self.inside.store(false, Ordering::Relaxed);
        // last, so that whoever sees it first and then the counters sees those of no generation before
        self.generation.store(generation.0, Ordering::Release);
    }

    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    pub fn finished(&self, step: Step) {
        self.step.store(step.0, Ordering::Relaxed);
        place::set(Field::Step, step.0);
    }

    #[must_use]
    pub fn phase(&self) -> Phase {
        Phase::numbered(self.phase.load(Ordering::Relaxed))
    }

    #[must_use]
    pub fn step(&self) -> Step {
        Step(self.step.load(Ordering::Relaxed))
    }
}

/// One rank's part of a finished step.
#[derive(Clone, Debug)]
pub struct FinishedStep {
    /// Finished steps, this one included.
    pub step: Step,
    pub epoch: u32,
    pub users: Vec<UserIndex>,
    pub work: Work,
    pub record: Option<StepRecord>,
}

/// What waits in the report queue.
enum Queued {
    Report(Report),
    /// Everything before has arrived.
    Flush(oneshot::Sender<()>),
}

enum Report {
    Step(v1::ReportStepRequest),
    Evaluation(v1::ReportEvaluationRequest),
    Event(v1::ReportEventRequest),
}

type Client = ControlClient<InterceptedService<Channel, BearerInterceptor>>;

/// A connection to the coordinator.
#[derive(Clone)]
pub struct Control {
    handle: Handle,
    client: Client,
    patience: Patience,
}

impl Control {
    /// Connects to `url`.
    ///
    /// # Errors
    /// If nobody listens there for a while.
    pub fn connect(handle: Handle, url: &str, pass: &Pass) -> Result<Self, ControlError> {
        let failed = |reason: String| ControlError::Connect { url: url.to_owned(), reason };
        let endpoint = pass.endpoint(url).map_err(|error| failed(error.to_string()))?;
        let patience = Patience::new(FIRST_PATIENCE);
        let connect = patience.answer("connect", || endpoint.connect());
        let channel = handle.block_on(connect).map_err(|error| match is_refusal(&error) {
            true => ControlError::Certificates(chain(&error)),
            false => failed(chain(&error)),
        })?;
        let bearer = pass.bearer().map_err(|error| failed(error.to_string()))?;
        let client = ControlClient::with_interceptor(channel, bearer);
        Ok(Self { handle, client, patience })
    }

    /// The patience of this worker, for other services too.
    #[must_use]
    pub fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Calls until there is an answer, a refusal, or no patience left.
    async fn call<T, F>(&self, what: &'static str, call: impl Fn(Client) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.patience.answer(what, || call(self.client.clone())).await.map(Response::into_inner)
    }

    /// Joins the job.
    ///
    /// # Errors
    /// If the coordinator refuses, or its answer cannot be read.
    pub fn join(&self, applicant: Applicant) -> Result<Admission, ControlError> {
        let request = v1::JoinRequest::from(applicant);
        let answer = self.call(JOIN, |mut client| {
            let request = request.clone();
            async move { client.join(request).await }
        });
        let answer = self.handle.block_on(answer).map_err(failed(JOIN))?;
        let admission: Admission = answer.try_into().map_err(|source| ControlError::Answer { call: JOIN, source })?;
        self.patience.set(admission.config.cluster.coordinator_timeout.0);
        Ok(admission)
    }

    /// One heartbeat, without an open call.
    ///
    /// # Errors
    /// If the coordinator cannot be reached or no longer knows the worker.
    pub async fn heartbeat(&self, heartbeat: Heartbeat) -> Result<Order, ControlError> {
        let answer = self.client.clone().heartbeat(heartbeat.0).await.map_err(failed("heartbeat"))?;
        answer.into_inner().try_into().map_err(|source| ControlError::Answer { call: "heartbeat", source })
    }

    /// Opens the call by which heartbeats go, the first of them at once, and orders come as soon as they change. By its end
    /// the coordinator learns that a worker is gone.
    ///
    /// # Errors
    /// If the coordinator cannot be reached.
    pub async fn attend(&self, first: Heartbeat) -> Result<(Beats, Orders), ControlError> {
        // one that is sent while another was not even taken says nothing new
        let (sender, said) = mpsc::channel(1);
        let said = stream::once(std::future::ready(first.0)).chain(ReceiverStream::new(said));
        let orders = self.client.clone().attend(said).await.map_err(failed("attend"))?.into_inner();
        Ok((Beats(sender), Orders(orders)))
    }

    /// Says that `worker` has left `generation` (0 = it was in none) and may take part in the next; `broken` is what went
    /// wrong with its collective.
    ///
    /// # Errors
    /// If the coordinator stays away or does not know the worker.
    pub fn ready(&self, worker: WorkerId, generation: Generation, broken: Option<String>) -> Result<(), ControlError> {
        let broken = broken.map(cut);
        let request = v1::ReadyRequest { worker_id: worker.0, generation: generation.0, broken };
        let said = self.call("ready", |mut client| {
            let request = request.clone();
            async move { client.ready(request).await }
        });
        self.handle.block_on(said).map(drop).map_err(failed("ready"))
    }

    /// Leaves the job.
    ///
    /// # Errors
    /// If the coordinator cannot be reached.
    pub fn leave(&self, worker: WorkerId, generation: Generation, departure: Departure) -> Result<(), ControlError> {
        let request =
            v1::LeaveRequest { worker_id: worker.0, generation: generation.0, departure: Some(departure.into()) };
        let left = self.call("leave", |mut client| {
            let request = request.clone();
            async move { client.leave(request).await }
        });
        self.handle.block_on(left).map(drop).map_err(failed("leave"))
    }

    /// A member's connection: reports and the rendezvous of its generation.
    #[must_use]
    pub fn member(&self, worker: WorkerId, place: Place) -> Member {
        let (queue, mut reports) = mpsc::channel::<Queued>(REPORT_QUEUE);
        let control = self.clone();
        let drain = self.handle.spawn(async move {
            while let Some(report) = reports.recv().await {
                let report = match report {
                    Queued::Report(report) => report,
                    Queued::Flush(arrived) => {
                        // nobody waits any more if the training has failed meanwhile
                        let _ = arrived.send(());
                        continue;
                    }
                };
                match control.deliver(&report).await {
                    // the next generation says where it goes on from, which covers what was not heard of this one
                    Err(error @ (ControlError::Ended { .. } | ControlError::Unknown { .. })) => {
                        tracing::debug!(%error, "a report came too late");
                    }
                    result => result?,
                }
            }
            Ok(())
        });
        Member { control: self.clone(), worker, place, queue, drain: Arc::new(std::sync::Mutex::new(Some(drain))) }
    }

    /// Brings one report to the coordinator, which takes a repeated one for the same.
    async fn deliver(&self, report: &Report) -> Result<(), ControlError> {
        match report {
            Report::Step(request) => {
                let sent = self.call("report-step", |mut client| {
                    let request = request.clone();
                    async move { client.report_step(request).await }
                });
                sent.await.map(drop).map_err(failed("report-step"))
            }
            Report::Evaluation(request) => {
                let sent = self.call("report-evaluation", |mut client| {
                    let request = request.clone();
                    async move { client.report_evaluation(request).await }
                });
                sent.await.map(drop).map_err(failed("report-evaluation"))
            }
            Report::Event(request) => {
                let sent = self.call("report-event", |mut client| {
                    let request = request.clone();
                    async move { client.report_event(request).await }
                });
                sent.await.map(drop).map_err(failed("report-event"))
            }
        }
    }

    /// The runtime that calls run on.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

/// A member of one generation.
#[derive(Clone)]
pub struct Member {
    control: Control,
    pub worker: WorkerId,
    pub place: Place,
    queue: mpsc::Sender<Queued>,
    drain: Arc<Drain>,
}

impl Member {
    #[must_use]
    pub fn handle(&self) -> &Handle {
        self.control.handle()
    }

    #[must_use]
    pub fn is_first(&self) -> bool {
        self.place.rank == Rank(0)
    }

    fn report(&self, report: Report) -> Result<(), ControlError> {
        self.send(Queued::Report(report))
    }

    fn send(&self, report: Queued) -> Result<(), ControlError> {
        self.queue.blocking_send(report).map_err(|_| match self.finish_reports() {
            Err(error) => error,
            Ok(()) => ControlError::Reports("it was closed".into()),
        })
    }

    /// Reports this rank's part of a finished step; rank 0 adds the record of the whole step.
    ///
    /// # Errors
    /// If an earlier report failed.
    pub fn report_step(&self, finished: FinishedStep) -> Result<(), ControlError> {
        let FinishedStep { step, epoch, users, work, record } = finished;
        let report =
            StepReport { worker: self.worker, generation: self.place.generation, step, epoch, users, work, record };
        self.report(Report::Step(report.into()))
    }

    /// Says from which finished step this generation goes on; only rank 0 does.
    ///
    /// # Errors
    /// If the coordinator refuses or stays away.
    pub fn begin(&self, step: Step, last: Vec<StepRecord>) -> Result<(), ControlError> {
        let beginning = Beginning { worker: self.worker, generation: self.place.generation, step, last };
        let request = v1::BeginGenerationRequest::from(beginning);
        let begun = self.control.call("begin-generation", |mut client| {
            let request = request.clone();
            async move { client.begin_generation(request).await }
        });
        self.control.handle.block_on(begun).map(drop).map_err(failed("begin-generation"))
    }

    /// Reports a durable checkpoint and waits until the coordinator has recorded it.
    ///
    /// # Errors
    /// If the coordinator refuses or cannot be reached.
    pub fn commit_checkpoint(&self, step: Step, path: String) -> Result<(), ControlError> {
        let request = v1::CommitCheckpointRequest {
            worker_id: self.worker.0,
            generation: self.place.generation.0,
            step: step.0,
            path,
        };
        let committed = self.control.call("commit-checkpoint", |mut client| {
            let request = request.clone();
            async move { client.commit_checkpoint(request).await }
        });
        self.control.handle.block_on(committed).map(drop).map_err(failed("commit-checkpoint"))
    }

    /// Reports an evaluation.
    ///
    /// # Errors
    /// If an earlier report failed.
    pub fn report_evaluation(&self, evaluation: &Evaluation) -> Result<(), ControlError> {
        let evaluation_json =
            evaluation_json(evaluation).map_err(|source| ControlError::Answer { call: "report-evaluation", source })?;
        self.report(Report::Evaluation(v1::ReportEvaluationRequest {
            worker_id: self.worker.0,
            generation: self.place.generation.0,
            evaluation_json,
        }))
    }

    /// Reports what has happened beside the steps.
    ///
    /// # Errors
    /// If an earlier report failed.
    pub fn report_event(&self, happening: &Happening) -> Result<(), ControlError> {
        let event_json =
            event_json(happening).map_err(|source| ControlError::Answer { call: "report-event", source })?;
        self.report(Report::Event(v1::ReportEventRequest {
            worker_id: self.worker.0,
            generation: self.place.generation.0,
            event_json,
        }))
    }

    /// Waits until every report so far has arrived.
    ///
    /// # Errors
    /// The first report that failed.
    pub fn flush(&self) -> Result<(), ControlError> {
        let (arrived, all) = oneshot::channel();
        self.send(Queued::Flush(arrived))?;
        // the queue is drained in order, or its end says what failed
        match self.control.handle.block_on(all) {
            Ok(()) => Ok(()),
            Err(_) => self.finish_reports(),
        }
    }

    fn finish_reports(&self) -> Result<(), ControlError> {
        join_drain(&self.control.handle, &self.drain)
    }
}

type Drain = std::sync::Mutex<Option<JoinHandle<Result<(), ControlError>>>>;

fn join_drain(handle: &Handle, drain: &Drain) -> Result<(), ControlError> {
    let task = drain.lock().map_err(|_| ControlError::Reports("a thread panicked".into()))?.take();
    match task {
        Some(task) => handle.block_on(task).map_err(|error| ControlError::Reports(error.to_string()))?,
        None => Ok(()),
    }
}

impl Rendezvous for Member {
    fn put(&self, key: &str, value: Vec<u8>) -> Result<(), String> {
        let request = v1::PutRequest {
            worker_id: self.worker.0,
            generation: self.place.generation.0,
            key: key.to_owned(),
            value,
        };
        let sent = self.control.call("put", |mut client| {
            let request = request.clone();
            async move { client.put(request).await }
        });
        self.control.handle.block_on(sent).map(drop).map_err(|status| status.message().to_owned())
    }

    fn get(&self, key: &str, wait: Duration) -> Result<Vec<u8>, String> {
        let started = Instant::now();
        loop {
            let left = wait.saturating_sub(started.elapsed());
            let request = v1::GetRequest {
                worker_id: self.worker.0,
                generation: self.place.generation.0,
                key: key.to_owned(),
                wait_millis: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
            };
            let answer = self.control.call("get", |mut client| {
                let request = request.clone();
                async move { client.get(request).await }
            });
            match self.control.handle.block_on(answer) {
                Ok(answer) => return Ok(answer.value),
                // one call waits for a minute at most (`learn_proto::MAX_WAIT_MILLIS`)
                Err(status) if status.code() == Code::DeadlineExceeded && started.elapsed() < wait => {}
                Err(status) => return Err(status.message().to_owned()),
            }
        }
    }
}
