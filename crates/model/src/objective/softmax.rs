//! The softmax over a whole catalogue, with its gradient, by hand, in tiles of items; the catalogue may be in shards.
//!
//! Input: the user rows `[R, d]` of *all* ranks, their targets, and this rank's shard of item embeddings `[n, d]`. Output:
//! the shard's part of the loss of the global batch, of its gradient for all rows, and the gradient for the shard. For
//! row r and its target i, with s = logit scale * cosine:
//!
//! loss_ri = log(sum over the catalogue e^{s}) - s_i.
//!
//! 1. [`Shard::scores`]: for each row, log-sum-exp and maximum of its scores in the shard.
//! 2. [`Normalizer::merge`]: those of all shards become those of the catalogue.
//! 3. [`Shard::loss`]: what the shard's items contribute to the loss and the gradient.
//!
//! Invariants: nothing is sampled; memory is O(rows x tile); a target lies in one shard, so the sum of the shards' parts
//! is the loss (the gradient) of the whole catalogue on one device. Items that are nobody's target are in the sum.

use tch::{Kind, Tensor};

/// One rank's part of a catalogue, and what meets it.
#[derive(Debug)]
pub struct Shard<'a> {
    /// `[R, d]`, L2-normalised, of all ranks.
    pub user: &'a Tensor,
    /// `[n, d]`, L2-normalised: the items from `first_item` on.
    pub item: &'a Tensor,
    pub first_item: i64,
    /// `[P]` i64: the row of each trained pair.
    pub pair_row: &'a Tensor,
    /// `[P]` i64: the item of each trained pair, of any shard.
    pub pair_item: &'a Tensor,
    /// Scalar tensor; see [`crate::Pch::logit_scale`].
    pub logit_scale: Tensor,
    /// Items whose scores are in memory at once; at least 1.
    pub tile: i64,
}

/// What a softmax over the catalogue needs of it, by row.
#[derive(Debug)]
pub struct Normalizer {
    /// `[R]`: log-sum-exp of the scores.
    pub lse: Tensor,
    /// `[R]`: the highest score.
    pub highest: Tensor,
}

/// What [`Shard::loss`] gives.
#[derive(Debug)]
pub struct ShardLoss {
    /// Scalar: the sum over the pairs whose target is in the shard, divided by P.
    pub loss: Tensor,
    /// Scalar i64: those of them that no item scores above.
    pub correct: Tensor,
    /// `[R, d]`: the shard's part for the rows of all ranks.
    pub d_user: Tensor,
    /// `[n, d]`.
    pub d_item: Tensor,
    /// Scalar: the shard's part of the derivative with respect to the logarithm of the logit scale.
    pub d_log_scale: Tensor,
}

impl Normalizer {
    /// Joins the normalizers of shards, `[S, R, 2]` as [`Normalizer::rows`] writes them.
    #[must_use]
    pub fn merge(shards: &Tensor) -> Self {
        Self {
            lse: shards.select(2, 0).logsumexp([0_i64].as_slice(), false),
            highest: shards.select(2, 1).amax([0_i64].as_slice(), false),
        }
    }

    /// `[R, 2]`: both numbers of each row.
    pub fn rows(&self) -> Tensor {
        Tensor::stack(&[&self.lse, &self.highest], 1)
    }
}

impl Shard<'_> {
    /// The normalizer of the shard alone; -inf where it has no items.
    #[must_use]
    pub fn scores(&self) -> Normalizer {
        tch::no_grad(|| {
            let scaled = self.scaled();
            let rows = [self.user.size()[0]];
            let mut lse = Tensor::full(rows, f64::NEG_INFINITY, (self.user.kind(), self.user.device()));
            let mut highest = lse.copy();
            for (start, length) in self.tiles() {
                let scores = self.tile(&scaled, start, length);
                lse = lse.logaddexp(&scores.logsumexp([1_i64].as_slice(), false));
                highest = highest.maximum(&scores.amax([1_i64].as_slice(), false));
            }
            Normalizer { lse, highest }
        })
    }

    /// The shard's part of loss and gradient; `whole` is the normalizer of the catalogue.
    #[must_use]
    pub fn loss(&self, whole: &Normalizer) -> ShardLoss {
        tch::no_grad(|| {
            let options = (self.user.kind(), self.user.device());
            let pairs = self.pair_row.size()[0].max(1) as f64;
            let scaled = self.scaled();
            // [R, 1]: the share of a row's pairs, each of which has the whole softmax as its gradient
            let one = Tensor::full(self.pair_row.size(), 1.0 / pairs, options);
            let weight = Tensor::zeros([self.user.size()[0]], options).index_add(0, self.pair_row, &one).unsqueeze(1);
            let (lse, highest) = (whole.lse.unsqueeze(1), whole.highest.index_select(0, self.pair_row));
            let mut loss = Tensor::zeros([0_i64; 0], options);
            let mut correct = Tensor::zeros([0_i64; 0], (Kind::Int64, self.user.device()));
            let mut d_scaled = scaled.zeros_like();
            let d_item = self.item.zeros_like();
            for (start, length) in self.tiles() {
                let scores = self.tile(&scaled, start, length);
                let column = self.pair_item - (self.first_item + start);
                let inside = column.ge(0).logical_and(&column.lt(length));
                let column = column.clamp(0, length - 1);
                let at = [Some(self.pair_row), Some(&column)];
                let wanted = scores.index(&at);
                let missed = whole.lse.index_select(0, self.pair_row) - &wanted;
                loss += missed.masked_fill(&inside.logical_not(), 0.0).sum(missed.kind()) / pairs;
                correct += wanted.ge_tensor(&highest).logical_and(&inside).sum(Kind::Int64);
                let gradient = (scores - &lse).exp() * &weight;
                let gradient = gradient.index_put(&at, &(-&one * inside.to_kind(one.kind())), true);
                let _ = d_scaled.addmm_(&gradient, &self.item.narrow(0, start, length));
                let _ = d_item.narrow(0, start, length).addmm_(&gradient.tr(), &scaled);
            }
            // cosine part of s = scale * u.v, so the sum of d loss / d s * it is that of d loss / d (scale * u) * (scale * u)
            let d_log_scale = (&d_scaled * &scaled).sum(d_scaled.kind());
            let d_user = d_scaled * self.logit_scale.detach().to_kind(self.user.kind());
            ShardLoss { loss, correct, d_user, d_item, d_log_scale }
        })
    }

    fn scaled(&self) -> Tensor {
        self.user * self.logit_scale.detach().to_kind(self.user.kind())
    }

    /// Starts and lengths; none without a pair, because there is nothing to learn then.
    fn tiles(&self) -> impl Iterator<Item = (i64, i64)> {
        let (items, tile) = (self.item.size()[0], self.tile.max(1));
        let items = if self.pair_row.size()[0] == 0 { 0 } else { items };
        (0..items)
            .step_by(usize::try_from(tile).unwrap_or(usize::MAX))
            .map(move |start| (start, tile.min(items - start)))
    }

    /// `[R, length]`: scores of a tile.
    fn tile(&self, scaled: &Tensor, start: i64, length: i64) -> Tensor {
        scaled.matmul(&self.item.narrow(0, start, length).tr())
    }
}

#[cfg(test)]
mod tests;
