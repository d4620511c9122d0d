//! Why a job takes no notice of a message.

use learn_domain::membership::{Refusal, StopCause};
use learn_domain::{Generation, Rank, Step, WorkerId};

use super::BooksError;

/// Why a message changes nothing.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum JobError {
    #[error("{0}")]
    Refused(Refusal),
    #[error("worker {0} does not belong to this job; it must join first")]
    UnknownWorker(WorkerId),
    #[error("generation {theirs} is not the one that runs (that is {ours}); ask the next heartbeat what to do")]
    StaleGeneration { theirs: Generation, ours: Generation },
    #[error("generation {0} has ended; ask the next heartbeat what to do")]
    Regrouping(Generation),
    #[error("the job is stopping: {0}")]
    Stopping(StopCause),
    #[error(
        "{workers} workers are too many for the machine whose learn-launch starts them, which takes {most} at most; ask for \
         fewer, or start the workers elsewhere: `learn-launch stop RUN`, then `learn-launch resume RUN --no-workers`"
    )]
    TooManyWorkers { workers: u32, most: u32 },
    #[error("only rank 0 may do this; worker {worker} has rank {rank}")]
    NotRankZero { worker: WorkerId, rank: Rank },
    #[error(
        "the {what} of step {step} is not a finite number: training has diverged; lower optimizer.learning_rate or raise \
         optimizer.warmup_steps, and resume from an earlier checkpoint"
    )]
    Diverged { what: String, step: Step },
    #[error(transparent)]
    Books(#[from] BooksError),
}
