//! InfoNCE with its gradient, by hand, in tiles of rows and items.
//!
//! Input: this rank's user rows `[R, d]` and the sampled targets `[M, d]` of *all* ranks. Output: this rank's share of
//! the loss of the global batch, and the gradient of that share for its rows and for all items. For user i, row j, own
//! target k, with s = logit scale * cosine:
//!
//! loss_ijk = log(e^{s_k} + sum over negatives e^{s_m}) - s_k = softplus(lse - s_k), 0 if no negative is left.
//!
//! With [`Pairs::Next`] a row meets one target: the nth row of a user belongs to the nth target of the user.
//!
//! Negatives of i are the items of other users whose id is not among i's own targets. i's own items are in the gathered
//! list too (that is how its targets are known) and carry own ids, so "id is not an own id" is the whole rule.
//!
//! With a correction, s = logit scale * cosine - correction of the item (logQ correction: the logarithm of the chance to
//! meet the item as a negative).
//!
//! Invariants: memory is that of rows, items and a tile, whatever `[R, M]` is; the sum of the shares (and of their item gradients) over the
//! ranks is the loss (the gradient) of the whole batch on one device. Every rank sees a learned logit scale in full, so
//! its gradient here is the share of the own rows, to be summed over ranks like the rest.

use learn_domain::config::Precision;
use learn_domain::sampling::Pairs;
use tch::{Device, Kind, Tensor};

use super::groups::Groups;
use super::pairs::valid;
use crate::products::{self, Added};

/// An id that no item has.
const NO_ITEM: i64 = i64::MIN;

/// How many scores are in memory at once.
///
/// One tile takes all rows and items if they fit. Else it is as long in one direction as there is need, down to a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// At least 1; a user's rows are never parted.
    pub scores: i64,
}

impl Default for Tile {
    fn default() -> Self {
        Self { scores: 1 << 21 }
    }
}

/// On a GPU so many scores are one tile, with what is made of them about 0.5 GiB: more tiles cost launches, and a product
/// is made a second time for the gradient.
const WHOLE_ON_GPU: i64 = 1 << 26;

impl Tile {
    /// For this matrix of scores on this device: larger tiles on a GPU, but where even they are many, small ones, so that a
    /// large batch does not need more memory than a small one.
    #[must_use]
    pub fn on(device: Device, (rows, items): (i64, i64)) -> Self {
        match device {
            Device::Cpu => Self::default(),
            _ if rows.saturating_mul(items) <= WHOLE_ON_GPU => Self { scores: WHOLE_ON_GPU },
            _ => Self { scores: 1 << 22 },
        }
    }

    /// Items of a tile.
    fn items(self, rows: i64, items: i64) -> i64 {
        let scores = self.scores.max(1);
        (scores / rows.max(1)).max(scores.isqrt()).min(items)
    }

    /// Rows of a tile.
    fn rows(self, rows: i64, items: i64) -> i64 {
        (self.scores.max(1) / self.items(rows, items).max(1)).clamp(1, rows.max(1))
    }
}

/// One rank's part of the loss of a global batch.
#[derive(Debug)]
pub struct InfoNce<'a> {
    /// `[R, d]`, L2-normalised; rows of the same user need not be neighbours.
    pub user: &'a Tensor,
    /// `[R]` i64: the user's place in the global batch.
    pub row_user: &'a Tensor,
    /// `[M, d]`, L2-normalised, of all ranks.
    pub item: &'a Tensor,
    /// `[M]` i64: item ids, not negative.
    pub item_id: &'a Tensor,
    /// `[M]` i64: place in the global batch of the user whose target it is.
    pub item_user: &'a Tensor,
    /// `[M]`: subtracted from every score of the item.
    pub correction: Option<&'a Tensor>,
    /// Which (j, k) of a user are trained on.
    pub pairing: Pairs,
    /// Scalar tensor; see [`crate::Pch::logit_scale`].
    pub logit_scale: Tensor,
    /// Valid (i, j, k) of the whole global batch.
    pub pairs: i64,
    pub tile: Tile,
    /// Whether anybody learns from the items' gradient; else it stays 0.
    pub items_learn: bool,
    /// Of the products with negatives. In bf16 a score is rounded to one part in 512, which the sum over many negatives
    /// evens out; scores of a row's own targets are never rounded.
    pub precision: Precision,
}

