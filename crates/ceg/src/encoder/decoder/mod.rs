//! Decoder families (Llama, Mistral, Qwen2, Qwen3, Baichuan) as encoders: one forward pass, whose differences a
//! [`DecoderShape`] holds.
//!
//! Input: padded token ids `[B, L]`, texts at the left. Output: last hidden states `[B, L, D]` in f32, after the final
//! norm, as transformers' `last_hidden_state`. Each token attends to itself and the earlier ones of its text, so padding
//! at the right needs no mask. Per layer: x + attention(norm x), then x + feed-forward(norm x); queries and keys are
//! turned by their positions (rotary embedding), groups of heads share keys and values, the feed-forward is SwiGLU. With
//! bf16 or f16 the matrices, their products and the attention have that kind; norms, rotation and the residual stream
//! stay f32.

mod rope;
mod shape;

use learn_domain::config::Precision;
use learn_model::multiplied_kind;
use tch::{Device, Kind, Tensor};

pub use self::shape::{DecoderFamily, DecoderShape};
use super::EncoderError;
use super::local::Batch;
use super::weights::{WeightFiles, Weights};

/// Models with a head keep their decoder below this name.
const PREFIXES: [&str; 2] = ["", "model."];

/// A decoder on a device.
pub(super) struct Decoder {
    shape: DecoderShape,
    weights: Weights,
    /// Angle per position, `[width of a head / 2]` f32.
    frequencies: Tensor,
}

/// What the layers of one pass share.
struct Pass {
    /// Rotation by position, `[L, width of a head]` f32.
    cosines: Tensor,
    sines: Tensor,
}

impl Decoder {
    pub(super) fn load(
        shape: DecoderShape,
        files: &WeightFiles,
        precision: Precision,
        device: Device,
    ) -> Result<Self, EncoderError> {
        let weights = Weights::load(files, &PREFIXES, shape.wanted(precision), device)?;
        let frequencies = shape.rope.frequencies(shape.head_width);
        let frequencies = learn_torch::from_host(&frequencies, &[frequencies.len() as i64], device)?;
        Ok(Self { shape, weights, frequencies })
    }

    /// Last hidden states `[B, L, D]`.
    pub(super) fn hidden(&self, batch: &Batch) -> Result<Tensor, EncoderError> {
        let table = self.weights.get("embed_tokens.weight")?;
        let mut hidden = Tensor::f_embedding(table, &batch.ids, -1, false, false)?.f_to_kind(Kind::Float)?;
        let pass = self.pass(batch.ids.size2()?.1)?;
        for layer in 0..self.shape.layers {
            let normed = self.norm(&hidden, &format!("layers.{layer}.input_layernorm"))?;
            hidden = hidden.f_add(&self.attention(layer, &normed, &pass)?)?;
            let normed = self.norm(&hidden, &format!("layers.{layer}.post_attention_layernorm"))?;
            hidden = hidden.f_add(&self.feed_forward(layer, &normed)?)?;
        }
        self.norm(&hidden, "norm")
    }

    fn pass(&self, length: i64) -> Result<Pass, EncoderError> {
        let positions = Tensor::f_arange(length, (Kind::Float, self.frequencies.device()))?;
        let half = positions.f_outer(&self.frequencies)?;
        let angles = Tensor::f_cat(&[&half, &half], -1)?;
        Ok(Pass { cosines: angles.f_cos()?, sines: angles.f_sin()? })
    }

    /// Root-mean-square norm over the last dimension, f32.
    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor, EncoderError> {
        let scale = self.weights.get(&format!("{name}.weight"))?;
        Ok(x.f_rms_norm(scale.size(), Some(scale), self.shape.epsilon)?)
    }

    /// `x W^T`, plus a bias where the family has one, in the matrix's kind.
    fn dense(&self, x: &Tensor, name: &str) -> Result<Tensor, EncoderError> {
        let weight = self.weights.get(&format!("{name}.weight"))?;
        let bias = self.weights.find(&format!("{name}.bias"));
        let kind = multiplied_kind(weight.kind(), weight.device());
        let bias = bias.map(|bias| bias.f_to_kind(kind)).transpose()?;
        let product = x.f_to_kind(kind)?.f_linear(&weight.f_to_kind(kind)?, bias)?;
        Ok(product.f_to_kind(weight.kind())?)
    }

