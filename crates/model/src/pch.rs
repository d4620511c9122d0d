//! The towers: sequences of content embeddings in, L2-normalised user and item embeddings out.
//!
//! adaptor (linear) -> encoder (post-LN BERT layers, causal) -> mlp (linear) -> L2 normalisation. Shapes: U unique items,
//! B users, L padded length, R sampled history positions, M sampled targets, D hidden, d output. Invariants: an output
//! does not depend on padding or on the other users of the batch; a tower without positions gives `[0, d]` with a graph.

use learn_domain::config::{ItemTower, ModelConfig, PositionEmbedding, Precision};
use tch::{Kind, Tensor};

use crate::ModelError;
use crate::bert::{self, Attention, LayerForward, LayerWeights, Linear};
use crate::parameters::{ParameterSpec, Parameters, Role};

/// Name of the learned logarithm of the logit scale.
pub const LOGIT_SCALE: &str = "logit_scale";
const POSITION: &str = "position_embedding.weight";
/// Added to the variance in the encoder's layer norms, as published.
pub const LAYER_NORM_EPS: f64 = 1e-12;
/// Shortest length that normalisation divides by.
const SHORTEST: f64 = 1e-12;

/// What decides the shapes of a PCH.
#[derive(Clone, Debug, PartialEq)]
pub struct PchShape {
    /// Dimension of the content embeddings.
    pub input_dim: i64,
    pub model: ModelConfig,
    /// Longest history; the number of learned positions.
    pub max_history: i64,
}

/// Right-padded sequences and the positions in them that are sampled.
#[derive(Debug)]
pub struct Sequences {
    /// `[B, L]` i64: rows of the batch's unique items; padding is any valid one.
    pub items: Tensor,
    /// `[B]` i64.
    pub lengths: Tensor,
    /// `[R]` i64: `user * L + position`, by user, then by position.
    pub positions: Tensor,
}

/// How a pass is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Dropout on.
    pub train: bool,
    pub precision: Precision,
}

/// The towers without their parameters.
#[derive(Clone, Debug)]
pub struct Pch {
    shape: PchShape,
}

impl PchShape {
    /// The parameters in the layout of the published LEARN checkpoints.
    #[must_use]
    pub fn specs(&self) -> Vec<ParameterSpec> {
        let model = &self.model;
        let (hidden, wide, output) = (self.hidden(), 4 * self.hidden(), self.output_dim());
        let std = model.init_std;
        let linear = |name: &str, out: i64, input: i64| {
            [
                ParameterSpec::new(format!("{name}.weight"), &[out, input], Role::Weight { std }),
                ParameterSpec::new(format!("{name}.bias"), &[out], Role::Bias),
            ]
        };
        let norm = |name: &str| {
            [
                ParameterSpec::new(format!("{name}.weight"), &[hidden], Role::NormScale),
                ParameterSpec::new(format!("{name}.bias"), &[hidden], Role::Bias),
            ]
        };
        let mut specs = Vec::new();
        specs.extend(linear("adaptor", hidden, self.input_dim));
        for layer in 0..model.layers {
            let at = |name: &str| format!("{}.{name}", layer_prefix(layer));
            for part in ["query", "key", "value"] {
                specs.extend(linear(&at(&format!("attention.self.{part}")), hidden, hidden));
            }
            specs.extend(linear(&at("attention.output.dense"), hidden, hidden));
            specs.extend(norm(&at("attention.output.LayerNorm")));
            specs.extend(linear(&at("intermediate.dense"), wide, hidden));
            specs.extend(linear(&at("output.dense"), hidden, wide));
            specs.extend(norm(&at("output.LayerNorm")));
        }
        specs.extend(linear("mlp.0", output, hidden));
        if model.position_embedding == PositionEmbedding::Learned {
            specs.push(ParameterSpec::new(POSITION, &[self.max_history, hidden], Role::Position { std }));
        }
        if model.learn_logit_scale {
            specs.push(ParameterSpec::new(LOGIT_SCALE, &[], Role::LogitScale { start: model.logit_scale.ln() }));
        }
        specs
    }

    fn hidden(&self) -> i64 {
        self.model.hidden.into()
    }

