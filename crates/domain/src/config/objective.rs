//! Settings of what a training minimises.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use crate::sampling::Pairs;

/// What a user embedding is trained to find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ObjectiveKind {
    /// InfoNCE: every sampled history position against every sampled target of the user, as published.
    #[default]
    DenseAllAction,
    /// InfoNCE: every sampled position of the newest `sampling.history` items against the item that follows it. The cut,
    /// `sampling.targets`, `window`, `stage_one` and `item_positions` play no part; `sampling.user_positions` of at least
    /// `sampling.history` trains all positions.
    NextItem,
    /// The exact softmax over the whole catalogue, for fine-tuning: every item goes through the item tower in each step,
    /// alone, with its gradient. Each worker keeps the content embeddings of its part of the catalogue on its device.
    FullSoftmax,
}

/// What is minimised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ObjectiveConfig {
    pub kind: ObjectiveKind,
    /// Which targets a position is trained on with `full_softmax`; the other kinds have their own.
    pub pairs: Pairs,
    /// Items of the catalogue that a worker puts through the item tower at once with `full_softmax`; a larger part is
    /// done in several passes with the same gradient. 0 = one pass.
    pub catalogue_batch: u32,
    /// Subtract the logarithm of each item's share of the training interactions (of sequences of two items at least)
    /// from its training scores. In-batch negatives come as often as they are popular, which punishes popular items;
    /// with the correction the scores approach those of a softmax over the catalogue (Bengio and Senécal 2008; Yi et
    /// al., RecSys 2019). With uniform negatives it is the logarithm of how often the item is expected among both
    /// kinds. Published: off.
    pub logq_correction: bool,
    /// The newest this many history items of each user join the negatives, for data in which nobody takes an item
    /// twice: the towers learn not to recommend what is already there. Published: 0.
    pub history_negatives: u32,
    /// This many items, drawn uniformly from the catalogue with replacement in each step, join the negatives of all users
    /// of the global batch, so that items which are nobody's target are pushed away too. Published: 0.
    pub uniform_negatives: u32,
    /// Weight of the loss of the CVR head, which predicts from user and item embedding whether an exposure converts:
    /// binary cross-entropy over the sampled targets, added to the main loss. Needs a dataset with labels
    /// (`prepare.interactions.label`). 0 = no head.
    pub cvr_weight: f64,
    /// Width of the CVR head's hidden layer.
    pub cvr_hidden: u32,
}

impl Default for ObjectiveConfig {
    fn default() -> Self {
        Self {
            kind: ObjectiveKind::DenseAllAction,
            pairs: Pairs::AllAction,
            catalogue_batch: 4096,
            logq_correction: false,
            history_negatives: 0,
            uniform_negatives: 0,
            cvr_weight: 0.0,
            cvr_hidden: 64,
        }
    }
}

impl ObjectiveConfig {
    /// Width of the CVR head's hidden layer, if there is a head.
    #[must_use]
    pub fn cvr_head(&self) -> Option<u32> {
        (self.cvr_weight > 0.0).then_some(self.cvr_hidden)
    }

    /// Which targets a position is trained on.
    #[must_use]
    pub fn pairs(&self) -> Pairs {
        match self.kind {
            ObjectiveKind::DenseAllAction => Pairs::AllAction,
            ObjectiveKind::NextItem => Pairs::Next,
            ObjectiveKind::FullSoftmax => self.pairs,
        }
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let fail = |key, problem: &str| Err(ConfigError { key, problem: problem.into() });
        if self.kind != ObjectiveKind::FullSoftmax {
            return if self.kind == ObjectiveKind::DenseAllAction && self.pairs == Pairs::Next {
                fail("objective.pairs", "is for full_softmax; set objective.kind = \"next_item\" for next-item pairs")
            } else {
                Ok(())
            };
        }
        let every_item = "must be off with full_softmax: every item of the catalogue is in the sum already";
        if self.history_negatives > 0 {
            return fail("objective.history_negatives", every_item);
        }
        if self.uniform_negatives > 0 {
            return fail("objective.uniform_negatives", every_item);
        }
        if self.logq_correction {
            return fail(
                "objective.logq_correction",
                "must be off with full_softmax: nothing is sampled that it could correct",
            );
        }
        Ok(())
    }
}
