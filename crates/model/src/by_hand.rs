//! The towers' forward and backward by hand, for the CPU: matrix products by [`crate::products`], everything between
//! them by `learn_kernels`, each a single pass over its data.
//!
//! What goes by hand is a stage: the encoder, a dense layer, a normalisation; and so is each layer that libtorch
//! differentiates. Input of a stage: a tensor, with libtorch's graph behind it or that of an earlier stage. Output: a leaf
//! at which the next graph begins. The [`Tape`] knows the way back, and says on it which gradients are whole.
//!
//! ```text
//! content ══ adaptor ══> ── graph: items, positions ──> ══ encoder ══> ══ projection ══> ══ normalisation ══> embeddings
//! ```
//!
//! The structure of a layer is that of [`crate::bert::layer`], which libtorch differentiates. It is the reference of the
//! tests, and what runs in f64 and, with attention by other kernels, on a GPU. What is done here and not there:
//! - weights are held in the products' kind from one update to the next, instead of being cast for each product;
//! - the last layer makes queries for the sampled positions only (what follows attention, both do for these alone);
//! - gradients of weights go straight into the flat buffer, the last layer's first.
//!
//! Invariants: dropout is a function of (seed of the pass, layer, place, row, column) alone, so a second pass with the
//! same seed draws the same masks; results do not depend on the number of threads.

mod dense;
mod graph;
mod layer;
mod weights;

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::rc::Rc;

use dense::{Dense, Unit};
pub(crate) use graph::GraphLayer;
use graph::Recorded;
use half::bf16;
use layer::{Frame, Hidden, Keep, Kept, Pending, Product};
use learn_domain::config::Precision;
use learn_domain::packing::Run;
use learn_domain::random;
use learn_kernels::Sequence;
use tch::{Device, Kind, Tensor};
pub(crate) use weights::{DenseNames, Working};

use crate::bert::{Attention, LayerForward};
use crate::parameters::{Milestone, Parameters};

/// What forward passes leave behind for the backward. Clones are the same tape.
#[derive(Clone, Debug)]
pub struct Tape(Rc<Record>);

#[derive(Debug)]
struct Record {
    /// Of dropout.
    seed: u64,
    /// Whether layers keep only what they read.
    checkpointing: bool,
    /// Encodings so far.
    encodings: Cell<u64>,
    /// In the order of the forward pass.
    stages: RefCell<Vec<Stage>>,
}

/// Where a stage stands on the way of every tower. Graphs that several towers share lie between two of them, so that the
/// backward goes through each of them once, stage by stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum StageOrder {
    Adaptor,
    Encoder,
    Projection,
    Normalisation,
}

/// A part by hand between two graphs.
#[derive(Debug)]
struct Stage {
    order: StageOrder,
    /// The end of the graph before it.
    input: Tensor,
    /// The leaf at which the graph after it begins.
    output: Tensor,
    /// The gradient of the output that has not come through libtorch's graph.
    given: Option<Tensor>,
    work: Work,
}

/// What the backward of a stage needs.
#[derive(Debug)]
enum Work {
    Encoding(Box<Encoding>),
    Layer(u32, Recorded),
    Dense(Dense),
    Unit(Unit),
}

#[derive(Debug)]
struct Encoding {
    /// Those that the backward has not done yet.
    layers: Layers,
    /// All of them.
    count: u32,
    /// The gradient behind them, when the backward has begun.
    pending: Option<Pending>,
    route: Route,
    settings: LayerForward,
    seed: u64,
}

/// What came of a part of a stage's backward.
enum Back {
    /// There is more of it.
    More(Stage),
    /// The input and its gradient, if it learns and anything has come back to the output.
    Done(Option<(Tensor, Tensor)>),
}

/// Of the kind of the products.
#[derive(Debug)]
enum Layers {
    F32(Vec<Kept>),
    Bf16(Vec<Kept>),
}

/// Which rows see which.
#[derive(Debug)]
struct Route {
    /// Empty if each row is alone.
    sequences: Vec<Sequence>,
    sampled: Option<Sampled>,
}

/// The rows for which the last layer is computed, by place.
#[derive(Debug)]
struct Sampled {
    /// Ascending places of tokens.
    rows: Vec<u32>,
    /// Their places in their sequences.
    places: Vec<u32>,
    /// Their part of each sequence.
    sequences: Vec<Sequence>,
    /// `[R]` i64: for each wanted position its number among `rows`; `None` if that is its own.
    order: Option<Tensor>,
}

