//! Identities and counters as types, so that a rank is never passed where a step is meant.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter!(
    /// The number of a membership; it grows by one each time the set of workers changes. 0 = none formed yet.
    Generation(u64)
);
counter!(
    /// The number of a worker inside one generation, dense from 0.
    Rank(u32)
);
counter!(
    /// Optimizer updates finished since the start of the job, over the global batch; never a per-worker count.
    Step(u64)
);
counter!(
    /// A worker as the coordinator knows it, for the life of the job.
    WorkerId(u32)
);
counter!(
    /// A user as a row of the dataset's training sequences, dense from 0.
    UserIndex(u32)
);

/// One start of a worker process; a restarted worker has another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub String);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
