//! What happened in a job beside its steps: one line of `events.jsonl` each.
//!
//! Input: what a worker or the coordinator has noticed. Output: the same value in the file, the log and a metric's label.
//! Fields are only ever added, with a default, so that the events of older versions stay readable.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::NonFinite;
use crate::ids::{Generation, Rank, Step, UserIndex, WorkerId};
use crate::ledger::Fault;
use crate::membership::LossCause;
use crate::progress::{Cause, Stall};

/// Most users that an event names.
pub const MAX_NAMED_USERS: usize = 1024;

/// One line of `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobEvent {
    /// Seconds since the Unix epoch when the coordinator took note of it, for people: nothing depends on the wall clock.
    pub time: f64,
    pub generation: Generation,
    #[serde(flatten)]
    pub happening: Happening,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happening {
    /// The loss or the gradient of a step was no finite number; the step was not applied.
    NonFinite {
        /// The step by its number as finished steps count, from 1.
        step: Step,
        /// None if it is this that is not finite.
        loss: Option<f64>,
        gradient_norm: Option<f64>,
        action: NonFinite,
        /// Rows of the training sequences: the users whose embeddings were not finite; if all were, every user of the
        /// step. The first [`MAX_NAMED_USERS`].
        users: Vec<UserIndex>,
        /// How many there are.
        user_count: u64,
        /// The embeddings of `users` were themselves not finite.
        suspected: bool,
    },
    /// A checkpoint could not be written; the earlier ones stay, and training goes on.
    CheckpointFailed { step: Step, reason: String },
    /// A checkpoint was due while one was still being written and another waited.
    CheckpointSkipped { step: Step },
    /// `checkpoint.metric` could not be told on valid, so no checkpoint becomes the best until it can.
    MetricMissing { step: Step, metric: String },
    /// A worker was lost; the job goes on without it if it can.
    WorkerLost { worker: WorkerId, rank: Rank, cause: LossCause },
    /// A worker was lost that waited for its first generation.
    NewcomerLost { worker: WorkerId, cause: LossCause },
    /// The generation has ended at once, for a new one.
    Regrouping { reason: String },
    /// The generation of this event was formed.
    Formed { world_size: u32 },
    /// No step was finished within the progress deadline.
    Stalled { stall: Stall, seconds: u64 },
    /// A rank's own work takes much longer than that of the others, by this ratio to their median.
    Lagging { rank: Rank, ratio: f64, cause: Cause },
    /// It does no longer.
    KeepsUp { rank: Rank, ratio: f64 },
    /// An epoch has not used every user exactly once. The program is to blame; the job goes on.
    LedgerInexact(Fault),
    /// A worker is not needed any more.
    WorkerDismissed { worker: WorkerId },
    /// A coordinator has taken the job over from one that was killed.
    TakenOver,
    /// A scheduler has started the job again, for the `restarts`-th time.
    Restarted { restarts: u32 },
}

impl fmt::Display for Happening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NonFinite { step, loss, action, user_count, suspected, .. } => {
                let what = if loss.is_none() { "loss" } else { "gradient" };
                let users = if *suspected { "users have embeddings that are not finite" } else { "users are in it" };
                write!(f, "the {what} of step {step} is not a finite number ({user_count} {users}): {action}")
            }
            Self::CheckpointFailed { step, reason } => {
                write!(f, "the checkpoint of step {step} could not be written: {reason}")
            }
            Self::CheckpointSkipped { step } => {
                write!(f, "no checkpoint of step {step}: those before are still being written")
            }
            Self::MetricMissing { step, metric } => {
                write!(
                    f,
                    "{metric} cannot be told after step {step}, so no checkpoint becomes the best by it: are there held-out \
                     exposures of both kinds? Choose another checkpoint.metric"
                )
            }
            Self::WorkerLost { worker, rank, cause } => {
                write!(f, "rank {rank} (worker {worker}) was lost: {cause}")
            }
            Self::NewcomerLost { worker, cause } => {
                write!(f, "worker {worker}, which had no rank yet, was lost: {cause}")
            }
            Self::Regrouping { reason } => write!(f, "the workers regroup: {reason}"),
            Self::Formed { world_size } => write!(f, "a generation of {world_size} workers was formed"),
            Self::Stalled { stall, seconds } => write!(f, "no step for {seconds} s: {stall}"),
            Self::Lagging { rank, ratio, cause } => {
                write!(f, "rank {rank} lags: its own work takes {ratio:.2} times the median (cause: {cause})")
            }
            Self::KeepsUp { rank, ratio } => write!(f, "rank {rank} keeps up again ({ratio:.2} times the median)"),
            Self::LedgerInexact(fault) => {
                write!(
                    f,
                    "not every user is used once in each epoch: {fault}. Please report it, with the run's events.jsonl"
                )
            }
            Self::WorkerDismissed { worker } => write!(f, "worker {worker} is not needed any more"),
            Self::Restarted { restarts } => write!(f, "the scheduler has started the job again (restart {restarts})"),
            Self::TakenOver => f.write_str("the coordinator was lost, and another has taken the job over"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::EpochCount;
    use crate::phase::Phase;

    #[test]
    fn a_line_is_read_back() {
        let events = [
            Happening::NonFinite {
                step: Step(7),
                loss: None,
                gradient_norm: Some(1.5),
                action: NonFinite::Skip,
                users: vec![UserIndex(3)],
                user_count: 1,
                suspected: true,
            },
            Happening::CheckpointFailed { step: Step(8), reason: "disk full".into() },
            Happening::CheckpointSkipped { step: Step(9) },
            Happening::MetricMissing { step: Step(9), metric: "cvr.auc".into() },
            Happening::WorkerLost { worker: WorkerId(3), rank: Rank(1), cause: LossCause::Disconnected },
            Happening::WorkerLost { worker: WorkerId(3), rank: Rank(1), cause: LossCause::Silent { seconds: 9 } },
            Happening::Regrouping { reason: "a worker joined".into() },
            Happening::Formed { world_size: 4 },
            Happening::WorkerDismissed { worker: WorkerId(5) },
            Happening::NewcomerLost { worker: WorkerId(6), cause: LossCause::Disconnected },
            Happening::TakenOver,
            Happening::Restarted { restarts: 2 },
            Happening::Stalled {
                stall: Stall { guilty: Some((WorkerId(1), Rank(0))), cause: Cause::Data, phase: Phase::DataWait },
                seconds: 31,
            },
            Happening::Lagging { rank: Rank(1), ratio: 1.75, cause: Cause::Device },
            Happening::KeepsUp { rank: Rank(1), ratio: 1.0 },
            Happening::LedgerInexact(Fault::OutOfTurn { epoch: 2 }),
            Happening::LedgerInexact(Fault::NotOnce {
                count: EpochCount { epoch: 1, users: 9, seen: 8, repeated: 1, unknown: 0 },
            }),
        ];
        for happening in events {
            let event = JobEvent { time: 1.5, generation: Generation(2), happening };
            let line = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<JobEvent>(&line).unwrap(), event, "{line}");
            assert!(line.contains("\"event\":\""), "{line}");
        }
    }
}
