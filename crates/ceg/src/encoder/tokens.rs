//! Texts to token ids with the model's own tokenizer.
//!
//! Input: texts. Output: one list of ids per text, special tokens included, cut to the longest length (the special
//! tokens survive the cut). No padding: batches do that. A `tokenizer.json` adds the special tokens of its template, its
//! own padding and truncation are replaced; the Llama and Baichuan tokenizer classes instead add what
//! `tokenizer_config.json` says, as in transformers.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;
use tokenizers::{Tokenizer, TruncationParams};

use super::directory::read_json;
use super::sentencepiece::SentencePiece;
use super::{EncoderError, ModelDirectory};

/// Classes of transformers that read `add_bos_token` and `add_eos_token`.
const CLASSES: [&str; 3] = ["LlamaTokenizer", "LlamaTokenizerFast", "BaichuanTokenizer"];

/// The tokenizer of a directory.
#[derive(Clone, Debug)]
pub struct TokenFiles {
    /// `tokenizer.json` or `tokenizer.model`.
    pub path: PathBuf,
    /// What stands around each text; `None` = what the template of `tokenizer.json` says.
    pub ends: Option<Ends>,
}

/// The tokens before and after each text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ends {
    pub first: Option<String>,
    pub last: Option<String>,
}

/// What `tokenizer_config.json` says.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerFile {
    tokenizer_class: Option<String>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    bos_token: Option<Special>,
    eos_token: Option<Special>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Special {
    Plain(String),
    Described { content: String },
}

impl TokenFiles {
    /// Finds the tokenizer; `decoder` allows a SentencePiece model.
    ///
    /// # Errors
    /// There is none, or `tokenizer_config.json` is damaged.
    pub(super) fn find(folder: &Path, decoder: bool) -> Result<Self, EncoderError> {
        let (json, pieces) = (folder.join("tokenizer.json"), folder.join("tokenizer.model"));
        if !decoder {
            return json
                .is_file()
                .then_some(Self { path: json, ends: None })
                .ok_or_else(|| EncoderError::Invalid { path: folder.into(), problem: "has no tokenizer.json".into() });
        }
        let settings = folder.join("tokenizer_config.json");
        let settings = if settings.is_file() { read_json(&settings)? } else { TokenizerFile::default() };
        let has_class = settings.tokenizer_class.as_deref().is_some_and(|class| CLASSES.contains(&class));
        if json.is_file() {
            return Ok(Self { path: json, ends: has_class.then(|| settings.ends()) });
        }
        if pieces.is_file() {
            return Ok(Self { path: pieces, ends: Some(settings.ends()) });
        }
        let problem = "has neither tokenizer.json nor tokenizer.model".into();
        Err(EncoderError::Invalid { path: folder.into(), problem })
    }
}

impl TokenizerFile {
    /// Defaults of the Llama and Baichuan classes: `<s>` before, nothing after.
    fn ends(self) -> Ends {
        let named = |special: Option<Special>, default: &str| match special {
            Some(Special::Plain(content) | Special::Described { content }) => content,
            None => default.to_owned(),
        };
        let (first, last) = (named(self.bos_token, "<s>"), named(self.eos_token, "</s>"));
        Ends {
            first: self.add_bos_token.unwrap_or(true).then_some(first),
            last: self.add_eos_token.unwrap_or(false).then_some(last),
        }
    }
}

enum Pieces {
    Json(Box<Tokenizer>),
    SentencePiece(SentencePiece),
}

/// A tokenizer for texts of limited length.
pub(super) struct TextTokens {
    pieces: Pieces,
    /// Ids around each text, where they are not the template's.
    first: Option<u32>,
    last: Option<u32>,
    /// Whether `tokenizer.json` adds the special tokens.
    template: bool,
    longest: usize,
    lower_case: bool,
}

