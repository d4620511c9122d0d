//! Floating-point operations that a training step's model needs: the numerator of model FLOP utilisation (MFU).
//!
//! Counted are the matrix products, a product `[a, b] x [b, c]` as `2 a b c`; element-wise work (norms, softmax, AdamW) is
//! left out, as is what the hardware does besides: padding, and forward passes that are done again to save memory. With
//! hidden width h, embeddings of dimension d and content embeddings of dimension E:
//!
//! | part | operations of a forward pass |
//! |---|---|
//! | adaptor | `2 E h` a unique item |
//! | a layer's weights (query, key, value, output: `4 h^2`; feed-forward: `8 h^2`) | `24 h^2` a token |
//! | a layer's attention (scores and their weighted sum) | `4 h` a pair of positions that see each other |
//! | projection | `2 h d` an embedding |
//! | scores of the loss | `2 d` a pair of user and item |
//!
//! A backward pass takes twice a forward pass: one product for the inputs' gradient, one for the weights'.

use crate::config::{ItemTower, ModelConfig};

/// Forward and backward, in forward passes.
const TRAINED: f64 = 3.0;

/// What a rank's share of a step holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Items whose content embeddings go through the adaptor.
    pub unique_items: u64,
    /// Items that the encoder reads, those of padding left out.
    pub tokens: u64,
    /// Pairs of a position and one that it attends to, itself included.
    pub attended: u64,
    /// Embeddings that the projection gives.
    pub embeddings: u64,
    /// Scores of users and items.
    pub scores: u64,
}

impl Work {
    /// A causal sequence goes through the encoder.
    pub fn add_sequence(&mut self, length: u64) {
        self.tokens += length;
        self.attended += length * (length + 1) / 2;
    }

    /// Items go through the item tower, `count` of them embedded, of sequences with these lengths.
    pub fn add_items(&mut self, tower: ItemTower, count: u64, lengths: impl Iterator<Item = u64>) {
        match tower {
            ItemTower::Causal => lengths.for_each(|length| self.add_sequence(length)),
            ItemTower::PerItem => {
                self.tokens += count;
                self.attended += count;
            }
            // the content embedding itself
            ItemTower::Content => return,
        }
        self.embeddings += count;
    }

    /// Operations of the forward pass.
    #[must_use]
    pub fn forward(&self, model: &ModelConfig, input_dim: u32) -> f64 {
        let (hidden, output, input) = (f64::from(model.hidden), f64::from(model.output_dim), f64::from(input_dim));
        let adaptor =
            if model.item_input.has_content() { 2.0 * input * hidden * self.unique_items as f64 } else { 0.0 };
        let layer = 24.0 * hidden * hidden * self.tokens as f64 + 4.0 * hidden * self.attended as f64;
        let projection = 2.0 * hidden * output * self.embeddings as f64;
        adaptor + f64::from(model.layers) * layer + projection + 2.0 * output * self.scores as f64
    }

    /// Operations of forward and backward pass.
    #[must_use]
    pub fn trained(&self, model: &ModelConfig, input_dim: u32) -> f64 {
        TRAINED * self.forward(model, input_dim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ItemInput;

    fn published() -> ModelConfig {
        ModelConfig { layers: 12, hidden: 768, output_dim: 64, ..ModelConfig::default() }
    }

    #[test]
    fn a_token_costs_two_operations_a_weight() {
        // BERT-base has 84.9 million weights in the matrices of its 12 layers
        let work = Work { tokens: 1, ..Work::default() };
        assert_eq!(work.forward(&published(), 4096), 2.0 * 84_934_656.0);
        assert_eq!(work.trained(&published(), 4096), 6.0 * 84_934_656.0);
    }

    #[test]
    fn adaptor_projection_scores_and_attention_are_products_of_their_shapes() {
        let model = published();
        let operations = |work: Work| work.forward(&model, 4096);
        assert_eq!(operations(Work { unique_items: 3, ..Work::default() }), 3.0 * 2.0 * 4096.0 * 768.0);
        assert_eq!(operations(Work { embeddings: 5, ..Work::default() }), 5.0 * 2.0 * 768.0 * 64.0);
        assert_eq!(operations(Work { scores: 7, ..Work::default() }), 7.0 * 2.0 * 64.0);
        assert_eq!(operations(Work { attended: 1, ..Work::default() }), 12.0 * 4.0 * 768.0);
        let learned = ModelConfig { item_input: ItemInput::Id, ..model };
        assert_eq!(Work { unique_items: 3, ..Work::default() }.forward(&learned, 0), 0.0);
    }

    #[test]
    fn a_causal_position_sees_itself_and_those_before() {
        let mut work = Work::default();
        work.add_sequence(4);
        assert_eq!((work.tokens, work.attended), (4, 1 + 2 + 3 + 4));
    }

    #[test]
    fn towers_read_what_they_embed() {
        let items = |tower| {
            let mut work = Work::default();
            work.add_items(tower, 2, [3, 1].into_iter());
            (work.tokens, work.attended, work.embeddings)
        };
        assert_eq!(items(ItemTower::Causal), (4, 7, 2));
        assert_eq!(items(ItemTower::PerItem), (2, 2, 2));
        assert_eq!(items(ItemTower::Content), (0, 0, 0));
    }
}
