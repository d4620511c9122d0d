//! What a training does about a step whose loss or gradient is not a finite number.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The policy for a step whose loss or gradient norm, reduced over all workers, is not a finite number. Such a step is
/// never applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// End the training with a checkpoint from before the step. The default: a loss that is no number has a cause (a
    /// learning rate, a damaged row), and a training that goes on by itself hides it.
    #[default]
    Stop,
    /// Leave parameters and moments as they are and go on with the next step.
    Skip,
    /// Take parameters and moments back to those of the last checkpoint (of this generation's start, if there is none
    /// since) and go on with the step after. Each worker keeps a copy of them in host memory.
    Rollback,
}

impl std::fmt::Display for NonFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop",
            Self::Skip => "skip",
            Self::Rollback => "rollback",
        })
    }
}

impl NonFinite {
    pub const ALL: [Self; 3] = [Self::Stop, Self::Skip, Self::Rollback];

    /// What is done about one such step, after `before` others, of which `budget` are borne: a pure function of values
    /// that all ranks share, so that all do the same.
    #[must_use]
    pub fn action(self, before: u32, budget: u32) -> Self {
        if before < budget { self } else { Self::Stop }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_ends_in_a_stop() {
        let actions = |policy: NonFinite| [0, 1, 2, 9].map(|before| policy.action(before, 2));
        use NonFinite::{Rollback, Skip, Stop};
        assert_eq!(actions(Skip), [Skip, Skip, Stop, Stop]);
        assert_eq!(actions(Rollback), [Rollback, Rollback, Stop, Stop]);
        assert_eq!(actions(Stop), [Stop; 4]);
        assert_eq!(Skip.action(0, 0), Stop);
    }
}
