//! InfoNCE against the items of the global batch.
//!
//! gather the items of all ranks -> loss of the own rows -> scatter the items' gradients to the ranks that own them.

use learn_domain::Phase;
use learn_domain::config::ObjectiveConfig;
use learn_domain::sampling::Pairs;
use learn_model::objective::{self, InfoNce, Proposal, Tile};
use tch::{Device, Tensor};

use super::{Contribution, StepLoss, Towers};
use crate::error::WorkerError;
use crate::train::exchange::Exchange;
use crate::train::passes::Embeddings;
use crate::train::step::PhaseClock;

/// InfoNCE over the global batch.
#[derive(Debug)]
pub struct InBatch {
    pairing: Pairs,
    /// Draws from the catalogue among the items of a step.
    uniform: i64,
    /// How often an item is expected, if the scores are corrected by it.
    proposal: Option<Proposal>,
}

impl InBatch {
    /// Scores are corrected if `popularity` is there: the training interactions of each item, by item index.
    #[must_use]
    pub fn new(config: &ObjectiveConfig, popularity: Option<&[u32]>, device: Device) -> Self {
        Self {
            pairing: config.pairs(),
            uniform: config.uniform_negatives.into(),
            proposal: popularity.map(|counts| Proposal::new(counts, device)),
        }
    }

    pub(super) fn pairing(&self) -> Pairs {
        self.pairing
    }

    pub(super) fn loss(
        &self,
        mine: &Contribution<'_>,
        towers: Towers<'_>,
        exchange: &mut Exchange,
        clock: &mut PhaseClock,
    ) -> Result<StepLoss, WorkerError> {
        let (share, counts) = (mine.share, mine.item_counts);
        clock.enter(Phase::Gather);
        let item = exchange.gather_rows(&mine.embeddings.item, counts)?;
        // ids and owners travel together as [m, 2]
        let identities = exchange.gather_rows(&Tensor::stack(&[&share.item_id, &share.item_user], 1), counts)?;
        clock.enter(Phase::Loss);
        let items_learn = towers.model.items_learn();
        let item_id = identities.select(1, 0).contiguous();
        let in_batch = item_id.size()[0] - self.uniform;
        let correction = self
            .proposal
            .as_ref()
            .map(|proposal| proposal.correction(&item_id, in_batch, self.uniform).to_kind(item.kind()));
        let output = InfoNce {
            user: &mine.embeddings.user,
            row_user: &share.row_user,
            item: &item,
            item_id: &item_id,
            item_user: &identities.select(1, 1).contiguous(),
            correction: correction.as_ref(),
            pairing: self.pairing,
            logit_scale: towers.model.logit_scale(towers.parameters),
            pairs: mine.pairs,
            tile: Tile::on(item.device(), (mine.embeddings.user.size()[0], item.size()[0])),
            items_learn,
            precision: towers.forward.precision,
        }
        .compute();
        clock.enter(Phase::Gather);
        let own_item = match items_learn {
            true => exchange.scatter_rows(&output.d_item, counts)?,
            false => objective::nothing(&mine.embeddings.item),
        };
        Ok(StepLoss {
            loss: output.loss,
            correct: output.correct,
            gradient: Embeddings { user: output.d_user, item: own_item },
            d_log_scale: output.d_log_scale,
        })
    }
}
