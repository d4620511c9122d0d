//! InfoNCE against the items of the global batch.
//!
//! gather the items of all ranks -> loss of the own rows -> scatter the items' gradients to the ranks that own them.

use learn_model::objective::InfoNce;
use learn_telemetry::Phase;
use tch::{Device, Tensor};

use super::{Contribution, StepLoss, Towers};
use crate::error::WorkerError;
use crate::train::exchange::Exchange;
use crate::train::passes::Embeddings;
use crate::train::step::PhaseClock;

/// Items of the gathered batch whose similarities are in memory at once.
const TILE: i64 = 1024;

/// InfoNCE over the global batch.
#[derive(Debug, Default)]
pub struct InBatch {
    /// `[N]`: logarithm of each item's share of the training interactions, if the scores are corrected by it.
    log_q: Option<Tensor>,
}

impl InBatch {
    /// Scores are corrected if `popularity` is there: the training interactions of each item, by item index.
    #[must_use]
    pub fn new(popularity: Option<&[u32]>, device: Device) -> Self {
        Self { log_q: popularity.map(|counts| log_shares(counts, device)) }
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
        let item_id = identities.select(1, 0).contiguous();
        let correction = self.log_q.as_ref().map(|log_q| log_q.index_select(0, &item_id));
        let output = InfoNce {
            user: &mine.embeddings.user,
            row_user: &share.row_user,
            item: &item,
            item_id: &item_id,
            item_user: &identities.select(1, 1).contiguous(),
            correction: correction.as_ref(),
            logit_scale: towers.model.logit_scale(towers.parameters),
            pairs: mine.pairs,
            tile: TILE,
        }
        .compute();
        clock.enter(Phase::Gather);
        let own_item = exchange.scatter_rows(&output.d_item, counts)?;
        Ok(StepLoss {
            loss: output.loss,
            correct: output.correct,
            gradient: Embeddings { user: output.d_user, item: own_item },
            d_log_scale: output.d_log_scale,
        })
    }
}

/// `[N]`: `log(share of the interactions)` of each item; an item without any counts as having one.
fn log_shares(counts: &[u32], device: Device) -> Tensor {
    let total: f64 = counts.iter().map(|&count| f64::from(count.max(1))).sum();
    let shares: Vec<f32> = counts.iter().map(|&count| (f64::from(count.max(1)) / total).ln() as f32).collect();
    Tensor::from_slice(&shares).to_device(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_one() {
        let shares = log_shares(&[3, 0, 4], Device::Cpu).exp();
        assert_eq!(Vec::<f32>::try_from(&(shares * 8.0).round()).unwrap(), [3.0, 1.0, 4.0]);
    }
}
