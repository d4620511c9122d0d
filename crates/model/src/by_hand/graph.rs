//! A layer that libtorch differentiates, as a stage of its own: its graph ends where the next layer's begins.
//!
//! Input: the layer's input `[T, D]`, then the gradient of its output, `[T, D]` or `[R, D]` at the sampled positions. Output:
//! its output without a graph, then the gradient of the input; those of the parameters go to the parameters. With activation checkpointing the graph is made when the
//! gradient is due, and not before (Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174).
//! Invariant: dropout draws the same masks both times, because each layer of a pass has a seed of its own.

use std::rc::Rc;

use learn_domain::packing::Run;
use tch::Tensor;

use super::{is_recorded, pull};
use crate::bert::{self, Attention, LayerForward, LayerWeights, Packed};
use crate::parameters::Parameters;

/// A layer of an encoding.
#[derive(Debug)]
pub(crate) struct GraphLayer<'a> {
    pub prefix: &'a str,
    pub attention: Attention<'a>,
    /// `[R]` i64: the only rows that are wanted of its output; of the last layer.
    pub positions: Option<&'a Tensor>,
    pub settings: LayerForward,
}

/// What is kept of a layer for its backward.
#[derive(Debug)]
pub(super) enum Recorded {
    /// Its graph, from a leaf `[T, D]` to its output.
    Graph { input: Tensor, output: Tensor },
    /// What is to be known to make the graph again.
    Input(Recipe),
}

/// A layer without its weights and its input.
#[derive(Debug)]
pub(super) struct Recipe {
    prefix: String,
    rows: Rows,
    positions: Option<Tensor>,
    settings: LayerForward,
    seed: u64,
}

/// Which rows see which.
#[derive(Debug)]
enum Rows {
    Alone,
    Causal(Vec<Run>),
    Packed(Rc<Packed>),
}

impl GraphLayer<'_> {
    /// `[T, D]` to `[T, D]`, or to `[R, D]` at its positions.
    pub fn run(&self, parameters: &Parameters, x: &Tensor) -> Tensor {
        let found = LayerWeights::find(self.prefix, |name| Ok::<_, std::convert::Infallible>(parameters.get(name)));
        let Ok(weights) = found;
        bert::layer_at(self.positions, &weights, x, &self.attention, &self.settings)
    }

    /// Whether there is anything to learn on the way back through it.
    pub(super) fn is_recorded(&self, parameters: &Parameters) -> bool {
        is_recorded(parameters.get(&format!("{}.output.dense.weight", self.prefix)))
    }

    /// The same with dropout of this seed.
    pub(super) fn seeded(&self, parameters: &Parameters, x: &Tensor, seed: u64) -> Tensor {
        if self.settings.train {
            learn_torch::seed(seed);
        }
        self.run(parameters, x)
    }
}

impl Recorded {
    /// The output of the layer for `x`, and its graph.
    pub fn graph(layer: &GraphLayer<'_>, parameters: &Parameters, x: &Tensor, seed: u64) -> (Tensor, Self) {
        let input = x.detach().set_requires_grad(true);
        let output = layer.seeded(parameters, &input, seed);
        (output.detach(), Self::Graph { input, output })
    }

    /// The output of the layer for `x`, which is all that is kept of it.
    pub fn input(layer: &GraphLayer<'_>, parameters: &Parameters, x: &Tensor, seed: u64) -> (Tensor, Self) {
        let rows = match layer.attention {
            Attention::Alone => Rows::Alone,
            Attention::Causal(runs) => Rows::Causal(runs.to_vec()),
            Attention::Packed(packed) => Rows::Packed(Rc::clone(packed)),
            Attention::Masked(_) => unreachable!("masked attention is for encoders that do not learn"),
        };
        let positions = layer.positions.map(Tensor::shallow_clone);
        let recipe = Recipe { prefix: layer.prefix.to_owned(), rows, positions, settings: layer.settings, seed };
        (tch::no_grad(|| layer.seeded(parameters, x, seed)), Self::Input(recipe))
    }

    /// From the gradient of the output to that of the input `x`.
    pub fn backward(self, parameters: &Parameters, x: &Tensor, gradient: &Tensor) -> Tensor {
        let (input, output) = match self {
            Self::Graph { input, output } => (input, output),
            Self::Input(recipe) => tch::with_grad(|| recipe.graph(parameters, x)),
        };
        tch::with_grad(|| pull(&[(&output, gradient)]));
        let gradient = input.grad();
        // nothing comes back to no rows
        if gradient.defined() { gradient } else { input.zeros_like() }
    }
}

impl Recipe {
    /// A leaf with the values of `x`, and the output for it.
    fn graph(self, parameters: &Parameters, x: &Tensor) -> (Tensor, Tensor) {
        let attention = match &self.rows {
            Rows::Alone => Attention::Alone,
            Rows::Causal(runs) => Attention::Causal(runs),
            Rows::Packed(packed) => Attention::Packed(packed),
        };
        let positions = self.positions.as_ref();
        let layer = GraphLayer { prefix: &self.prefix, attention, positions, settings: self.settings };
        let input = x.detach().set_requires_grad(true);
        let output = layer.seeded(parameters, &input, self.seed);
        (input, output)
    }
}
