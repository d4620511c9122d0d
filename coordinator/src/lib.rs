//! The coordinator of a training job, and of an embed job ([`embedding`]), which has nothing but leases.
//!
//! Input: a run directory with its configuration and secret, a dataset, a task. Output: a control service and a data service
//! (gRPC, one port), metrics and status (HTTP), the run directory's files, and how the job ended. Shape: rules are in
//! `learn-domain`; [`job`] is the one owner of the job's state; [`control`], [`operator`], [`data`] and [`http`] carry its
//! inputs and outputs; [`journal`] writes its files, [`board`] reads them again for those who look, and [`state`] keeps what a coordinator
//! that takes over needs; [`replica`] is a process of its own that serves the data alone. Invariant: nothing is served before
//! configuration, dataset and history were checked.

pub mod bench;
pub mod board;
pub mod connections;
pub mod control;
pub mod data;
pub mod embedding;
pub mod files;
pub mod http;
pub mod job;
pub mod journal;
pub mod operator;
pub mod replica;
pub mod sd;
mod serve;
pub mod settings;
pub mod state;
pub mod store;
pub mod tensorboard;

use std::future::Future;
use std::path::Path;

pub use learn_domain::membership::{Outcome, StopCause};
use learn_domain::report::exit;
pub use replica::ReplicaError;
pub use serve::{Coordinator, ServeError};
pub use settings::{Settings, SettingsError};

/// Why a coordinator could not start, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Source(#[from] data::SourceError),
    #[error(transparent)]
    Resume(#[from] job::ResumeError),
    #[error(transparent)]
    Files(#[from] files::FileError),
    #[error(transparent)]
    State(#[from] state::StateError),
    #[error("this job cannot be taken over: {0}")]
    TakeOver(#[from] job::TakeOverError),
    #[error(transparent)]
    Replica(#[from] replica::ReplicaError),
    #[error(transparent)]
    Client(#[from] learn_proto::connect::ConnectError),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl CoordinatorError {
    /// The exit code of a process that ends with this error.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Source(data::SourceError::Unsuitable(unsuitable)) if unsuitable.is_usage() => exit::USAGE,
            Self::Settings(_) | Self::Replica(ReplicaError::Address { .. }) => exit::USAGE,
            Self::Source(_)
            | Self::Resume(_)
            | Self::Files(_)
            | Self::State(_)
            | Self::TakeOver(_)
            | Self::Replica(_)
            | Self::Client(_)
            | Self::Serve(_) => exit::FAILED,
        }
    }
}

/// The exit code of a process whose job ended like this.
#[must_use]
pub fn exit_code(outcome: &Outcome) -> i32 {
    match outcome {
        Outcome::Finished => exit::OK,
        Outcome::Stopped(StopCause::Operator) => exit::STOPPED,
        Outcome::Stopped(
            StopCause::Lost(_)
            | StopCause::Failed { .. }
            | StopCause::JoinDeadline { .. }
            | StopCause::NeverJoined { .. },
        ) => exit::WORKER_LOST,
        Outcome::Stopped(StopCause::NoProgress { .. }) => exit::NO_PROGRESS,
        Outcome::Stopped(StopCause::GaveUp { why, .. }) => why.exit_code(),
    }
}

/// Serves a job until it has ended; `shutdown` is the operator's stop.
///
/// # Errors
/// If the job cannot be started, or its files not be written any more.
pub async fn run(settings: Settings, shutdown: impl Future<Output = ()> + Send) -> Result<Outcome, CoordinatorError> {
    let mut shutdown = std::pin::pin!(shutdown);
    let coordinator = tokio::select! {
        biased;
        // nothing has begun
        () = &mut shutdown => return Ok(Outcome::Stopped(StopCause::Operator)),
        coordinator = Coordinator::bind(settings) => coordinator?,
    };
    coordinator.run(shutdown).await
}

/// As [`run`], for the job that a killed coordinator of this run directory has left.
///
/// # Errors
/// If there is none, or as [`run`].
pub async fn take_over(run_dir: &Path, shutdown: impl Future<Output = ()> + Send) -> Result<Outcome, CoordinatorError> {
    Coordinator::take_over(run_dir).await?.run(shutdown).await
}
