//! Settings of `learn-launch embed`: content embeddings from item texts (CEG).

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cluster::DeviceKind;
use super::units::Span;
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

/// The text of an item: what the language model reads. The default is the published prompt, with two shorter wordings of
/// our own for an item that has a category without a brand, or a brand without a category.
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
            // these two are not published
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

/// A server with the OpenAI-compatible `POST /v1/embeddings` (vLLM, TEI, SGLang, OpenAI), instead of an encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EndpointConfig {
    /// Base URL with its version, like `http://gpu-7:8000/v1`; requests go to `URL/embeddings`. Set = vectors come from
    /// there.
    pub url: Option<String>,
    /// The model, as the server calls it.
    pub model: String,
    /// Name of the environment variable that holds the key (`OPENAI_API_KEY`, say); unset = no key is sent. The key itself
    /// is never written down.
    pub key_variable: Option<String>,
    /// Dimensions to ask for, of a model that can shorten its vectors; unset = the model's own.
    pub dimensions: Option<u32>,
    /// Texts of one request.
    pub batch_items: u32,
    /// Requests that one process has under way at once.
    pub concurrency: u32,
    /// Longest wait for one answer.
    pub timeout: Span,
    /// How long a request is tried again (no connection, no answer, status 408, 429 or 5xx) before `embed` gives up.
    pub patience: Span,
}

impl Default for EndpointConfig {
    fn default() -> Self {
        Self {
            url: None,
            model: String::new(),
            key_variable: None,
            dimensions: None,
            batch_items: 32,
            concurrency: 8,
            timeout: Span::from_secs(60),
            patience: Span::from_secs(600),
        }
    }
}

impl EndpointConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let fail = |key, problem: &str| Err(ConfigError { key, problem: problem.into() });
        for (key, value) in [
            ("embed.endpoint.batch_items", self.batch_items),
            ("embed.endpoint.concurrency", self.concurrency),
            ("embed.endpoint.dimensions", self.dimensions.unwrap_or(1)),
        ] {
            if value == 0 {
                return fail(key, "must be at least 1");
            }
        }
        if self.timeout.0.is_zero() {
            return fail("embed.endpoint.timeout", "must be longer than nothing");
        }
        if let Some(variable) = &self.key_variable {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            // Someone may have put the key itself here, so it is not repeated.
            if variable.is_empty() || !variable.chars().all(plain) {
                return fail(
                    "embed.endpoint.key_variable",
                    "is not the name of an environment variable; never put the key itself here",
                );
            }
        }
        let Some(url) = &self.url else { return Ok(()) };
        let Some((_, rest)) = url.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https")) else {
            return fail("embed.endpoint.url", "must start with http:// or https://, like http://gpu-7:8000/v1");
        };
        let host = rest.split('/').next().unwrap_or_default();
        if host.contains('@') {
            let problem =
                "carries a user or a password, which would be stored; name a variable in embed.endpoint.key_variable";
            return fail("embed.endpoint.url", problem);
        }
        if host.is_empty() || rest.contains(['?', '#', ' ']) {
            return fail("embed.endpoint.url", "is a base URL without query, like http://gpu-7:8000/v1");
        }
        if rest.trim_end_matches('/').ends_with("/embeddings") {
            return fail("embed.endpoint.url", "is the base URL; leave /embeddings out");
        }
        if self.model.is_empty() {
            return fail("embed.endpoint.model", "must name the model, as the server calls it");
        }
        Ok(())
    }
}

/// Settings of `embed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EmbedConfig {
    /// Directory of the frozen encoder in Hugging Face layout (`config.json`, `tokenizer.json` or `tokenizer.model`,
    /// `model.safetensors` or its shards).
    pub model: PathBuf,
    /// Vectors made elsewhere (`.npy` or `.parquet`, one row per item) instead of an encoder. Without ids, row i is taken
    /// for the i-th item id in the order of their texts.
    pub from: Option<PathBuf>,
    /// Longest text in tokens; longer ones are cut, and counted in the result. The server of an endpoint does not know it
    /// and cuts by its own settings.
    pub max_tokens: u32,
    /// Most tokens (padding included) of one forward pass.
    pub batch_tokens: u32,
    /// Items of one output file; a killed `embed` recomputes at most one of them per process.
    pub shard_items: u32,
    /// Processes of this machine that share the work (one per GPU), each with its own copy of the encoder; at most 16 for
    /// each core, or 64.
    pub processes: u32,
    /// CPU threads of each process; 0 = the machine's cores divided by the processes. A number keeps the files the same,
    /// byte for byte, whatever the number of processes.
    pub threads: u32,
    pub precision: Precision,
    pub device: DeviceKind,
    pub prompt: PromptConfig,
    pub refine: RefineConfig,
    pub endpoint: EndpointConfig,
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
            threads: 0,
            precision: Precision::F32,
            device: DeviceKind::Auto,
            prompt: PromptConfig::default(),
            refine: RefineConfig::default(),
            endpoint: EndpointConfig::default(),
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
        self.endpoint.validate()?;
        if self.from.is_some() && self.endpoint.url.is_some() {
            let problem = "and embed.endpoint.url are two places for vectors; unset one";
            return Err(ConfigError { key: "embed.from", problem: problem.into() });
        }
        PromptTemplate::new(&self.prompt).map_err(|problem| ConfigError { key: "embed.prompt.sentences", problem })?;
        self.refine.validate()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut EmbedConfig)) -> (&'static str, String) {
        let mut config = EmbedConfig::default();
        (config.endpoint.url, config.endpoint.model) = (Some("https://a.example/v1/".into()), "m".into());
        config.validate().unwrap();
        change(&mut config);
        let error = config.validate().unwrap_err();
        (error.key, error.problem)
    }

    #[test]
    fn an_endpoint_is_a_base_url_and_a_model() {
        for (url, problem) in [
            ("a.example/v1", "must start with http://"),
            ("http:///v1", "base URL without query"),
            ("https://a.example/v1?key=1", "base URL without query"),
            ("https://a.example/v1/embeddings", "leave /embeddings out"),
            ("https://me:secret@a.example/v1", "key_variable"),
        ] {
            let (key, found) = refused(|config| config.endpoint.url = Some(url.into()));
            assert!(key == "embed.endpoint.url" && found.contains(problem) && !found.contains("secret"), "{found}");
        }
        assert_eq!(refused(|config| config.endpoint.model.clear()).0, "embed.endpoint.model");
        assert_eq!(refused(|config| config.endpoint.concurrency = 0).0, "embed.endpoint.concurrency");
        assert_eq!(refused(|config| config.from = Some("v.npy".into())).0, "embed.from");
    }

    #[test]
    fn a_key_in_place_of_its_variable_is_refused_and_not_repeated() {
        let (key, problem) = refused(|config| config.endpoint.key_variable = Some("sk-abc".into()));
        assert_eq!(key, "embed.endpoint.key_variable");
        assert!(!problem.contains("sk-abc"), "{problem}");
    }
}
