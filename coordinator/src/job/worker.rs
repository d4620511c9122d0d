//! A worker as the job knows it.

use std::time::Duration;

use learn_domain::{Phase, Rank, Step};
use learn_proto::convert::Applicant;
use serde::{Deserialize, Serialize};

/// What is known of a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Worker {
    pub applicant: Applicant,
    pub rank: Option<Rank>,
    pub step: Step,
    pub phase: Phase,
    pub seen: Duration,
    /// Collective operations that it has entered in this generation.
    pub entered: u64,
    /// It is inside the last of them.
    pub inside: bool,
    /// How long it had been in its phase or collective when it was seen.
    pub since: Duration,
    /// It has said that it leaves.
    pub left: bool,
    /// It knows that the job stops.
    pub told: bool,
}

impl Worker {
    pub fn on_gpu(&self) -> bool {
        self.applicant.device.starts_with("cuda")
    }
}
