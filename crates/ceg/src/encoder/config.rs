//! The files of a Hugging Face model directory: which ones there are, what they say, and whether we can honour it.
//!
//! Input: a directory with `config.json`, `tokenizer.json`, `model.safetensors` and perhaps `sentence_bert_config.json`.
//! Output: a [`ModelDirectory`]. A setting that would change the vectors and is not implemented is refused by name.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::EncoderError;

/// Encoders that differ from BERT in no more than the numbering of their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Bert,
    /// RoBERTa and XLM-RoBERTa: positions count from the padding token's id + 1.
    Roberta,
}

/// What `config.json` must say.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    #[serde(default = "bert_token_types")]
    type_vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "bert_activation")]
    hidden_act: String,
    #[serde(default = "bert_epsilon")]
    layer_norm_eps: f64,
    #[serde(default)]
    pad_token_id: usize,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

fn bert_activation() -> String {
    "gelu".into()
}

const fn bert_token_types() -> usize {
    2
}

const fn bert_epsilon() -> f64 {
    1e-12
}

/// What `sentence_bert_config.json` says, where a sentence-transformers model brings it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SentenceFile {
    max_seq_length: Option<usize>,
    do_lower_case: bool,
}

/// A model directory whose settings were read and can be honoured.
#[derive(Clone, Debug)]
pub struct ModelDirectory {
    pub path: PathBuf,
    pub family: Family,
    pub vocabulary: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    /// Epsilon of the layer norms.
    pub epsilon: f64,
    /// Width of the feed-forward part.
    pub intermediate: usize,
    pub token_types: usize,
    /// Rows of the position table.
    pub positions: usize,
    /// Number of the first token's position.
    pub first_position: usize,
    /// Most tokens of a text that the model takes, special tokens included.
    pub longest: usize,
    pub lower_case: bool,
}

impl ModelDirectory {
    /// Reads the settings of a model directory.
    ///
    /// # Errors
    /// A file is missing or damaged, or a setting is one that this encoder does not have.
    pub fn open(path: &Path) -> Result<Self, EncoderError> {
        if !path.is_dir() {
            let problem = "is not a directory; set embed.model to a Hugging Face directory with config.json, \
                           tokenizer.json and model.safetensors";
            return Err(EncoderError::Invalid { path: path.into(), problem: problem.into() });
        }
        let file = path.join("config.json");
        let config: ConfigFile = read_json(&file)?;
        let sentence = path.join("sentence_bert_config.json");
        let sentence = if sentence.is_file() { read_json(&sentence)? } else { SentenceFile::default() };
        let directory =
            Self::checked(path, &config, &sentence).map_err(|problem| EncoderError::Invalid { path: file, problem })?;
        directory.check_weights()?;
        Ok(directory)
    }

