//! The files of a Hugging Face model directory: which ones there are, what they say, and whether we can honour it.
//!
//! Input: a directory with `config.json`, `tokenizer.json` or `tokenizer.model`, `model.safetensors` or its shards, and
//! perhaps `tokenizer_config.json` and `sentence_bert_config.json`. Output: a [`ModelDirectory`]. A setting that would
//! change the vectors and is not implemented is refused by name.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::EncoderError;
use super::bert::BertShape;
use super::decoder::{DecoderFamily, DecoderShape};
use super::tokens::TokenFiles;
use super::weights::WeightFiles;

/// What runs the weights.
#[derive(Clone, Debug)]
pub enum Architecture {
    Bert(BertShape),
    Decoder(DecoderShape),
}

impl Architecture {
    fn read(config: Value) -> Result<Self, String> {
        let family = config["model_type"].as_str().ok_or("has no model_type")?.to_owned();
        if !config["quantization_config"].is_null() {
            return Err("has a quantization_config; take the model in bf16, f16 or f32".into());
        }
        if let "bert" | "roberta" | "xlm-roberta" = family.as_str() {
            return BertShape::read(&family, config).map(Self::Bert);
        }
        let decoder = DecoderFamily::of(&family).ok_or_else(|| {
            format!(
                "model_type is {family:?}; bert, roberta, xlm-roberta, llama, mistral, qwen2, qwen3 and baichuan can be \
                 run here. Vectors of any other model can be brought with embed.from"
            )
        })?;
        DecoderShape::read(decoder, config).map(Self::Decoder)
    }

    /// Most tokens of a text.
    fn longest(&self) -> usize {
        match self {
            Self::Bert(shape) => shape.longest(),
            Self::Decoder(shape) => shape.positions,
        }
    }
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
    pub architecture: Architecture,
    pub weights: WeightFiles,
    pub tokens: TokenFiles,
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
        let architecture =
            Architecture::read(read_json(&file)?).map_err(|problem| EncoderError::Invalid { path: file, problem })?;
        let sentence = path.join("sentence_bert_config.json");
        let sentence = if sentence.is_file() { read_json(&sentence)? } else { SentenceFile::default() };
        let longest = architecture.longest();
        Ok(Self {
            path: path.into(),
            weights: WeightFiles::find(path)?,
            tokens: TokenFiles::find(path, matches!(architecture, Architecture::Decoder(_)))?,
            longest: sentence.max_seq_length.map_or(longest, |limit| limit.min(longest)),
            lower_case: sentence.do_lower_case,
            architecture,
        })
    }

    /// Numbers per vector.
    #[must_use]
    pub const fn dim(&self) -> usize {
        match &self.architecture {
            Architecture::Bert(shape) => shape.hidden,
            Architecture::Decoder(shape) => shape.hidden,
        }
    }

    /// Token ids that the model knows.
    #[must_use]
    pub const fn vocabulary(&self) -> usize {
        match &self.architecture {
            Architecture::Bert(shape) => shape.vocabulary,
            Architecture::Decoder(shape) => shape.vocabulary,
        }
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
        let settings = [self.path.join("config.json"), self.tokens.path.clone()];
        for path in settings.into_iter().chain(self.weights.paths()) {
            File::open(&path)
                .and_then(|file| hasher.update_reader(file).map(|_| ()))
                .map_err(|source| EncoderError::Read { path, source })?;
        }
        if let Some(ends) = &self.tokens.ends {
            hasher.update(format!("{ends:?}").as_bytes());
        }
        hasher.update(&(self.longest as u64).to_le_bytes());
        hasher.update(&[u8::from(self.lower_case)]);
        Ok(hasher)
    }
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, EncoderError> {
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
        "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512, "pad_token_id": 0}"#;

    fn directory(config: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("config.json"), config).unwrap();
        for empty in ["model.safetensors", "tokenizer.json"] {
            std::fs::write(directory.path().join(empty), "").unwrap();
        }
        directory
    }

    fn refusal(directory: &tempfile::TempDir) -> String {
        ModelDirectory::open(directory.path()).unwrap_err().to_string()
    }

    #[test]
    fn the_shortest_limit_counts() {
        let model = directory(MINILM);
        let longest = || ModelDirectory::open(model.path()).unwrap().longest;
        assert_eq!(longest(), 512);
        let sentence = model.path().join("sentence_bert_config.json");
        for (text, limit) in [(r#"{"max_seq_length": 256, "do_lower_case": false}"#, 256), ("{}", 512)] {
            std::fs::write(&sentence, text).unwrap();
            assert_eq!(longest(), limit);
        }
    }

    #[test]
    fn what_is_not_there_or_not_implemented_is_named() {
        let with = |from: &str, to: &str| refusal(&directory(&MINILM.replace(from, to)));
        assert!(with("\"bert\"", "\"gpt2\"").contains("model_type is \"gpt2\""));
        assert!(with("\"model_type\": \"bert\",", "").contains("has no model_type"));
        assert!(with("\"vocab_size\": 30522,", "").contains("missing field `vocab_size`"));
        assert!(with("{", "{\"quantization_config\": {\"bits\": 4}, ").contains("quantization_config"));
        assert!(with("{", "{{").contains("config.json"));
        for missing in ["tokenizer.json", "model.safetensors"] {
            let model = directory(MINILM);
            std::fs::remove_file(model.path().join(missing)).unwrap();
            assert!(refusal(&model).contains(missing));
        }
        let nowhere = ModelDirectory::open(&PathBuf::from("nowhere")).unwrap_err().to_string();
        assert!(nowhere.contains("embed.model"), "{nowhere}");
    }
}
