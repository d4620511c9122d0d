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

use std::io;
use std::path::PathBuf;

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
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    #[error("the encoder has no tensor {0}")]
    NoTensor(String),
    #[error(transparent)]
    Weights(#[from] learn_model::safetensors::SafetensorsError),
    #[error(transparent)]
    Device(#[from] learn_torch::TorchError),
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

    /// The vectors of the texts, `[texts, dim]` by rows; `finished` hears how many more texts are done.
    ///
    /// # Errors
    /// A text cannot be made into tokens, or libtorch fails.
    fn encode(&self, texts: &[String], finished: &mut dyn FnMut(usize)) -> Result<Vec<f32>, EncoderError>;
}
