//! Values that the processes of a job exchange about it, and that its JSON files hold.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::ids::{Generation, Rank, Step, WorkerId};
use crate::ledger::LedgerSummary;
use crate::phase::Phase;

/// What the workers are there for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Task {
    /// Train, from a checkpoint directory if one is named.
    Train { resume_from: Option<String> },
    /// Evaluate a checkpoint on a split and end.
    Evaluate { checkpoint: String, split: Split },
}

/// A held-out part of the dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    Valid,
    Test,
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Valid => "valid",
            Self::Test => "test",
        })
    }
}

/// Counts that describe a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetFacts {
    pub name: String,
    pub fingerprint: String,
    /// Users of all splits.
    pub users: u64,
    /// Users with a training sequence.
    pub train_users: u32,
    pub valid_users: u32,
    pub test_users: u32,
    pub items: u32,
    pub interactions: u64,
    /// Dimension of the content embeddings.
    pub embedding_dim: u32,
    /// Fingerprint of the content embeddings' values; empty without any.
    #[serde(default)]
    pub embeddings_fingerprint: String,
}

impl DatasetFacts {
    /// The dataset as a model sees it: without its content embeddings if the model does not read them, so that they may
    /// come, go or change.
    #[must_use]
    pub fn seen_by(self, model: &ModelConfig) -> Self {
        if model.item_input.has_content() {
            return self;
        }
        Self { embedding_dim: 0, embeddings_fingerprint: String::new(), ..self }
    }

    /// What differs between the data of a training, these, and those of `now`; what one of them does not have tells
    /// nothing, because it may yet be made.
    #[must_use]
    pub fn differ_from(&self, now: &Self) -> Option<&'static str> {
        let differ = |a: &str, b: &str| !a.is_empty() && !b.is_empty() && a != b;
        if differ(&self.fingerprint, &now.fingerprint) {
            return Some("items or interactions");
        }
        differ(&self.embeddings_fingerprint, &now.embeddings_fingerprint).then_some("content embeddings")
    }
}

/// Where a live coordinator listens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorAddress {
    pub pid: u32,
    /// Name of its machine; empty in files of older versions, which were always read there.
    #[serde(default)]
    pub host: String,
    /// `http://HOST:PORT` of control and Flight.
    pub grpc: String,
    /// `http://HOST:PORT` of metrics and status.
    pub http: String,
    /// Tells this process from any other that may listen at the address later; empty in files of older versions.
    #[serde(default)]
    pub incarnation: String,
}

impl CoordinatorAddress {
    /// The header by which `/healthz` tells the incarnation.
    pub const INCARNATION: &str = "learn-incarnation";
}

/// One finished step of the global batch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Finished steps, this one included.
    pub step: Step,
    pub epoch: u32,
    pub generation: Generation,
    pub loss: f64,
    /// Share of (position, target) pairs whose target scores above every negative.
    pub accuracy: f64,
    pub learning_rate: f64,
    pub gradient_norm: f64,
    pub users: u32,
    pub tokens: u64,
    /// Share of the encoder's rows that were padding.
    pub padding_share: f64,
    /// Seconds from the end of the step before, slowest rank.
    pub seconds: f64,
    /// Mean binary cross-entropy of the CVR head, before its weight; part of `loss`. Only with a head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cvr_loss: Option<f64>,
}

/// A line of `metrics.jsonl` or `evaluations.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timed<T> {
    /// Seconds since the Unix epoch when the coordinator took note of it, for people; none in files of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<f64>,
    #[serde(flatten)]
    pub value: T,
}

/// Ranking quality on one split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub split: Split,
    pub step: Step,
    pub epoch: u32,
    pub users: u64,
    /// `recall@10`, `ndcg@10`, `hr@10`, `mrr`, `auc` -> value; with a CVR head `cvr.auc` and the others of
    /// [`crate::conversion`].
    pub metrics: BTreeMap<String, f64>,
    pub seconds: f64,
    /// The parts of the split; empty in the evaluations between the epochs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub segments: Vec<SegmentResult>,
    /// What needs no training, on the same users in the same way; empty in the evaluations between the epochs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub comparisons: Vec<Comparison>,
}

