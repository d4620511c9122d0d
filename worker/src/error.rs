//! Why a worker could not do its task.

use learn_domain::Step;
use learn_domain::membership::GiveUp;
use learn_domain::report::exit;

use crate::checkpoint::CheckpointError;
use crate::control::ControlError;
use crate::feed::FeedError;
use crate::feed::flight::FlightClientError;

/// A worker's failure; its text goes to the coordinator, the log and the user.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Client(#[from] learn_proto::connect::ConnectError),
    #[error(transparent)]
    Torch(#[from] learn_torch::TorchError),
    #[error(transparent)]
    Tensor(#[from] tch::TchError),
    #[error(transparent)]
    Model(#[from] learn_model::ModelError),
    #[error(transparent)]
    Collective(#[from] learn_collective::CollectiveError),
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error(transparent)]
    Flight(#[from] FlightClientError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Plan(#[from] learn_domain::plan::PlanError),
    #[error(transparent)]
    Dataset(#[from] learn_dataset::DatasetError),
    #[error(transparent)]
    Row(#[from] learn_dataset::RowError),
    #[error("the runtime could not be started: {0}")]
    Runtime(std::io::Error),
    #[error("cannot listen on {address}: {source}; set --bind to an address of this host")]
    Bind { address: String, source: std::io::Error },
    #[error("the job ended before it began: {0}")]
    Refused(String),
    #[error("aborted because {cause} ({error})")]
    Aborted { cause: String, error: String },
    #[error(
        "the {what} of step {step} is not a finite number; lower optimizer.learning_rate, set optimizer.clip_norm, or look \
         at the content embeddings"
    )]
    NonFiniteStep { step: Step, what: &'static str },
    #[error("the last checkpoint could not be written: {0}; make room, or mend the directory")]
    Unsaved(CheckpointError),
    #[error("the model's scores are not finite, so nothing can be ranked; the training has diverged")]
    NonFiniteScores,
    #[error(
        "the model's embeddings are not finite, so they are of no use; the training has diverged: take an earlier checkpoint \
         with --checkpoint"
    )]
    NonFiniteEmbeddings,
    #[error(
        "the ranks do not start with the same parameters; are all workers of the same version, and do they read the same \
         run directory?"
    )]
    Signature,
    #[error("{0}")]
    Memory(String),
    #[error("{0}; this is a defect of the program or of the installation")]
    Panic(String),
    #[error("stdout cannot be written: {0}")]
    Stdout(std::io::Error),
    #[error("{path}: {reason}")]
    File { path: String, reason: String },
    #[error("{0}")]
    Usage(String),
}

impl WorkerError {
    /// Why the whole job is to be given up, if nobody could do better: every rank comes to the same.
    #[must_use]
    pub fn gives_up(&self) -> Option<GiveUp> {
        match self {
            Self::NonFiniteStep { .. } | Self::NonFiniteScores | Self::NonFiniteEmbeddings => Some(GiveUp::Diverged),
            Self::Unsaved(_) => Some(GiveUp::Unsaved),
            _ => None,
        }
    }

    /// It ends a generation and not this worker: what it holds is as it was.
    #[must_use]
    pub fn passes(&self) -> bool {
        match self {
            Self::Control(error) => matches!(error, ControlError::Ended { .. } | ControlError::Unknown { .. }),
            Self::Feed(FeedError::Aborted) => true,
            Self::Collective(error) => error.passes(),
            _ => false,
        }
    }

    /// It ends this process and says nothing of others in its place: a defect, a broken device.
    #[must_use]
    pub fn crashes(&self) -> bool {
        matches!(self, Self::Panic(_) | Self::Collective(_))
    }

    /// The exit code of a process that ends with this error.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self.gives_up() {
            Some(GiveUp::Diverged) => exit::DIVERGED,
            Some(GiveUp::Unsaved) => exit::UNSAVED,
            None if matches!(self, Self::Usage(_) | Self::Checkpoint(CheckpointError::Unknown { .. })) => exit::USAGE,
            None => exit::FAILED,
        }
    }
}