/// Whether the towers go by hand: on the CPU, where kernels for the kind exist.
pub(crate) fn possible(parameters: &Parameters, precision: Precision) -> bool {
    let kind = matches!(precision, Precision::F32 | Precision::Bf16);
    kind && parameters.device() == Device::Cpu && parameters.kind() == Kind::Float
}

/// `x / max(|x|, shortest)` of each row of `x` `[R, d]`, f32, without a graph.
pub(crate) fn normalised(x: &Tensor, shortest: f64) -> Tensor {
    learn_kernels::set_runner(crate::RUNNER);
    tch::no_grad(|| Unit::forward(x, shortest).0)
}

impl Tape {
    /// An empty tape; `seed` is that of the pass's dropout.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with(seed, false)
    }

    /// An empty tape that keeps only what each layer of the encoder reads; the rest is computed again in the backward.
    #[must_use]
    pub fn with_checkpointing(seed: u64) -> Self {
        Self::with(seed, true)
    }

    fn with(seed: u64, checkpointing: bool) -> Self {
        learn_kernels::set_runner(crate::RUNNER);
        Self(Rc::new(Record { seed, checkpointing, encodings: Cell::new(0), stages: RefCell::default() }))
    }

    /// The seed of the next encoding.
    pub(crate) fn next_encoding(&self) -> u64 {
        let number = self.0.encodings.replace(self.0.encodings.get() + 1);
        random::key(&[self.0.seed, number])
    }

    /// A layer by libtorch, the `number`-th of the encoding with this seed.
    pub(crate) fn layer(
        &self,
        parameters: &Parameters,
        layer: &GraphLayer<'_>,
        x: Tensor,
        (encoding, number): (u64, u32),
    ) -> Tensor {
        let seed = random::key(&[encoding, number.into()]);
        if !layer.is_recorded(parameters) {
            return layer.seeded(parameters, &x, seed);
        }
        let (output, recorded) = match self.0.checkpointing {
            true => Recorded::input(layer, parameters, &x, seed),
            false => Recorded::graph(layer, parameters, &x, seed),
        };
        self.stage(StageOrder::Encoder, (x, output), true, || Work::Layer(number, recorded))
    }

    /// Encodes `x` `[T, D]`: hidden states at `positions` `[R]` i64 of its rows, or at all of them.
    pub(crate) fn encode(
        &self,
        (parameters, layers): (&Parameters, u32),
        x: Tensor,
        (attention, positions): (&Attention, Option<&Tensor>),
        settings: &LayerForward,
    ) -> Tensor {
        let seed = self.next_encoding();
        let route = Route::new(attention, positions);
        let frame = Frame { parameters, settings, route: &route, seed, last: layers - 1 };
        let records = x.requires_grad();
        let keep = match (records, self.0.checkpointing) {
            (false, _) => Keep::Nothing,
            (true, false) => Keep::Activations,
            (true, true) => Keep::Inputs,
        };
        let (hidden, saved) = tch::no_grad(|| match settings.precision {
            Precision::Bf16 => {
                let (hidden, saved) = frame.forward::<bf16>(Hidden::new::<bf16>(&x), keep);
                (hidden, Layers::Bf16(saved))
            }
            Precision::F32 | Precision::F16 => {
                let (hidden, saved) = frame.forward::<f32>(Hidden::new::<f32>(&x), keep);
                (hidden, Layers::F32(saved))
            }
        });
        let order = route.sampled.as_ref().and_then(|sampled| sampled.order.as_ref()).map(Tensor::shallow_clone);
        let output = self.stage(StageOrder::Encoder, (x, hidden), records, || {
            let settings = *settings;
            Work::Encoding(Box::new(Encoding { layers: saved, count: layers, pending: None, route, settings, seed }))
        });
        match order {
            Some(order) => output.index_select(0, &order),
            None => output,
        }
    }

    /// `x W^T + b` in f32, `[R, out]`, for `x` `[R, in]` of any floating kind; W and b are the parameters of these names.
    pub(crate) fn dense(
        &self,
        (parameters, layers): (&Parameters, u32),
        names: DenseNames,
        x: Tensor,
        precision: Precision,
    ) -> Tensor {
        let records = is_recorded(parameters.get(names.weight));
        let (output, saved) = tch::no_grad(|| Dense::forward((parameters, layers), names, &x, precision));
        self.stage(names.order, (x, output), records, || Work::Dense(saved))
    }

    /// `x / max(|x|, shortest)` of each row of `x` `[R, d]`, f32.
    pub(crate) fn normalise(&self, x: Tensor, shortest: f64) -> Tensor {
        let records = x.requires_grad();
        let (output, saved) = tch::no_grad(|| Unit::forward(&x, shortest));
        self.stage(StageOrder::Normalisation, (x, output), records, || Work::Unit(saved))
    }

    /// The leaf that stands for a stage's output.
    fn stage(
        &self,
        order: StageOrder,
        (input, output): (Tensor, Tensor),
        records: bool,
        work: impl FnOnce() -> Work,
    ) -> Tensor {
        let output = output.set_requires_grad(records);
        if records {
            let stage = Stage { order, input, output: output.shallow_clone(), given: None, work: work() };
            self.0.stages.borrow_mut().push(stage);
        }
        output
    }

    /// Brings gradients of tower outputs back to the parameters; what has no graph has nothing to learn. Empties the
    /// tape. Calls `passed` at each milestone but the end, which is the return, so far as there is something on the way.
    ///
    /// Pairs are (output, its gradient), of all that was computed with this tape.
    pub fn backward(&self, parameters: &Parameters, outputs: &[(&Tensor, &Tensor)], passed: &mut dyn FnMut(Milestone)) {
        let mut stages = self.0.stages.take();
        self.0.encodings.set(0);
        let through: Vec<(&Tensor, &Tensor)> =
            outputs.iter().filter(|(output, gradient)| !give(&mut stages, output, gradient)).copied().collect();
        pull(&through);
        while let Some(order) = stages.iter().map(|stage| stage.order).max() {
            let (mut now, before) = stages.into_iter().partition(|stage: &Stage| stage.order == order);
            stages = before;
            if order == StageOrder::Encoder {
                passed(Milestone::Projection);
            }
            let mut through = Vec::new();
            // each layer for all towers before the next one, so that its gradient is whole early
            while let Some((place, stage)) = take_deepest(&mut now) {
                let layer = stage.work.layer();
                let done = match stage.backward(parameters) {
                    Back::More(stage) => {
                        now.insert(place, stage);
                        None
                    }
                    Back::Done(done) => done,
                };
                if let Some(layer) = layer.filter(|layer| now.iter().all(|stage| stage.work.layer() < Some(*layer))) {
                    passed(Milestone::Layer(Reverse(layer)));
                }
                let Some((input, gradient)) = done else { continue };
                // a layer's input may be the output of the one before it
                if !give(&mut now, &input, &gradient) && !give(&mut stages, &input, &gradient) {
                    through.push((input, gradient));
                }
            }
            pull(&through.iter().map(|(input, gradient)| (input, gradient)).collect::<Vec<_>>());
        }
    }
}

