//! Content embedding generation (CEG): from the texts of a dataset's items to its content embeddings.
//!
//! Item -> [`prompt`] -> [`encoder`] (frozen language model, mean over tokens, L2 norm) -> f16 rows -> the dataset's
//! embedding shards ([`embed`]). Vectors of a server enter by [`endpoint`], those that were made elsewhere by [`vectors`],
//! instead of an encoder, and leave by the same shards. `learn-embed` is the process around it; several of them share
//! the work. [`golden`] checks encoders against transformers.

pub mod batch;
pub mod embed;
pub mod encoder;
pub mod endpoint;
pub mod golden;
pub mod progress;
pub mod prompt;
pub mod ranges;
pub mod refine;
pub mod vectors;
