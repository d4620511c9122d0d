//! One BERT layer: attention and feed-forward, each followed by dropout, residual and layer norm (post-LN), exact GELU.
//!
//! Input: hidden states `[B, L, D]`, or `[T, D]` of packed sequences, weights found by name. Output: hidden states of the same
//! shape and kind.
//! With `Precision::Bf16` or `F16` the matrix products and the attention have that kind; layer norms, residuals and the
//! softmax's statistics keep the kind of the input (f32). With `F32` everything has the input's kind, so f64 works too.

use std::rc::Rc;

use learn_domain::config::Precision;
use learn_domain::packing::Run;
use learn_torch::{MOST_SEQUENCES, SequenceBounds};
use tch::{Device, Kind, Tensor};

use crate::products::multiplied_kind;

/// Who attends to whom.
#[derive(Clone, Copy, Debug)]
pub enum Attention<'a> {
    /// Packed sequences `[T, D]`: each position to itself and the earlier ones of its sequence.
    Causal(&'a [Run]),
    /// The same by kernels that take all sequences at once, on a GPU.
    Packed(&'a Rc<Packed>),
    /// Each position to itself only, so the context is its value and queries and keys do not matter.
    Alone,
    /// To the keys where the mask (bool, `[B, 1, 1, L]` or broadcastable to `[B, heads, L, L]`) is true; every query
    /// needs one.
    Masked(&'a Tensor),
}

/// Packed sequences, shortest first, as the GPU's kernels want them.
#[derive(Debug)]
pub struct Packed {
    /// Tokens that are a sequence of their own.
    alone: i64,
    /// The sequences behind them.
    rest: SequenceBounds,
}

/// A dense layer's weight `[out, in]` and bias `[out]`.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
}

/// A layer norm's scale and shift, both `[D]`.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
}

/// The weights of one layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeights<'a> {
    pub query: Linear<'a>,
    pub key: Linear<'a>,
    pub value: Linear<'a>,
    pub attention_output: Linear<'a>,
    pub attention_norm: LayerNorm<'a>,
    pub intermediate: Linear<'a>,
    pub output: Linear<'a>,
    pub output_norm: LayerNorm<'a>,
}

/// What is the same for all layers of a pass.
#[derive(Clone, Copy, Debug)]
pub struct LayerForward {
    pub heads: i64,
    /// Added to the variance in layer norms.
    pub eps: f64,
    /// On attention weights, attention output and feed-forward output; only if `train`.
    pub dropout: f64,
    pub train: bool,
    pub precision: Precision,
}

impl<'a> LayerWeights<'a> {
    /// Finds the weights below `prefix` (for example `summary_encoder.layer.0`) by their Hugging Face names.
    ///
    /// # Errors
    /// The first error of `find`, which is asked once for each name.
    pub fn find<E>(prefix: &str, find: impl Fn(&str) -> Result<&'a Tensor, E>) -> Result<Self, E> {
        let pair = |name: &str| -> Result<_, E> {
            Ok((find(&format!("{prefix}.{name}.weight"))?, find(&format!("{prefix}.{name}.bias"))?))
        };
        let linear = |name: &str| pair(name).map(|(weight, bias)| Linear { weight, bias });
        let norm = |name: &str| pair(name).map(|(weight, bias)| LayerNorm { weight, bias });
        Ok(Self {
            query: linear("attention.self.query")?,
            key: linear("attention.self.key")?,
            value: linear("attention.self.value")?,
            attention_output: linear("attention.output.dense")?,
            attention_norm: norm("attention.output.LayerNorm")?,
            intermediate: linear("intermediate.dense")?,
            output: linear("output.dense")?,
            output_norm: norm("output.LayerNorm")?,
        })
    }
}

