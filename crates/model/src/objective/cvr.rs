//! The auxiliary conversion loss: does the user, as of the last sampled history position, convert on this target?
//!
//! Input: pairs of a user embedding and an item embedding, `[K, d]` each, with labels. Output: logits `[K]` from
//! concat(user, item) through Linear-ReLU-Linear, and the share of the mean binary cross-entropy over the global batch.
//! Both carry a graph: unlike InfoNCE, a pair needs nothing of another rank.

use learn_domain::config::Precision;
use tch::{Reduction, Tensor};

use crate::parameters::{ParameterSpec, Parameters, Role};
use crate::pch::linear;

/// The parameters of the head.
#[must_use]
pub fn specs(output_dim: i64, hidden: i64, std: f64) -> Vec<ParameterSpec> {
    vec![
        ParameterSpec::new("cvr.0.weight", &[hidden, 2 * output_dim], Role::Weight { std }),
        ParameterSpec::new("cvr.0.bias", &[hidden], Role::Bias),
        ParameterSpec::new("cvr.2.weight", &[1, hidden], Role::Weight { std }),
        ParameterSpec::new("cvr.2.bias", &[1], Role::Bias),
    ]
}

/// Whether a parameter belongs to the head.
#[must_use]
pub fn owns(name: &str) -> bool {
    name.starts_with("cvr.")
}

/// The middle layer `[K, W]` of pairs of embeddings `[K, d]`, after its ReLU.
pub fn middle(parameters: &Parameters, user: &Tensor, item: &Tensor) -> Tensor {
    linear(parameters, "cvr.0").forward(&Tensor::cat(&[user, item], 1), Precision::F32).relu()
}

/// Logits `[K]` of pairs of embeddings `[K, d]`.
pub fn logits(parameters: &Parameters, user: &Tensor, item: &Tensor) -> Tensor {
    linear(parameters, "cvr.2").forward(&middle(parameters, user, item), Precision::F32).squeeze_dim(1)
}

/// Sum of the binary cross-entropies of the own pairs divided by the number of pairs of the global batch.
pub fn loss(logits: &Tensor, labels: &Tensor, pairs: i64) -> Tensor {
    let labels = labels.to_kind(logits.kind());
    logits.binary_cross_entropy_with_logits(&labels, None::<Tensor>, None::<Tensor>, Reduction::Sum) / pairs.max(1)
}
