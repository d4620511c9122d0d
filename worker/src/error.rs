//! Why a worker could not do its task.

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
    Secret(#[from] learn_proto::auth::AuthError),
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
    #[error("the runtime could not be started: {0}")]
    Runtime(std::io::Error),
    #[error("cannot listen on {address}: {source}; set --bind to an address of this host")]
    Bind { address: String, source: std::io::Error },
    #[error("the job ended before it began: {0}")]
    Refused(String),
    #[error("aborted because {cause} ({error})")]
    Aborted { cause: String, error: String },
    #[error(
        "the loss of step {step} is {loss}; lower optimizer.learning_rate or set optimizer.clip_norm, and look at the \
         content embeddings"
    )]
    NonFiniteLoss { step: u64, loss: f64 },
    #[error("the model's scores are not finite, so nothing can be ranked; the training has diverged")]
    NonFiniteScores,
    #[error(
        "the ranks do not start with the same parameters; are all workers of the same version, and do they read the same \
         run directory?"
    )]
    Signature,
    #[error("{path}: {reason}")]
    File { path: String, reason: String },
    #[error("{0}")]
    Usage(String),
}
