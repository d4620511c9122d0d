//! What a step minimises, over all ranks.
//!
//! Input: this rank's embeddings without a graph, what they stand for, and the towers. Output: this rank's part of the
//! loss, and the gradient of the *whole* loss for its own embeddings. Invariants: the parts of the ranks add up to the
//! loss of the global batch on one device; every rank takes part in the same collectives, whatever its share holds.

mod in_batch;

pub use in_batch::InBatch;
use learn_model::{Forward, Parameters, Pch};
use tch::Tensor;

use super::exchange::Exchange;
use super::passes::{Embeddings, Share};
use super::step::PhaseClock;
use crate::error::WorkerError;

/// The towers and how they run.
#[derive(Clone, Copy, Debug)]
pub struct Towers<'a> {
    pub model: &'a Pch,
    pub parameters: &'a Parameters,
    pub forward: &'a Forward,
}

/// What this rank brings to a step's loss.
pub struct Contribution<'a> {
    pub share: &'a Share,
    /// Without a graph.
    pub embeddings: &'a Embeddings,
    /// Item rows of each rank.
    pub item_counts: &'a [usize],
    /// (position, target) pairs of the whole global batch.
    pub pairs: i64,
}

/// What an objective gives back.
#[derive(Debug)]
pub struct StepLoss {
    /// Scalar: this rank's part.
    pub loss: Tensor,
    /// Scalar i64: pairs of this rank whose target scores highest.
    pub correct: Tensor,
    /// Of the whole loss with respect to this rank's rows.
    pub gradient: Embeddings,
    /// Scalar: this rank's part of the derivative with respect to the logarithm of the logit scale.
    pub d_log_scale: Tensor,
}

/// An objective with what it needs besides a step's data.
pub enum Objective {
    /// Items of the global batch are the negatives.
    InBatch(InBatch),
}

impl Objective {
    /// The loss of the global batch and its gradient; the collectives of all ranks meet here.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn loss(
        &mut self,
        mine: &Contribution<'_>,
        towers: Towers<'_>,
        exchange: &mut Exchange,
        clock: &mut PhaseClock,
    ) -> Result<StepLoss, WorkerError> {
        match self {
            Self::InBatch(objective) => objective.loss(mine, towers, exchange, clock),
        }
    }
}
