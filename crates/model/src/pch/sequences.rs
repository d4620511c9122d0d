//! Sequences as the towers read them: packed, without padding.
//!
//! Input: index tensors in the layout of `learn_domain::packing`. Output: dense blocks `[count, length, ..]` of what belongs
//! to the tokens, and back.

use learn_domain::packing::{Run, ages};
use tch::Tensor;

use crate::bert::blocks;

/// Sequences one behind the other, T tokens in all, and the positions in them that are sampled.
#[derive(Debug)]
pub struct Sequences {
    /// `[T]` i64: rows of the batch's unique items.
    pub items: Tensor,
    pub runs: Vec<Run>,
    /// `[R]` i64: places of tokens, in the order in which embeddings are wanted.
    pub positions: Tensor,
    /// `[T]` i64: [`learn_domain::time_gap::buckets`]. None for items alone, and for a model that does not read times.
    pub gaps: Option<Tensor>,
}

impl Sequences {
    /// Nothing is sampled, so nothing need be computed.
    pub(super) fn is_unread(&self) -> bool {
        self.positions.size()[0] == 0
    }

    /// Each sequence has one item at most.
    pub(super) fn is_alone(&self) -> bool {
        self.runs.iter().all(|run| run.length == 1)
    }

    /// `[T]` i64: how many items of its sequence follow each token.
    pub(super) fn ages(&self) -> Tensor {
        let ages: Vec<i64> = ages(&self.runs).map(|age| age as i64).collect();
        Tensor::from_slice(&ages).to_device(self.items.device())
    }

    /// What `of` makes of each block `[count, length]` of the items, `[count, length, F]`, at the sampled positions `[R, F]`.
    pub(super) fn by_block(&self, of: impl Fn(&Tensor, i64) -> Tensor) -> Tensor {
        let blocks = blocks(&self.items, &self.runs);
        let made: Vec<Tensor> = blocks.map(|(items, run)| of(&items, run.length as i64).flatten(0, 1)).collect();
        Tensor::cat(&made, 0).index_select(0, &self.positions)
    }
}
