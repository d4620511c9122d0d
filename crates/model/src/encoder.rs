//! The encoder's forward and backward by hand, for the CPU: matrix products by libtorch, everything between them by
//! `learn_kernels`, each a single pass over its data.
//!
//! Input: what the first layer reads, `[T, D]` with libtorch's graph behind it, and the sampled positions `[R]`. Output: the last
//! layer's hidden states there, `[R, D]`, and a [`Tape`] that knows the way back.
//!
//! ```text
//! adaptor, positions ── graph ──> x ══ by hand ══> hidden ── graph ──> projection, normalisation
//! ```
//!
//! The structure of a layer is that of [`crate::bert::layer`], which libtorch differentiates. It is the reference of the
//! tests, and what runs on a GPU and in f64. What is done here and not there:
//! - weights are held in the products' kind from one update to the next, instead of being cast for each product;
//! - the last layer makes queries, and all that follows them, for the sampled positions only;
//! - gradients of weights go straight into the flat buffer, the last layer's first.
//!
//! Invariants: dropout is a function of (seed of the pass, layer, place, row, column) alone, so a second pass with the same
//! seed draws the same masks; results do not depend on the number of threads.

mod layer;
mod weights;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use half::bf16;
use layer::{Frame, Hidden, LayerTape};
use learn_domain::config::Precision;
use learn_domain::packing::Run;
use learn_domain::random;
use learn_kernels::Sequence;
use tch::{Device, Kind, Tensor};
pub(crate) use weights::Working;

use crate::bert::{Attention, LayerForward};
use crate::parameters::Parameters;

/// What forward passes leave behind for the backward. Clones are the same tape.
#[derive(Clone, Debug)]
pub struct Tape(Rc<Record>);

#[derive(Debug)]
struct Record {
    /// Of dropout.
    seed: u64,
    /// Encodings so far.
    count: Cell<u64>,
    segments: RefCell<Vec<Segment>>,
}

/// An encoding by hand between two graphs.
#[derive(Debug)]
struct Segment {
    /// `[T, D]`, the end of the graph before it.
    input: Tensor,
    /// `[R, D]`, the leaf at which the graph after it begins.
    output: Tensor,
    layers: Layers,
    route: Route,
    settings: LayerForward,
}

/// Of the kind of the products.
#[derive(Debug)]
enum Layers {
    F32(Vec<LayerTape>),
    Bf16(Vec<LayerTape>),
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
    /// `[R]` i64: for each wanted position its number among `rows`.
    order: Tensor,
}

/// Whether encodings go by hand: on the CPU, where kernels for the kind exist.
pub(crate) fn by_hand(parameters: &Parameters, precision: Precision) -> bool {
    let kind = matches!(precision, Precision::F32 | Precision::Bf16);
    kind && parameters.device() == Device::Cpu && parameters.kind() == Kind::Float
}

impl Tape {
    /// An empty tape; `seed` is that of the pass's dropout.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        learn_kernels::set_runner(learn_torch::run_tasks);
        Self(Rc::new(Record { seed, count: Cell::new(0), segments: RefCell::default() }))
    }

    /// Encodes `x` `[T, D]`: hidden states at `positions` `[R]` i64 of its rows, or at all of them.
    pub(crate) fn encode(
        &self,
        (parameters, layers): (&Parameters, u32),
        x: Tensor,
        (attention, positions): (&Attention, Option<&Tensor>),
        settings: &LayerForward,
    ) -> Tensor {
        let number = self.0.count.replace(self.0.count.get() + 1);
        let route = Route::new(attention, positions);
        let frame =
            Frame { parameters, settings, route: &route, seed: random::key(&[self.0.seed, number]), last: layers - 1 };
        let records = x.requires_grad();
        let (hidden, saved) = tch::no_grad(|| match settings.precision {
            Precision::Bf16 => {
                let (hidden, saved) = frame.forward::<bf16>(Hidden::new::<bf16>(&x), records);
                (hidden, Layers::Bf16(saved))
            }
            Precision::F32 | Precision::F16 => {
                let (hidden, saved) = frame.forward::<f32>(Hidden::new::<f32>(&x), records);
                (hidden, Layers::F32(saved))
            }
        });
        let output = hidden.set_requires_grad(records);
        let wanted = match &route.sampled {
            Some(sampled) => output.index_select(0, &sampled.order),
            None => output.shallow_clone(),
        };
        if records {
            let settings = *settings;
            self.0.segments.borrow_mut().push(Segment { input: x, output, layers: saved, route, settings });
        }
        wanted
    }

    /// Brings gradients of tower outputs back to the parameters; what has no graph has nothing to learn. Empties the tape.
    ///
    /// Pairs are (output, its gradient), of all that was computed with this tape.
    pub fn backward(&self, parameters: &Parameters, outputs: &[(&Tensor, &Tensor)]) {
        pull(outputs);
        let segments: Vec<(u64, Segment)> = (0..).zip(self.0.segments.take()).collect();
        self.0.count.set(0);
        let inputs: Vec<(Tensor, Tensor)> = segments
            .into_iter()
            .filter_map(|(number, segment)| {
                let gradient = segment.output.grad();
                let Segment { input, layers, route, settings, .. } = segment;
                let last = match &layers {
                    Layers::F32(layers) | Layers::Bf16(layers) => layers.len() as u32 - 1,
                };
                let seed = random::key(&[self.0.seed, number]);
                let frame = Frame { parameters, settings: &settings, route: &route, seed, last };
                gradient.defined().then(|| {
                    let gradient = tch::no_grad(|| match layers {
                        Layers::F32(layers) => frame.backward::<f32>(layers, gradient),
                        Layers::Bf16(layers) => frame.backward::<bf16>(layers, gradient),
                    });
                    (input, gradient)
                })
            })
            .collect();
        pull(&inputs.iter().map(|(input, gradient)| (input, gradient)).collect::<Vec<_>>());
    }
}

/// Brings gradients back through libtorch's graphs in one pass.
///
/// The dot product of output and gradient has `gradient` as its derivative, so its backward is the wanted one.
fn pull(parts: &[(&Tensor, &Tensor)]) {
    let surrogate = parts
        .iter()
        .filter(|(output, _)| output.requires_grad())
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
        Self { places, sequences, order: Tensor::from_slice(&order), rows }
    }
}

#[cfg(test)]
mod tests;
