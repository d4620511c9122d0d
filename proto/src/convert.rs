//! Between messages and the values of `learn-domain`.
//!
//! Input: one side. Output: the other. Invariant: what comes from the network is checked here (version, sizes, JSON), so
//! the shells pass on nothing but plain, bounded values.

use std::path::PathBuf;
use std::time::Duration;

use learn_domain::event::Happening;
use learn_domain::membership::{Call, Departure, Directive, GiveUp};
use learn_domain::progress::Work;
use learn_domain::report::{DatasetFacts, Evaluation, StepRecord, Task};
use learn_domain::{Config, Generation, Incarnation, Phase, Rank, Step, UserIndex, WorkerId};

use crate::v1::{
    BeginGenerationRequest, DataServer, FinishedStep, HeartbeatRequest, HeartbeatResponse, JoinRequest, JoinResponse,
    OfferDataRequest, ReportStepRequest, StepNumbers, heartbeat_response, leave_request,
};
use crate::{MAX_TEXT_BYTES, PROTOCOL};

/// A message that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error(
        "this process speaks protocol version {theirs} (0 = older than the field) and the coordinator speaks {ours}; start \
         all processes of a job from the same build"
    )]
    Protocol { theirs: u32, ours: u32 },
    #[error("`{field}` has {bytes} bytes; at most {limit} are allowed")]
    TooLong { field: &'static str, bytes: usize, limit: usize },
    #[error("`{0}` is empty")]
    Missing(&'static str),
    #[error("`{field}` is not the expected JSON: {source}; start workers and coordinator from the same build")]
    Json { field: &'static str, source: serde_json::Error },
    #[error("worker {0} is not known here; it must join again, or leave")]
    UnknownWorker(WorkerId),
}

impl From<ConvertError> for tonic::Status {
    fn from(error: ConvertError) -> Self {
        let text = error.to_string();
        match error {
            ConvertError::Protocol { .. } => Self::failed_precondition(text),
            ConvertError::UnknownWorker(_) => Self::not_found(text),
            ConvertError::TooLong { .. } | ConvertError::Missing(_) | ConvertError::Json { .. } => {
                Self::invalid_argument(text)
            }
        }
    }
}

/// Refuses text that is longer than a worker's description may be.
///
/// # Errors
/// [`ConvertError::TooLong`] with the field's name.
pub fn bounded(field: &'static str, text: String) -> Result<String, ConvertError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(ConvertError::TooLong { field, bytes: text.len(), limit: MAX_TEXT_BYTES });
    }
    Ok(text)
}

/// A worker that asks to take part.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Applicant {
    pub incarnation: Incarnation,
    pub host: String,
    pub pid: u32,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// URL of its Prometheus metrics.
    pub metrics_url: String,
}

impl From<Applicant> for JoinRequest {
    fn from(applicant: Applicant) -> Self {
        Self {
            protocol: PROTOCOL,
            incarnation: applicant.incarnation.0,
            host: applicant.host,
            pid: applicant.pid,
            device: applicant.device,
            metrics_url: applicant.metrics_url,
        }
    }
}

impl TryFrom<JoinRequest> for Applicant {
    type Error = ConvertError;

    fn try_from(request: JoinRequest) -> Result<Self, ConvertError> {
        if request.protocol != PROTOCOL {
            return Err(ConvertError::Protocol { theirs: request.protocol, ours: PROTOCOL });
        }
        if request.incarnation.is_empty() {
            return Err(ConvertError::Missing("incarnation"));
        }
        Ok(Self {
            incarnation: Incarnation(bounded("incarnation", request.incarnation)?),
            host: bounded("host", request.host)?,
            pid: request.pid,
            device: bounded("device", request.device)?,
            metrics_url: bounded("metrics_url", request.metrics_url)?,
        })
    }
}

/// What a worker learns when it is let in.
#[derive(Clone, Debug, PartialEq)]
pub struct Admission {
    pub worker: WorkerId,
    pub config: Config,
    pub dataset: DatasetFacts,
    pub task: Task,
    /// gRPC URLs of Flight servers with the dataset, in order of preference.
    pub data_locations: Vec<String>,
    pub run_dir: PathBuf,
}

fn to_json<T: serde::Serialize>(field: &'static str, value: &T) -> Result<String, ConvertError> {
    serde_json::to_string(value).map_err(|source| ConvertError::Json { field, source })
}

fn from_json<T: serde::de::DeserializeOwned>(field: &'static str, text: &str) -> Result<T, ConvertError> {
    serde_json::from_str(text).map_err(|source| ConvertError::Json { field, source })
}

