//! `learn.v1.Control` over the owner of the job: messages in, commands out, errors as statuses.
//!
//! Invariant: sizes are checked here; every decision is the owner's.

use std::time::{Duration, Instant};

use futures::stream::{self, BoxStream, StreamExt};
use learn_domain::membership::{Directive, Refusal};
use learn_domain::{Generation, Step, WorkerId};
use learn_proto::convert::{self, Admission, Applicant, Beginning, DataOffer, Heartbeat, OfferedServer, StepReport};
use learn_proto::v1::control_server::Control;
use learn_proto::v1::{
    BeginGenerationRequest, BeginGenerationResponse, CommitCheckpointRequest, CommitCheckpointResponse, GetRequest,
    GetResponse, HeartbeatRequest, HeartbeatResponse, JoinRequest, JoinResponse, LeaveRequest, LeaveResponse,
    OfferDataRequest, OfferDataResponse, PutRequest, PutResponse, ReadyRequest, ReadyResponse, ReportEvaluationRequest,
    ReportEvaluationResponse, ReportEventRequest, ReportEventResponse, ReportStepRequest, ReportStepResponse,
};
use learn_proto::{MAX_KEY_BYTES, MAX_VALUE_BYTES, MAX_WAIT_MILLIS};
use learn_telemetry::CoordinatorMetrics;
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

use crate::data::Directory;
use crate::job::actor::{AskError, Command, JobHandle, Key};
use crate::job::{BooksError, JobError};

/// The control service.
pub struct ControlService {
    pub job: JobHandle,
    pub metrics: CoordinatorMetrics,
    /// What every worker learns when it joins, its number and data locations aside.
    pub admission: Admission,
    /// The configuration as data servers are told it.
    pub config_json: String,
    pub directory: Directory,
    /// True when the job is over.
    pub over: watch::Receiver<bool>,
}

/// What heartbeats need: they come by themselves and by open calls.
#[derive(Clone)]
struct Beats {
    job: JobHandle,
    metrics: CoordinatorMetrics,
}

impl Beats {
    async fn take(&self, beat: HeartbeatRequest) -> Result<Response<HeartbeatResponse>, Status> {
        timed(&self.metrics, "heartbeat", self.answer(beat)).await
    }

    async fn answer(&self, beat: HeartbeatRequest) -> Result<HeartbeatResponse, Status> {
        let beat = Heartbeat::try_from(beat)?;
        let worker = beat.worker;
        let directive: Directive = self.job.ask(|reply| Command::Heartbeat(beat, reply)).await?;
        Ok(convert::directive_message(worker, directive)?)
    }
}

/// A worker's open call; its end, however it comes, is told to the job.
struct Attendance {
    beats: Beats,
    worker: WorkerId,
    number: u64,
    /// The heartbeat that has opened the call, until it is answered.
    first: Option<HeartbeatRequest>,
    said: Streaming<HeartbeatRequest>,
    directives: watch::Receiver<Directive>,
}

impl Attendance {
    /// The next answer to a heartbeat, or a directive that has changed; none at the end of the worker's side, or of the job.
    async fn next(&mut self) -> Option<Result<HeartbeatResponse, Status>> {
        let beat = match self.first.take() {
            Some(first) => first,
            None => tokio::select! {
                changed = self.directives.changed() => {
                    changed.ok()?;
                    let directive = self.directives.borrow_and_update().clone();
                    return Some(convert::directive_message(self.worker, directive).map_err(Status::from));
                }
                said = self.said.message() => match said {
                    Ok(Some(beat)) if beat.worker_id == self.worker.0 => beat,
                    Ok(Some(_)) => return Some(Err(Status::invalid_argument("a call is of one worker"))),
                    Ok(None) | Err(_) => return None,
                },
            },
        };
        Some(self.beats.take(beat).await.map(Response::into_inner))
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.beats.job.disconnected(self.worker, self.number);
    }
}

impl From<AskError> for Status {
    fn from(error: AskError) -> Self {
        let text = error.to_string();
        match error {
            AskError::Gone => Self::unavailable(text),
            AskError::Full(_) => Self::resource_exhausted(text),
            AskError::Job(error) => match error {
                JobError::UnknownWorker(_) => Self::not_found(text),
                JobError::NotRankZero { .. } => Self::permission_denied(text),
                JobError::Diverged { .. }
                | JobError::Books(BooksError::Epoch { .. } | BooksError::TooFarAhead { .. }) => {
                    Self::invalid_argument(text)
                }
                // a place may become free
                JobError::Refused(Refusal::Full) => Self::resource_exhausted(text),
                JobError::StaleGeneration { .. } | JobError::Regrouping(_) => Self::aborted(text),
                JobError::Refused(Refusal::Over)
                | JobError::Stopping(_)
                | JobError::TooManyWorkers { .. }
                | JobError::Books(BooksError::OldCheckpoint { .. } | BooksError::Behind { .. }) => {
                    Self::failed_precondition(text)
                }
            },
        }
    }
}

