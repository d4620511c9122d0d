//! What a step minimises, over all ranks.
//!
//! Input: this rank's embeddings without a graph, what they stand for, and the towers. Output: this rank's part of the
//! loss, and the gradient of the *whole* loss for its own embeddings. Invariants: the parts of the ranks add up to the
//! loss of the global batch on one device; every rank takes part in the same collectives, whatever its share holds.

mod conversion;
mod full_softmax;
mod in_batch;

pub use conversion::Conversion;
pub use full_softmax::FullSoftmax;
pub use in_batch::InBatch;
use learn_domain::sampling::Pairs;
use learn_model::{Forward, Parameters, Pch, Tape};
use tch::{Kind, Tensor};

use super::exchange::Exchange;
use super::passes::{Embeddings, Seeds, Share};
use super::step::PhaseClock;
use crate::error::WorkerError;

/// The towers and how they run.
#[derive(Clone, Copy, Debug)]
pub struct Towers<'a> {
    pub model: &'a Pch,
    pub parameters: &'a Parameters,
    pub forward: &'a Forward,
    pub activation_checkpointing: bool,
}

impl Towers<'_> {
    /// For a pass with this seed of dropout.
    #[must_use]
    pub fn tape(&self, seed: u64) -> Tape {
        if self.activation_checkpointing { Tape::with_checkpointing(seed) } else { Tape::new(seed) }
    }
}

/// What this rank brings to a step's loss.
pub struct Contribution<'a> {
    pub share: &'a Share,
    /// Without a graph.
    pub embeddings: &'a Embeddings,
    /// User rows of each rank.
    pub row_counts: &'a [usize],
    /// Item rows of each rank.
    pub item_counts: &'a [usize],
    /// The step's on this rank, for dropout.
    pub seeds: Seeds,
    /// (position, target) pairs of the whole global batch.
    pub pairs: i64,
    /// Sampled targets with a label of the whole global batch.
    pub exposures: i64,
}

/// What an objective gives back.
#[derive(Debug)]
pub struct StepLoss {
    /// Scalar: a part; those of all ranks add up to the whole.
    pub loss: Tensor,
    /// Scalar i64: pairs whose target scores highest, likewise.
    pub correct: Tensor,
    /// Of the whole loss with respect to this rank's rows.
    pub gradient: Embeddings,
    /// Scalar: this rank's part of the derivative with respect to the logarithm of the logit scale.
    pub d_log_scale: Tensor,
}

impl StepLoss {
    /// A loss of 0 for these embeddings.
    fn nothing(embeddings: &Embeddings) -> Self {
        let zero = |kind| Tensor::zeros([0_i64; 0], (kind, embeddings.user.device()));
        Self {
            loss: zero(embeddings.user.kind()),
            correct: zero(Kind::Int64),
            gradient: Embeddings { user: embeddings.user.zeros_like(), item: embeddings.item.zeros_like() },
            d_log_scale: zero(embeddings.user.kind()),
        }
    }
}

/// An objective with what it needs besides a step's data.
pub enum Objective {
    /// Items of the global batch are the negatives.
    InBatch(InBatch),
    /// The softmax over the catalogue.
    FullSoftmax(FullSoftmax),
    /// None: the towers are frozen.
    Frozen,
}

impl Objective {
    /// The loss of the global batch and its gradient; the collectives of all ranks meet here. What an objective embeds
    /// besides the share, it brings back to the parameters itself.
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
            Self::FullSoftmax(objective) => objective.loss(mine, towers, exchange, clock),
            Self::Frozen => Ok(StepLoss::nothing(mine.embeddings)),
        }
    }

    /// Puts another one in the place of this one, which goes first: each may hold a part of the catalogue.
    ///
    /// # Errors
    /// That of `make`; then nothing is trained on.
    pub fn replace(&mut self, make: impl FnOnce() -> Result<Self, WorkerError>) -> Result<(), WorkerError> {
        *self = Self::Frozen;
        *self = make()?;
        Ok(())
    }

    /// Which rows and targets are trained on each other, if any are.
    #[must_use]
    pub fn pairing(&self) -> Option<Pairs> {
        match self {
            Self::InBatch(objective) => Some(objective.pairing()),
            Self::FullSoftmax(objective) => Some(objective.pairing()),
            Self::Frozen => None,
        }
    }

    /// Items of the catalogue that this rank embeds in every step.
    #[must_use]
    pub fn catalogue_items(&self) -> u64 {
        match self {
            Self::FullSoftmax(objective) => objective.items(),
            Self::InBatch(_) | Self::Frozen => 0,
        }
    }

    /// Whether the towers learn.
    #[must_use]
    pub fn trains_towers(&self) -> bool {
        !matches!(self, Self::Frozen)
    }
}

#[cfg(test)]
mod tests;
