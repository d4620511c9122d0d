//! The towers: sequences of content embeddings in, L2-normalised user and item embeddings out.
//!
//! adaptor (linear) or learned item vectors, or their sum -> encoder (post-LN BERT layers, causal) -> mlp (linear) -> L2 normalisation. Shapes: U unique items,
//! B users, T tokens of all sequences, R sampled history positions, M sampled targets, D hidden, d output. Invariants: an output
//! does not depend on padding or on the other users of the batch; a tower without positions gives `[0, d]` with a graph.
//!
//! With `model.time_embedding = "gap"` the vector of each item's time gap (`learn_domain::time_gap`) is added where positions
//! are, in both causal towers. The first item of a sequence has no gap and gets nothing, so an item alone is what it was.
//!
//! With `model.residual = "content"` the mlp's output is a correction of the content embedding c `[input_dim]`: an item is
//! normalise(R c + mlp(..)), a user at position p is normalise(R m + mlp(..)) with m = sum_j w^(p - j) c_j / sum_j w^(p - j)
//! over the history up to p and w = `model.residual_decay`.

mod history_code;
mod sequences;
mod start;

use std::rc::Rc;

use learn_domain::config::{ItemInput, ItemTower, ModelConfig, PositionEmbedding, Precision, Residual, TimeEmbedding};
use learn_domain::random::Draws;
use learn_domain::time_gap;
use tch::Tensor;

pub use self::sequences::Sequences;
use crate::ModelError;
use crate::bert::{Attention, LayerForward, Linear, Packed};
use crate::by_hand::{self, DenseNames, GraphLayer, Tape};
use crate::objective::cvr;
use crate::parameters::{ParameterSpec, Parameters, Role};

/// Name of the learned logarithm of the logit scale.
pub const LOGIT_SCALE: &str = "logit_scale";
/// Names of a layer's parameters begin with it and the layer's number.
pub(crate) const LAYER_PREFIX: &str = "summary_encoder.layer.";
const POSITION: &str = "position_embedding.weight";
/// Row b - 1 is the vector of bucket b.
const TIME_GAP: &str = "time_embedding.weight";
const ADAPTOR_WEIGHT: &str = DenseNames::ADAPTOR.weight;
const ADAPTOR_BIAS: &str = DenseNames::ADAPTOR.bias;
/// The catalogue's mean content embedding, measured at the start.
const CONTENT_MEAN: &str = "content_mean";
/// The table of learned item vectors.
pub const ID_EMBEDDING: &str = "id_embedding.weight";
/// R, the projection of the residual path.
const RESIDUAL: &str = "residual.weight";
/// Added to the variance in the encoder's layer norms, as published.
pub const LAYER_NORM_EPS: f64 = 1e-12;
/// Shortest length that normalisation divides by.
const SHORTEST: f64 = 1e-12;

/// What decides the shapes of a PCH.
#[derive(Clone, Debug, PartialEq)]
pub struct PchShape {
    /// Dimension of the content embeddings; 0 if the model does not read them.
    pub input_dim: i64,
    /// N, the items of the catalogue.
    pub items: i64,
    pub model: ModelConfig,
    /// Longest history; the number of learned positions.
    pub max_history: i64,
    /// Width of the CVR head's hidden layer, if the model has one; see [`crate::objective::cvr`].
    pub cvr_hidden: Option<i64>,
}

/// How a pass is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Dropout on.
    pub train: bool,
    pub precision: Precision,
}

/// The unique items of a pass, and how it is differentiated.
#[derive(Clone, Copy, Debug)]
pub struct ItemInputs<'a> {
    /// U item indices, each once.
    pub items: &'a [u32],
    /// `[U, input_dim]`: their content embeddings, of any floating kind.
    pub content: &'a Tensor,
    /// In training: the seed of the step, the same on every rank, which decides whose learned vectors are left out.
    pub id_seed: Option<u64>,
    /// Towers go by hand where they can, and what comes out goes back by [`Tape::backward`]. Without one libtorch
    /// differentiates everything, and its generator draws the dropout.
    pub tape: Option<&'a Tape>,
}

