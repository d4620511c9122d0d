//! Settings of training: model, samples, optimizer, evaluation and checkpoints.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::model::{AdaptorInit, ItemInput, ItemTower, PositionEmbedding, Residual, TimeEmbedding};
use super::{ByteSize, Config, ConfigError, NonFinite, Precision};
use crate::ranking::Metrics;
use crate::sampling::{SamplingShape, StageOne};

/// The preference comprehension towers (PCH).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Transformer layers.
    pub layers: u32,
    /// Attention heads; divides `hidden`.
    pub heads: u32,
    /// Width of the transformer; its feed-forward layers are four times as wide.
    pub hidden: u32,
    /// Dimension of user and item embeddings.
    pub output_dim: u32,
    pub item_input: ItemInput,
    /// Share of the items that a training step reads without their learned vectors, with `item_input = "content_id"`: the
    /// towers learn to do without them (Volkovs et al., "DropoutNet", NeurIPS 2017).
    pub id_dropout: f64,
    pub item_tower: ItemTower,
    pub position_embedding: PositionEmbedding,
    pub time_embedding: TimeEmbedding,
    /// Dropout on attention weights, attention output and feed-forward output.
    pub dropout: f64,
    /// InfoNCE multiplies cosines by this (1 / temperature).
    pub logit_scale: f64,
    /// Learn `log(logit_scale)` with the other parameters.
    pub learn_logit_scale: bool,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    pub adaptor_init: AdaptorInit,
    /// Subtract the catalogue's mean from content embeddings and L2-normalise them again before anything reads them: what
    /// a text encoder gives to all items no longer hides what tells them apart. The mean is measured at a fresh start and
    /// kept with the weights. Published: off.
    pub centring: bool,
    pub residual: Residual,
    /// Weight of a history item relative to the next newer one in the mean of `residual = "content"`; 1 = all the same.
    pub residual_decay: f64,
    /// Train the projection of `residual = "content"` with the towers; else it stays as it starts.
    pub residual_trained: bool,
    /// Further dimensions in which an item has a fixed vector of length 1, a hash of its index, and a user minus the sum of
    /// those of its history's distinct items: the model can say "not this very item again". 0 = none. Embeddings have
    /// `output_dim` and these dimensions, and users' are longer than 1.
    pub history_code: u32,
    /// How much lower an item of the history scores by its history code.
    pub history_code_weight: f64,
}

impl ModelConfig {
    /// Whether the towers read when interactions were.
    #[must_use]
    pub fn reads_times(&self) -> bool {
        self.time_embedding != TimeEmbedding::None
    }
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            layers: 4,
            heads: 12,
            hidden: 768,
            output_dim: 64,
            item_input: ItemInput::Content,
            id_dropout: 0.0,
            item_tower: ItemTower::PerItem,
            position_embedding: PositionEmbedding::None,
            time_embedding: TimeEmbedding::None,
            dropout: 0.1,
            logit_scale: 20.0,
            learn_logit_scale: false,
            init_std: 0.02,
            adaptor_init: AdaptorInit::Normal,
            centring: false,
            residual: Residual::None,
            residual_decay: 0.5,
            residual_trained: false,
            history_code: 0,
            history_code_weight: 0.3,
        }
    }
}

/// How a user's sequence becomes a training sample; see `learn_domain::sampling`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingConfig {
    /// Most history items the user tower sees (H).
    pub history: u32,
    /// Most target items the item tower sees (T).
    pub targets: u32,
    /// Targets come from this many items after the cut; 0 = from all later ones.
    pub window: u32,
    /// How a longer sequence is shortened to `history` and `targets`.
    pub stage_one: StageOne,
    /// Sampled history positions (Nh).
    pub user_positions: u32,
    /// Sampled target positions (Nt).
    pub item_positions: u32,
    /// The oldest position's weight is the logarithm of this.
    pub alpha: f64,
    /// The newest position's weight is the logarithm of this.
    pub beta: f64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            history: 80,
            targets: 20,
            window: 0,
            stage_one: StageOne::Uniform,
            user_positions: 10,
            item_positions: 10,
            alpha: 10.0,
            beta: 10_000.0,
        }
    }
}

/// The learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    #[default]
    Cosine,
    Constant,
}

/// AdamW and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay; not applied to biases, layer norms, positions, time gaps, the logit scale and the
    /// trained projection of `model.residual`. A learned item vector decays only in steps that touch it.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 = no clipping.
    pub clip_norm: f64,
    /// Steps of linear warm-up to the peak.
    pub warmup_steps: u64,
    pub schedule: ScheduleKind,
    /// Floor of the cosine schedule as a share of the peak.
    pub min_learning_rate_ratio: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
            warmup_steps: 100,
            schedule: ScheduleKind::Cosine,
            min_learning_rate_ratio: 0.05,
        }
    }
}

