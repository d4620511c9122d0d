//! One layer forward and backward.
//!
//! Shapes: T rows in, R rows out (T of them but in the last layer), D hidden. `E` is the kind of the products, f32 or bf16;
//! residuals, layer norms and gradients of parameters are f32.

use half::bf16;
use learn_domain::random;
use learn_kernels::{Attention, BiasGelu, Dropout, Element, NormGradients, ResidualNorm, RowStatistics, Saved};
use learn_torch::{Stored, values, values_mut};
use tch::{Device, Kind, Tensor};

use super::Route;
use super::weights::{ATTENTION, LayerNames, LayerProducts};
use crate::bert::LayerForward;
use crate::parameters::Parameters;
use crate::products::{Added, mm, product};

/// A kind of matrix products.
pub(super) trait Product: Element + Stored {
    /// Whether it is the kind of the residuals too.
    const FULL: bool;
}

impl Product for f32 {
    const FULL: bool = true;
}

impl Product for bf16 {
    const FULL: bool = false;
}

/// Hidden states `[T, D]` as residual and as the next product's input; in f32 both are the same tensor.
#[derive(Debug)]
pub(super) struct Hidden {
    full: Tensor,
    low: Tensor,
}

/// What a forward leaves for the backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    Nothing,
    /// What each layer reads; the rest is computed again.
    Inputs,
    Activations,
}

/// What is there of a layer.
#[derive(Debug)]
pub(super) enum Kept {
    Input(Hidden),
    Activations(LayerTape),
}

/// What is the same for the layers of an encoding.
pub(super) struct Frame<'a> {
    pub parameters: &'a Parameters,
    pub settings: &'a LayerForward,
    pub route: &'a Route,
    pub seed: u64,
    /// Number of the last layer.
    pub last: u32,
}

/// What the backward of a layer needs of its forward.
#[derive(Debug)]
pub(super) struct LayerTape {
    /// `[T, D]`, E.
    input: Tensor,
    mixed: Mixed,
    /// `[R, D]`, E: the heads' weighted values.
    context: Tensor,
    attention_norm: NormTape,
    /// `[R, D]`, E.
    attended: Tensor,
    /// `[R, 4 D]`, E: before and after GELU, the first without its bias.
    wide: Tensor,
    active: Tensor,
    output_norm: NormTape,
}

/// How the context was made.
#[derive(Debug)]
enum Mixed {
    /// It is the value.
    Alone,
    /// `[T, 3 D]`: of queries, keys and values.
    Whole(Tensor),
    /// Of the sampled rows: their input `[R, D]`, their queries `[R, D]`, and keys and values `[T, 2 D]`.
    Sampled { input: Tensor, query: Tensor, key_value: Tensor },
}

/// `[R, D]` each: a product without its bias, and the residual it was added to.
#[derive(Debug)]
struct NormTape {
    dense: Tensor,
    residual: Tensor,
    statistics: Vec<RowStatistics>,
}

/// A layer's gradient on its way back, in two parts: by way of the residuals, f32, and of the products, E.
#[derive(Debug)]
pub(super) struct Pending {
    full: Tensor,
    low: Option<Tensor>,
}

/// Where dropout is.
#[derive(Clone, Copy)]
enum Site {
    Probabilities,
    Attention,
    Output,
}

/// A norm's parameters and the bias of the product before it.
struct NormNames {
    dense: &'static str,
    norm: &'static str,
    site: Site,
}

const ATTENTION_NORM: NormNames =
    NormNames { dense: "attention.output.dense", norm: "attention.output.LayerNorm", site: Site::Attention };
const OUTPUT_NORM: NormNames = NormNames { dense: "output.dense", norm: "output.LayerNorm", site: Site::Output };

impl Hidden {
    pub fn new<E: Product>(x: &Tensor) -> Self {
        let full = x.detach().contiguous();
        let low = if E::FULL { full.shallow_clone() } else { full.to_kind(E::KIND) };
        Self { full, low }
    }

    fn shallow_clone(&self) -> Self {
        Self { full: self.full.shallow_clone(), low: self.low.shallow_clone() }
    }

    /// The rows of these places.
    fn rows<E: Product>(&self, rows: &[u32]) -> Self {
        let full = gathered::<f32>(&self.full, rows);
        let low = if E::FULL { full.shallow_clone() } else { gathered::<E>(&self.low, rows) };
        Self { full, low }
    }
}

impl Pending {
    /// The gradient `[R, D]` of the hidden states after all layers.
    pub fn new(gradient: &Tensor) -> Self {
        Self { full: gradient.contiguous(), low: None }
    }