/// The unique items of a pass as the towers read them.
#[derive(Debug)]
pub struct Items {
    adapted: Adapted,
    tape: Option<Tape>,
    /// `[U, d]`: R c, with a residual path.
    projected: Option<Tensor>,
    /// `[U, K]`, with a history code.
    codes: Option<Tensor>,
}

/// What the encoder reads of the unique items.
#[derive(Debug)]
enum Adapted {
    /// `[U, D]`: of each.
    All(Tensor),
    /// Of those in histories, because the item tower is `content`: made of content embeddings `[U, input_dim]` when they are
    /// known.
    Histories { content: Tensor, vectors: Option<Tensor> },
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
        if model.item_input.has_content() {
            specs.extend(linear("adaptor", hidden, self.input_dim));
        }
        if model.item_input.has_ids() {
            // beside content a vector of 0 means that nothing is known of the item but its content
            let std = if model.item_input.has_content() { 0.0 } else { std };
            specs.push(ParameterSpec::new(ID_EMBEDDING, &[self.items, hidden], Role::ItemVector { std }));
        }
        if model.centring {
            specs.push(ParameterSpec::new(CONTENT_MEAN, &[self.input_dim], Role::Measured));
        }
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
        match model.residual {
            Residual::None => specs.extend(linear("mlp.0", output, hidden)),
            Residual::Content => {
                let role = if model.residual_trained { Role::Residual } else { Role::Measured };
                specs.push(ParameterSpec::new(RESIDUAL, &[output, self.input_dim], role));
                // no correction before the first step
                specs.push(ParameterSpec::new("mlp.0.weight", &[output, hidden], Role::Weight { std: 0.0 }));
                specs.push(ParameterSpec::new("mlp.0.bias", &[output], Role::Bias));
            }
        }
        specs.extend(self.cvr_hidden.into_iter().flat_map(|width| cvr::specs(output, width, std)));
        if model.position_embedding == PositionEmbedding::Learned {
            specs.push(ParameterSpec::new(POSITION, &[self.max_history, hidden], Role::Position { std }));
        }
        if model.time_embedding == TimeEmbedding::Gap {
            specs.push(ParameterSpec::new(TIME_GAP, &[time_gap::BUCKETS.into(), hidden], Role::Position { std }));
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
        if shape.input_dim < 1 && model.item_input.has_content() {
            return fail("data.dataset", "has no content embeddings; run `learn-launch embed CONFIG`".into());
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

    /// The dimension of user and item embeddings: d of the towers and K of the history code.
    #[must_use]
    pub fn output_dim(&self) -> i64 {
        self.shape.output_dim() + i64::from(self.shape.model.history_code)
    }

    /// Whether item embeddings depend on anything that is trained.
    #[must_use]
    pub fn items_learn(&self) -> bool {
        self.shape.model.item_tower != ItemTower::Content
    }

    /// What InfoNCE multiplies cosines by: a scalar without a graph, learned or fixed.
    pub fn logit_scale(&self, parameters: &Parameters) -> Tensor {
        match parameters.find(LOGIT_SCALE) {
            Some(logarithm) => logarithm.detach().exp(),
            None => Tensor::full([0_i64; 0], self.shape.model.logit_scale, (parameters.kind(), parameters.device())),
        }
    }

    /// The unique items of a pass as the towers read them.
    pub fn items(&self, parameters: &Parameters, inputs: &ItemInputs<'_>, forward: &Forward) -> Items {
        let model = &self.shape.model;
        let content = self.content(parameters, inputs.content);
        let vectors = || {
            let vectors = parameters.take_item_vectors(inputs.items);
            let vectors = vectors.unwrap_or_else(|| panic!("the model has no parameter {ID_EMBEDDING}"));
            match inputs.id_seed.filter(|_| forward.train && model.id_dropout > 0.0 && model.item_input.has_content()) {
                Some(seed) => vectors * self.kept(parameters, inputs.items, seed),
                None => vectors,
            }
        };
        let adapted = match (model.item_tower, model.item_input) {
            (_, ItemInput::Id) => Adapted::All(vectors()),
            (ItemTower::Content, input) => {
                Adapted::Histories { content: content.shallow_clone(), vectors: input.has_ids().then(vectors) }
            }
            (_, ItemInput::Content) => Adapted::All(self.adapt((parameters, inputs.tape), &content, forward)),
            (_, ItemInput::ContentId) => {
                Adapted::All(self.adapt((parameters, inputs.tape), &content, forward) + vectors())
            }
        };
        let options = (parameters.kind(), parameters.device());
        Items {
            adapted,
            tape: inputs.tape.cloned(),
            codes: (model.history_code > 0)
                .then(|| history_code::codes(inputs.items, model.history_code.into(), options)),
            // never in bf16: it starts as the content's own cosines
            projected: parameters.find(RESIDUAL).map(|projection| unit(parameters, &content).matmul(&projection.tr())),
        }
    }

    /// `[U, 1]`: 0 for the items whose learned vectors a step leaves out, else 1: a function of the step's seed and the
    /// item, so that every rank and every pass leaves out the same.
    fn kept(&self, parameters: &Parameters, items: &[u32], seed: u64) -> Tensor {
        let draw = |&item: &u32| Draws::new(&[seed, item.into()]).unit();
        let kept: Vec<f32> =
            items.iter().map(|item| f32::from(u8::from(draw(item) >= self.shape.model.id_dropout))).collect();
        Tensor::from_slice(&kept).unsqueeze(1).to_device(parameters.device()).to_kind(parameters.kind())
    }

    /// Content embeddings as everything reads them: as they are, or without the catalogue's mean.
    fn content(&self, parameters: &Parameters, rows: &Tensor) -> Tensor {
        match parameters.find(CONTENT_MEAN) {
            Some(mean) => normalise(&(rows.to_kind(parameters.kind()) - mean)),
            None => rows.shallow_clone(),
        }
    }

    /// The user tower at the sampled positions: `[R, d]`.
    pub fn user(&self, parameters: &Parameters, items: &Items, histories: &Sequences, forward: &Forward) -> Tensor {
        let positions = parameters.find(POSITION).map(|table| self.position_vectors(table, histories));
        let hidden = self.causal(parameters, items, (histories, positions), forward);
        let recent = items.projected.as_ref().map(|projected| self.recent(projected, histories));
        let user = self.project((parameters, items.tape.as_ref()), hidden, recent, forward);
        let weight = self.shape.model.history_code_weight;
        coded(user, items.codes.as_ref().map(|codes| history_code::history(codes, histories, weight)))
    }

    /// The item tower at the sampled targets: `[M, d]`.
    pub fn item(&self, parameters: &Parameters, items: &Items, targets: &Sequences, forward: &Forward) -> Tensor {
        let sampled = targets.items.index_select(0, &targets.positions);
        let own = |rows: &Tensor| take(rows, &sampled);
        let item = match &items.adapted {
            Adapted::Histories { content, .. } => unit(parameters, &content.index_select(0, &sampled)),
            Adapted::All(adapted) => {
                let hidden = match self.shape.model.item_tower {
                    ItemTower::Causal => self.causal(parameters, items, (targets, None), forward),
                    ItemTower::PerItem | ItemTower::Content => {
                        self.alone((parameters, items.tape.as_ref()), own(adapted), forward)
                    }
                };
                let base = items.projected.as_ref().map(own);
                self.project((parameters, items.tape.as_ref()), hidden, base, forward)
            }
        };
        coded(item, items.codes.as_ref().map(own))
    }

    /// The item tower over items of the catalogue, each as a sequence of one: `[U, d]`.
    pub fn catalogue(&self, parameters: &Parameters, inputs: &ItemInputs<'_>, forward: &Forward) -> Tensor {
        let items = self.items(parameters, inputs, forward);
        let item = match items.adapted {
            Adapted::Histories { content, .. } => unit(parameters, &content),
            Adapted::All(adapted) => {
                let hidden = self.alone((parameters, items.tape.as_ref()), adapted, forward);
                self.project((parameters, items.tape.as_ref()), hidden, items.projected, forward)
            }
        };
        coded(item, items.codes)
    }

    /// `[R, d]`: at each sampled position the mean of the history up to it, the newest item with weight 1 and each older one
    /// with `residual_decay` times the weight of the next.
    fn recent(&self, projected: &Tensor, histories: &Sequences) -> Tensor {
        if histories.is_unread() {
            return projected.narrow(0, 0, 0);
        }
        let options = (projected.kind(), projected.device());
        let decay = Tensor::full([1], self.shape.model.residual_decay, options);
        histories.by_block(|items, length| {
            let place = Tensor::arange(length, options);
            let age = place.unsqueeze(1) - &place;
            let weights = decay.pow(&age.clamp_min(0)).tril(0);
            let weights = &weights / weights.sum_dim_intlist([1_i64].as_slice(), true, projected.kind());
            weights.matmul(&take(projected, items))
        })
    }

    /// `[T, D]`: the learned vector of each position's distance from the newest item. Items older than the learned
    /// positions reach share the last one.
    fn position_vectors(&self, table: &Tensor, histories: &Sequences) -> Tensor {
        take(table, &histories.ages().clamp(0, self.shape.max_history - 1))
    }

    /// `[T, D]`: what the encoder reads of the tokens, by the adaptor once for each item.
    fn read(&self, parameters: &Parameters, items: &Items, sequences: &Sequences, forward: &Forward) -> Tensor {
        match &items.adapted {
            Adapted::All(adapted) => take(adapted, &sequences.items),
            Adapted::Histories { content, vectors } => {
                let (used, place) = sequences.items.internal_unique(true, true);
                let content = content.index_select(0, &used);
                let adapted = self.adapt((parameters, items.tape.as_ref()), &content, forward);
                let read = take(&adapted, &place);
                match vectors {
                    Some(vectors) => read + take(vectors, &sequences.items),
                    None => read,
                }
            }
        }
    }

    /// Causal encoding of whole sequences, at the sampled positions: `[R, D]`.
    fn causal(
        &self,
        parameters: &Parameters,
        items: &Items,
        (sequences, positions): (&Sequences, Option<Tensor>),
        forward: &Forward,
    ) -> Tensor {
        let mut x = self.read(parameters, items, sequences, forward);
        if sequences.is_unread() {
            // without the graph before the encoder, which the backward goes through when it has come back to there
            return x.detach().narrow(0, 0, 0);
        }
        if let Some(positions) = positions {
            x += positions;
        }
        if let Some(table) = parameters.find(TIME_GAP) {
            match &sequences.gaps {
                Some(gaps) => x += gap_vectors(table, gaps),
                None => assert!(sequences.is_alone(), "a sequence of several items came without its times"),
            }
        }
        let route = (&Attention::Causal(&sequences.runs), Some(&sequences.positions));
        self.encode((parameters, items.tape.as_ref()), x, route, forward)
    }

    /// Items `[M, D]`, each encoded as a sequence of one: `[M, D]`.
    fn alone(&self, towers: (&Parameters, Option<&Tape>), adapted: Tensor, forward: &Forward) -> Tensor {
        self.encode(towers, adapted, (&Attention::Alone, None), forward)
    }

    /// Hidden states after the last layer, at `positions` `[R]` or everywhere.
    fn encode(
        &self,
        (parameters, tape): (&Parameters, Option<&Tape>),
        x: Tensor,
        (attention, positions): (&Attention, Option<&Tensor>),
        forward: &Forward,
    ) -> Tensor {
        let model = &self.shape.model;
        let settings = LayerForward {
            heads: model.heads.into(),
            eps: LAYER_NORM_EPS,
            dropout: model.dropout,
            train: forward.train,
            precision: forward.precision,
        };
        if let Some(tape) = by_hand(tape, parameters, forward).filter(|_| model.layers > 0) {
            return tape.encode((parameters, model.layers), x, (attention, positions), &settings);
        }
        let packed = match attention {
            Attention::Causal(runs) => {
                let kind = learn_torch::product_kind(forward.precision).unwrap_or_else(|| parameters.kind());
                let width = self.shape.hidden() / settings.heads;
                Packed::new(runs, parameters.device(), (kind, width)).map(Rc::new)
            }
            Attention::Packed(_) | Attention::Alone | Attention::Masked(_) => None,
        };
        let attention = packed.as_ref().map_or(*attention, Attention::Packed);
        let encoding = tape.map(|tape| (tape, tape.next_encoding()));
        let hidden = (0..model.layers).fold(x, |x, number| {
            let positions = positions.filter(|_| number + 1 == model.layers);
            let layer = GraphLayer { prefix: &layer_prefix(number), attention, positions, settings };
            match encoding {
                Some((tape, seed)) => tape.layer(parameters, &layer, x, (seed, number)),
                None => layer.run(parameters, &x),
            }
        });
        match positions {
            Some(positions) if model.layers == 0 => hidden.index_select(0, positions),
            _ => hidden,
        }
    }

    /// Hidden states `[R, D]` to embeddings `[R, d]`, as a correction of `base` `[R, d]` if there is one. Rounding to bf16
    /// moves a cosine by about 2^-9 / sqrt(d), far less than dropout does.
    fn project(
        &self,
        towers: (&Parameters, Option<&Tape>),
        hidden: Tensor,
        base: Option<Tensor>,
        forward: &Forward,
    ) -> Tensor {
        let output = self.dense(towers, DenseNames::PROJECTION, hidden, forward);
        let output = match base {
            Some(base) => output + base,
            None => output,
        };
        match by_hand(towers.1, towers.0, forward) {
            Some(tape) => tape.normalise(output, SHORTEST),
            None => normalise(&output),
        }
    }

    /// `[U, D]`: the adaptor's output for content embeddings `[U, input_dim]`.
    fn adapt(&self, towers: (&Parameters, Option<&Tape>), content: &Tensor, forward: &Forward) -> Tensor {
        self.dense(towers, DenseNames::ADAPTOR, content.shallow_clone(), forward)
    }

    fn dense(
        &self,
        (parameters, tape): (&Parameters, Option<&Tape>),
        names: DenseNames,
        x: Tensor,
        forward: &Forward,
    ) -> Tensor {
        match by_hand(tape, parameters, forward) {
            Some(tape) => tape.dense((parameters, self.shape.model.layers), names, x, forward.precision),
            None => {
                let layer = Linear { weight: parameters.get(names.weight), bias: parameters.get(names.bias) };
                layer.forward(&x, forward.precision).to_kind(parameters.kind())
            }
        }
    }
}

/// The tape, if the towers go by hand.
fn by_hand<'a>(tape: Option<&'a Tape>, parameters: &Parameters, forward: &Forward) -> Option<&'a Tape> {
    tape.filter(|_| by_hand::possible(parameters, forward.precision))
}

