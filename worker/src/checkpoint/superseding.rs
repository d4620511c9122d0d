//! What a resume owes to its run: later checkpoints are of a past that is not gone on from, and are to be out of the way.
//!
//! Input: the checkpoint that the job goes on from. Output: later ones in `checkpoints/superseded`. Invariant: they are
//! moved before a step is finished or an evaluation told of, whichever ranks are lost meanwhile: with that the coordinator
//! drops the lines of the run that a resume from one of them would need.

use learn_domain::run_dir::RunDir;
use serde::{Deserialize, Serialize};

use super::{CheckpointError, State, supersede_later};

/// A resume whose later checkpoints may still be in the way. Every rank holds it, and gives it on with its state, until all
/// have met after the first one has moved them: should that one be lost before, the next first one moves them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Superseding(Option<State>);

impl Superseding {
    /// The job goes on from the checkpoint of `state`.
    #[must_use]
    pub fn by(state: &State) -> Self {
        Self(Some(state.clone()))
    }

    /// Moves the later checkpoints out of the way, if that may still be to do. A second time changes nothing, as long as
    /// nothing was trained between.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn carry_out(&self, run: &RunDir) -> Result<(), CheckpointError> {
        match &self.0 {
            Some(state) => supersede_later(run, state),
            None => Ok(()),
        }
    }
}