impl Linear<'_> {
    /// `x W^T + b` for `x` of any floating kind, in the precision's kind or in the weight's; the result has that kind. A
    /// processor that multiplies bf16 slowly does it in f32 and rounds the result.
    pub fn forward(&self, x: &Tensor, precision: Precision) -> Tensor {
        let kind = learn_torch::product_kind(precision).unwrap_or_else(|| self.weight.kind());
        let multiplied = multiplied_kind(kind, x.device());
        let cast = |tensor: &Tensor| tensor.to_kind(multiplied);
        cast(x).linear(&cast(self.weight), Some(cast(self.bias))).to_kind(kind)
    }
}

impl Packed {
    /// Of these runs, on the device; `None` where there are no such kernels for heads of this width and `kind`.
    #[must_use]
    pub fn new(runs: &[Run], device: Device, (kind, width): (Kind, i64)) -> Option<Self> {
        let fits = runs.iter().map(|run| run.count).sum::<usize>() <= MOST_SEQUENCES;
        (fits && learn_torch::can_pack(device, kind, width)).then(|| Self::on(device, runs))
    }

    fn on(device: Device, runs: &[Run]) -> Self {
        let alone = runs.iter().take_while(|run| run.length == 1).map(|run| run.tokens()).sum::<usize>();
        let lengths = runs.iter().filter(|run| run.length > 1);
        let lengths = lengths.flat_map(|run| std::iter::repeat_n(run.length as i32, run.count));
        let mut bounds = vec![0];
        bounds.extend(lengths.scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        let longest = runs.iter().map(|run| run.length as i64).max().unwrap_or(0);
        Self { alone: alone as i64, rest: SequenceBounds { bounds: learn_torch::on_device(&bounds, device), longest } }
    }
}

impl LayerNorm<'_> {
    fn forward(&self, x: &Tensor, eps: f64) -> Tensor {
        x.layer_norm(self.weight.size(), Some(self.weight), Some(self.bias), eps, true)
    }
}

/// Hidden states after one layer: `[.., D]` to `[.., D]`.
pub fn layer(weights: &LayerWeights, x: &Tensor, attention: &Attention, forward: &LayerForward) -> Tensor {
    layer_at(None, weights, x, attention, forward)
}

/// The same for these rows `[R]` i64 alone of packed sequences, `[R, D]`: what follows attention is computed for no other.
pub(crate) fn layer_at(
    rows: Option<&Tensor>,
    weights: &LayerWeights,
    x: &Tensor,
    attention: &Attention,
    forward: &LayerForward,
) -> Tensor {
    let after = |dense: Tensor, residual: &Tensor, norm: &LayerNorm| {
        let dropped = dense.dropout(forward.dropout, forward.train).to_kind(residual.kind());
        norm.forward(&(dropped + residual), forward.eps)
    };
    let wanted = |all: &Tensor| match rows {
        Some(rows) => all.index_select(0, rows),
        None => all.shallow_clone(),
    };
    let context = wanted(&context(weights, x, attention, forward));
    let attended = weights.attention_output.forward(&context, forward.precision);
    let attended = after(attended, &wanted(x), &weights.attention_norm);
    let wide = weights.intermediate.forward(&attended, forward.precision).gelu("none");
    let narrow = weights.output.forward(&wide, forward.precision);
    after(narrow, &attended, &weights.output_norm)
}

/// The heads' weighted values, side by side: `[.., D]`.
fn context(weights: &LayerWeights, x: &Tensor, attention: &Attention, forward: &LayerForward) -> Tensor {
    let product = |part: &Linear| part.forward(x, forward.precision);
    let parts = || (product(&weights.query), product(&weights.key), product(&weights.value));
    match attention {
        _ if x.numel() == 0 => product(&weights.value),
        // One key has weight 1. Dropping that weight would erase the item instead of thinning its context.
        Attention::Alone => product(&weights.value),
        Attention::Masked(mask) => {
            let (query, key, value) = parts();
            attend(forward, (&query, &key, &value), Some(*mask))
        }
        Attention::Packed(packed) => packed_context(weights, x, packed, forward, |parts, dropout| {
            let attended = learn_torch::packed_attention(parts, &packed.rest, dropout);
            // as the binding's own operators do
            attended.unwrap_or_else(|error| panic!("{error}"))
        }),
        Attention::Causal(runs) => {
            let (query, key, value) = parts();
            let parts = blocks(&query, runs).zip(blocks(&key, runs)).zip(blocks(&value, runs));
            let attended = parts.map(|(((query, run), (key, _)), (value, _))| match run.length {
                1 => value.flatten(0, 1),
                _ => attend(forward, (&query, &key, &value), None).flatten(0, 1),
            });
            Tensor::cat(&attended.collect::<Vec<_>>(), 0)
        }
    }
}

