//! The one typed configuration of a job.
//!
//! Precedence (applied by `learn-launch`): defaults < TOML file < environment < `--set` and flags. Unknown keys are
//! refused. The resolved copy is saved with each run and each checkpoint. Every option has a default that runs.

mod cluster;
mod embed;
mod model;
mod non_finite;
mod objective;
mod prepare;
mod refine;
mod tls;
mod train;
mod units;

use std::path::PathBuf;

pub use cluster::{ClusterConfig, DeviceKind};
pub use embed::{EmbedConfig, EndpointConfig, Precision, PromptConfig, Sentence};
pub use model::{AdaptorInit, ItemInput, ItemTower, PositionEmbedding, Residual, TimeEmbedding};
pub use non_finite::NonFinite;
pub use objective::{ObjectiveConfig, ObjectiveKind};
pub use prepare::{FileFormat, InteractionsConfig, ItemsConfig, PrepareConfig, SplitPolicy};
pub use refine::RefineConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use tls::{TlsConfig, TlsMode};
pub use train::{
    CheckpointConfig, EvaluationConfig, ModelConfig, OptimizerConfig, SamplingConfig, ScheduleKind, SegmentsConfig,
    TrainingConfig,
};
pub use units::{ByteSize, Span, UnitError};

/// The configuration of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub job: JobConfig,
    pub data: DataConfig,
    pub prepare: PrepareConfig,
    pub embed: EmbedConfig,
    pub model: ModelConfig,
    pub objective: ObjectiveConfig,
    pub sampling: SamplingConfig,
    pub optimizer: OptimizerConfig,
    pub training: TrainingConfig,
    pub evaluation: EvaluationConfig,
    pub checkpoint: CheckpointConfig,
    pub cluster: ClusterConfig,
}

/// What the job is called and where it writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct JobConfig {
    /// Name of the job; the run directory is `runs_dir/name`.
    pub name: String,
    /// Directory of all runs.
    pub runs_dir: PathBuf,
    /// Seed of the order, the samples, the initial weights and dropout.
    pub seed: u64,
}

impl Default for JobConfig {
    fn default() -> Self {
        Self { name: "learn".into(), runs_dir: "runs".into(), seed: 1 }
    }
}

/// How a content embedding travels from the data service to a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// As it is stored.
    #[default]
    F16,
    /// A signed byte a value and one scale a row.
    Int8,
}

impl RowFormat {
    /// Bytes of a row of `dim` values on the wire.
    #[must_use]
    pub fn row_bytes(self, dim: usize) -> usize {
        match self {
            Self::F16 => 2 * dim,
            Self::Int8 => dim + size_of::<f32>(),
        }
    }
}

/// Where the dataset lies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// The dataset directory: `prepare` writes it, `embed` adds the content embeddings, `train` reads it.
    pub dataset: PathBuf,
    /// A worker that can open the dataset's files itself (same host, shared file system) maps the content embeddings instead of
    /// having their rows sent. false: rows always come from the data servers, and pass through `cluster.row_cache`.
    pub map_rows: bool,
    /// How a content embedding travels to a worker: as it is stored (f16), or as signed bytes with one scale a row (int8), half
    /// the bytes. int8 rounds: every value by up to 1/226 of its row's largest. Whatever reads content embeddings for the
    /// run rounds them so, from the dataset's files too: training, evaluation, `export` and `recommend`.
    pub row_format: RowFormat,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { dataset: "data/dataset".into(), map_rows: true, row_format: RowFormat::F16 }
    }
}

/// A setting that is well-formed but makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{key}: {problem}")]
pub struct ConfigError {
    /// Dotted key, for example `training.global_batch`.
    pub key: &'static str,
    /// What is wrong and what to do.
    pub problem: String,
}