/// Ranking quality on one part of a split; see [`crate::segments`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SegmentResult {
    /// `all`, `cold_items`, …
    pub segment: String,
    /// Users with a target in it.
    pub users: u64,
    /// Their targets in it, each item of a user once.
    pub targets: u64,
    pub metrics: BTreeMap<String, Estimate>,
}

/// A mean over users.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub value: f64,
    /// None without resamples, and for `cvr.*`, which are not resampled; in JSON `low` and `high` are then missing.
    #[serde(flatten)]
    pub interval: Option<Interval>,
}

/// A 95 % bootstrap interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

/// What a scorer that was not trained reaches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// `popularity`, `last_item` or `decayed_mean`.
    pub name: String,
    pub metrics: BTreeMap<String, f64>,
    pub segments: Vec<SegmentResult>,
}

/// A worker as the status shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    pub worker: WorkerId,
    pub rank: Option<Rank>,
    pub host: String,
    pub pid: u32,
    pub device: String,
    pub step: Step,
    pub phase: Phase,
    /// `http://HOST:PORT/metrics`.
    pub metrics_url: String,
    pub seconds_since_heartbeat: f64,
    /// Since it entered the phase, or the collective in it that it waits in; 0 in files of older versions.
    #[serde(default)]
    pub seconds_in_phase: f64,
    /// Its own work in a step, divided by the median of all ranks; none while there is too little to say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work_ratio: Option<f64>,
    /// It is no part of the job any more: its phase says how it went.
    #[serde(default)]
    pub left: bool,
}

/// A data server beside the coordinator, as the status shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataServerStatus {
    /// `http://HOST:PORT` of its Flight service.
    pub location: String,
    /// `http://HOST:PORT/metrics`.
    pub metrics_url: String,
    pub host: String,
    pub pid: u32,
}

/// Where a job stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waiting for workers to join.
    Gathering,
    Running,
    /// Between two generations.
    Regrouping,
    Stopping,
    Finished,
    /// Stopped by its operator; can be resumed.
    Stopped,
    Failed,
}

impl JobState {
    /// As its JSON, the metrics and people name it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Gathering => "gathering",
            Self::Running => "running",
            Self::Regrouping => "regrouping",
            Self::Stopping => "stopping",
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    /// Nothing more will happen.
    #[must_use]
    pub fn ended(&self) -> bool {
        matches!(self, Self::Finished | Self::Stopped | Self::Failed)
    }
}

/// The whole job at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobStatus {
    pub name: String,
    pub task: Task,
    pub state: JobState,
    /// Why it is stopping, stopped or failed.
    pub cause: Option<String>,
    /// Whom it stands still for, if no step was finished within the progress deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall: Option<String>,
    pub generation: Generation,
    /// Ranks of this generation; before the first, how many there will be.
    pub world_size: u32,
    /// Workers that the job wants to have; 0 in files of older versions.
    #[serde(default)]
    pub wanted_workers: u32,
    /// Most workers that whoever starts them can start; none where nobody does but people or a scheduler, and in files of older
    /// versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_workers: Option<u32>,
    pub dataset: DatasetFacts,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
    /// The last finished step.
    pub last_step: Option<StepRecord>,
    pub last_checkpoint: Option<Step>,
    /// The best evaluation on valid by `checkpoint.metric`, however old.
    pub best: Option<Evaluation>,
    /// The newest 100, oldest first; all in files of older versions.
    pub evaluations: Vec<Evaluation>,
    pub workers: Vec<WorkerStatus>,
    /// Live data servers beside the coordinator's own; only a coordinator that is asked knows them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_servers: Vec<DataServerStatus>,
    pub ledger: LedgerSummary,
    /// Times that a scheduler has started the job again.
    #[serde(default)]
    pub restarts: u32,
    /// Somebody has called to stop it (`learn-launch stop`, the API). A signal does not say who it is from: schedulers send them, too.
    #[serde(default)]
    pub operator_stop: bool,
    /// Seconds since the coordinator started.
    pub seconds: f64,
}