impl Stage {
    /// Of the deepest layer, or of the whole if it has none.
    fn backward(mut self, parameters: &Parameters) -> Back {
        if let Work::Encoding(encoding) = &mut self.work {
            if encoding.pending.is_none() {
                let Some(gradient) = come_back(&self.output, self.given.take()) else { return Back::Done(None) };
                encoding.pending = Some(Pending::new(&gradient));
            }
            return match tch::no_grad(|| encoding.backward(parameters)) {
                None => Back::More(self),
                Some(gradient) => Back::Done(Some((self.input, gradient))),
            };
        }
        let Some(gradient) = come_back(&self.output, self.given) else { return Back::Done(None) };
        let (learns, input) = (self.input.requires_grad(), self.input);
        let gradient = tch::no_grad(|| match self.work {
            Work::Layer(_, layer) => Some(layer.backward(parameters, &input, &gradient)),
            Work::Dense(dense) => dense.backward(parameters, &gradient, learns),
            Work::Unit(unit) => Some(unit.backward(&gradient)),
            Work::Encoding(_) => unreachable!("it went layer by layer"),
        });
        Back::Done(gradient.map(|gradient| (input, gradient)))
    }
}

/// The gradient of a stage's output, if anything has come back to it.
fn come_back(output: &Tensor, given: Option<Tensor>) -> Option<Tensor> {
    let through = output.grad();
    match (given, through.defined()) {
        (Some(given), true) => Some(given + through),
        (Some(given), false) => Some(given),
        (None, true) => Some(through),
        (None, false) => None,
    }
}

/// The stage with the deepest layer that is still to be done, the latest of several, and its place.
fn take_deepest(stages: &mut Vec<Stage>) -> Option<(usize, Stage)> {
    let (place, _) = stages.iter().enumerate().max_by_key(|(_, stage)| stage.work.layer())?;
    Some((place, stages.remove(place)))
}

impl Work {
    /// The deepest of the encoder's layers that the backward has not done yet.
    fn layer(&self) -> Option<u32> {
        match self {
            Self::Layer(number, _) => Some(*number),
            Self::Encoding(encoding) => match &encoding.layers {
                Layers::F32(layers) | Layers::Bf16(layers) => (layers.len() as u32).checked_sub(1),
            },
            Self::Dense(_) | Self::Unit(_) => None,
        }
    }
}

