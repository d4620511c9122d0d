//! Preference comprehension (PCH) on libtorch: towers, objectives, optimizer. No network, no data loading.
//!
//! Input: content embeddings and index sequences as tensors. Output: user and item embeddings, losses, gradients,
//! updated parameters. Invariant: everything works for an empty share (no users, no rows, no items), because a rank of a
//! large job may have none in a step.
//!
//! - [`bert`]: one post-LN transformer layer, also used for the frozen text encoder.
//! - [`by_hand`]: the towers' forward and backward by hand, for the CPU.
//! - [`parameters`]: named leaf tensors that are views into one flat buffer, and a table of item vectors beside it.
//! - [`pch`]: the user tower and the item towers.
//! - [`objective`]: InfoNCE by hand in tiles, and the CVR head.
//! - [`optimizer`]: AdamW over the flat buffer and the touched rows of the table, clipping.
//! - [`safetensors`]: tensors to and from files, without pickles.
//! - [`golden`]: checks all of this against cases that PyTorch computed.

pub mod bert;
pub mod by_hand;
pub mod golden;
pub mod objective;
pub mod optimizer;
pub mod parameters;
pub mod pch;
mod products;
pub mod safetensors;

pub use by_hand::Tape;
pub use optimizer::AdamW;
pub use parameters::{Milestone, ParameterSpec, Parameters, Role, RowGradient};
pub use pch::{Forward, ItemInputs, Items, Pch, PchShape, Sequences};
pub use products::multiplied_kind;

/// The threads of this crate's kernels: those of libtorch.
const RUNNER: learn_kernels::Runner =
    learn_kernels::Runner { run: learn_torch::run_tasks, threads: learn_torch::task_threads };

/// A model that cannot be made as asked.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{key}: {problem}")]
    Shape { key: &'static str, problem: String },
    #[error("the weights do not fit the model, use the settings that they were made with:{0}")]
    Weights(parameters::Mismatch),
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}
