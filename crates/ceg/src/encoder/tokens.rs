//! Texts to token ids with the model's own `tokenizer.json`.
//!
//! Input: texts. Output: one list of ids per text, special tokens included, cut to the longest length (the special
//! tokens survive the cut). No padding: batches do that. The file's own padding and truncation are replaced.

use std::path::Path;

use rayon::prelude::*;
use tokenizers::{Tokenizer, TruncationParams};

use super::{EncoderError, ModelDirectory};

pub(super) struct TextTokens {
    tokenizer: Tokenizer,
    lower_case: bool,
}

impl TextTokens {
    /// Loads the tokenizer of a model for texts of at most `longest` tokens.
    pub(super) fn load(model: &ModelDirectory, longest: usize) -> Result<Self, EncoderError> {
        let path = model.tokenizer();
        let invalid = |problem: String| EncoderError::Invalid { path: path.clone(), problem };
        check_readable(&path)?;
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|error| invalid(format!("cannot be used: {error}")))?;
        let beyond = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if beyond > model.vocabulary {
            return Err(invalid(format!(
                "has token ids up to {} but the model knows {} tokens; the files belong to different models",
                beyond - 1,
                model.vocabulary
            )));
        }
        let special =
            tokenizer.encode_fast("", true).map_err(|error| invalid(format!("cannot be used: {error}")))?.len();
        if longest <= special {
            return Err(invalid(format!(
                "adds {special} special tokens, which leaves no room for text in {longest}; raise embed.max_tokens"
            )));
        }
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(Some(TruncationParams { max_length: longest, ..TruncationParams::default() }))
            .map_err(|error| invalid(format!("cannot cut texts to {longest} tokens: {error}")))?;
        Ok(Self { tokenizer, lower_case: model.lower_case })
    }

    /// The token ids of each text.
    pub(super) fn encode(&self, texts: &[String]) -> Result<Vec<Vec<u32>>, EncoderError> {
        let one = |(text, content): (usize, &String)| {
            let tokens = if self.lower_case {
                self.tokenizer.encode_fast(content.to_lowercase(), true)
            } else {
                self.tokenizer.encode_fast(content.as_str(), true)
            };
            let ids =
                tokens.map_err(|error| EncoderError::Tokens { text, problem: error.to_string() })?.get_ids().to_vec();
            if ids.is_empty() {
                return Err(EncoderError::Tokens { text, problem: "it has none".into() });
            }
            Ok(ids)
        };
        texts.par_iter().enumerate().map(one).collect()
    }
}

fn check_readable(path: &Path) -> Result<(), EncoderError> {
    std::fs::metadata(path).map(|_| ()).map_err(|source| EncoderError::Read { path: path.into(), source })
}