impl TextTokens {
    /// Loads the tokenizer of a model for texts of at most `longest` tokens.
    pub(super) fn load(model: &ModelDirectory, longest: usize) -> Result<Self, EncoderError> {
        let TokenFiles { path, ends } = &model.tokens;
        let invalid = |problem: String| EncoderError::Invalid { path: path.clone(), problem };
        let unusable = |error: String| invalid(format!("cannot be used: {error}"));
        let bytes = std::fs::read(path).map_err(|source| EncoderError::Read { path: path.clone(), source })?;
        let mut pieces = match path.extension().is_some_and(|ending| ending == "json") {
            true => Pieces::Json(Box::new(Tokenizer::from_bytes(bytes).map_err(|error| unusable(error.to_string()))?)),
            false => Pieces::SentencePiece(SentencePiece::parse(&bytes).map_err(unusable)?),
        };
        let beyond = pieces.count();
        if beyond > model.vocabulary() {
            return Err(invalid(format!(
                "has token ids up to {} but the model knows {} tokens; the files belong to different models",
                beyond - 1,
                model.vocabulary()
            )));
        }
        let id = |piece: &String| {
            pieces
                .id(piece)
                .ok_or_else(|| invalid(format!("has no token {piece:?}, which tokenizer_config.json names")))
        };
        let first = ends.as_ref().and_then(|ends| ends.first.as_ref()).map(id).transpose()?;
        let last = ends.as_ref().and_then(|ends| ends.last.as_ref()).map(id).transpose()?;
        let template = ends.is_none();
        let special = match &pieces {
            Pieces::Json(tokenizer) if template => {
                tokenizer.encode_fast("", true).map_err(|error| unusable(error.to_string()))?.len()
            }
            _ => first.iter().chain(&last).count(),
        };
        if longest <= special {
            return Err(invalid(format!(
                "adds {special} special tokens, which leaves no room for text in {longest}; raise embed.max_tokens"
            )));
        }
        if let Pieces::Json(tokenizer) = &mut pieces {
            tokenizer.with_padding(None);
            let truncation = TruncationParams { max_length: longest, ..TruncationParams::default() };
            tokenizer
                .with_truncation(template.then_some(truncation))
                .map_err(|error| invalid(format!("cannot cut texts to {longest} tokens: {error}")))?;
        }
        Ok(Self { pieces, first, last, template, longest, lower_case: model.lower_case })
    }

    /// The token ids of each text, and how many texts had more tokens than there is room for.
    pub(super) fn encode(&self, texts: &[String]) -> Result<(Vec<Vec<u32>>, usize), EncoderError> {
        let one = |(text, content): (usize, &String)| {
            let ids = if self.lower_case { self.ids(&content.to_lowercase()) } else { self.ids(content) };
            match ids {
                Ok((ids, _)) if ids.is_empty() => Err(EncoderError::Tokens { text, problem: "it has none".into() }),
                Ok(ids) => Ok(ids),
                Err(error) => Err(EncoderError::Tokens { text, problem: error.to_string() }),
            }
        };
        let tokens: Vec<_> = texts.par_iter().enumerate().map(one).collect::<Result<_, _>>()?;
        let cut = tokens.iter().filter(|(_, cut)| *cut).count();
        Ok((tokens.into_iter().map(|(ids, _)| ids).collect(), cut))
    }

    /// The token ids of a text, and whether there are fewer than the text has.
    fn ids(&self, text: &str) -> Result<(Vec<u32>, bool), tokenizers::Error> {
        let (ids, cut) = match &self.pieces {
            Pieces::Json(tokenizer) => {
                let tokens = tokenizer.encode_fast(text, self.template)?;
                (tokens.get_ids().to_vec(), !tokens.get_overflowing().is_empty())
            }
            Pieces::SentencePiece(pieces) => (pieces.encode(text), false),
        };
        let room = self.longest - self.first.iter().chain(&self.last).count();
        let cut = cut || ids.len() > room;
        Ok((self.first.into_iter().chain(ids.into_iter().take(room)).chain(self.last).collect(), cut))
    }
}

impl Pieces {
    /// The largest id + 1.
    fn count(&self) -> usize {
        match self {
            Self::Json(tokenizer) => tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1),
            Self::SentencePiece(pieces) => pieces.count(),
        }
    }

    fn id(&self, piece: &str) -> Option<u32> {
        match self {
            Self::Json(tokenizer) => tokenizer.token_to_id(piece),
            Self::SentencePiece(pieces) => pieces.id(piece),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)], decoder: bool) -> Result<TokenFiles, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        TokenFiles::find(folder.path(), decoder).map_err(|error| error.to_string())
    }

    fn ends(settings: &str) -> Option<Ends> {
        found(&[("tokenizer.json", ""), ("tokenizer_config.json", settings)], true).unwrap().ends
    }

    #[test]
    fn a_tokenizer_json_comes_first() {
        let both = [("tokenizer.json", ""), ("tokenizer.model", "")];
        assert!(found(&both, true).unwrap().path.ends_with("tokenizer.json"));
        assert!(found(&both[1..], true).unwrap().path.ends_with("tokenizer.model"));
        assert!(found(&both[1..], false).unwrap_err().contains("has no tokenizer.json"));
        assert!(found(&[], true).unwrap_err().contains("nor tokenizer.model"));
    }

    #[test]
    fn ends_follow_the_tokenizer_class() {
        assert_eq!(ends(r#"{"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": true}"#), None);
        let ends_of = |first: Option<&str>, last: Option<&str>| {
            Some(Ends { first: first.map(str::to_owned), last: last.map(str::to_owned) })
        };
        assert_eq!(ends(r#"{"tokenizer_class": "LlamaTokenizer"}"#), ends_of(Some("<s>"), None));
        assert_eq!(
            ends(
                r#"{"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": false, "add_eos_token": true,
                    "eos_token": {"content": "<end>", "lstrip": false}}"#
            ),
            ends_of(None, Some("<end>"))
        );
        let model = found(&[("tokenizer.model", "")], true).unwrap();
        assert_eq!(model.ends, ends_of(Some("<s>"), None));
    }
}