/// What [`InfoNce::compute`] gives.
#[derive(Debug)]
pub struct InfoNceOutput {
    /// Scalar: the sum over own (i, j, k) divided by `pairs`.
    pub loss: Tensor,
    /// Scalar i64: own (i, j, k) whose target scores above every negative.
    pub correct: Tensor,
    /// `[R, d]`.
    pub d_user: Tensor,
    /// `[M, d]`, for the items of all ranks; of items that do not learn, zeros that cannot be written to.
    pub d_item: Tensor,
    /// Scalar: derivative with respect to the logarithm of the logit scale.
    pub d_log_scale: Tensor,
}

impl InfoNce<'_> {
    /// Loss and gradient; no graph is needed or made.
    #[must_use]
    pub fn compute(&self) -> InfoNceOutput {
        tch::no_grad(|| {
            let mut output = InfoNceOutput {
                loss: Tensor::zeros([0_i64; 0], (self.user.kind(), self.user.device())),
                correct: Tensor::zeros([0_i64; 0], (Kind::Int64, self.user.device())),
                d_user: self.user.zeros_like(),
                // nobody writes to what nobody learns from, so one value stands for all
                d_item: if self.items_learn { self.item.zeros_like() } else { nothing(self.item) },
                d_log_scale: Tensor::zeros([0_i64; 0], (self.user.kind(), self.user.device())),
            };
            if self.user.size()[0] > 0 && self.item.size()[0] > 0 && self.pairs > 0 {
                let item = self.item.to_kind(self.products());
                for users in self.blocks() {
                    Block::new(self, &item, &users).run(&mut output);
                }
            }
            output
        })
    }
}

impl InfoNce<'_> {
    fn products(&self) -> Kind {
        learn_torch::product_kind(self.precision).unwrap_or_else(|| self.user.kind())
    }

    /// The own users `[G]`, ascending, in parts that have about so many rows as fit into a tile.
    fn blocks(&self) -> Vec<Tensor> {
        let (users, ..) = self.row_user.internal_unique2(true, false, false);
        let (count, rows) = (users.size()[0], self.row_user.size()[0]);
        let most = self.tile.rows(rows, self.item.size()[0]);
        users.split((most * count / rows).max(1), 0)
    }
}

/// Zeros of the shape of `x` that take no memory; not to be written to.
pub fn nothing(x: &Tensor) -> Tensor {
    Tensor::zeros(vec![1; x.dim()].as_slice(), (x.kind(), x.device())).expand_as(x)
}

/// Rows and targets of some own users as tables. G users, J = most rows of one, K = most targets of one; n rows that are
/// there.
struct Block<'a> {
    input: &'a InfoNce<'a>,
    rows: Groups,
    targets: Groups,
    /// `[G, J, d]`: user rows times the logit scale.
    scaled: Tensor,
    /// `[n, d]`: those of them that are there.
    dense: Tensor,
    /// `[n, d]` the same, and all items `[M, d]`, both of the products' kind.
    factor: Tensor,
    item: &'a Tensor,
    /// `[n]`: the user of each of these.
    group: Tensor,
    /// `[G, K, d]`.
    own_item: Tensor,
    /// `[G, K, 1]`.
    own_id: Tensor,
    /// `[G, J, K]` bool: see [`super::pairs`].
    valid: Tensor,
}

impl<'a> Block<'a> {
    fn new(input: &'a InfoNce<'a>, item: &'a Tensor, users: &Tensor) -> Self {
        let rows = Groups::new(input.row_user, users);
        let targets = Groups::new(input.item_user, users);
        let scaled = rows.table(input.user) * input.logit_scale.detach().to_kind(input.user.kind());
        let dense = rows.dense(&scaled);
        Self {
            factor: dense.to_kind(item.kind()),
            dense,
            item,
            group: rows.group(),
            scaled,
            own_item: targets.table(input.item),
            own_id: targets.table(input.item_id).masked_fill(&targets.present.logical_not(), NO_ITEM).unsqueeze(2),
            valid: valid(&rows, &targets, input.pairing),
            input,
            rows,
            targets,
        }
    }