impl Config {
    /// Checks the values that types cannot.
    ///
    /// # Errors
    /// The first key whose value makes no sense.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |key, problem: &str| Err(ConfigError { key, problem: problem.into() });
        let name = &self.job.name;
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
            return fail("job.name", "must be a plain directory name, like \"my-run\"");
        }
        self.prepare.validate()?;
        self.embed.validate()?;
        train::validate(self)
    }

    /// Checks what a new training starts with. A run that exists has its start, and other commands need none.
    ///
    /// # Errors
    /// The first key whose value makes no sense without `training.init`.
    pub fn validate_start(&self) -> Result<(), ConfigError> {
        train::validate_start(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_survive_a_round_trip() {
        let config = Config::default();
        config.validate().unwrap();
        config.validate_start().unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);
        assert_eq!(serde_json::from_str::<Config>("{}").unwrap(), config);
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = serde_json::from_str::<Config>(r#"{"training": {"epoch": 3}}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `epoch`") && error.contains("epochs"), "{error}");
    }

    #[test]
    fn a_metric_that_is_not_measured_is_named_with_the_ways_out() {
        let problem = |metric: &str, cutoffs: &[u32]| {
            let mut config = Config::default();
            (config.checkpoint.metric, config.evaluation.cutoffs) = (metric.into(), cutoffs.to_vec());
            config.validate().unwrap_err().problem
        };
        let text = problem("ndcg@10", &[20, 300]);
        for words in ["ndcg@10", "evaluation.cutoffs = [20, 300]", "add 10", "checkpoint.metric=ndcg@300"] {
            assert!(text.contains(words), "{words} is not in {text}");
        }
        for unknown in ["loss", "ndcg", "ndcg@ten", "map@10"] {
            let text = problem(unknown, &[10]);
            assert!(text.contains(&format!("is {unknown}, but must be mrr")), "{text}");
        }
    }

    #[test]
    fn frozen_towers_need_a_start_that_is_not_random() {
        let mut config = Config::default();
        (config.training.freeze_towers, config.objective.cvr_weight) = (true, 1.0);
        config.checkpoint.metric = "cvr.auc".into();
        config.validate().expect("a command that trains nothing may read it");
        let ConfigError { key, problem } = config.validate_start().unwrap_err();
        assert_eq!(key, "training.freeze_towers");
        assert!(problem.contains("is random") && problem.contains("training.init"), "{problem}");
        let mut of_content = config.clone();
        of_content.model.residual = Residual::Content;
        of_content.validate_start().unwrap();
        config.training.init = Some("runs/towers".into());
        config.validate_start().unwrap();
    }

    #[test]
    fn weights_that_are_not_named_cannot_be_taken_in_part() {
        let mut config = Config::default();
        config.training.init_partial = true;
        config.validate().expect("a command that trains nothing may read it");
        let ConfigError { key, problem } = config.validate_start().unwrap_err();
        assert!(key == "training.init_partial" && problem.contains("--init RUN_OR_FILE"), "{problem}");
        config.training.init = Some("weights.safetensors".into());
        config.validate_start().unwrap();
    }

    #[test]
    fn nonsense_is_named() {
        let refused = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.validate().unwrap_err().key
        };
        assert_eq!(refused(|c| c.job.name = "a/b".into()), "job.name");
        assert_eq!(refused(|c| c.embed.prompt.sentences.clear()), "embed.prompt.sentences");
        assert_eq!(refused(|c| c.training.global_batch = 0), "training.global_batch");
        assert_eq!(refused(|c| c.training.precision = Precision::F16), "training.precision");
        assert_eq!(refused(|c| c.model.heads = 7), "model.heads");
        assert_eq!(refused(|c| c.model.dropout = 1.0), "model.dropout");
        assert_eq!(refused(|c| c.model.residual_decay = 1.5), "model.residual_decay");
        assert_eq!(refused(|c| c.model.id_dropout = 0.1), "model.id_dropout");
        let ids = |c: &mut Config| c.model.item_input = ItemInput::Id;
        assert_eq!(refused(|c| (c.model.item_input, c.model.centring) = (ItemInput::Id, true)), "model.centring");
        let mut config = Config::default();
        ids(&mut config);
        config.validate().unwrap();
        assert_eq!(refused(|c| c.optimizer.learning_rate = f64::NAN), "optimizer.learning_rate");
        assert_eq!(refused(|c| c.sampling.history = 0), "sampling.history");
        assert_eq!(refused(|c| c.objective.pairs = crate::sampling::Pairs::Next), "objective.pairs");
        let mut fine = Config::default();
        fine.objective.kind = ObjectiveKind::FullSoftmax;
        fine.validate().unwrap();
        for (change, key) in [
            ((|o| o.uniform_negatives = 1) as fn(&mut ObjectiveConfig), "objective.uniform_negatives"),
            (|o| o.history_negatives = 1, "objective.history_negatives"),
            (|o| o.logq_correction = true, "objective.logq_correction"),
        ] {
            let mut config = fine.clone();
            change(&mut config.objective);
            assert_eq!(config.validate().unwrap_err().key, key);
        }
        assert_eq!(refused(|c| c.evaluation.cutoffs = vec![]), "evaluation.cutoffs");
        assert_eq!(refused(|c| c.evaluation.decay = 1.5), "evaluation.decay");
        assert_eq!(refused(|c| c.evaluation.segments.head_items = 0.0), "evaluation.segments.head_items");
        assert_eq!(refused(|c| c.evaluation.segments.active_users = 5), "evaluation.segments.active_users");
        assert_eq!(refused(|c| c.cluster.workers = 0), "cluster.workers");
        assert_eq!(refused(|c| c.cluster.heartbeat_interval = Span::from_secs(0)), "cluster.heartbeat_interval");
        assert_eq!(refused(|c| c.cluster.collective_timeout = Span::from_secs(0)), "cluster.collective_timeout");
        assert_eq!(refused(|c| c.cluster.join_timeout = Span::from_secs(0)), "cluster.join_timeout");
        assert_eq!(refused(|c| c.cluster.min_workers = c.cluster.workers + 1), "cluster.min_workers");
        assert_eq!(refused(|c| (c.cluster.grpc_port, c.cluster.http_port) = (4100, 4100)), "cluster.http_port");
        let mut ports = Config::default();
        (ports.cluster.grpc_port, ports.cluster.http_port) = (4100, 4101);
        ports.validate().unwrap();
        assert_eq!(refused(|c| c.checkpoint.metric = "loss".into()), "checkpoint.metric");
        assert_eq!(refused(|c| c.checkpoint.metric = "cvr.auc".into()), "checkpoint.metric");
        assert_eq!(refused(|c| c.evaluation.cutoffs = vec![20]), "checkpoint.metric");
        assert_eq!(refused(|c| c.objective.cvr_weight = -1.0), "objective.cvr_weight");
        let coded = |c: &mut Config| (c.model.history_code, c.objective.cvr_weight) = (64, 1.0);
        assert_eq!(refused(coded), "model.history_code");
        assert_eq!(refused(|c| c.training.freeze_towers = true), "training.freeze_towers");
        let adapter = |c: &mut Config| {
            (c.training.freeze_towers, c.objective.cvr_weight) = (true, 1.0);
            c.training.init = Some("runs/towers".into());
        };
        assert_eq!(refused(adapter), "checkpoint.metric");
        assert_eq!(
            refused(|c| c.prepare.interactions.label_at_least = Some(4.0)),
            "prepare.interactions.label_at_least"
        );
    }
}