/// How long and how large.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingConfig {
    /// Passes over all users.
    pub epochs: u32,
    /// Stop after this many steps even if epochs are left; 0 = no limit.
    pub max_steps: u64,
    /// Users of one step over all workers.
    pub global_batch: u32,
    /// Most users of one forward and backward pass of a worker; a larger share is done in several passes with the same
    /// gradient (negatives stay those of the whole global batch). 0 = one pass.
    pub micro_batch: u32,
    pub precision: Precision,
    /// Keep only what each layer of the encoder reads, and compute the rest again when its gradient is due: about a third more
    /// work for much less memory with many layers. It changes no result.
    pub activation_checkpointing: bool,
    /// Train the CVR head alone (the adapter stage): the towers keep the weights they start with, run without dropout,
    /// and the loss is that of the head. Needs `init`, or `model.residual = "content"`: a random start would stay.
    pub freeze_towers: bool,
    /// Start with these weights instead of random ones: a run directory (its best checkpoint, else its last), a checkpoint
    /// directory, or a `.safetensors` file in the layout of the published checkpoints. They must be exactly the model's, but
    /// for a CVR head, which starts at random if they have none. Optimizer and steps start anew.
    pub init: Option<PathBuf>,
    /// Take what fits from `init` and start the rest anew, instead of refusing weights that are not exactly the model's.
    pub init_partial: bool,
    /// What is done about a step whose loss or gradient is not a finite number; the same on every worker.
    pub non_finite: NonFinite,
    /// Most such steps of a run that are skipped or rolled back; one more stops it.
    pub non_finite_budget: u32,
    /// Threads of a worker; 0 = cores divided by local workers.
    pub threads: u32,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            epochs: 10,
            max_steps: 0,
            global_batch: 256,
            micro_batch: 0,
            precision: Precision::F32,
            activation_checkpointing: false,
            freeze_towers: false,
            init: None,
            init_partial: false,
            non_finite: NonFinite::Stop,
            non_finite_budget: 10,
            threads: 0,
        }
    }
}

impl TrainingConfig {
    /// Steps of the whole job.
    #[must_use]
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        let all = u64::from(self.epochs) * steps_per_epoch;
        if self.max_steps == 0 { all } else { all.min(self.max_steps) }
    }
}

/// Full ranking over the catalogue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationConfig {
    /// Evaluate on valid after every so many epochs; 0 = only at the end.
    pub every_epochs: u32,
    /// The `k` of Recall@k, NDCG@k and HR@k.
    pub cutoffs: Vec<u32>,
    /// Leave items of the user's history out of the ranking. A target that is in the history competes all the same,
    /// though `recommend` shows it only with `--with-history`.
    pub exclude_history: bool,
    /// Users that are ranked at once.
    pub batch_users: u32,
    /// Bootstrap resamples for the 95 % intervals of the test; 0 = no intervals.
    pub resamples: u32,
    /// What an item of the history weighs for the built-in comparison `decayed_mean`, as a share of the next newer one.
    pub decay: f64,
    /// Memory of a worker, on its device, for the content embeddings of the whole catalogue in f32, which the comparisons
    /// `last_item` and `decayed_mean` need: `4 * dimension * (items + items / workers)` bytes at most, one worker alone
    /// `4 * dimension * items`. A larger catalogue goes without these two.
    pub content_memory: ByteSize,
    pub segments: SegmentsConfig,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self {
            every_epochs: 1,
            cutoffs: vec![1, 5, 10, 50],
            exclude_history: false,
            batch_users: 256,
            resamples: 1000,
            decay: 0.7,
            content_memory: ByteSize(2 << 30),
            segments: SegmentsConfig::default(),
        }
    }
}

/// Parts of the test that have numbers of their own; see `learn_domain::segments`. Training interactions are those of
/// the training sequences, which have two items at least.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SegmentsConfig {
    /// A cold item has at most this many training interactions.
    pub cold_items: u32,
    /// Share of the catalogue that is the head: its most popular items. The others are the long tail.
    pub head_items: f64,
    /// A cold user has at most this many interactions before the targets.
    pub cold_users: u32,
    /// An active user has at least this many interactions before the targets.
    pub active_users: u32,
}

impl Default for SegmentsConfig {
    fn default() -> Self {
        Self { cold_items: 3, head_items: 0.2, cold_users: 5, active_users: 20 }
    }
}

/// When checkpoints are written and which are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Write after every so many steps; 0 = not by steps.
    pub every_steps: u64,
    /// Write after every so many epochs; 0 = not by epochs. One is always written at the end.
    pub every_epochs: u32,
    /// The latest this many are kept, besides the best one.
    pub keep_last: u32,
    /// Keep the one with the best `metric` on valid, and test with it at the end.
    pub keep_best: bool,
    /// `recall@K`, `ndcg@K`, `hr@K` (K among `evaluation.cutoffs`), `mrr` or `auc`; with a CVR head also `cvr.auc`,
    /// `cvr.uauc` or `cvr.wuauc`.
    pub metric: String,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_steps: 0, every_epochs: 1, keep_last: 3, keep_best: true, metric: "ndcg@10".into() }
    }
}

