//! The towers' weights in the kind of their matrix products.
//!
//! Input: parameters. Output: per layer the matrices of its four products, queries, keys and values side by side, and
//! those before and after the layers. They are made again when a parameter has changed; [`crate::AdamW`] keeps those in
//! bf16 up to date in its own pass.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::StageOrder;
use crate::parameters::Parameters;
use crate::pch::LAYER_PREFIX;

/// Names of a dense layer's parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DenseNames {
    pub weight: &'static str,
    pub bias: &'static str,
    pub order: StageOrder,
}

impl DenseNames {
    pub const ADAPTOR: Self = Self { weight: "adaptor.weight", bias: "adaptor.bias", order: StageOrder::Adaptor };
    /// From hidden states to embeddings.
    pub const PROJECTION: Self = Self { weight: "mlp.0.weight", bias: "mlp.0.bias", order: StageOrder::Projection };
}

/// Names of a layer's parameters.
#[derive(Debug)]
pub(crate) struct LayerNames(String);

/// The weights of a layer: `[out, in]` each.
#[derive(Debug)]
pub(crate) struct LayerProducts {
    /// `[3 D, D]`: query, key, value.
    pub attention: Tensor,
    /// `[3 D]`.
    pub attention_bias: Tensor,
    /// `[D, D]`.
    pub attention_output: Tensor,
    /// `[4 D, D]`.
    pub intermediate: Tensor,
    /// `[D, 4 D]`.
    pub output: Tensor,
}

/// Those of all layers, and of what is before and after them.
#[derive(Debug)]
pub(crate) struct Working {
    pub kind: Kind,
    /// [`Parameters::version`] that they were made of.
    pub version: i64,
    pub layers: Vec<LayerProducts>,
    /// Views into all of them by the names of the parameters that they were made of.
    parts: BTreeMap<String, Tensor>,
}

/// Of queries, keys and values, in the order in which they stand side by side.
pub(crate) const ATTENTION: [&str; 3] = ["attention.self.query", "attention.self.key", "attention.self.value"];

impl LayerNames {
    pub fn new(layer: usize) -> Self {
        Self(format!("{LAYER_PREFIX}{layer}"))
    }

    /// The full name of `part`.
    pub fn of(&self, part: &str) -> String {
        format!("{}.{part}", self.0)
    }
}

impl LayerProducts {
    fn new(parameters: &Parameters, layer: usize, kind: Kind) -> Self {
        let names = LayerNames::new(layer);
        let get = |part: &str| parameters.get(&names.of(part)).detach().to_kind(kind);
        let beside = |what: &str| {
            let parts = ATTENTION.map(|part| get(&format!("{part}.{what}")));
            Tensor::cat(&parts, 0)
        };
        Self {
            attention: beside("weight"),
            attention_bias: beside("bias"),
            attention_output: get("attention.output.dense.weight"),
            intermediate: get("intermediate.dense.weight"),
            output: get("output.dense.weight"),
        }
    }
}

impl LayerProducts {
    fn parts(&self, names: &LayerNames) -> Vec<(String, Tensor)> {
        let width = self.attention_output.size()[0];
        let side_by_side = ATTENTION.iter().enumerate().flat_map(|(number, part)| {
            let view = |all: &Tensor| all.narrow(0, number as i64 * width, width);
            [
                (names.of(&format!("{part}.weight")), view(&self.attention)),
                (names.of(&format!("{part}.bias")), view(&self.attention_bias)),
            ]
        });
        let alone = [
            ("attention.output.dense.weight", &self.attention_output),
            ("intermediate.dense.weight", &self.intermediate),
            ("output.dense.weight", &self.output),
        ];
        side_by_side.chain(alone.map(|(part, weight)| (names.of(part), weight.shallow_clone()))).collect()
    }
}

impl Working {
    pub fn new(parameters: &Parameters, layers: usize, kind: Kind) -> Self {
        let layers: Vec<_> = (0..layers).map(|layer| LayerProducts::new(parameters, layer, kind)).collect();
        let parts = layers.iter().enumerate().flat_map(|(layer, products)| products.parts(&LayerNames::new(layer)));
        let dense =
            [DenseNames::ADAPTOR, DenseNames::PROJECTION].into_iter().filter_map(|DenseNames { weight, .. }| {
                parameters.find(weight).map(|values| (weight.to_owned(), values.detach().to_kind(kind)))
            });
        let parts = parts.chain(dense);
        Self { kind, version: parameters.version(), parts: parts.collect(), layers }
    }

    /// `[out, in]`.
    pub fn dense(&self, names: DenseNames) -> &Tensor {
        &self.parts[names.weight]
    }

    /// What was made of the parameter of this name, if anything was.
    pub fn shadow(&mut self, name: &str) -> Option<Tensor> {
        self.parts.get(name).map(Tensor::shallow_clone)
    }
}