impl Encoding {
    /// Of the deepest layer; the gradient of the input after the last one.
    fn backward(&mut self, parameters: &Parameters) -> Option<Tensor> {
        let Self { layers, count, pending, route, settings, seed } = self;
        let frame = Frame { parameters, settings, route, seed: *seed, last: *count - 1 };
        match layers {
            Layers::F32(kept) => one_layer::<f32>(&frame, kept, pending),
            Layers::Bf16(kept) => one_layer::<bf16>(&frame, kept, pending),
        }
    }
}

fn one_layer<E: Product>(frame: &Frame<'_>, kept: &mut Vec<Kept>, pending: &mut Option<Pending>) -> Option<Tensor> {
    let (deepest, behind) = (kept.pop()?, pending.take()?);
    let before = frame.backward::<E>(kept.len(), deepest, behind);
    if kept.is_empty() {
        return Some(before.whole::<E>());
    }
    *pending = Some(before);
    None
}

/// Whether what is computed from this leaf gets a graph.
fn is_recorded(leaf: &Tensor) -> bool {
    leaf.narrow(0, 0, 0).requires_grad()
}

/// Gives the gradient to the stage whose output this tensor is, if there is one: no graph lies between.
fn give(stages: &mut [Stage], tensor: &Tensor, gradient: &Tensor) -> bool {
    // tensors without numbers have no place by which to tell them apart, and nothing to bring
    if tensor.numel() == 0 {
        return true;
    }
    let is_it = |stage: &&mut Stage| {
        tensor.is_leaf()
            && tensor.requires_grad()
            && stage.output.data_ptr() == tensor.data_ptr()
            && stage.output.size() == tensor.size()
    };
    let Some(stage) = stages.iter_mut().find(is_it) else { return false };
    stage.given = Some(match stage.given.take() {
        Some(given) => given + gradient,
        None => gradient.shallow_clone(),
    });
    true
}

/// Brings gradients back through libtorch's graphs in one pass.
///
/// The dot product of output and gradient has `gradient` as its derivative, so its backward is the wanted one. What has
/// no rows has nothing to bring.
fn pull(parts: &[(&Tensor, &Tensor)]) {
    let surrogate = parts
        .iter()
        .filter(|(output, _)| output.requires_grad() && output.numel() > 0)
        .map(|(output, gradient)| output.reshape([-1]).dot(&gradient.reshape([-1])))
        .reduce(|sum, part| sum + part);
    if let Some(surrogate) = surrogate {
        surrogate.backward();
    }
}

impl Route {
    fn new(attention: &Attention, positions: Option<&Tensor>) -> Self {
        let runs: &[Run] = match attention {
            Attention::Causal(runs) => runs,
            Attention::Alone => &[],
            Attention::Masked(_) => unreachable!("masked attention is for encoders that do not learn"),
            Attention::Packed(_) => unreachable!("what goes by hand is on the CPU"),
        };
        let mut start = 0;
        let lengths = runs.iter().flat_map(|run| std::iter::repeat_n(run.length, run.count));
        let sequences: Vec<Sequence> = lengths
            .map(|length| {
                let sequence = Sequence::whole(start, length);
                start += length;
                sequence
            })
            .collect();
        let sampled = positions.map(|positions| Sampled::new(positions, &sequences));
        Self { sequences, sampled }
    }
}

impl Sampled {
    fn new(positions: &Tensor, sequences: &[Sequence]) -> Self {
        let wanted: &[i64] = learn_torch::values(positions);
        let mut by_place: Vec<usize> = (0..wanted.len()).collect();
        by_place.sort_by_key(|&number| wanted[number]);
        let mut order = vec![0; wanted.len()];
        for (place, &number) in by_place.iter().enumerate() {
            order[number] = place as i64;
        }
        let rows: Vec<u32> = by_place.iter().map(|&number| wanted[number] as u32).collect();
        let mut places = Vec::with_capacity(rows.len());
        let mut first_query = 0;
        let sequences = sequences
            .iter()
            .map(|whole| {
                let end = (whole.first_key + whole.keys) as u32;
                let queries = rows[first_query..].iter().take_while(|row| **row < end).count();
                let own = &rows[first_query..first_query + queries];
                places.extend(own.iter().map(|row| row - whole.first_key as u32));
                first_query += queries;
                Sequence { first_query: first_query - queries, queries, ..*whole }
            })
            .collect();
        let ascends = order.is_sorted();
        Self { places, sequences, order: (!ascends).then(|| Tensor::from_slice(&order)), rows }
    }
}

#[cfg(test)]
mod tests;