    fn output_dim(&self) -> i64 {
        self.model.output_dim.into()
    }
}

impl Pch {
    /// The towers of this shape.
    ///
    /// # Errors
    /// The shape makes no sense: heads do not divide the width, or the content tower has another dimension than its
    /// output.
    pub fn new(shape: PchShape) -> Result<Self, ModelError> {
        let fail = |key, problem: String| Err(ModelError::Shape { key, problem });
        let model = &shape.model;
        if shape.input_dim < 1 {
            return fail("data.dataset", "has no content embeddings; run `learn-launch embed`".into());
        }
        if model.heads == 0 || !model.hidden.is_multiple_of(model.heads) {
            return fail("model.heads", format!("{} does not divide model.hidden {}", model.heads, model.hidden));
        }
        if model.item_tower == ItemTower::Content && shape.output_dim() != shape.input_dim {
            return fail(
                "model.output_dim",
                format!(
                    "the item tower \"content\" takes the content embeddings as they are, so set it to their dimension \
                     {} (it is {})",
                    shape.input_dim, model.output_dim
                ),
            );
        }
        if model.position_embedding == PositionEmbedding::Learned && shape.max_history < 1 {
            return fail("sampling.history", "must be at least 1 for learned positions".into());
        }
        Ok(Self { shape })
    }

    #[must_use]
    pub fn shape(&self) -> &PchShape {
        &self.shape
    }

    /// d, the dimension of user and item embeddings.
    #[must_use]
    pub fn output_dim(&self) -> i64 {
        self.shape.output_dim()
    }

    /// What InfoNCE multiplies cosines by: a scalar without a graph, learned or fixed.
    pub fn logit_scale(&self, parameters: &Parameters) -> Tensor {
        match parameters.find(LOGIT_SCALE) {
            Some(logarithm) => logarithm.detach().exp(),
            None => Tensor::full([0_i64; 0], self.shape.model.logit_scale, (parameters.kind(), parameters.device())),
        }
    }

    /// Lets the adaptor start as if the content embeddings had mean 0 and variance 1, judged by a `sample`
    /// `[S, input_dim]`: `W <- W / std`, `b <- -W mean`, with one standard deviation over all dimensions.
    pub fn standardize_adaptor(&self, parameters: &mut Parameters, sample: &Tensor) {
        let weight = parameters.get("adaptor.weight");
        let sample = sample.to_kind(Kind::Double).to_device(weight.device());
        let mean = sample.mean_dim([0_i64].as_slice(), false, Kind::Double);
        let variance = (sample - &mean).square().mean(Kind::Double);
        tch::no_grad(|| {
            let scaled = weight.to_kind(Kind::Double) / variance.sqrt().clamp_min(1e-12);
            let bias = -scaled.mv(&mean);
            weight.shallow_clone().copy_(&scaled);
            parameters.get("adaptor.bias").shallow_clone().copy_(&bias);
        });
    }

    /// The adaptor: content embeddings `[U, input_dim]` of any floating kind to `[U, D]`.
    pub fn adapt(&self, parameters: &Parameters, rows: &Tensor, forward: &Forward) -> Tensor {
        linear(parameters, "adaptor").forward(rows, forward.precision).to_kind(parameters.kind())
    }

    /// The user tower at the sampled positions: `[R, d]`.
    pub fn user(&self, parameters: &Parameters, adapted: &Tensor, histories: &Sequences, forward: &Forward) -> Tensor {
        let positions = parameters.find(POSITION).map(|table| self.position_vectors(table, histories));
        self.causal(parameters, adapted, (histories, positions), forward)
    }

    /// The item tower at the sampled targets: `[M, d]`. `rows` are the content embeddings, `adapted` what [`Pch::adapt`]
    /// made of them.
    pub fn item(
        &self,
        parameters: &Parameters,
        rows: &Tensor,
        adapted: &Tensor,
        targets: &Sequences,
        forward: &Forward,
    ) -> Tensor {
        let sampled = || targets.items.reshape([-1]).index_select(0, &targets.positions);
        match self.shape.model.item_tower {
            ItemTower::Causal => self.causal(parameters, adapted, (targets, None), forward),
            ItemTower::PerItem => self.alone(parameters, &take(adapted, &sampled()), forward),
            ItemTower::Content => normalise(&take(rows, &sampled()).to_kind(parameters.kind())),
        }
    }