/// The context `[T, D]` of packed sequences: `attend` gives that of the longer ones, of query, key and value
/// `[T', heads, D / heads]`. Queries, keys and values are one product.
fn packed_context(
    weights: &LayerWeights,
    x: &Tensor,
    packed: &Packed,
    forward: &LayerForward,
    attend: impl Fn((&Tensor, &Tensor, &Tensor), f64) -> Tensor,
) -> Tensor {
    let parts = [&weights.query, &weights.key, &weights.value];
    let weight = Tensor::cat(&parts.map(|part| part.weight), 0);
    let bias = Tensor::cat(&parts.map(|part| part.bias), 0);
    let all = Linear { weight: &weight, bias: &bias }.forward(x, forward.precision);
    let (tokens, width) = (x.size()[0], x.size()[1]);
    // one key has weight 1, as where each position is alone
    let alone = all.narrow(0, 0, packed.alone).narrow(1, 2 * width, width);
    if packed.alone == tokens {
        return alone.contiguous();
    }
    let rest = all.narrow(0, packed.alone, tokens - packed.alone).view([-1, 3, forward.heads, width / forward.heads]);
    // their gradients come together in one piece
    let parts = rest.unbind(1);
    let dropout = if forward.train { forward.dropout } else { 0.0 };
    let attended = attend((&parts[0], &parts[1], &parts[2]), dropout).reshape([-1, width]);
    match packed.alone {
        0 => attended,
        _ => Tensor::cat(&[alone, attended], 0),
    }
}