impl TryFrom<Admission> for JoinResponse {
    type Error = ConvertError;

    fn try_from(admission: Admission) -> Result<Self, ConvertError> {
        Ok(Self {
            worker_id: admission.worker.0,
            config_json: to_json("config_json", &admission.config)?,
            dataset_json: to_json("dataset_json", &admission.dataset)?,
            task_json: to_json("task_json", &admission.task)?,
            data_locations: admission.data_locations,
            run_dir: admission.run_dir.to_string_lossy().into_owned(),
        })
    }
}

impl TryFrom<JoinResponse> for Admission {
    type Error = ConvertError;

    fn try_from(response: JoinResponse) -> Result<Self, ConvertError> {
        Ok(Self {
            worker: WorkerId(response.worker_id),
            config: from_json("config_json", &response.config_json)?,
            dataset: from_json("dataset_json", &response.dataset_json)?,
            task: from_json("task_json", &response.task_json)?,
            data_locations: response.data_locations,
            run_dir: response.run_dir.into(),
        })
    }
}

/// A worker's sign of life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    pub worker: WorkerId,
    /// The generation that it is in; 0 = none yet.
    pub generation: Generation,
    /// Finished steps.
    pub step: Step,
    pub phase: Phase,
    /// Collective operations that it has entered in this generation.
    pub entered: u64,
    /// It is inside the last of them.
    pub inside: bool,
    /// Since it entered the phase or the collective.
    pub since: Duration,
}

impl From<Heartbeat> for HeartbeatRequest {
    fn from(heartbeat: Heartbeat) -> Self {
        let Heartbeat { worker, generation, step, phase, entered, inside, since } = heartbeat;
        Self {
            worker_id: worker.0,
            generation: generation.0,
            step: step.0,
            phase: phase.as_str().to_owned(),
            entered,
            inside,
            since_millis: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl TryFrom<HeartbeatRequest> for Heartbeat {
    type Error = ConvertError;

    fn try_from(request: HeartbeatRequest) -> Result<Self, ConvertError> {
        let HeartbeatRequest { worker_id, generation, step, phase, entered, inside, since_millis } = request;
        Ok(Self {
            worker: WorkerId(worker_id),
            generation: Generation(generation),
            step: Step(step),
            phase: bounded("phase", phase)?.as_str().into(),
            entered,
            inside,
            since: Duration::from_millis(since_millis),
        })
    }
}

/// What a data server has, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataOffer {
    pub fingerprint: String,
    /// Of the content embeddings; empty without any.
    pub embeddings_fingerprint: String,
    /// None if it does not serve yet.
    pub server: Option<OfferedServer>,
}

/// A data server that serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedServer {
    /// `http://HOST:PORT` of its Flight service.
    pub location: String,
    pub metrics_url: String,
    pub host: String,
    pub pid: u32,
    /// The configuration that it serves, as the coordinator told it.
    pub config_json: String,
}

impl From<DataOffer> for OfferDataRequest {
    fn from(offer: DataOffer) -> Self {
        let server = offer.server.map(|server| DataServer {
            location: server.location,
            metrics_url: server.metrics_url,
            host: server.host,
            pid: server.pid,
            config_json: server.config_json,
        });
        Self {
            protocol: PROTOCOL,
            fingerprint: offer.fingerprint,
            embeddings_fingerprint: offer.embeddings_fingerprint,
            server,
        }
    }
}

impl TryFrom<OfferDataRequest> for DataOffer {
    type Error = ConvertError;

    fn try_from(request: OfferDataRequest) -> Result<Self, ConvertError> {
        if request.protocol != PROTOCOL {
            return Err(ConvertError::Protocol { theirs: request.protocol, ours: PROTOCOL });
        }
        let server = request.server.map(|server| {
            if server.location.is_empty() {
                return Err(ConvertError::Missing("location"));
            }
            Ok(OfferedServer {
                location: bounded("location", server.location)?,
                metrics_url: bounded("metrics_url", server.metrics_url)?,
                host: bounded("host", server.host)?,
                pid: server.pid,
                config_json: server.config_json,
            })
        });
        Ok(Self {
            fingerprint: bounded("fingerprint", request.fingerprint)?,
            embeddings_fingerprint: bounded("embeddings_fingerprint", request.embeddings_fingerprint)?,
            server: server.transpose()?,
        })
    }
}

/// A [`Directive`] as a worker reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    Wait,
    Run {
        generation: Generation,
        rank: Rank,
        world_size: u32,
        after: AfterStep,
    },
    /// Abort the collectives of this generation, and be ready for the next.
    Regroup(Generation),
    /// Abort collectives, and leave at once.
    Stop {
        cause: String,
    },
    Dismissed,
}