    /// As one tensor, f32.
    pub fn whole<E: Product>(mut self) -> Tensor {
        if let Some(low) = &self.low {
            learn_kernels::add(values::<E>(low), values_mut::<f32>(&mut self.full));
        }
        self.full
    }
}

impl Frame<'_> {
    /// The hidden states `[R, D]` after all layers, f32, and what the backward needs if it is to be kept.
    pub fn forward<E: Product>(&self, mut hidden: Hidden, keep: Keep) -> (Tensor, Vec<Kept>) {
        let mut all = Vec::new();
        for layer in 0..=self.last as usize {
            let input = (keep == Keep::Inputs).then(|| hidden.shallow_clone());
            let tape;
            (hidden, tape) = self.layer::<E>(layer, hidden);
            all.extend(match keep {
                Keep::Nothing => None,
                Keep::Inputs => input.map(Kept::Input),
                Keep::Activations => Some(Kept::Activations(tape)),
            });
        }
        (hidden.full, all)
    }

    /// From the gradient of this layer's output to that of its input, of what is kept of it.
    pub fn backward<E: Product>(&self, layer: usize, kept: Kept, pending: Pending) -> Pending {
        let tape = match kept {
            Kept::Activations(tape) => tape,
            Kept::Input(hidden) => self.layer::<E>(layer, hidden).1,
        };
        self.layer_backward::<E>(layer, tape, pending)
    }

    fn layer<E: Product>(&self, layer: usize, hidden: Hidden) -> (Hidden, LayerTape) {
        let names = LayerNames::new(layer);
        self.parameters.with_working(self.last as usize + 1, E::KIND, |working| {
            let weights = &working.layers[layer];
            let input = hidden.low.shallow_clone();
            let (context, mixed, residual) = self.mix::<E>(layer, weights, hidden);
            let dense = mm(&context, &weights.attention_output.tr());
            let (attended, attention_norm) = self.norm::<E>((layer, &names), &ATTENTION_NORM, dense, residual);
            let wide = mm(&attended.low, &weights.intermediate.tr());
            let mut active = wide.empty_like();
            let bias = self.f32(&names.of("intermediate.dense.bias"));
            BiasGelu { bias: values(&bias) }.forward(values::<E>(&wide), values_mut::<E>(&mut active));
            let narrow = mm(&active, &weights.output.tr());
            let low = attended.low;
            let (hidden, output_norm) = self.norm::<E>((layer, &names), &OUTPUT_NORM, narrow, attended.full);
            let tape = LayerTape { input, mixed, context, attention_norm, attended: low, wide, active, output_norm };
            (hidden, tape)
        })
    }

    /// The context `[R, D]`, how it was made, and the residual beside it `[R, D]`.
    fn mix<E: Product>(&self, layer: usize, weights: &LayerProducts, hidden: Hidden) -> (Tensor, Mixed, Tensor) {
        let width = weights.attention_output.size()[0];
        // the rows `part` to `part + count` of the three matrices
        let parts = |x: &Tensor, part: i64, count: i64| {
            let (weight, bias) = weights.attention(part, count);
            product(x, &weight.tr(), Added::Row(&bias), E::KIND)
        };
        if self.route.sequences.is_empty() {
            return (parts(&hidden.low, 2, 1), Mixed::Alone, hidden.full);
        }
        let context = |rows: i64| Tensor::empty([rows, width], (E::KIND, Device::Cpu));
        match self.sampled(layer) {
            None => {
                let all = parts(&hidden.low, 0, 3);
                let mut context = context(all.size()[0]);
                self.attention(layer).forward(values::<E>(&all), values_mut::<E>(&mut context));
                (context, Mixed::Whole(all), hidden.full)
            }
            Some(sampled) => {
                let Hidden { full, low: input } = hidden.rows::<E>(&sampled.rows);
                let (query, key_value) = (parts(&input, 0, 1), parts(&hidden.low, 1, 2));
                let mut context = context(query.size()[0]);
                self.attention(layer).forward_some(
                    values::<E>(&query),
                    values::<E>(&key_value),
                    values_mut::<E>(&mut context),
                );
                (context, Mixed::Sampled { input, query, key_value }, full)
            }
        }
    }

    fn norm<E: Product>(
        &self,
        (layer, names): (usize, &LayerNames),
        of: &NormNames,
        dense: Tensor,
        residual: Tensor,
    ) -> (Hidden, NormTape) {
        let mut full = residual.empty_like();
        let mut low = (!E::FULL).then(|| dense.empty_like());
        let mut statistics = vec![RowStatistics::default(); dense.size()[0] as usize];
        self.with_norm((layer, names), of, |norm| {
            norm.forward(
                values::<E>(&dense),
                values::<f32>(&residual),
                values_mut(&mut full),
                low.as_mut().map(values_mut::<E>),
                &mut statistics,
            );
        });
        let low = low.unwrap_or_else(|| full.shallow_clone());
        (Hidden { full, low }, NormTape { dense, residual, statistics })
    }

    fn layer_backward<E: Product>(&self, layer: usize, tape: LayerTape, pending: Pending) -> Pending {
        let names = LayerNames::new(layer);
        self.parameters.with_working(self.last as usize + 1, E::KIND, |working| {
            let weights = &working.layers[layer];
            let (full, d_narrow) = self.norm_backward::<E>((layer, &names), &OUTPUT_NORM, tape.output_norm, pending);
            let mut d_wide = mm(&d_narrow, &weights.output);
            self.add_weight(&names.of("output.dense.weight"), &d_narrow, &tape.active);
            let bias = self.f32(&names.of("intermediate.dense.bias"));
            let mut d_bias = self.parameters.slot(&names.of("intermediate.dense.bias")).zeroed();
            BiasGelu { bias: values(&bias) }.backward(
                values::<E>(&tape.wide),
                values_mut::<E>(&mut d_wide),
                values_mut(&mut d_bias),
            );
            self.add_weight(&names.of("intermediate.dense.weight"), &d_wide, &tape.attended);
            let pending = Pending { full, low: Some(mm(&d_wide, &weights.intermediate)) };
            let (full, d_dense) =
                self.norm_backward::<E>((layer, &names), &ATTENTION_NORM, tape.attention_norm, pending);
            self.add_weight(&names.of("attention.output.dense.weight"), &d_dense, &tape.context);
            let d_context = mm(&d_dense, &weights.attention_output);
            self.mix_backward::<E>((layer, &names), weights, (tape.mixed, &tape.input), (full, d_context))
        })
    }

    /// From the gradients of residual (f32) and context (E), `[R, D]` both, to those of the layer's input.
    fn mix_backward<E: Product>(
        &self,
        (layer, names): (usize, &LayerNames),
        weights: &LayerProducts,
        (mixed, input): (Mixed, &Tensor),
        (full, d_context): (Tensor, Tensor),
    ) -> Pending {
        // the gradient of rows x by way of the parts `first` to `first + count` of the three matrices
        let back = |d_parts: &Tensor, x: &Tensor, first: usize, count: usize| {
            self.add_attention::<E>(names, first, d_parts, x);
            mm(d_parts, &weights.attention(first as i64, count as i64).0)
        };
        match mixed {
            Mixed::Alone => Pending { full, low: Some(back(&d_context, input, 2, 1)) },
            Mixed::Whole(all) => {
                let mut d_all = all.empty_like();
                self.attention(layer).backward(values::<E>(&all), values::<E>(&d_context), values_mut::<E>(&mut d_all));
                Pending { full, low: Some(back(&d_all, input, 0, 3)) }
            }
            Mixed::Sampled { input: own, query, key_value } => {
                let (mut d_query, mut d_key_value) = (query.empty_like(), key_value.empty_like());
                self.attention(layer).backward_some(
                    values::<E>(&query),
                    values::<E>(&key_value),
                    values::<E>(&d_context),
                    values_mut::<E>(&mut d_query),
                    values_mut::<E>(&mut d_key_value),
                );
                let low = back(&d_key_value, input, 1, 2);
                let d_own = back(&d_query, &own, 0, 1);
                let rows = self.sampled(layer).map_or(&[][..], |sampled| &sampled.rows[..]);
                let width = full.size()[1] as usize;
                let mut all = Tensor::zeros(low.size(), (Kind::Float, Device::Cpu));
                learn_kernels::scatter_add_rows(values::<f32>(&full), width, rows, values_mut::<f32>(&mut all));
                learn_kernels::scatter_add_rows(values::<E>(&d_own), width, rows, values_mut::<f32>(&mut all));
                Pending { full: all, low: Some(low) }
            }
        }
    }

    /// From the gradient of a norm's output to those of its residual (f32) and of the product (E).
    fn norm_backward<E: Product>(
        &self,
        (layer, names): (usize, &LayerNames),
        of: &NormNames,
        tape: NormTape,
        pending: Pending,
    ) -> (Tensor, Tensor) {
        let NormTape { dense, residual, statistics } = tape;
        let Pending { full: mut gradient, low } = pending;
        let slot = |name: String| self.parameters.slot(&name).zeroed();
        let mut d_dense = dense.empty_like();
        let mut bias = slot(names.of(&format!("{}.bias", of.dense)));
        let mut gamma = slot(names.of(&format!("{}.weight", of.norm)));
        let mut beta = slot(names.of(&format!("{}.bias", of.norm)));
        self.with_norm((layer, names), of, |norm| {
            norm.backward(
                Saved { dense: values::<E>(&dense), residual: values::<f32>(&residual), statistics: &statistics },
                NormGradients {
                    gradient: values_mut::<f32>(&mut gradient),
                    more: low.as_ref().map(values::<E>),
                    dense: values_mut::<E>(&mut d_dense),
                    bias: values_mut(&mut bias),
                    gamma: values_mut(&mut gamma),
                    beta: values_mut(&mut beta),
                },
            );
        });
        (gradient, d_dense)
    }

    fn with_norm(&self, (layer, names): (usize, &LayerNames), of: &NormNames, run: impl FnOnce(ResidualNorm<'_>)) {
        let bias = self.f32(&names.of(&format!("{}.bias", of.dense)));
        let gamma = self.f32(&names.of(&format!("{}.weight", of.norm)));
        let beta = self.f32(&names.of(&format!("{}.bias", of.norm)));
        run(ResidualNorm {
            bias: values(&bias),
            gamma: values(&gamma),
            beta: values(&beta),
            eps: self.settings.eps as f32,
            dropout: self.dropout(layer, of.site),
        });
    }

    /// Adds `d_y^T x` to the gradient of a weight; `d_y` `[R, out]`, `x` `[R, in]`.
    fn add_weight(&self, name: &str, d_y: &Tensor, x: &Tensor) {
        self.parameters.slot(name).add_product(&d_y.tr(), x);
    }

    /// As `add_weight` for the parts of `d_parts` `[T, n D]` from `first` on, with their biases.
    fn add_attention<E: Product>(&self, names: &LayerNames, first: usize, d_parts: &Tensor, x: &Tensor) {
        let width = x.size()[1];
        let parts = (d_parts.size()[1] / width) as usize;
        let mut sums = Tensor::zeros([d_parts.size()[1]], (Kind::Float, Device::Cpu));
        learn_kernels::column_sums(values::<E>(d_parts), values_mut(&mut sums));
        for (number, part) in ATTENTION[first..first + parts].iter().enumerate() {
            let start = number as i64 * width;
            self.parameters.slot(&names.of(&format!("{part}.bias"))).add(&sums.narrow(0, start, width));
            let slot = self.parameters.slot(&names.of(&format!("{part}.weight")));
            slot.add_product(&d_parts.narrow(1, start, width).tr(), x);
        }
    }

    fn attention(&self, layer: usize) -> Attention<'_> {
        let (sequences, places) = match self.sampled(layer) {
            Some(sampled) => (&sampled.sequences, Some(&sampled.places[..])),
            None => (&self.route.sequences, None),
        };
        Attention {
            sequences,
            places,
            heads: self.settings.heads as usize,
            width: self.width(),
            dropout: self.dropout(layer, Site::Probabilities),
        }
    }

    /// The rows of the layer's output, if they are not all.
    fn sampled(&self, layer: usize) -> Option<&super::Sampled> {
        self.route.sampled.as_ref().filter(|_| layer == self.last as usize && !self.route.sequences.is_empty())
    }

    fn width(&self) -> usize {
        self.parameters.get(&LayerNames::new(0).of("output.LayerNorm.weight")).size()[0] as usize
    }

    fn dropout(&self, layer: usize, site: Site) -> Dropout {
        match self.settings.train {
            true => Dropout {
                rate: self.settings.dropout as f32,
                key: random::key(&[self.seed, layer as u64, site as u64]),
            },
            false => Dropout::OFF,
        }
    }

    fn f32(&self, name: &str) -> Tensor {
        self.parameters.get(name).detach()
    }
}

impl LayerProducts {
    /// The matrices and biases from `first` to `first + count` of query, key and value.
    fn attention(&self, first: i64, count: i64) -> (Tensor, Tensor) {
        let width = self.attention_output.size()[0];
        let part = |tensor: &Tensor| tensor.narrow(0, first * width, count * width);
        (part(&self.attention), part(&self.attention_bias))
    }
}

/// The rows of `x` `[T, D]` at these places.
fn gathered<E: Product>(x: &Tensor, rows: &[u32]) -> Tensor {
    let width = x.size()[1];
    let mut out = Tensor::empty([rows.len() as i64, width], (E::KIND, Device::Cpu));
    learn_kernels::gather_rows(values::<E>(x), width as usize, rows, values_mut(&mut out));
    out
}
