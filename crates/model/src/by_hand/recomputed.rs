//! A layer that libtorch differentiates, computed again when its gradient is due (activation checkpointing: Chen et al.,
//! "Training deep nets with sublinear memory cost", arXiv 1604.06174).
//!
//! Input: the layer's input `[T, D]`, then the gradient of its output. Output: its output without a graph, then the gradient
//! of the input; those of the parameters go to the parameters. Invariant: dropout draws the same masks both times, because
//! each layer of a pass has a seed of its own.

use learn_domain::packing::Run;
use tch::Tensor;

use super::pull;
use crate::bert::{self, Attention, LayerForward, LayerWeights};
use crate::parameters::Parameters;

/// A layer of an encoding.
#[derive(Debug)]
pub(crate) struct GraphLayer<'a> {
    pub prefix: &'a str,
    pub attention: Attention<'a>,
    pub settings: LayerForward,
}

/// What is kept of one whose activations are not.
#[derive(Debug)]
pub(super) struct Recomputed {
    prefix: String,
    /// None if each row is alone.
    runs: Option<Vec<Run>>,
    settings: LayerForward,
    seed: u64,
}

impl GraphLayer<'_> {
    /// `[T, D]` to `[T, D]`.
    pub fn run(&self, parameters: &Parameters, x: &Tensor) -> Tensor {
        let found = LayerWeights::find(self.prefix, |name| Ok::<_, std::convert::Infallible>(parameters.get(name)));
        let Ok(weights) = found;
        bert::layer(&weights, x, &self.attention, &self.settings)
    }

    /// The same with dropout of this seed.
    pub(super) fn seeded(&self, parameters: &Parameters, x: &Tensor, seed: u64) -> Tensor {
        if self.settings.train {
            learn_torch::seed(seed);
        }
        self.run(parameters, x)
    }
}

impl Recomputed {
    pub fn new(layer: &GraphLayer<'_>, seed: u64) -> Self {
        let runs = match layer.attention {
            Attention::Causal(runs) => Some(runs.to_vec()),
            Attention::Alone => None,
            Attention::Masked(_) => unreachable!("masked attention is for encoders that do not learn"),
        };
        Self { prefix: layer.prefix.to_owned(), runs, settings: layer.settings, seed }
    }

    /// From the gradient of the output to that of the input.
    pub fn backward(&self, parameters: &Parameters, input: &Tensor, gradient: &Tensor) -> Tensor {
        let attention = self.runs.as_ref().map_or(Attention::Alone, |runs| Attention::Causal(runs));
        let layer = GraphLayer { prefix: &self.prefix, attention, settings: self.settings };
        tch::with_grad(|| {
            let x = input.detach().set_requires_grad(true);
            let y = layer.seeded(parameters, &x, self.seed);
            pull(&[(&y, gradient)]);
            let gradient = x.grad();
            // nothing comes back to no rows
            if gradient.defined() { gradient } else { x.zeros_like() }
        })
    }
}
