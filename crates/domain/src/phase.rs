//! What a worker is at, or how it went: one list for heartbeats, for the rules of [`crate::progress`], for metrics, and for
//! whoever shows it.
//!
//! Input: a text from a message or a file. Output: a [`Phase`], and its text again. Invariants: the texts stand here alone;
//! one that this version does not know is [`Phase::Unknown`] and no error, so that other versions can be listened to and
//! their files stay readable.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a worker is at, or how it went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// It makes what its task needs, and waits for its first generation.
    Starting,
    /// It waits for its next generation.
    Regrouping,
    /// It waits for the batch of its next step.
    DataWait,
    /// A batch is laid out, beside the steps.
    Assemble,
    Forward,
    Gather,
    Loss,
    Backward,
    Reduce,
    Optimizer,
    /// A checkpoint is copied for the writer, or all wait for one that is to be kept until the writer takes it.
    Checkpoint,
    Evaluation,
    /// The last checkpoint is waited for.
    Finishing,
    /// Of a process that takes part in no job.
    Export,
    /// Likewise.
    Recommend,
    /// It was let in and has not been heard of yet.
    Joining,
    /// It has left: the task is finished.
    Done,
    /// It has left: the job was stopped.
    Stopped,
    /// It has left: it could not go on.
    Failed,
    /// It has left: the job cannot go on, whoever does it.
    GaveUp,
    /// It was taken out of the job.
    Lost,
    /// Nobody needs it any more.
    Dismissed,
    /// A text of another version, or none.
    #[default]
    Unknown,
}

impl Phase {
    /// In the order of their numbers.
    pub const ALL: [Self; 23] = [
        Self::Starting,
        Self::Regrouping,
        Self::DataWait,
        Self::Assemble,
        Self::Forward,
        Self::Gather,
        Self::Loss,
        Self::Backward,
        Self::Reduce,
        Self::Optimizer,
        Self::Checkpoint,
        Self::Evaluation,
        Self::Finishing,
        Self::Export,
        Self::Recommend,
        Self::Joining,
        Self::Done,
        Self::Stopped,
        Self::Failed,
        Self::GaveUp,
        Self::Lost,
        Self::Dismissed,
        Self::Unknown,
    ];

    /// Those whose seconds are measured, in the order of a step.
    pub const STEP: [Self; 8] = [
        Self::DataWait,
        Self::Assemble,
        Self::Forward,
        Self::Gather,
        Self::Loss,
        Self::Backward,
        Self::Reduce,
        Self::Optimizer,
    ];

    /// As messages, files, metrics and people name it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Regrouping => "regrouping",
            Self::DataWait => "data_wait",
            Self::Assemble => "assemble",
            Self::Forward => "forward",
            Self::Gather => "gather",
            Self::Loss => "loss",
            Self::Backward => "backward",
            Self::Reduce => "reduce",
            Self::Optimizer => "optimizer",
            Self::Checkpoint => "checkpoint",
            Self::Evaluation => "evaluation",
            Self::Finishing => "finishing",
            Self::Export => "export",
            Self::Recommend => "recommend",
            Self::Joining => "joining",
            Self::Done => "done",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::GaveUp => "gave up",
            Self::Lost => "lost",
            Self::Dismissed => "dismissed",
            Self::Unknown => "unknown",
        }
    }

    /// The phase of a number, which is its place in [`Self::ALL`].
    #[must_use]
    pub fn numbered(number: u8) -> Self {
        Self::ALL.get(usize::from(number)).copied().unwrap_or_default()
    }

    /// It takes as long as it takes: no step is missed meanwhile.
    #[must_use]
    pub const fn takes_its_time(self) -> bool {
        matches!(self, Self::Starting | Self::Regrouping | Self::Checkpoint | Self::Evaluation | Self::Finishing)
    }
}

impl From<&str> for Phase {
    fn from(text: &str) -> Self {
        Self::ALL.into_iter().find(|phase| phase.as_str() == text).unwrap_or_default()
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Phase {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Phase {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self::from(text.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_phase_is_found_by_its_number_and_by_its_text() {
        for (number, phase) in (0..).zip(Phase::ALL) {
            assert_eq!((phase as u8, Phase::numbered(number)), (number, phase));
            assert_eq!(Phase::from(phase.as_str()), phase, "{phase} stands for two");
            let json = serde_json::to_string(&phase).unwrap();
            assert_eq!((json.trim_matches('"'), serde_json::from_str(&json).unwrap()), (phase.as_str(), phase));
        }
        assert_eq!(Phase::numbered(Phase::ALL.len() as u8), Phase::Unknown);
    }

    #[test]
    fn the_texts_stay_those_that_files_dashboards_and_other_versions_know() {
        assert_eq!(
            Phase::ALL.map(Phase::as_str).join(" "),
            "starting regrouping data_wait assemble forward gather loss backward reduce optimizer checkpoint evaluation \
             finishing export recommend joining done stopped failed gave up lost dismissed unknown"
        );
    }

    proptest! {
        #[test]
        fn no_text_is_an_error(text in ".*") {
            let phase: Phase = serde_json::from_str(&serde_json::to_string(&text).unwrap()).unwrap();
            prop_assert!(phase == Phase::Unknown || phase.as_str() == text);
        }
    }
}