    /// The item tower over a catalogue `[N, input_dim]`, each item as a sequence of one: `[N, d]`.
    pub fn catalogue(&self, parameters: &Parameters, rows: &Tensor, forward: &Forward) -> Tensor {
        match self.shape.model.item_tower {
            ItemTower::Causal | ItemTower::PerItem => {
                self.alone(parameters, &self.adapt(parameters, rows, forward), forward)
            }
            ItemTower::Content => normalise(&rows.to_kind(parameters.kind())),
        }
    }

    /// `[B, L, D]`: the learned vector of each position's distance from the newest item. Items older than the learned
    /// positions reach share the last one.
    fn position_vectors(&self, table: &Tensor, histories: &Sequences) -> Tensor {
        let length = histories.items.size()[1];
        let newest = histories.lengths.unsqueeze(1) - 1;
        let distance = newest - Tensor::arange(length, (Kind::Int64, table.device()));
        take(table, &distance.clamp(0, self.shape.max_history - 1))
    }

    /// Causal encoding of whole sequences, projected at the sampled positions.
    fn causal(
        &self,
        parameters: &Parameters,
        adapted: &Tensor,
        (sequences, positions): (&Sequences, Option<Tensor>),
        forward: &Forward,
    ) -> Tensor {
        if sequences.positions.size()[0] == 0 {
            return self.project(parameters, &adapted.narrow(0, 0, 0));
        }
        let mut x = take(adapted, &sequences.items);
        if let Some(positions) = positions {
            x += positions;
        }
        let hidden = self.encode(parameters, x, &Attention::Causal, forward);
        let sampled = hidden.reshape([-1, self.shape.hidden()]).index_select(0, &sequences.positions);
        self.project(parameters, &sampled)
    }

    /// Items `[M, D]`, each encoded as a sequence of one.
    fn alone(&self, parameters: &Parameters, adapted: &Tensor, forward: &Forward) -> Tensor {
        let hidden = self.encode(parameters, adapted.unsqueeze(1), &Attention::Alone, forward);
        self.project(parameters, &hidden.squeeze_dim(1))
    }

    fn encode(&self, parameters: &Parameters, x: Tensor, attention: &Attention, forward: &Forward) -> Tensor {
        let model = &self.shape.model;
        let settings = LayerForward {
            heads: model.heads.into(),
            eps: LAYER_NORM_EPS,
            dropout: model.dropout,
            train: forward.train,
            precision: forward.precision,
        };
        (0..model.layers).fold(x, |x, layer| {
            let found = LayerWeights::find(&layer_prefix(layer), |name| {
                Ok::<_, std::convert::Infallible>(parameters.get(name))
            });
            let Ok(weights) = found;
            bert::layer(&weights, &x, attention, &settings)
        })
    }

    /// Hidden states `[R, D]` to embeddings `[R, d]`. Never in bf16: it is a small product, and the loss multiplies its
    /// rounding by the logit scale.
    fn project(&self, parameters: &Parameters, hidden: &Tensor) -> Tensor {
        normalise(&linear(parameters, "mlp.0").forward(hidden, Precision::F32))
    }
}

fn layer_prefix(layer: u32) -> String {
    format!("summary_encoder.layer.{layer}")
}

pub(crate) fn linear<'a>(parameters: &'a Parameters, name: &str) -> Linear<'a> {
    Linear { weight: parameters.get(&format!("{name}.weight")), bias: parameters.get(&format!("{name}.bias")) }
}

/// Rows of `table` by index; its gradient adds up in a fixed order.
fn take(table: &Tensor, index: &Tensor) -> Tensor {
    Tensor::embedding(table, index, -1, false, false)
}

/// `x / max(|x|, 1e-12)` along the last dimension.
fn normalise(x: &Tensor) -> Tensor {
    x / x.norm_scalaropt_dim(2.0, [-1_i64].as_slice(), true).clamp_min(SHORTEST)
}

#[cfg(test)]
mod tests;