/// Embeddings of the towers with the history code's dimensions, if there are any.
fn coded(embeddings: Tensor, codes: Option<Tensor>) -> Tensor {
    match codes {
        Some(codes) => Tensor::cat(&[embeddings, codes], 1),
        None => embeddings,
    }
}

/// `[T, D]`: the learned vector of each bucket; 0 for bucket 0.
fn gap_vectors(table: &Tensor, gaps: &Tensor) -> Tensor {
    let nothing = table.zeros_like().narrow(0, 0, 1);
    take(&Tensor::cat(&[&nothing, table], 0), gaps)
}

fn layer_prefix(layer: u32) -> String {
    format!("{LAYER_PREFIX}{layer}")
}

pub(crate) fn linear<'a>(parameters: &'a Parameters, name: &str) -> Linear<'a> {
    Linear { weight: parameters.get(&format!("{name}.weight")), bias: parameters.get(&format!("{name}.bias")) }
}

/// Content embeddings as the item tower `content` and the residual path read them: L2-normalised.
fn unit(parameters: &Parameters, content: &Tensor) -> Tensor {
    let rows = content.to_kind(parameters.kind());
    match by_hand::possible(parameters, Precision::F32) && !rows.requires_grad() {
        true => by_hand::normalised(&rows, SHORTEST),
        false => normalise(&rows),
    }
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
