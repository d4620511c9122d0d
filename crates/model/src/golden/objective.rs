//! The objective of a case, as a training step computes it, with several shards and tiles.

use learn_domain::config::{ObjectiveKind, Precision};
use learn_domain::packing::Run;
use learn_domain::sampling::Pairs;
use tch::{Kind, Tensor};

use super::{Case, GoldenError, Side};
use crate::objective::softmax::{Normalizer, Shard, ShardLoss};
use crate::objective::{InfoNce, Proposal, Tile, local_pairs, pair_indices};
use crate::parameters::Parameters;
use crate::pch::{Forward, ItemInputs, Items, Pch, Sequences};

/// Rows and items of a tile: less than any case's batch has, so that there are several, and a last one that is not full.
const TILE: i64 = 3;
/// The owner of an item that is nobody's target.
const NOBODY: i64 = -1;

/// The towers of a case and what went through them.
pub(super) struct Towers<'a> {
    pub model: &'a Pch,
    pub parameters: &'a Parameters,
    pub forward: &'a Forward,
    pub items: &'a Items,
    /// `[R, d]`.
    pub user: &'a Tensor,
    pub history: &'a Side,
    pub target: &'a Side,
}

/// Loss and gradient of an objective.
pub(super) struct Minimised {
    pub loss: Tensor,
    pub correct: Tensor,
    pub d_user: Tensor,
    pub d_log_scale: Tensor,
    /// Scalar with a graph, whose derivative is that of the loss by way of the items.
    pub surrogate: Tensor,
    pub embedded: Embedded,
}

/// What went through the item tower.
pub(super) enum Embedded {
    /// `[M, d]`, the sampled targets.
    Targets(Tensor),
    /// `[N, d]`.
    Catalogue(Tensor),
}

impl Towers<'_> {
    /// The item tower over the items with these numbers `[U]`.
    fn catalogue(&self, table: &Tensor, ids: &Tensor) -> Tensor {
        let items: Vec<u32> = (0..ids.numel()).map(|place| ids.int64_value(&[place as i64]) as u32).collect();
        let inputs = ItemInputs { items: &items, content: &table.index_select(0, ids), id_seed: None, tape: None };
        self.model.catalogue(self.parameters, &inputs, self.forward)
    }

    pub(super) fn minimise(&self, case: &Case) -> Result<Minimised, GoldenError> {
        match case.config.kind {
            ObjectiveKind::DenseAllAction | ObjectiveKind::NextItem => self.in_batch(case),
            ObjectiveKind::FullSoftmax => self.full_softmax(case),
        }
    }

    fn in_batch(&self, case: &Case) -> Result<Minimised, GoldenError> {
        let (table, pairing) = (case.tensor("in.table")?, case.config.pairs);
        let alone = || {
            let count = self.target.id.len();
            Sequences {
                items: case.index(&self.target.id),
                positions: Tensor::arange(count as i64, (Kind::Int64, case.device)),
                runs: vec![Run { count, length: 1 }],
                gaps: None,
            }
        };
        let item = |sequences: &Sequences| self.model.item(self.parameters, self.items, sequences, self.forward);
        let targets = match pairing {
            Pairs::AllAction => item(&self.target.sequences),
            Pairs::Next => item(&alone()),
        };
        let uniform_id = match case.tensors.get("in.uniform_id") {
            Some(drawn) => drawn.shallow_clone(),
            None => case.index(&[]),
        };
        let uniform = self.catalogue(table, &uniform_id);
        let (item, item_id) =
            (Tensor::cat(&[&targets, &uniform], 0), Tensor::cat(&[&case.index(&self.target.id), &uniform_id], 0));
        let row_user = case.index(&self.history.user);
        let item_user = Tensor::cat(&[case.index(&self.target.user), uniform_id.full_like(NOBODY)], 0);
        let correction = match case.tensors.get("in.popularity") {
            Some(counts) => {
                let counts: Vec<i64> = Vec::try_from(counts).map_err(|error| case.layout("in.popularity", &error))?;
                let counts: Vec<u32> = counts.iter().map(|&count| count as u32).collect();
                let (in_batch, uniform) = (self.target.id.len() as i64, uniform_id.size()[0]);
                Some(Proposal::new(&counts, case.device).correction(&item_id, in_batch, uniform))
            }
            None => None,
        };
        let output = InfoNce {
            user: &self.user.detach(),
            row_user: &row_user,
            item: &item.detach(),
            item_id: &item_id,
            item_user: &item_user,
            correction: correction.as_ref(),
            pairing,
            logit_scale: self.model.logit_scale(self.parameters),
            pairs: local_pairs(&row_user, &item_user, pairing),
            tile: Tile { scores: TILE * TILE },
            items_learn: true,
            precision: Precision::F32,
        }
        .compute();
        Ok(Minimised {
            loss: output.loss,
            correct: output.correct,
            d_user: output.d_user,
            d_log_scale: output.d_log_scale,
            surrogate: (&item * &output.d_item).sum(Kind::Double),
            embedded: Embedded::Targets(targets),
        })
    }

    fn full_softmax(&self, case: &Case) -> Result<Minimised, GoldenError> {
        let table = case.tensor("in.table")?;
        let catalogue = self.catalogue(table, &Tensor::arange(table.size()[0], (Kind::Int64, case.device)));
        let (row_user, item_user) = (case.index(&self.history.user), case.index(&self.target.user));
        let (pair_row, pair_target) = pair_indices(&row_user, &item_user, case.config.pairs);
        let pair_item = case.index(&self.target.id).index_select(0, &pair_target);
        let items = catalogue.size()[0];
        // three shards of unequal size
        let cuts = [0, items / 4, items / 2, items];
        let parts: Vec<Tensor> =
            cuts.windows(2).map(|cut| catalogue.detach().narrow(0, cut[0], cut[1] - cut[0])).collect();
        let user = self.user.detach();
        let shards: Vec<Shard<'_>> = parts
            .iter()
            .zip(cuts)
            .map(|(item, first_item)| Shard {
                user: &user,
                item,
                first_item,
                pair_row: &pair_row,
                pair_item: &pair_item,
                logit_scale: self.model.logit_scale(self.parameters),
                tile: TILE,
            })
            .collect();
        let scores: Vec<Tensor> = shards.iter().map(|shard| shard.scores().rows()).collect();
        let whole = Normalizer::merge(&Tensor::stack(&scores, 0));
        let losses: Vec<ShardLoss> = shards.iter().map(|shard| shard.loss(&whole)).collect();
        let sum = |part: fn(&ShardLoss) -> &Tensor| {
            losses.iter().map(part).fold(part(&losses[0]).zeros_like(), |sum, one| sum + one)
        };
        let d_item = Tensor::cat(&losses.iter().map(|loss| &loss.d_item).collect::<Vec<_>>(), 0);
        Ok(Minimised {
            loss: sum(|part| &part.loss),
            correct: sum(|part| &part.correct),
            d_user: sum(|part| &part.d_user),
            d_log_scale: sum(|part| &part.d_log_scale),
            surrogate: (&catalogue * d_item).sum(Kind::Double),
            embedded: Embedded::Catalogue(catalogue),
        })
    }
}