/// What a member of a generation is to do after the step it is at; the greatest that any of them was told counts for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum AfterStep {
    #[default]
    Continue,
    /// Leave the generation, and be ready for the next.
    Regroup,
    /// Write a checkpoint and leave the job.
    Stop,
}

/// What `worker` is to do, as a message.
///
/// # Errors
/// [`ConvertError::UnknownWorker`], which a status of `NOT_FOUND` carries to the worker.
pub fn directive_message(worker: WorkerId, directive: Directive) -> Result<HeartbeatResponse, ConvertError> {
    use heartbeat_response::{Directive as Message, Dismissed, Regroup, Run, Stop, Wait};
    let message = match directive {
        Directive::Wait => Message::Wait(Wait {}),
        Directive::Run { generation, rank, world_size, call } => Message::Run(Run {
            generation: generation.0,
            rank: rank.0,
            world_size,
            regroup: call == Call::Regroup,
            stop: matches!(call, Call::Stop(_)),
        }),
        Directive::Regroup(generation) => Message::Regroup(Regroup { generation: generation.0 }),
        Directive::Stop(cause) => Message::Stop(Stop { cause: cause.to_string() }),
        Directive::Dismissed => Message::Dismissed(Dismissed {}),
        Directive::Unknown => return Err(ConvertError::UnknownWorker(worker)),
    };
    Ok(HeartbeatResponse { directive: Some(message) })
}

impl TryFrom<HeartbeatResponse> for Order {
    type Error = ConvertError;

    fn try_from(response: HeartbeatResponse) -> Result<Self, ConvertError> {
        use heartbeat_response::Directive as Message;
        Ok(match response.directive.ok_or(ConvertError::Missing("directive"))? {
            Message::Wait(_) => Self::Wait,
            Message::Run(run) => Self::Run {
                generation: Generation(run.generation),
                rank: Rank(run.rank),
                world_size: run.world_size,
                after: match (run.stop, run.regroup) {
                    (true, _) => AfterStep::Stop,
                    (false, true) => AfterStep::Regroup,
                    (false, false) => AfterStep::Continue,
                },
            },
            Message::Regroup(regroup) => Self::Regroup(Generation(regroup.generation)),
            Message::Stop(stop) => Self::Stop { cause: stop.cause },
            Message::Dismissed(_) => Self::Dismissed,
        })
    }
}

impl From<Departure> for leave_request::Departure {
    fn from(departure: Departure) -> Self {
        match departure {
            Departure::Done => Self::Done(leave_request::Done {}),
            Departure::Stopped => Self::Stopped(leave_request::Stopped {}),
            Departure::Crashed(message) => Self::Crashed(leave_request::Failed { message: cut(message) }),
            Departure::Failed(message) => Self::Failed(leave_request::Failed { message: cut(message) }),
            Departure::GaveUp(why, message) => {
                let message = leave_request::GaveUp { message: cut(message) };
                match why {
                    GiveUp::Diverged => Self::Diverged(message),
                    GiveUp::Unsaved => Self::Unsaved(message),
                }
            }
        }
    }
}

/// At most as much of a message as is read, in whole characters.
#[must_use]
pub fn cut(mut message: String) -> String {
    message.truncate(message.floor_char_boundary(MAX_TEXT_BYTES));
    message
}

/// How a worker says that it has left.
///
/// # Errors
/// If the message does not say how, or its cause is too long.
pub fn departure_from(departure: Option<leave_request::Departure>) -> Result<Departure, ConvertError> {
    use leave_request::Departure as Message;
    Ok(match departure.ok_or(ConvertError::Missing("departure"))? {
        Message::Done(_) => Departure::Done,
        Message::Stopped(_) => Departure::Stopped,
        Message::Crashed(crashed) => Departure::Crashed(bounded("crashed.message", crashed.message)?),
        Message::Failed(failed) => Departure::Failed(bounded("failed.message", failed.message)?),
        Message::Diverged(gone) => Departure::GaveUp(GiveUp::Diverged, bounded("diverged.message", gone.message)?),
        Message::Unsaved(gone) => Departure::GaveUp(GiveUp::Unsaved, bounded("unsaved.message", gone.message)?),
    })
}

