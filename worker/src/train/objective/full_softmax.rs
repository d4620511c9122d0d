//! The exact softmax over the whole catalogue, whose items are sharded over the ranks.
//!
//! embed the own items -> gather the user rows of all ranks -> normalizer of the shard -> gather the normalizers -> loss of
//! the targets in the shard -> scatter the users' gradients to the ranks that own them; the items' gradients go through the
//! item tower here. Nothing of size `[rows, items]` or of the catalogue's activations is ever in memory: scores come in
//! tiles, and a shard larger than a batch is embedded twice, as a share larger than a micro-batch is.

use std::ops::Range;

use learn_domain::Phase;
use learn_domain::config::ObjectiveConfig;
use learn_domain::random;
use learn_domain::sampling::Pairs;
use learn_model::objective::pair_indices;
use learn_model::objective::softmax::{Normalizer, Shard};
use learn_model::{ItemInputs, Tape};
use tch::Tensor;

use super::{Contribution, StepLoss, Towers};
use crate::error::WorkerError;
use crate::train::exchange::Exchange;
use crate::train::passes::{Embeddings, Seeds};
use crate::train::step::PhaseClock;

/// Scores that are in memory at once.
const SCORES: i64 = 1 << 24;

/// The softmax over the catalogue, with this rank's items.
#[derive(Debug)]
pub struct FullSoftmax {
    pairing: Pairs,
    /// `[n, input_dim]`: content embeddings of the own items, those from `first_item` on.
    rows: Tensor,
    first_item: i64,
    /// Items that go through the item tower at once.
    batch: i64,
}

impl FullSoftmax {
    /// `rows` `[n, input_dim]` are the content embeddings of this rank's part of the catalogue, from `first_item` on.
    #[must_use]
    pub fn new(config: &ObjectiveConfig, (rows, first_item): (Tensor, i64)) -> Self {
        let batch = if config.catalogue_batch == 0 { i64::MAX } else { i64::from(config.catalogue_batch) };
        Self { pairing: config.pairs(), rows, first_item, batch }
    }

    pub(super) fn pairing(&self) -> Pairs {
        self.pairing
    }

    pub(super) fn items(&self) -> u64 {
        self.rows.size()[0].cast_unsigned()
    }

    pub(super) fn loss(
        &self,
        mine: &Contribution<'_>,
        towers: Towers<'_>,
        exchange: &mut Exchange,
        clock: &mut PhaseClock,
    ) -> Result<StepLoss, WorkerError> {
        clock.enter(Phase::Forward);
        let (embedded, tape) = self.embed_all(mine.seeds, towers);
        let item = embedded.detach();
        clock.enter(Phase::Gather);
        let user = exchange.gather_rows(&mine.embeddings.user, mine.row_counts)?;
        let (pair_row, pair_item) = self.pairs(mine, exchange)?;
        clock.enter(Phase::Loss);
        let rows = user.size()[0];
        let shard = Shard {
            user: &user,
            item: &item,
            first_item: self.first_item,
            pair_row: &pair_row,
            pair_item: &pair_item,
            logit_scale: towers.model.logit_scale(towers.parameters),
            tile: (SCORES / rows.max(1)).max(1),
        };
        let own = shard.scores().rows();
        let world = exchange.world_size();
        clock.enter(Phase::Gather);
        let all = exchange.gather_rows(&own, &vec![rows as usize; world])?;
        clock.enter(Phase::Loss);
        let loss = shard.loss(&Normalizer::merge(&all.view([world as i64, rows, 2])));
        clock.enter(Phase::Gather);
        let d_user = exchange.scatter_rows(&loss.d_user, mine.row_counts)?;
        clock.enter(Phase::Backward);
        self.pull_all((&embedded, tape), &loss.d_item, mine.seeds, towers);
        Ok(StepLoss {
            loss: loss.loss,
            correct: loss.correct,
            gradient: Embeddings { user: d_user, item: mine.embeddings.item.zeros_like() },
            d_log_scale: loss.d_log_scale,
        })
    }

    /// The trained pairs of all ranks: rows of the gathered users, and items.
    fn pairs(&self, mine: &Contribution<'_>, exchange: &mut Exchange) -> Result<(Tensor, Tensor), WorkerError> {
        let share = mine.share;
        let row_user = exchange.gather_rows(&share.row_user.unsqueeze(1), mine.row_counts)?.squeeze_dim(1);
        // ids and owners travel together as [m, 2]
        let targets = Tensor::stack(&[&share.item_id, &share.item_user], 1);
        let targets = exchange.gather_rows(&targets, mine.item_counts)?;
        let (row, target) = pair_indices(&row_user, &targets.select(1, 1).contiguous(), self.pairing);
        Ok((row, targets.select(1, 0).index_select(0, &target)))
    }

    /// `[n, d]`: the own items, with the way back if they are one batch.
    fn embed_all(&self, seeds: Seeds, towers: Towers<'_>) -> (Tensor, Option<Tape>) {
        match &self.batches()[..] {
            [] => (Tensor::zeros([0, towers.model.output_dim()], (towers.parameters.kind(), self.rows.device())), None),
            [all] => {
                let (all, tape) = self.embed(all.clone(), seeds, towers);
                (all, Some(tape))
            }
            batches => tch::no_grad(|| {
                let embed = |batch: &Range<i64>| self.embed(batch.clone(), seeds, towers).0;
                (Tensor::cat(&batches.iter().map(embed).collect::<Vec<_>>(), 0), None)
            }),
        }
    }

    /// Brings the gradient `[n, d]` of the own items back to the parameters.
    fn pull_all(&self, (embedded, tape): (&Tensor, Option<Tape>), d_item: &Tensor, seeds: Seeds, towers: Towers<'_>) {
        if let Some(tape) = tape {
            // the share's own pass through the same towers is still to come
            tape.backward(towers.parameters, &[(embedded, d_item)], &mut |_| ());
            return;
        }
        for batch in self.batches() {
            let gradient = d_item.narrow(0, batch.start, batch.end - batch.start);
            let (items, tape) = self.embed(batch, seeds, towers);
            tape.backward(towers.parameters, &[(&items, &gradient)], &mut |_| ());
        }
    }

    /// One batch of the own items through the item tower; dropout draws the same masks each time.
    fn embed(&self, batch: Range<i64>, seeds: Seeds, towers: Towers<'_>) -> (Tensor, Tape) {
        // the passes of the share count from 0
        let tape = towers.tape(random::key(&[seeds.dropout, u64::MAX, batch.start.cast_unsigned()]));
        let rows = self.rows.narrow(0, batch.start, batch.end - batch.start);
        let first = self.first_item + batch.start;
        let items: Vec<u32> = (first..first + rows.size()[0]).map(|item| item as u32).collect();
        let inputs = ItemInputs { items: &items, content: &rows, id_seed: Some(seeds.items), tape: Some(&tape) };
        let embedded = towers.model.catalogue(towers.parameters, &inputs, towers.forward);
        (embedded, tape)
    }

    fn batches(&self) -> Vec<Range<i64>> {
        let items = self.rows.size()[0];
        (0..items)
            .step_by(usize::try_from(self.batch).unwrap_or(usize::MAX))
            .map(|start| start..items.min(start.saturating_add(self.batch)))
            .collect()
    }
}
