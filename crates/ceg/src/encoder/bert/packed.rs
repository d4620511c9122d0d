//! The layers over packed texts, on the CPU: no padded token, no mask.
//!
//! Input: hidden states `[T, D]` of texts that lie one behind the other, those of equal length side by side ([`Run`]s), so
//! that attention takes a run at once as a dense `[count, length]` block. Output: the last layer's, f32. Invariants:
//! queries, keys and values are one product; a text's states depend on no other text (rounding aside). With bf16 or f16 the
//! products and the attention have that kind; layer norms, residuals and the softmax's statistics stay f32.

use learn_domain::packing::Run;
use tch::{Kind, Tensor};

use crate::encoder::EncoderError;
use crate::encoder::weights::Weights;

/// Rows of the feed-forward part that are worked on at once: what lies between its products stays in the cache.
const ROWS: i64 = 1024;

/// A dense layer.
struct Dense {
    /// `[out, in]`
    weight: Tensor,
    /// `[out]`
    bias: Tensor,
}

/// A layer norm's scale and shift, both `[D]`.
struct Norm {
    scale: Tensor,
    shift: Tensor,
}

struct Layer {
    /// Queries, keys and values below each other.
    parts: Dense,
    context: Dense,
    context_norm: Norm,
    wide: Dense,
    narrow: Dense,
    norm: Norm,
}

/// All layers.
pub(super) struct PackedLayers {
    layers: Vec<Layer>,
    heads: i64,
    epsilon: f64,
}

impl PackedLayers {
    /// Takes the layers' weights out of those of a model.
    pub(super) fn take(weights: &mut Weights, layers: usize, heads: usize, epsilon: f64) -> Result<Self, EncoderError> {
        let layer = |number: usize| -> Result<Layer, EncoderError> {
            let at = format!("encoder.layer.{number}");
            let mut pair = |name: &str| -> Result<_, EncoderError> {
                Ok((weights.take(&format!("{at}.{name}.weight"))?, weights.take(&format!("{at}.{name}.bias"))?))
            };
            let parts = ["query", "key", "value"].map(|part| pair(&format!("attention.self.{part}")));
            let parts = parts.into_iter().collect::<Result<Vec<_>, _>>()?;
            let (matrices, biases): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
            let mut dense = |name: &str| pair(name).map(|(weight, bias)| Dense { weight, bias });
            let (context, wide, narrow) =
                (dense("attention.output.dense")?, dense("intermediate.dense")?, dense("output.dense")?);
            let mut norm = |name: &str| pair(name).map(|(scale, shift)| Norm { scale, shift });
            let (context_norm, norm) = (norm("attention.output.LayerNorm")?, norm("output.LayerNorm")?);
            let parts = Dense { weight: Tensor::f_cat(&matrices, 0)?, bias: Tensor::f_cat(&biases, 0)? };
            Ok(Layer { parts, context, context_norm, wide, narrow, norm })
        };
        let layers = (0..layers).map(layer).collect::<Result<_, _>>()?;
        Ok(Self { layers, heads: heads as i64, epsilon })
    }

    /// Hidden states `[T, D]` f32 after the last layer, from those before the first.
    pub(super) fn forward(&self, embedded: Tensor, runs: &[Run]) -> Result<Tensor, EncoderError> {
        self.layers.iter().try_fold(embedded, |hidden, layer| self.layer(layer, &hidden, runs))
    }

    fn layer(&self, layer: &Layer, x: &Tensor, runs: &[Run]) -> Result<Tensor, EncoderError> {
        let context = self.attend(&layer.parts.of(x)?, runs)?;
        let attended = self.norm(&layer.context_norm, layer.context.of(&context)?, x)?;
        let mut after = Vec::new();
        for rows in attended.f_split(ROWS, 0)? {
            let mut wide = layer.wide.of(&rows)?;
            let wide = wide.f_gelu_("none")?;
            after.push(self.norm(&layer.norm, layer.narrow.of(&wide)?, &rows)?);
        }
        Ok(Tensor::f_cat(&after, 0)?)
    }

    /// The heads' weighted values side by side, `[T, D]`, from queries, keys and values `[T, 3 D]`.
    fn attend(&self, parts: &Tensor, runs: &[Run]) -> Result<Tensor, EncoderError> {
        let (tokens, width) = parts.size2()?;
        let width = width / 3;
        let context = Tensor::f_empty([tokens, width], (parts.kind(), parts.device()))?;
        let sizes: Vec<i64> = runs.iter().map(|run| run.tokens() as i64).collect();
        let blocks = parts
            .f_split_with_sizes(sizes.as_slice(), 0)?
            .into_iter()
            .zip(context.f_split_with_sizes(sizes.as_slice(), 0)?);
        for ((parts, context), run) in blocks.zip(runs) {
            let (count, length) = (run.count as i64, run.length as i64);
            let head = width / self.heads;
            // [count, length, 3, heads, D / heads] -> three of [count, heads, length, D / heads]
            let split = parts.f_view([count, length, 3, self.heads, head])?.f_permute([2, 0, 3, 1, 4])?;
            let [query, key, value] = [0, 1, 2].map(|part| split.f_select(0, part));
            let mixed = Tensor::f_scaled_dot_product_attention(
                &query?,
                &key?,
                &value?,
                None::<&Tensor>,
                0.0,
                false,
                None,
                false,
            )?;
            context.f_view([count, length, self.heads, head])?.f_copy_(&mixed.f_transpose(1, 2)?)?;
        }
        Ok(context)
    }

    /// Layer norm of a product and the residual, f32.
    fn norm(&self, norm: &Norm, product: Tensor, residual: &Tensor) -> Result<Tensor, EncoderError> {
        let sum = product.f_to_kind(Kind::Float)?.f_add_(residual)?;
        Ok(sum.f_layer_norm(norm.scale.size(), Some(&norm.scale), Some(&norm.shift), self.epsilon, true)?)
    }
}

impl Dense {
    /// `x W^T + b` in the weight's kind.
    fn of(&self, x: &Tensor) -> Result<Tensor, EncoderError> {
        Ok(x.f_to_kind(self.weight.kind())?.f_linear(&self.weight, Some(&self.bias))?)
    }
}