impl From<JobError> for Status {
    fn from(error: JobError) -> Self {
        AskError::Job(error).into()
    }
}

fn key(worker: u32, generation: u64, key: String) -> Result<Key, Status> {
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        let text = format!("a key has 1 to {MAX_KEY_BYTES} bytes, this one has {}", key.len());
        return Err(Status::invalid_argument(text));
    }
    Ok(Key { worker: WorkerId(worker), generation: Generation(generation), key })
}

/// Answers a call, and takes note of how long that took.
pub(crate) async fn timed<T>(
    metrics: &CoordinatorMetrics,
    method: &'static str,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<Response<T>, Status> {
    let start = Instant::now();
    let result = work.await;
    metrics.rpc_seconds.with_label_values(&[method]).observe(start.elapsed().as_secs_f64());
    if let Err(status) = &result {
        tracing::debug!(method, code = %status.code(), message = status.message(), "call refused");
    }
    result.map(Response::new)
}

impl ControlService {
    async fn timed<T>(
        &self,
        method: &'static str,
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        timed(&self.metrics, method, work).await
    }

    fn beats(&self) -> Beats {
        Beats { job: self.job.clone(), metrics: self.metrics.clone() }
    }

    /// Refuses a data server whose dataset or configuration is not the job's.
    fn check(&self, offer: &DataOffer) -> Result<(), Status> {
        let (ours, config) = (&self.admission.dataset, &self.admission.config);
        let differs = |what: &str, theirs: &str, ours: &str| {
            let text = format!(
                "this dataset is another one: its {what} has fingerprint {theirs}, that of the job \"{}\" has {ours}; name \
                 a copy of {} with --dataset",
                config.job.name,
                config.data.dataset.display(),
            );
            Err(Status::failed_precondition(text))
        };
        // who only asks for the configuration has not looked yet
        let asks = offer.server.is_none() && offer.fingerprint.is_empty();
        if !asks && offer.fingerprint != ours.fingerprint {
            return differs("content", &offer.fingerprint, &ours.fingerprint);
        }
        let (theirs, ours) = (&offer.embeddings_fingerprint, &ours.embeddings_fingerprint);
        // empty where the model reads no content
        if !asks && !ours.is_empty() && theirs != ours {
            return differs("embeddings", theirs, ours);
        }
        match &offer.server {
            Some(server) if server.config_json != self.config_json => {
                Err(Status::failed_precondition("it serves another configuration than the job has now; start it again"))
            }
            _ => Ok(()),
        }
    }

    /// Names a data server as long as its call, and the time until the next one, last.
    async fn stand(&self, server: OfferedServer) -> bool {
        let offer = self.directory.offer(server, Instant::now());
        let mut over = self.over.clone();
        let over = tokio::select! {
            () = tokio::time::sleep(self.admission.config.cluster.heartbeat_interval.0) => false,
            // the sender outlives the servers
            _ = over.wait_for(|over| *over) => true,
        };
        offer.renewed(Instant::now());
        over
    }

    async fn wait_for(&self, request: GetRequest) -> Result<GetResponse, Status> {
        let wait = Duration::from_millis(request.wait_millis.min(MAX_WAIT_MILLIS).into());
        let key = key(request.worker_id, request.generation, request.key)?;
        let name = key.key.clone();
        let answer = self.job.ask(|reply| Command::Get(key, reply)).await??;
        match tokio::time::timeout(wait, answer).await {
            Ok(Ok(value)) => Ok(GetResponse { value }),
            Ok(Err(_)) => Err(Status::aborted("this generation ended while a rank waited for a key of it")),
            Err(_) => Err(Status::deadline_exceeded(format!("nobody has put `{name}` within {} ms", wait.as_millis()))),
        }
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        self.timed("join", async {
            let applicant = Applicant::try_from(request.into_inner())?;
            let worker = self.job.ask(|reply| Command::Join(applicant, reply)).await??;
            let data_locations = self.directory.locations(worker.0 as usize, Instant::now());
            Ok(JoinResponse::try_from(Admission { worker, data_locations, ..self.admission.clone() })?)
        })
        .await
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        self.beats().take(request.into_inner()).await
    }

    type AttendStream = BoxStream<'static, Result<HeartbeatResponse, Status>>;

    async fn attend(
        &self,
        request: Request<Streaming<HeartbeatRequest>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        self.timed("attend", async {
            let mut said = request.into_inner();
            let Some(first) = said.message().await? else {
                return Err(Status::invalid_argument("the first heartbeat says which worker attends; there was none"));
            };
            let worker = WorkerId(first.worker_id);
            let (number, directives) = self.job.ask(|reply| Command::Attend(worker, reply)).await?;
            let attendance = Attendance { beats: self.beats(), worker, number, first: Some(first), said, directives };
            // the whole attendance goes with the stream, so that its end is the stream's
            let messages = stream::unfold(attendance, |mut attendance| async move {
                attendance.next().await.map(|message| (message, attendance))
            });
            Ok(messages.boxed())
        })
        .await
    }