/// `summary.json` of a finished job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub dataset: String,
    pub fingerprint: String,
    pub users: u64,
    pub items: u32,
    pub interactions: u64,
    pub world_size: u32,
    pub steps: u64,
    /// Wall-clock of the training, evaluation included.
    pub seconds: f64,
    /// Users trained per second of the steps alone.
    pub samples_per_second: f64,
    /// Step of the checkpoint that was tested.
    pub best_step: Step,
    pub valid: BTreeMap<String, f64>,
    pub test: BTreeMap<String, f64>,
    /// The same test users, ranked by training popularity.
    pub popularity: BTreeMap<String, f64>,
    /// The parts of the test; empty in summaries of older versions, as `comparisons`.
    #[serde(default)]
    pub segments: Vec<SegmentResult>,
    /// The same test users, ranked without training; popularity is among them.
    #[serde(default)]
    pub comparisons: Vec<Comparison>,
}

/// Where an embed job stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EmbeddingStatus {
    /// Items to embed; 0 until the first worker knows.
    pub items: u64,
    /// Finished ones, those of ranges in work included.
    pub items_done: u64,
    pub ranges: u64,
    pub ranges_done: u64,
    /// Those that have neither left nor fallen silent.
    pub workers: Vec<EmbeddingWorker>,
    /// Why it has failed.
    pub failure: Option<String>,
}

/// A worker of an embed job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmbeddingWorker {
    pub worker: WorkerId,
    pub host: String,
    pub pid: u32,
    /// The range that it holds.
    pub range: Option<u64>,
    pub seconds_since_heard: f64,
}

/// Exit codes of `learn-launch`, the coordinator and the workers.
pub mod exit {
    /// Done.
    pub const OK: i32 = 0;
    /// Something failed; the message says what.
    pub const FAILED: i32 = 1;
    /// Wrong flags or configuration.
    pub const USAGE: i32 = 2;
    /// Stopped by the operator (SIGTERM, SIGINT, `learn-launch stop`); a training has written a checkpoint, from which `resume`
    /// continues.
    pub const STOPPED: i32 = 3;
    /// Workers were lost and the job could not go on without them; `resume` continues from the last checkpoint.
    pub const WORKER_LOST: i32 = 4;
    /// Loss or gradient was not a finite number, and `training.non_finite` says stop; or embeddings or scores were not.
    pub const DIVERGED: i32 = 5;
    /// The job went on to its end, or to a stop, but its last checkpoint could not be written.
    pub const UNSAVED: i32 = 6;
    /// The workers kept being lost or losing each other without finishing a step (`cluster.max_recoveries`).
    pub const NO_PROGRESS: i32 = 7;
    /// Its scheduler ended the job before it was done, and it could not be queued again from within: `learn-launch slurm
    /// --resubmit` goes on from the last checkpoint.
    pub const RESUBMIT: i32 = 8;
    /// Its scheduler has started the job again as often as it may, or again and again without a new checkpoint.
    pub const RESTARTS: i32 = 9;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_vectors_are_other_data_unless_one_side_has_none() {
        let facts = |fingerprint: &str, embeddings_fingerprint: &str| DatasetFacts {
            fingerprint: fingerprint.into(),
            embeddings_fingerprint: embeddings_fingerprint.into(),
            ..DatasetFacts::default()
        };
        assert_eq!(facts("a", "v").differ_from(&facts("a", "v")), None);
        assert_eq!(facts("a", "v").differ_from(&facts("a", "w")), Some("content embeddings"));
        assert_eq!(facts("a", "v").differ_from(&facts("b", "v")), Some("items or interactions"));
        assert_eq!(facts("a", "v").differ_from(&facts("a", "")), None, "it has to be embedded again first");
        assert_eq!(facts("a", "").differ_from(&facts("a", "v")), None, "a model that reads no content");
    }

    #[test]
    fn an_estimate_has_both_ends_of_an_interval_or_none() {
        let read = |text: &str| serde_json::from_str::<Estimate>(text).unwrap();
        let with = Estimate { value: 0.5, interval: Some(Interval { low: 0.4, high: 0.6 }) };
        assert_eq!(read(r#"{"value":0.5,"low":0.4,"high":0.6}"#), with);
        let without = Estimate { value: 0.5, interval: None };
        assert_eq!(serde_json::to_string(&without).unwrap(), r#"{"value":0.5}"#);
        for estimate in [with, without] {
            assert_eq!(read(&serde_json::to_string(&estimate).unwrap()), estimate);
        }
    }
}