impl Config {
    /// The shape of a training sample.
    #[must_use]
    pub fn sample_shape(&self) -> SamplingShape {
        let sampling = &self.sampling;
        SamplingShape {
            pairs: self.objective.pairs(),
            history: sampling.history,
            targets: sampling.targets,
            window: sampling.window,
            stage_one: sampling.stage_one,
            user_positions: sampling.user_positions,
            item_positions: sampling.item_positions,
            alpha: sampling.alpha,
            beta: sampling.beta,
        }
    }
}

/// Why evaluations with these cutoffs do not tell a metric, and what to do.
fn not_measured(metric: &str, cutoffs: &[u32]) -> String {
    let of_ranking = metric.split_once('@').filter(|(kind, _)| ["recall", "ndcg", "hr"].contains(kind));
    match of_ranking.and_then(|(kind, cutoff)| Some((kind, cutoff.parse::<u32>().ok()?, cutoffs.last()?))) {
        Some((kind, cutoff, last)) => format!(
            "is {metric}, which evaluation.cutoffs = {cutoffs:?} does not measure; add {cutoff} to them, or set \
             checkpoint.metric={kind}@{last}"
        ),
        None => format!(
            "is {metric}, but must be mrr, auc, or recall@K, ndcg@K or hr@K with K among evaluation.cutoffs, or, with a CVR \
             head, cvr.auc, cvr.uauc or cvr.wuauc"
        ),
    }
}

pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    let Config { model, objective, sampling, optimizer, training, evaluation, checkpoint, cluster, .. } = config;
    let at_least_one = [
        ("model.layers", u64::from(model.layers)),
        ("model.heads", model.heads.into()),
        ("model.hidden", model.hidden.into()),
        ("model.output_dim", model.output_dim.into()),
        ("objective.cvr_hidden", objective.cvr_hidden.into()),
        ("sampling.history", sampling.history.into()),
        ("sampling.targets", sampling.targets.into()),
        ("sampling.user_positions", sampling.user_positions.into()),
        ("sampling.item_positions", sampling.item_positions.into()),
        ("training.global_batch", training.global_batch.into()),
        ("training.epochs", training.epochs.into()),
        ("evaluation.batch_users", evaluation.batch_users.into()),
        ("checkpoint.keep_last", checkpoint.keep_last.into()),
        ("cluster.workers", cluster.workers.into()),
        ("cluster.min_workers", cluster.min_workers.into()),
        ("cluster.prefetch_steps", cluster.prefetch_steps.into()),
        ("cluster.row_streams", cluster.row_streams.into()),
    ];
    let fail = |key, problem: &str| Err(ConfigError { key, problem: problem.into() });
    for (key, value) in at_least_one {
        if value == 0 {
            return fail(key, "must be at least 1");
        }
    }
    if model.history_code > 0 && objective.cvr_weight > 0.0 {
        return fail(
            "model.history_code",
            "lengthens the embeddings, which the CVR head does not take; set it to 0, or objective.cvr_weight to 0",
        );
    }
    if training.precision == Precision::F16 {
        return fail(
            "training.precision",
            "f16 loses small gradients; take \"bf16\" or \"f32\" (f16 is for embed.precision)",
        );
    }
    let positive = [
        ("model.logit_scale", model.logit_scale),
        ("model.init_std", model.init_std),
        ("model.history_code_weight", model.history_code_weight),
        ("optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.epsilon", optimizer.epsilon),
    ];
    for (key, value) in positive {
        if !(value.is_finite() && value > 0.0) {
            return fail(key, "must be a positive number");
        }
    }
    let shares = [
        ("model.dropout", model.dropout),
        ("model.id_dropout", model.id_dropout),
        ("optimizer.beta1", optimizer.beta1),
        ("optimizer.beta2", optimizer.beta2),
        ("optimizer.min_learning_rate_ratio", optimizer.min_learning_rate_ratio),
    ];
    for (key, value) in shares {
        if !(0.0..1.0).contains(&value) {
            return fail(key, "must lie in [0, 1)");
        }
    }
    for (key, value) in [
        ("optimizer.weight_decay", optimizer.weight_decay),
        ("optimizer.clip_norm", optimizer.clip_norm),
        ("objective.cvr_weight", objective.cvr_weight),
        ("cluster.device_peak_tflops", cluster.device_peak_tflops),
    ] {
        if !(value.is_finite() && value >= 0.0) {
            return fail(key, "must be 0 or a positive number");
        }
    }
    if !model.item_input.has_content() {
        let need = "reads content embeddings, which model.item_input = \"id\" does not have";
        let readers = [
            ("model.item_tower", model.item_tower == ItemTower::Content),
            ("model.residual", model.residual == Residual::Content),
            ("model.centring", model.centring),
            ("model.adaptor_init", model.adaptor_init == AdaptorInit::Standardized),
        ];
        if let Some((key, _)) = readers.into_iter().find(|(_, reads)| *reads) {
            return fail(key, need);
        }
    }
    if model.id_dropout > 0.0 && model.item_input != ItemInput::ContentId {
        return fail("model.id_dropout", "needs model.item_input = \"content_id\"");
    }
    if !(0.0..=1.0).contains(&model.residual_decay) {
        return fail("model.residual_decay", "must lie in [0, 1]");
    }
    config.objective.validate()?;
    if !model.hidden.is_multiple_of(model.heads) {
        return fail("model.heads", "must divide model.hidden");
    }
    if !(sampling.alpha.is_finite()
        && sampling.alpha > 1.0
        && sampling.beta.is_finite()
        && sampling.beta > sampling.alpha)
    {
        return fail("sampling.alpha", "must be above 1 and below sampling.beta, so that every weight is positive");
    }
    if evaluation.cutoffs.is_empty() || evaluation.cutoffs.contains(&0) {
        return fail("evaluation.cutoffs", "must name at least one k, each at least 1");
    }
    let segments = &evaluation.segments;
    if !(0.0..=1.0).contains(&evaluation.decay) {
        return fail("evaluation.decay", "must lie in [0, 1]");
    }
    if !(segments.head_items > 0.0 && segments.head_items <= 1.0) {
        return fail("evaluation.segments.head_items", "must lie in (0, 1]");
    }
    if segments.active_users <= segments.cold_users {
        return fail("evaluation.segments.active_users", "must be above evaluation.segments.cold_users");
    }
    let of_head = ["cvr.auc", "cvr.uauc", "cvr.wuauc"].contains(&checkpoint.metric.as_str());
    if of_head && objective.cvr_head().is_none() {
        return fail("checkpoint.metric", "is one of the CVR head, so set objective.cvr_weight above 0");
    }
    if !of_head && !Metrics::new(&evaluation.cutoffs).names().contains(&checkpoint.metric) {
        return fail("checkpoint.metric", &not_measured(&checkpoint.metric, &evaluation.cutoffs));
    }
    if training.freeze_towers {
        if objective.cvr_head().is_none() {
            return fail("training.freeze_towers", "leaves nothing to train; set objective.cvr_weight above 0");
        }
        if checkpoint.keep_best && !of_head {
            return fail("checkpoint.metric", "does not change with frozen towers; set cvr.auc, cvr.uauc or cvr.wuauc");
        }
    }
    cluster.tls.validate()?;
    if cluster.grpc_port != 0 && cluster.grpc_port == cluster.http_port {
        return fail(
            "cluster.http_port",
            "is cluster.grpc_port, too, and a port serves one; set another, or 0 for any free one",
        );
    }
    for (key, span) in [
        ("cluster.heartbeat_interval", cluster.heartbeat_interval),
        ("cluster.collective_timeout", cluster.collective_timeout),
        ("cluster.join_timeout", cluster.join_timeout),
    ] {
        if span.0.is_zero() {
            return fail(key, "must be longer than nothing");
        }
    }
    if cluster.min_workers > cluster.workers {
        return fail("cluster.min_workers", "must be at most cluster.workers");
    }
    if cluster.heartbeat_timeout <= cluster.heartbeat_interval {
        return fail("cluster.heartbeat_timeout", "must be longer than cluster.heartbeat_interval");
    }
    if cluster.coordinator_timeout <= cluster.heartbeat_interval {
        return fail("cluster.coordinator_timeout", "must be longer than cluster.heartbeat_interval");
    }
    if cluster.stop_within() <= cluster.heartbeat_interval.0 {
        return fail("cluster.stop_timeout", "must be longer than cluster.heartbeat_interval");
    }
    Ok(())
}

pub(super) fn validate_start(config: &Config) -> Result<(), ConfigError> {
    let Config { model, training, .. } = config;
    let fail = |key, problem: &str| Err(ConfigError { key, problem: problem.into() });
    if training.init.is_some() {
        return Ok(());
    }
    // the residual's start is that of the content embeddings, and not random
    if training.freeze_towers && model.residual != Residual::Content {
        return fail(
            "training.freeze_towers",
            "keeps the towers' start, which is random: set training.init to a trained run (or model.residual = \
             \"content\", whose start is the content embeddings)",
        );
    }
    if training.init_partial {
        return fail(
            "training.init_partial",
            "takes what fits of training.init, which is not set: set it (--init RUN_OR_FILE), or leave this out",
        );
    }
    Ok(())
}
