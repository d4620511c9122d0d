//! What is minimised.
//!
//! - [`InfoNce`]: the contrastive loss over a global batch, forward and backward by hand in tiles.
//! - [`softmax`]: the softmax over a catalogue in shards, likewise.
//! - [`Proposal`]: the logQ correction.
//! - [`cvr`]: the auxiliary conversion loss.

pub mod cvr;
mod groups;
mod infonce;
mod pairs;
mod proposal;
pub mod softmax;

pub use infonce::{InfoNce, InfoNceOutput, Tile, nothing};
pub use pairs::{local_pairs, pair_indices};
pub use proposal::Proposal;
