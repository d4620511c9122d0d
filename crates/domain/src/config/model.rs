//! Settings of the towers that are a choice between named ways.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How target items become item embeddings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ItemTower {
    /// The user tower's weights over the target sequence, causally.
    Causal,
    /// The user tower's weights, each item alone.
    #[default]
    PerItem,
    /// The content embedding itself, L2-normalised; needs `output_dim` equal to the embeddings' dimension.
    Content,
}

/// What tells the encoder where in the sequence an item stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PositionEmbedding {
    /// Nothing but the causal mask, as published.
    #[default]
    None,
    /// A learned vector per distance from the newest item, added to the adaptor's output of the user tower.
    Learned,
}

/// What tells the encoder when interactions were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TimeEmbedding {
    /// Nothing but their order, as published.
    #[default]
    None,
    /// A learned vector per bucket of the time since the item before it in the sequence, added to the adaptor's output of
    /// the user tower and of a `causal` item tower; nothing for an item without an earlier one. Buckets double in width, so
    /// any unit of time will do. Needs a dataset whose held-out rows have times (version 2).
    Gap,
}

/// How the adaptor starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdaptorInit {
    /// Like every other weight, as published.
    #[default]
    Normal,
    /// As if the content embeddings had mean 0 and variance 1: their common part, which a text encoder gives to all
    /// items, is taken out by the initial bias. Measured on a sample of the catalogue.
    Standardized,
}

/// What the towers read of an item.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ItemInput {
    /// Its content embedding through the adaptor, as published.
    #[default]
    Content,
    /// A learned vector of its own; the dataset needs no content embeddings. Items without training interactions keep
    /// their random start.
    Id,
    /// The sum of both. The vectors start at 0, and those of items without training interactions stay there: such items
    /// have their content alone.
    ContentId,
}

impl ItemInput {
    /// Whether items have learned vectors.
    #[must_use]
    pub fn has_ids(self) -> bool {
        self != Self::Content
    }

    /// Whether content embeddings are read.
    #[must_use]
    pub fn has_content(self) -> bool {
        self != Self::Id
    }
}

/// What user and item embeddings are a correction of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// Nothing: they are what the towers make of the content embeddings, as published.
    #[default]
    None,
    /// The content embeddings through a projection: the item's own, and for a user the mean of the history's, weighted by
    /// `residual_decay`. The towers' last layer starts at 0 and the projection keeps cosines (exactly if `output_dim` is
    /// the embeddings' dimension, else as well as the catalogue's principal directions can), so before the first step the
    /// model is that training-free recommender.
    Content,
}
