//! Preference comprehension (PCH) on libtorch: towers, objectives, optimizer. No network, no data loading.
//!
//! Input: content embeddings and index sequences as tensors. Output: user and item embeddings, losses, gradients,
//! updated parameters. Invariant: everything works for an empty share (no users, no rows, no items), because a rank of a
//! large job may have none in a step.
//!
//! - [`bert`]: one post-LN transformer layer, also used for the frozen text encoder.
//! - [`safetensors`]: tensors to and from files, without pickles.

pub mod bert;
pub mod safetensors;