/// What a rank has finished; the record comes from rank 0 alone.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    pub worker: WorkerId,
    pub generation: Generation,
    /// Finished steps, this one included.
    pub step: Step,
    pub epoch: u32,
    /// Users of this rank's share.
    pub users: Vec<UserIndex>,
    /// What this rank did by itself in the step.
    pub work: Work,
    pub record: Option<StepRecord>,
}

impl From<StepReport> for ReportStepRequest {
    fn from(report: StepReport) -> Self {
        Self {
            worker_id: report.worker.0,
            generation: report.generation.0,
            step: report.step.0,
            epoch: report.epoch,
            users: report.users.iter().map(|user| user.0).collect(),
            numbers: report.record.as_ref().map(StepNumbers::from),
            data_seconds: report.work.data_seconds,
            compute_seconds: report.work.compute_seconds,
        }
    }
}

impl From<ReportStepRequest> for StepReport {
    fn from(request: ReportStepRequest) -> Self {
        let (generation, step, epoch) = (Generation(request.generation), Step(request.step), request.epoch);
        Self {
            worker: WorkerId(request.worker_id),
            generation,
            step,
            epoch,
            users: request.users.into_iter().map(UserIndex).collect(),
            work: Work { data_seconds: request.data_seconds, compute_seconds: request.compute_seconds },
            record: request.numbers.map(|numbers| numbers.record(step, epoch, generation)),
        }
    }
}

impl From<&StepRecord> for StepNumbers {
    fn from(record: &StepRecord) -> Self {
        Self {
            loss: record.loss,
            accuracy: record.accuracy,
            learning_rate: record.learning_rate,
            gradient_norm: record.gradient_norm,
            users: record.users,
            tokens: record.tokens,
            padding_share: record.padding_share,
            seconds: record.seconds,
            cvr_loss: record.cvr_loss,
        }
    }
}

impl StepNumbers {
    fn record(self, step: Step, epoch: u32, generation: Generation) -> StepRecord {
        StepRecord {
            step,
            epoch,
            generation,
            loss: self.loss,
            accuracy: self.accuracy,
            learning_rate: self.learning_rate,
            gradient_norm: self.gradient_norm,
            users: self.users,
            tokens: self.tokens,
            padding_share: self.padding_share,
            seconds: self.seconds,
            cvr_loss: self.cvr_loss,
        }
    }
}

/// Where a generation goes on from.
#[derive(Clone, Debug, PartialEq)]
pub struct Beginning {
    pub worker: WorkerId,
    pub generation: Generation,
    /// Finished steps.
    pub step: Step,
    /// Records of the last of them, in order; the rank that was to report them may be lost.
    pub last: Vec<StepRecord>,
}

impl From<Beginning> for BeginGenerationRequest {
    fn from(beginning: Beginning) -> Self {
        let finished = |record: &StepRecord| FinishedStep {
            step: record.step.0,
            epoch: record.epoch,
            generation: record.generation.0,
            numbers: Some(StepNumbers::from(record)),
        };
        Self {
            worker_id: beginning.worker.0,
            generation: beginning.generation.0,
            step: beginning.step.0,
            last: beginning.last.iter().map(finished).collect(),
        }
    }
}

impl From<BeginGenerationRequest> for Beginning {
    fn from(request: BeginGenerationRequest) -> Self {
        let record = |finished: FinishedStep| {
            let FinishedStep { step, epoch, generation, numbers } = finished;
            Some(numbers?.record(Step(step), epoch, Generation(generation)))
        };
        Self {
            worker: WorkerId(request.worker_id),
            generation: Generation(request.generation),
            step: Step(request.step),
            last: request.last.into_iter().filter_map(record).collect(),
        }
    }
}

/// An evaluation as its report carries it.
///
/// # Errors
/// If it cannot be written as JSON (a metric that is not a number is written as `null` and refused by the reader).
pub fn evaluation_json(evaluation: &Evaluation) -> Result<String, ConvertError> {
    to_json("evaluation_json", evaluation)
}

/// # Errors
/// If the text is not an [`Evaluation`].
pub fn evaluation_from_json(text: &str) -> Result<Evaluation, ConvertError> {
    from_json("evaluation_json", text)
}

/// An event as its report carries it.
///
/// # Errors
/// If it cannot be written as JSON.
pub fn event_json(happening: &Happening) -> Result<String, ConvertError> {
    to_json("event_json", happening)
}

/// # Errors
/// If the text is not a [`Happening`].
pub fn event_from_json(text: &str) -> Result<Happening, ConvertError> {
    from_json("event_json", text)
}

#[cfg(test)]
mod tests;
