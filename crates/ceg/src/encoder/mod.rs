//! Frozen language models that turn texts into vectors.
//!
//! [`TextEncoder`] is what the embedding run needs of a model; [`LocalEncoder`] runs the families that [`Architecture`]
//! names on libtorch, from a Hugging Face directory ([`ModelDirectory`]).

mod bert;
mod decoder;
mod directory;
mod local;
mod sentencepiece;
mod tokens;
mod weights;

use std::path::PathBuf;
use std::{fmt, io};

pub use bert::BertShape;
pub use decoder::{DecoderFamily, DecoderShape};
pub use directory::{Architecture, ModelDirectory};
pub use local::{EncoderSettings, LocalEncoder};
pub use tokens::{Ends, TokenFiles};
pub use weights::WeightFiles;

/// An encoder cannot be used, or failed on a text.
#[derive(Debug, thiserror::Error)]
pub enum EncoderError {
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {problem}", path.display())]
    Invalid { path: PathBuf, problem: String },
    #[error("text {text} cannot be made into tokens: {problem}")]
    Tokens { text: usize, problem: String },
    #[error("libtorch: {source}{}", advice(source))]
    Torch {
        #[from]
        source: tch::TchError,
    },
    #[error("the encoder has no tensor {0}")]
    NoTensor(String),
    #[error(transparent)]
    Weights(#[from] learn_model::safetensors::SafetensorsError),
    #[error("{source}{}", advice(source))]
    Device {
        #[from]
        source: learn_torch::TorchError,
    },
}

/// What to lower, if an error says that memory ran out.
#[must_use]
pub fn advice(error: &dyn fmt::Display) -> &'static str {
    const KNOWN: [&str; 5] = [
        "CUDA out of memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "can't allocate memory",
        "not enough memory: you tried to allocate",
    ];
    let message = error.to_string();
    if KNOWN.iter().any(|known| message.contains(known)) { "; lower embed.batch_tokens" } else { "" }
}

/// The vectors of texts.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// `[texts, dim]` by rows.
    pub rows: Vec<f32>,
    /// Texts that were longer than the encoder reads.
    pub cut: usize,
}

/// A frozen model: texts in, unit-length vectors out. A text's vector depends on nothing but the text (up to the
/// rounding of the arithmetic), in particular not on the texts beside it.
pub trait TextEncoder {
    /// What people call the model.
    fn name(&self) -> &str;

    /// Numbers per vector.
    fn dim(&self) -> usize;

    /// A digest of everything that decides the vectors besides the text: weights, tokenizer, longest text, precision.
    fn fingerprint(&self) -> &str;

    /// The vectors of the texts; `finished` hears how many more texts are done.
    ///
    /// # Errors
    /// A text cannot be made into tokens, or libtorch fails.
    fn encode(&self, texts: &[String], finished: &mut dyn FnMut(usize)) -> Result<Encoded, EncoderError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_memory_says_what_to_lower() {
        let torch = |message: &str| EncoderError::from(tch::TchError::Torch(message.into())).to_string();
        assert!(torch("CUDA out of memory. Tried to allocate 2.44 GiB.").ends_with("; lower embed.batch_tokens"));
        assert!(!torch("shapes differ").contains("embed.batch_tokens"));
    }
}
