//! Settings of `learn-launch embed`: content embeddings from item texts (CEG).

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::train::DeviceKind;
use super::{ConfigError, RefineConfig};
use crate::prompt::PromptTemplate;

/// Arithmetic of the matrix products; parameters and reductions stay f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    Bf16,
    /// For `embed` only: training would need its gradients scaled.
    F16,
}

/// A sentence of the prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a sentence is text, or a list of texts of which the first that fits is taken")]
pub enum Sentence {
    One(String),
    /// Wordings in order of preference.
    FirstThatFits(Vec<String>),
}

impl Sentence {
    #[must_use]
    pub fn wordings(&self) -> &[String] {
        match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::FirstThatFits(texts) => texts,
        }
    }
}

/// The text of an item: what the language model reads. The default is the published prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PromptConfig {
    /// The sentences, in order, with placeholders for what `prepare.items` has brought: `{title}`, `{category}`, `{brand}`,
    /// `{price}`, `{keywords}`, `{attributes}`. A sentence whose field is missing is left out; where several wordings
    /// stand in a list, the first one with all its fields is taken. `{{` and `}}` are the braces themselves.
    pub sentences: Vec<Sentence>,
    /// What stands between two sentences.
    pub separator: String,
}

impl Default for PromptConfig {
    fn default() -> Self {
        let one = |text: &str| Sentence::One(text.into());
        let category_and_brand = [
            r#"This item belongs to "{category}" and brand is "{brand}"."#,
            r#"This item belongs to "{category}"."#,
            r#"The brand is "{brand}"."#,
        ];
        Self {
            sentences: vec![
                one("The item information is given as follows."),
                one(r#"Item title is "{title}"."#),
                Sentence::FirstThatFits(category_and_brand.map(Into::into).into()),
                one(r#"The price is "{price}"."#),
                one(r#"The key words of items are "{keywords}"."#),
                one(r#"The item supports "{attributes}"."#),
            ],
            separator: " ".into(),
        }
    }
}

/// Settings of `embed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EmbedConfig {
    /// Directory of the frozen encoder in Hugging Face layout (`config.json`, `tokenizer.json` or `tokenizer.model`,
    /// `model.safetensors` or its shards).
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
    pub prompt: PromptConfig,
    pub refine: RefineConfig,
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
            prompt: PromptConfig::default(),
            refine: RefineConfig::default(),
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
        PromptTemplate::new(&self.prompt).map_err(|problem| ConfigError { key: "embed.prompt.sentences", problem })?;
        self.refine.validate()?;
        Ok(())
    }
}
