//! Settings of what `learn-launch embed` does to content embeddings before a training sees them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// What is done to content embeddings before a training sees them; see docs/embeddings.md. All off: the vectors of the
/// language model as they are, as published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RefineConfig {
    /// Take out what all items share and let every direction count alike (ZCA whitening).
    pub whitening: bool,
    /// Share of the mean variance that is added to each direction's, so that directions without signal stay small.
    pub shrinkage: f64,
    /// How much of the content of items that the same users chose next to it an item takes over; 0 = nothing.
    /// Interactions of training sequences only, which have two items at least.
    pub smoothing: f64,
    /// Two items of one user count as neighbours with this to the power of their distance - 1.
    pub smoothing_decay: f64,
}

impl Default for RefineConfig {
    fn default() -> Self {
        Self { whitening: false, shrinkage: 0.1, smoothing: 0.0, smoothing_decay: 0.7 }
    }
}

impl RefineConfig {
    /// Whether anything is done at all.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.whitening || self.smoothing > 0.0
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in [("embed.refine.shrinkage", self.shrinkage), ("embed.refine.smoothing", self.smoothing)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError { key, problem: "must be 0 or a positive number".into() });
            }
        }
        if !(self.smoothing_decay > 0.0 && self.smoothing_decay < 1.0) {
            let problem = "must lie between 0 and 1".into();
            return Err(ConfigError { key: "embed.refine.smoothing_decay", problem });
        }
        Ok(())
    }
}