/// The blocks `[count, length, ..]` of `x` `[T, ..]`, and their runs. The gradient of all is put together in one piece.
pub(crate) fn blocks<'a>(x: &Tensor, runs: &'a [Run]) -> impl Iterator<Item = (Tensor, &'a Run)> {
    let sizes: Vec<i64> = runs.iter().map(|run| run.tokens() as i64).collect();
    let block = |(part, run): (Tensor, &'a Run)| (part.unflatten(0, [run.count as i64, run.length as i64]), run);
    x.split_with_sizes(sizes, 0).into_iter().zip(runs).map(block)
}

/// Attention over a block `[B, L, D]`, causal without a mask.
fn attend(forward: &LayerForward, parts: (&Tensor, &Tensor, &Tensor), mask: Option<&Tensor>) -> Tensor {
    let size = parts.0.size();
    // [B, L, D] -> [B, heads, L, D / heads]
    let split = |x: &Tensor| x.view([size[0], size[1], forward.heads, -1]).transpose(1, 2);
    let (query, key, value) = (split(parts.0), split(parts.1), split(parts.2));
    let dropout = if forward.train { forward.dropout } else { 0.0 };
    Tensor::scaled_dot_product_attention(&query, &key, &value, mask, dropout, mask.is_none(), None, false)
        .transpose(1, 2)
        .reshape(size)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::{Device, Kind};

    use super::*;

    const WIDTH: i64 = 12;
    const HEADS: i64 = 3;

    fn weights(kind: Kind) -> BTreeMap<String, Tensor> {
        tch::manual_seed(5);
        let mut all = BTreeMap::new();
        let shapes = [
            ("attention.self.query", WIDTH, WIDTH),
            ("attention.self.key", WIDTH, WIDTH),
            ("attention.self.value", WIDTH, WIDTH),
            ("attention.output.dense", WIDTH, WIDTH),
            ("attention.output.LayerNorm", WIDTH, 0),
            ("intermediate.dense", 4 * WIDTH, WIDTH),
            ("output.dense", WIDTH, 4 * WIDTH),
            ("output.LayerNorm", WIDTH, 0),
        ];
        for (name, out, input) in shapes {
            let options = (kind, Device::Cpu);
            let weight =
                if input == 0 { Tensor::randn([out], options) } else { Tensor::randn([out, input], options) * 0.4 };
            all.insert(format!("l.{name}.weight"), weight.set_requires_grad(true));
            all.insert(format!("l.{name}.bias"), Tensor::randn([out], options).set_requires_grad(true));
        }
        all
    }

    fn find(all: &BTreeMap<String, Tensor>) -> LayerWeights<'_> {
        LayerWeights::find("l", |name| all.get(name).ok_or_else(|| name.to_owned())).unwrap()
    }

    fn settings(dropout: f64) -> LayerForward {
        LayerForward { heads: HEADS, eps: 1e-12, dropout, train: dropout > 0.0, precision: Precision::F32 }
    }

    /// Attention spelled out: scores, mask, softmax, weighted sum.
    fn spelled_out(w: &LayerWeights, x: &Tensor, allowed: &Tensor) -> Tensor {
        let (batch, length, head) = (x.size()[0], x.size()[1], WIDTH / HEADS);
        let split =
            |l: &Linear| (x.matmul(&l.weight.tr()) + l.bias).view([batch, length, HEADS, head]).permute([0, 2, 1, 3]);
        let scores = split(&w.query).matmul(&split(&w.key).transpose(-1, -2)) / (head as f64).sqrt();
        let shares = scores.masked_fill(&allowed.logical_not(), f64::NEG_INFINITY).softmax(-1, x.kind());
        let context = shares.matmul(&split(&w.value)).permute([0, 2, 1, 3]).reshape([batch, length, WIDTH]);
        let norm = |x: Tensor, n: &LayerNorm| {
            let centred = &x - x.mean_dim([-1].as_slice(), true, x.kind());
            let variance = centred.square().mean_dim([-1].as_slice(), true, x.kind());
            centred / (variance + 1e-12).sqrt() * n.weight + n.bias
        };
        let dense = |x: &Tensor, l: &Linear| x.matmul(&l.weight.tr()) + l.bias;
        let attended = norm(dense(&context, &w.attention_output) + x, &w.attention_norm);
        let wide = dense(&attended, &w.intermediate);
        let gelu = &wide * 0.5 * ((&wide / 2.0_f64.sqrt()).erf() + 1.0);
        norm(dense(&gelu, &w.output) + &attended, &w.output_norm)
    }

    fn gap(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn every_kind_of_attention_equals_the_spelled_out_one() {
        let all = weights(Kind::Double);
        let w = find(&all);
        let x = Tensor::randn([4, 6, WIDTH], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let causal = Tensor::ones([6, 6], (Kind::Bool, Device::Cpu)).tril(0).view([1, 1, 6, 6]);
        let alone = Tensor::eye(6, (Kind::Bool, Device::Cpu)).view([1, 1, 6, 6]);
        let lengths = Tensor::from_slice(&[6_i64, 1, 4, 3]).view([4, 1, 1, 1]);
        let present = Tensor::arange(6, (Kind::Int64, Device::Cpu)).view([1, 1, 1, 6]).lt_tensor(&lengths);
        let runs = [Run { count: 4, length: 6 }];
        let cases =
            [(Attention::Causal(&runs), &causal), (Attention::Alone, &alone), (Attention::Masked(&present), &present)];
        for (attention, allowed) in cases {
            let packed = if matches!(attention, Attention::Causal(_)) { x.flatten(0, 1) } else { x.shallow_clone() };
            let ours = layer(&w, &packed, &attention, &settings(0.0)).view_as(&x);
            let theirs = spelled_out(&w, &x, allowed);
            assert!(gap(&ours, &theirs) < 1e-12, "{attention:?}");
            let cotangent = Tensor::randn_like(&ours);
            let gradient = |y: &Tensor| {
                let inputs = [&x, w.query.weight, w.key.bias, w.value.weight, w.intermediate.weight];
                // `Alone` has no query: a zero contribution keeps the graph whole
                let tied = inputs.iter().fold(Tensor::from(0.0_f64), |sum, input| sum + input.sum(Kind::Double) * 0.0);
                Tensor::run_backward(&[(y * &cotangent).sum(Kind::Double) + tied], &inputs, true, false)
            };
            for (ours, theirs) in gradient(&ours).iter().zip(gradient(&theirs)) {
                assert!(gap(ours, &theirs) < 1e-10, "{attention:?}");
            }
        }
    }

    #[test]
    fn packed_sequences_do_not_see_each_other() {
        let all = weights(Kind::Double);
        let w = find(&all);
        let runs = [(2, 1), (1, 2), (3, 4)].map(|(count, length)| Run { count, length });
        let x = Tensor::randn([16, WIDTH], (Kind::Double, Device::Cpu));
        let together = layer(&w, &x, &Attention::Causal(&runs), &settings(0.0));
        let mut place = 0;
        for run in runs {
            for _ in 0..run.count {
                let length = run.length as i64;
                let causal =
                    Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).tril(0).view([1, 1, length, length]);
                let own = spelled_out(&w, &x.narrow(0, place, length).unsqueeze(0), &causal).squeeze_dim(0);
                assert!(gap(&own, &together.narrow(0, place, length)) < 1e-12, "{run:?} at {place}");
                place += length;
            }
        }
    }

    #[test]
    fn rows_that_are_wanted_alone_are_what_they_are_among_all() {
        let all = weights(Kind::Double);
        let w = find(&all);
        let runs = [(2, 1), (3, 4)].map(|(count, length)| Run { count, length });
        let x = Tensor::randn([14, WIDTH], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let rows = Tensor::from_slice(&[13_i64, 0, 5, 4]);
        let attention = Attention::Causal(&runs);
        let alone = layer_at(Some(&rows), &w, &x, &attention, &settings(0.0));
        let among = layer(&w, &x, &attention, &settings(0.0)).index_select(0, &rows);
        assert!(gap(&alone, &among) < 1e-12);
        let cotangent = Tensor::randn_like(&alone);
        let inputs = [&x, w.query.weight, w.key.weight, w.attention_output.bias, w.output_norm.weight];
        let gradients = |y: &Tensor| Tensor::run_backward(&[(y * &cotangent).sum(Kind::Double)], &inputs, false, false);
        for (alone, among) in gradients(&alone).iter().zip(gradients(&among)) {
            assert!(gap(alone, &among) < 1e-10);
        }
    }

    #[test]
    fn kernels_for_all_sequences_at_once_are_given_what_the_blocks_are() {
        let all = weights(Kind::Double);
        let w = find(&all);
        for runs in [&[(2, 1), (1, 2), (3, 4)][..], &[(3, 1)], &[(1, 5), (2, 7)]] {
            let runs: Vec<Run> = runs.iter().map(|&(count, length)| Run { count, length }).collect();
            let tokens = runs.iter().map(|run| run.tokens()).sum::<usize>() as i64;
            let x = Tensor::randn([tokens, WIDTH], (Kind::Double, Device::Cpu)).set_requires_grad(true);
            let packed = Packed::on(Device::Cpu, &runs);
            // what the kernels do: causal attention between each two bounds
            let attend = |(query, key, value): (&Tensor, &Tensor, &Tensor), _| {
                let bounds: Vec<i64> = (&packed.rest.bounds.to_kind(Kind::Int64)).try_into().unwrap();
                let parts = bounds.windows(2).map(|two| {
                    let length = two[1] - two[0];
                    assert!((2..=packed.rest.longest).contains(&length));
                    let cut = |x: &Tensor| x.narrow(0, two[0], length).transpose(0, 1).unsqueeze(0);
                    let causal = Tensor::scaled_dot_product_attention::<Tensor>(
                        &cut(query),
                        &cut(key),
                        &cut(value),
                        None,
                        0.0,
                        true,
                        None,
                        false,
                    );
                    causal.squeeze_dim(0).transpose(0, 1)
                });
                Tensor::cat(&parts.collect::<Vec<_>>(), 0)
            };
            let ours = packed_context(&w, &x, &packed, &settings(0.0), attend);
            let blocks = context(&w, &x, &Attention::Causal(&runs), &settings(0.0));
            assert!(gap(&ours, &blocks) < 1e-12, "{runs:?}");
            let inputs = [&x, w.query.weight, w.key.bias, w.value.weight];
            let tied = || inputs.iter().fold(Tensor::from(0.0_f64), |sum, input| sum + input.sum(Kind::Double) * 0.0);
            let cotangent = Tensor::randn_like(&ours);
            let gradients =
                |y: &Tensor| Tensor::run_backward(&[(y * &cotangent).sum(Kind::Double) + tied()], &inputs, true, false);
            for (ours, theirs) in gradients(&ours).iter().zip(gradients(&blocks)) {
                assert!(gap(ours, &theirs) < 1e-10, "{runs:?}");
            }
        }
        assert!(Packed::new(&[], Device::Cpu, (Kind::Float, 64)).is_none(), "there are no such kernels on the CPU");
    }

    #[test]
    fn dropout_thins_in_training_only_and_follows_the_seed() {
        let all = weights(Kind::Float);
        let w = find(&all);
        let x = Tensor::randn([10, WIDTH], (Kind::Float, Device::Cpu));
        let run = |seed, forward: &LayerForward| {
            learn_torch::seed(seed);
            layer(&w, &x, &Attention::Causal(&[Run { count: 2, length: 5 }]), forward)
        };
        assert_eq!(run(1, &settings(0.3)), run(1, &settings(0.3)));
        assert_ne!(run(1, &settings(0.3)), run(2, &settings(0.3)));
        let asleep = LayerForward { train: false, ..settings(0.3) };
        assert_eq!(run(1, &asleep), run(2, &settings(0.0)));
    }

    #[test]
    fn half_precisions_stay_near_f32_and_return_f32() {
        let all = weights(Kind::Float);
        let w = find(&all);
        let x = Tensor::randn([15, WIDTH], (Kind::Float, Device::Cpu));
        let causal = Attention::Causal(&[Run { count: 3, length: 5 }]);
        let full = layer(&w, &x, &causal, &settings(0.0));
        for precision in [Precision::Bf16, Precision::F16] {
            let half = layer(&w, &x, &causal, &LayerForward { precision, ..settings(0.0) });
            assert_eq!(half.kind(), Kind::Float);
            assert!(gap(&full, &half) > 0.0, "{precision:?}");
            let cosine = (&full * &half).sum(Kind::Float) / (full.norm() * half.norm());
            assert!(cosine.double_value(&[]) > 0.999, "{precision:?}");
        }
    }

    #[test]
    fn nothing_goes_in_and_nothing_comes_out() {
        let all = weights(Kind::Float);
        for shape in [[0, 5, WIDTH], [3, 0, WIDTH], [0, 0, WIDTH]] {
            let x = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
            let mask = Tensor::ones([shape[0], 1, 1, shape[1]], (Kind::Bool, Device::Cpu));
            for attention in [Attention::Causal(&[]), Attention::Alone, Attention::Masked(&mask)] {
                assert_eq!(layer(&find(&all), &x, &attention, &settings(0.1)).size(), shape);
            }
        }
    }

    #[test]
    fn a_missing_weight_is_named() {
        let mut all = weights(Kind::Float);
        all.remove("l.output.dense.bias");
        let error = LayerWeights::find("l", |name| all.get(name).ok_or_else(|| name.to_owned())).unwrap_err();
        assert_eq!(error, "l.output.dense.bias");
    }
}
