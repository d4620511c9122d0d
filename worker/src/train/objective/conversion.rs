//! The CVR head's loss, beside the main objective.
//!
//! A pair (user at the newest sampled history position, sampled target) needs nothing of another rank, so there is no
//! collective: each rank has the sum over its own pairs divided by the pairs of the global batch. The head sees the
//! embeddings without the towers' graph; its own gradient is collected at once, that for the embeddings joins the main
//! objective's on its way through the towers. So the step is the same for any number of ranks and of passes.

use learn_model::objective::cvr;
use tch::Tensor;

use super::{Contribution, StepLoss, Towers};

/// The head's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct Conversion {
    pub weight: f64,
}

impl Conversion {
    /// Adds the weighted loss and its gradient to a step's; returns this rank's part of the loss before the weight.
    pub fn add(&self, loss: &mut StepLoss, mine: &Contribution<'_>, towers: Towers<'_>) -> Tensor {
        let exposures = &mine.share.exposures;
        if exposures.count() == 0 {
            return loss.loss.zeros_like();
        }
        let leaf = |tensor: &Tensor| tensor.detach().set_requires_grad(true);
        let (user, item) = (leaf(&mine.embeddings.user), leaf(&mine.embeddings.item));
        let pairs = (user.index_select(0, &exposures.user_row), item.index_select(0, &exposures.item_row));
        let logits = cvr::logits(towers.parameters, &pairs.0, &pairs.1);
        let own = cvr::loss(&logits, &exposures.label, mine.exposures);
        (&own * self.weight).backward();
        loss.gradient.user += user.grad();
        loss.gradient.item = &loss.gradient.item + item.grad();
        let own = own.detach();
        loss.loss += &own * self.weight;
        own
    }
}