    fn run(&self, output: &mut InfoNceOutput) {
        let (dense_lse, dense_hardest, scores) = self.forward();
        let spread = |dense: &Tensor| self.rows.spread(dense, f64::NEG_INFINITY);
        let (lse, hardest) = (spread(&dense_lse), spread(&dense_hardest));
        // [G, J, K]
        let mut own = self.scaled.bmm(&self.own_item.transpose(1, 2));
        if let Some(correction) = self.input.correction {
            own -= self.targets.table(correction).unsqueeze(1);
        }
        let margin = lse.unsqueeze(2) - &own;
        let absent = self.valid.logical_not();
        // softplus without the cut-off of libtorch's, which is wrong in the ninth digit
        let loss = margin.logaddexp(&margin.zeros_like()).masked_fill(&absent, 0.0);
        output.loss += loss.sum(loss.kind()) / self.input.pairs;
        output.correct += own.gt_tensor(&hardest.unsqueeze(2)).logical_and(&self.valid).sum(Kind::Int64);

        let miss = margin.sigmoid().masked_fill(&absent, 0.0) / self.input.pairs;
        // [G, J]: how much the negatives of a row weigh; their softmax is exp(s - lse)
        let weight = miss.sum_dim_intlist([2_i64].as_slice(), false, miss.kind());
        let d_own = -miss;
        let mut d_dense = self.rows.dense(&d_own.bmm(&self.own_item));
        if self.input.items_learn {
            self.targets.add_to_rows(&mut output.d_item, &d_own.transpose(1, 2).bmm(&self.scaled));
        }
        let weight = self.rows.dense(&weight.unsqueeze(2));
        self.backward((&dense_lse, &weight), scores, (&mut d_dense, &mut output.d_item));

        // cosine part of s = scale * u.v, so the sum of d loss / d s * it is that of d loss / d (scale * u) * (scale * u)
        output.d_log_scale += d_dense.view(-1).dot(&self.dense.view(-1));
        d_dense *= self.input.logit_scale.detach().to_kind(d_dense.kind());
        self.rows.put_rows(&mut output.d_user, &d_dense);
    }

    /// Per row, over its negatives: log-sum-exp and maximum of the scores, both `[n]`; -inf where there is none. Scores
    /// that are one tile come along.
    fn forward(&self) -> (Tensor, Tensor, Option<Tensor>) {
        let rows = [self.dense.size()[0]];
        let mut lse = Tensor::full(rows, f64::NEG_INFINITY, (self.dense.kind(), self.dense.device()));
        let mut hardest = lse.copy();
        let mut kept = None;
        for (start, length) in self.tiles() {
            let scores = self.negatives(start, length);
            lse = lse.logaddexp(&scores.logsumexp([1_i64].as_slice(), false));
            hardest = hardest.maximum(&scores.amax([1_i64].as_slice(), false));
            kept = (length == self.input.item.size()[0]).then_some(scores);
        }
        (lse, hardest, kept)
    }

    /// Adds what the negatives contribute to the gradients of the rows `[n, d]` and of the items `[M, d]`.
    fn backward(
        &self,
        (lse, weight): (&Tensor, &Tensor),
        mut kept: Option<Tensor>,
        (d_dense, d_item): (&mut Tensor, &mut Tensor),
    ) {
        // without a negative every score is -inf, and exp(-inf - inf) is the wanted 0
        let none = lse.eq(f64::NEG_INFINITY);
        let lse = lse.masked_fill(&none, f64::INFINITY).unsqueeze(1);
        for (start, length) in self.tiles() {
            let scores = kept.take().unwrap_or_else(|| self.negatives(start, length));
            let mut gradient = scores;
            gradient -= &lse;
            let _ = gradient.exp_();
            gradient *= weight;
            let gradient = gradient.to_kind(self.factor.kind());
            products::add_product(d_dense, true, &gradient, &self.item.narrow(0, start, length));
            if self.input.items_learn {
                products::add_product(&mut d_item.narrow(0, start, length), true, &gradient.tr(), &self.factor);
            }
        }
    }

    fn tiles(&self) -> impl Iterator<Item = (i64, i64)> {
        let items = self.input.item.size()[0];
        let tile = self.input.tile.items(self.input.row_user.size()[0], items);
        (0..items)
            .step_by(usize::try_from(tile).unwrap_or(usize::MAX))
            .map(move |start| (start, tile.min(items - start)))
    }

    /// `[n, length]`: scores of a tile, -inf where an item is no negative of the user.
    fn negatives(&self, start: i64, length: i64) -> Tensor {
        let ids = self.input.item_id.narrow(0, start, length).view([1, 1, length]);
        let excluded = self.own_id.eq_tensor(&ids).any_dim(1, false).index_select(0, &self.group);
        let item = self.item.narrow(0, start, length);
        let mut scores = products::product(&self.factor, &item.tr(), Added::Nothing, self.dense.kind());
        if let Some(correction) = self.input.correction {
            scores -= correction.narrow(0, start, length);
        }
        scores.masked_fill_(&excluded, f64::NEG_INFINITY)
    }
}

#[cfg(test)]
mod tests;