    /// What the heads of a layer add to `[B, L, D]`.
    fn attention(&self, layer: usize, x: &Tensor, pass: &Pass) -> Result<Tensor, EncoderError> {
        let shape = &self.shape;
        let at = format!("layers.{layer}.self_attn");
        let (count, length, _) = x.size3()?;
        let (heads, groups, width) = (shape.heads as i64, shape.key_heads as i64, shape.head_width as i64);
        let (query, key, value) = if shape.packed {
            let packed = self.dense(x, &format!("{at}.W_pack"))?.f_chunk(3, -1)?;
            let [query, key, value] = <[Tensor; 3]>::try_from(packed)
                .map_err(|_| EncoderError::NoTensor(format!("{at}.W_pack in three parts")))?;
            (query, key, value)
        } else {
            let part = |name: &str| self.dense(x, &format!("{at}.{name}_proj"));
            (part("q")?, part("k")?, part("v")?)
        };
        let kind = value.kind();
        // [B, L, heads * width] -> [B, L, heads, width], normed, -> [B, heads, L, width], turned
        let turned = |part: &Tensor, heads: i64, norm: &str| -> Result<Tensor, EncoderError> {
            let mut part = part.f_reshape([count, length, heads, width])?.f_to_kind(Kind::Float)?;
            if shape.head_norms {
                part = self.norm(&part, &format!("{at}.{norm}"))?;
            }
            pass.turn(&part.f_transpose(1, 2)?)?.f_to_kind(kind).map_err(EncoderError::from)
        };
        // Keys and values of a group, once for each of its heads.
        let spread = |part: &Tensor| {
            part.f_unsqueeze(2)?
                .f_expand([count, groups, heads / groups, length, width], false)?
                .f_reshape([count, heads, length, width])
        };
        let query = turned(&query, heads, "q_norm")?;
        let key = spread(&turned(&key, groups, "k_norm")?)?;
        let value = spread(&value.f_reshape([count, length, groups, width])?.f_transpose(1, 2)?)?;
        let window = shape.windows[layer].filter(|&window| window < length);
        let mask = window.map(|window| sliding(length, window, x.device())).transpose()?;
        let context = Tensor::f_scaled_dot_product_attention(
            &query,
            &key,
            &value,
            mask.as_ref(),
            0.0,
            mask.is_none(),
            None,
            false,
        )?;
        let context = context.f_transpose(1, 2)?.f_reshape([count, length, heads * width])?;
        Ok(self.dense(&context, &format!("{at}.o_proj"))?.f_to_kind(Kind::Float)?)
    }

    /// SwiGLU: down(silu(gate x) * up x).
    fn feed_forward(&self, layer: usize, x: &Tensor) -> Result<Tensor, EncoderError> {
        let dense = |x: &Tensor, name: &str| self.dense(x, &format!("layers.{layer}.mlp.{name}_proj"));
        let wide = dense(x, "gate")?.f_silu()?.f_mul(&dense(x, "up")?)?;
        Ok(dense(&wide, "down")?.f_to_kind(Kind::Float)?)
    }
}

impl Pass {
    /// Queries or keys `[B, heads, L, width]`, each turned by its position's angles: the pairs are the two halves.
    fn turn(&self, x: &Tensor) -> Result<Tensor, EncoderError> {
        let half = self.cosines.size2()?.1 / 2;
        let (first, second) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
        let across = Tensor::f_cat(&[&second.f_neg()?, &first], -1)?;
        Ok(x.f_mul(&self.cosines)?.f_add(&across.f_mul(&self.sines)?)?)
    }
}

/// Who attends to whom, `[L, L]` bool: to itself and at most `window - 1` earlier ones.
fn sliding(length: i64, window: i64, device: Device) -> Result<Tensor, EncoderError> {
    Ok(Tensor::f_ones([length, length], (Kind::Bool, device))?.f_tril(0)?.f_triu(1 - window)?)
}
