//! Settings of `learn-launch embed`: content embeddings from item texts (CEG).

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::train::DeviceKind;

/// Arithmetic of the matrix products; parameters and reductions stay f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    Bf16,
}

/// Settings of `embed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EmbedConfig {
    /// Directory of the frozen encoder in Hugging Face layout (`config.json`, `tokenizer.json`, `model.safetensors`).
    pub model: PathBuf,
    /// Vectors made elsewhere (`.npy` or `.parquet`, one row per item) instead of an encoder.
    pub from: Option<PathBuf>,
    /// Longest text in tokens; longer ones are cut.
    pub max_tokens: u32,
    /// Most tokens (padding included) of one forward pass.
    pub batch_tokens: u32,
    /// Items of one output file; a killed `embed` recomputes at most one of them per process.
    pub shard_items: u32,
    /// Processes that share the work, each with its own copy of the encoder.
    pub processes: u32,
    pub precision: Precision,
    pub device: DeviceKind,
}

impl Default for EmbedConfig {
    fn default() -> Self {
        Self {
            model: "data/encoder".into(),
            from: None,
            max_tokens: 256,
            batch_tokens: 8192,
            shard_items: 4096,
            processes: 1,
            precision: Precision::F32,
            device: DeviceKind::Auto,
        }
    }
}

impl EmbedConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in [
            ("embed.max_tokens", self.max_tokens),
            ("embed.batch_tokens", self.batch_tokens),
            ("embed.shard_items", self.shard_items),
            ("embed.processes", self.processes),
        ] {
            if value == 0 {
                return Err(ConfigError { key, problem: "must be at least 1".into() });
            }
        }
        Ok(())
    }
}