    fn checked(path: &Path, config: &ConfigFile, sentence: &SentenceFile) -> Result<Self, String> {
        let family = match config.model_type.as_str() {
            "bert" => Family::Bert,
            "roberta" | "xlm-roberta" => Family::Roberta,
            other => {
                return Err(format!(
                    "model_type is {other:?}; bert, roberta and xlm-roberta can be run here. Vectors of any other model \
                     can be brought with embed.from"
                ));
            }
        };
        if config.hidden_act != "gelu" {
            return Err(format!("hidden_act is {:?}; only the exact \"gelu\" is implemented", config.hidden_act));
        }
        if let Some(kind) = config.position_embedding_type.as_deref().filter(|&kind| kind != "absolute") {
            return Err(format!("position_embedding_type is {kind:?}; only \"absolute\" is implemented"));
        }
        if config.is_decoder {
            return Err("is_decoder is true; a bidirectional encoder is wanted".into());
        }
        if config.num_attention_heads == 0 || !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return Err(format!(
                "hidden_size {} is not a multiple of num_attention_heads {}",
                config.hidden_size, config.num_attention_heads
            ));
        }
        let first_position = match family {
            Family::Bert => 0,
            Family::Roberta => config.pad_token_id + 1,
        };
        let positions = config.max_position_embeddings.saturating_sub(first_position);
        if config.vocab_size == 0 || config.type_vocab_size == 0 || positions == 0 {
            return Err("vocab_size, type_vocab_size or max_position_embeddings leaves no room for text".into());
        }
        Ok(Self {
            path: path.into(),
            family,
            vocabulary: config.vocab_size,
            hidden: config.hidden_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            epsilon: config.layer_norm_eps,
            intermediate: config.intermediate_size,
            token_types: config.type_vocab_size,
            positions: config.max_position_embeddings,
            first_position,
            longest: sentence.max_seq_length.map_or(positions, |longest| longest.min(positions)),
            lower_case: sentence.do_lower_case,
        })
    }

    fn check_weights(&self) -> Result<(), EncoderError> {
        if self.weights().is_file() {
            return Ok(());
        }
        let at = self.path.display();
        let problem = if self.path.join("pytorch_model.bin").is_file() {
            format!(
                "only has pytorch_model.bin, a pickle, which can run code and is never opened here; convert it where you \
                 trust it: python -c 'from transformers import AutoModel; \
                 AutoModel.from_pretrained(\"{at}\").save_pretrained(\"{at}\", safe_serialization=True)'"
            )
        } else {
            "has no model.safetensors".into()
        };
        Err(EncoderError::Invalid { path: self.path.clone(), problem })
    }

    #[must_use]
    pub fn weights(&self) -> PathBuf {
        self.path.join("model.safetensors")
    }

    #[must_use]
    pub fn tokenizer(&self) -> PathBuf {
        self.path.join("tokenizer.json")
    }

    /// The directory's own name.
    #[must_use]
    pub fn name(&self) -> String {
        let path = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        path.file_name().map_or_else(|| "encoder".into(), |name| name.to_string_lossy().into_owned())
    }

    /// A digest of the files that decide the vectors.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn digest(&self) -> Result<blake3::Hasher, EncoderError> {
        let mut hasher = blake3::Hasher::new_derive_key("learn-ceg encoder 1");
        for path in [self.path.join("config.json"), self.tokenizer(), self.weights()] {
            File::open(&path)
                .and_then(|file| hasher.update_reader(file).map(|_| ()))
                .map_err(|source| EncoderError::Read { path, source })?;
        }
        hasher.update(&(self.longest as u64).to_le_bytes());
        hasher.update(&[u8::from(self.lower_case)]);
        Ok(hasher)
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, EncoderError> {
    let text = std::fs::read(path).map_err(|source| EncoderError::Read { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|error| EncoderError::Invalid {
        path: path.into(),
        problem: format!("is not the settings of an encoder: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINILM: &str = r#"{"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute", "pad_token_id": 0}"#;

    fn directory(config: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("config.json"), config).unwrap();
        std::fs::write(directory.path().join("model.safetensors"), "").unwrap();
        directory
    }

    fn refusal(directory: &tempfile::TempDir) -> String {
        ModelDirectory::open(directory.path()).unwrap_err().to_string()
    }

    #[test]
    fn the_shortest_limit_counts() {
        let model = directory(MINILM);
        assert_eq!(ModelDirectory::open(model.path()).unwrap().longest, 512);
        let sentence = model.path().join("sentence_bert_config.json");
        std::fs::write(&sentence, r#"{"max_seq_length": 256, "do_lower_case": false}"#).unwrap();
        assert_eq!(ModelDirectory::open(model.path()).unwrap().longest, 256);
        let roberta =
            MINILM.replace("\"bert\"", "\"xlm-roberta\"").replace("_id\": 0", "_id\": 1").replace("512", "514");
        std::fs::write(&sentence, r#"{"max_seq_length": null}"#).unwrap();
        std::fs::write(model.path().join("config.json"), roberta).unwrap();
        let roberta = ModelDirectory::open(model.path()).unwrap();
        assert_eq!((roberta.longest, roberta.first_position), (512, 2));
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        let with = |from: &str, to: &str| refusal(&directory(&MINILM.replace(from, to)));
        assert!(with("\"bert\"", "\"llama\"").contains("model_type is \"llama\""));
        assert!(with("\"gelu\"", "\"gelu_new\"").contains("hidden_act is \"gelu_new\""));
        assert!(with("absolute", "relative_key").contains("relative_key"));
        assert!(with(": 12,", ": 7,").contains("multiple of num_attention_heads 7"));
        assert!(with("\"vocab_size\": 30522,", "").contains("missing field `vocab_size`"));
        assert!(with("{", "{{").contains("config.json"));
    }

    #[test]
    fn a_pickle_is_refused_with_the_line_that_converts_it() {
        let model = directory(MINILM);
        std::fs::remove_file(model.path().join("model.safetensors")).unwrap();
        assert!(refusal(&model).contains("has no model.safetensors"));
        std::fs::write(model.path().join("pytorch_model.bin"), "").unwrap();
        assert!(refusal(&model).contains("safe_serialization=True"));
        let nowhere = ModelDirectory::open(&model.path().join("nowhere")).unwrap_err().to_string();
        assert!(nowhere.contains("embed.model"), "{nowhere}");
    }
}