    async fn ready(&self, request: Request<ReadyRequest>) -> Result<Response<ReadyResponse>, Status> {
        self.timed("ready", async {
            let ReadyRequest { worker_id, generation, broken } = request.into_inner();
            let (worker, generation) = (WorkerId(worker_id), Generation(generation));
            let broken = broken.map(|broken| convert::bounded("broken", broken)).transpose()?;
            self.job.ask(|reply| Command::Ready { worker, generation, broken, reply }).await??;
            Ok(ReadyResponse {})
        })
        .await
    }

    async fn begin_generation(
        &self,
        request: Request<BeginGenerationRequest>,
    ) -> Result<Response<BeginGenerationResponse>, Status> {
        self.timed("begin_generation", async {
            let beginning = Beginning::from(request.into_inner());
            self.job.ask(|reply| Command::Begin(beginning, reply)).await??;
            Ok(BeginGenerationResponse {})
        })
        .await
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        self.timed("put", async {
            let request = request.into_inner();
            if request.value.len() > MAX_VALUE_BYTES {
                let text = format!("a value has at most {MAX_VALUE_BYTES} bytes, this one has {}", request.value.len());
                return Err(Status::invalid_argument(text));
            }
            let key = key(request.worker_id, request.generation, request.key)?;
            self.job.ask(|reply| Command::Put(key, request.value, reply)).await??;
            Ok(PutResponse {})
        })
        .await
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        self.timed("get", self.wait_for(request.into_inner())).await
    }

    async fn report_step(&self, request: Request<ReportStepRequest>) -> Result<Response<ReportStepResponse>, Status> {
        self.timed("report_step", async {
            let report = StepReport::from(request.into_inner());
            self.job.ask(|reply| Command::Report(report, reply)).await??;
            Ok(ReportStepResponse {})
        })
        .await
    }

    async fn commit_checkpoint(
        &self,
        request: Request<CommitCheckpointRequest>,
    ) -> Result<Response<CommitCheckpointResponse>, Status> {
        self.timed("commit_checkpoint", async {
            let CommitCheckpointRequest { worker_id, generation, step, path } = request.into_inner();
            let (worker, generation, step) = (WorkerId(worker_id), Generation(generation), Step(step));
            let durable = self.job.ask(|reply| Command::Commit(worker, generation, step, reply)).await??;
            durable.await.map_err(|_| AskError::Gone)?;
            tracing::info!(%step, path, "checkpoint committed");
            Ok(CommitCheckpointResponse {})
        })
        .await
    }

    async fn report_evaluation(
        &self,
        request: Request<ReportEvaluationRequest>,
    ) -> Result<Response<ReportEvaluationResponse>, Status> {
        self.timed("report_evaluation", async {
            let ReportEvaluationRequest { worker_id, generation, evaluation_json } = request.into_inner();
            let evaluation = convert::evaluation_from_json(&evaluation_json)?;
            let (worker, generation) = (WorkerId(worker_id), Generation(generation));
            self.job.ask(|reply| Command::Evaluation(worker, generation, evaluation, reply)).await??;
            Ok(ReportEvaluationResponse {})
        })
        .await
    }

    async fn report_event(
        &self,
        request: Request<ReportEventRequest>,
    ) -> Result<Response<ReportEventResponse>, Status> {
        self.timed("report_event", async {
            let ReportEventRequest { worker_id, generation, event_json } = request.into_inner();
            let happening = convert::event_from_json(&event_json)?;
            let (worker, generation) = (WorkerId(worker_id), Generation(generation));
            self.job.ask(|reply| Command::Event(worker, generation, happening, reply)).await??;
            Ok(ReportEventResponse {})
        })
        .await
    }

    async fn offer_data(&self, request: Request<OfferDataRequest>) -> Result<Response<OfferDataResponse>, Status> {
        self.timed("offer_data", async {
            let offer = DataOffer::try_from(request.into_inner())?;
            self.check(&offer)?;
            let over = match offer.server {
                Some(server) => self.stand(server).await,
                None => false,
            };
            let data_locations = self.directory.locations(0, Instant::now());
            Ok(OfferDataResponse { config_json: self.config_json.clone(), data_locations, over })
        })
        .await
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        self.timed("leave", async {
            // whichever generation it was in last: who leaves has left the present one, too
            let LeaveRequest { worker_id, departure, .. } = request.into_inner();
            let departure = convert::departure_from(departure)?;
            self.job.ask(|reply| Command::Leave(WorkerId(worker_id), departure, reply)).await??;
            Ok(LeaveResponse {})
        })
        .await
    }
}
