//! What is minimised.
//!
//! - [`InfoNce`]: the dense all-action contrastive loss, forward and backward by hand in tiles of items.
//! - [`cvr`]: the auxiliary conversion loss.

pub mod cvr;
mod groups;
mod infonce;

pub use infonce::{InfoNce, InfoNceOutput, local_pairs};
