//! Why a worker could not do its task.

use learn_domain::Step;
use learn_domain::failure::Reach;
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
    #[error("rank 0 could not begin: {0}")]
    NotBegun(String),
    #[error("{0}")]
    Memory(String),
    #[error("{0}; this is a defect of the program or of the installation")]
    Panic(String),
    /// What nothing outside of the program brings about.
    #[error("{0}; this is a defect of the program, so please report it")]
    Defect(String),
    #[error("stdout cannot be written: {0}")]
    Stdout(std::io::Error),
    #[error("{path}: {reason}")]
    File { path: String, reason: String },
    #[error("{0}")]
    Usage(String),
}

impl WorkerError {
    /// How far it reaches.
    #[must_use]
    pub fn reach(&self) -> Reach {
        match self {
            Self::NonFiniteStep { .. } | Self::NonFiniteScores | Self::NonFiniteEmbeddings => {
                Reach::Job(GiveUp::Diverged)
            }
            Self::Unsaved(_) => Reach::Job(GiveUp::Unsaved),
            Self::Control(ControlError::Ended { .. } | ControlError::Unknown { .. })
            | Self::Feed(FeedError::Aborted) => Reach::Generation,
            Self::Collective(error) if error.passes() => Reach::Generation,
            Self::Collective(_) | Self::Panic(_) | Self::Defect(_) => Reach::Process,
            _ => Reach::Place,
        }
    }

    /// The exit code of a process that ends with this error.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Usage(_) | Self::Checkpoint(CheckpointError::Unknown { .. }) => exit::USAGE,
            _ => self.reach().exit_code(),
        }
    }
}

#[cfg(test)]
mod tests {
    use learn_collective::CollectiveError;

    use super::*;

    #[test]
    fn each_failure_reaches_as_far_as_it_should() {
        let ended = ControlError::Ended { call: "put", message: String::new() };
        let lost = CollectiveError::PeerLost { op: "gather", peer: Some(1), reason: String::new() };
        let broken = CollectiveError::Device { op: "gather", reason: String::new() };
        for (error, reach) in [
            (WorkerError::from(ended), Reach::Generation),
            (FeedError::Aborted.into(), Reach::Generation),
            (lost.into(), Reach::Generation),
            (broken.into(), Reach::Process),
            (WorkerError::Panic("a defect".into()), Reach::Process),
            (WorkerError::Defect("no trainer".into()), Reach::Process),
            (WorkerError::Memory("lower training.micro_batch".into()), Reach::Place),
            (ControlError::Refused { call: "join", message: String::new() }.into(), Reach::Place),
            (WorkerError::Usage("no such user".into()), Reach::Place),
            (WorkerError::NonFiniteScores, Reach::Job(GiveUp::Diverged)),
            (WorkerError::Unsaved(CheckpointError::WriterGone), Reach::Job(GiveUp::Unsaved)),
        ] {
            assert_eq!(error.reach(), reach, "{error}");
        }
        assert_eq!(WorkerError::Usage(String::new()).exit_code(), exit::USAGE);
        assert_eq!(WorkerError::NonFiniteScores.exit_code(), exit::DIVERGED);
        assert_eq!(WorkerError::Signature.exit_code(), exit::FAILED);
        assert_eq!(WorkerError::Defect(String::new()).exit_code(), exit::FAILED);
    }
}
