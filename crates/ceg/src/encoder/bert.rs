//! BERT-family encoders: word, position and token-type embeddings are added and normalised; the layers are the ones of
//! `learn-model`, attending to all tokens of the same text.
//!
//! Input: on a GPU padded token ids `[B, L]`, on the CPU packed ones `[T]`, since there a padded token costs as much as any
//! other. Output: last hidden states, `[B, L, D]` or `[T, D]`, in f32. With bf16 or f16 the layers' matrix products have that
//! kind, while embeddings, layer norms and softmax statistics stay f32.

mod packed;

use learn_domain::config::Precision;
use learn_domain::packing::Run;
use learn_model::bert::{self, Attention, LayerForward, LayerWeights};
use packed::PackedLayers;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::EncoderError;
use super::local::Batch;
use super::weights::{Wanted, WeightFiles, Weights};

/// Models with a head keep their encoder below the family's name.
const PREFIXES: [&str; 3] = ["", "bert.", "roberta."];

/// What `config.json` must say.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    #[serde(default = "bert_token_types")]
    type_vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "bert_activation")]
    hidden_act: String,
    #[serde(default = "bert_epsilon")]
    layer_norm_eps: f64,
    #[serde(default)]
    pad_token_id: usize,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

fn bert_activation() -> String {
    "gelu".into()
}

const fn bert_token_types() -> usize {
    2
}

const fn bert_epsilon() -> f64 {
    1e-12
}

/// The numbers of a BERT-family encoder.
#[derive(Clone, Debug)]
pub struct BertShape {
    pub vocabulary: usize,
    pub hidden: usize,
    layers: usize,
    heads: usize,
    /// Epsilon of the layer norms.
    epsilon: f64,
    /// Width of the feed-forward part.
    intermediate: usize,
    token_types: usize,
    /// Rows of the position table.
    positions: usize,
    /// Number of the first token's position: 0 in BERT, the padding token's id + 1 in RoBERTa and XLM-RoBERTa.
    first_position: usize,
}

impl BertShape {
    /// The shape that a `config.json` describes, for this `model_type`.
    pub(super) fn read(family: &str, config: serde_json::Value) -> Result<Self, String> {
        let config: ConfigFile = serde_json::from_value(config).map_err(|error| error.to_string())?;
        if config.hidden_act != "gelu" {
            return Err(format!("hidden_act is {:?}; only the exact \"gelu\" is implemented", config.hidden_act));
        }
        if let Some(kind) = config.position_embedding_type.as_deref().filter(|&kind| kind != "absolute") {
            return Err(format!("position_embedding_type is {kind:?}; only \"absolute\" is implemented"));
        }
        if config.is_decoder {
            return Err("is_decoder is true; a bidirectional encoder is wanted".into());
        }
        if config.num_attention_heads == 0 || !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return Err(format!(
                "hidden_size {} is not a multiple of num_attention_heads {}",
                config.hidden_size, config.num_attention_heads
            ));
        }
        let shape = Self {
            vocabulary: config.vocab_size,
            hidden: config.hidden_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            epsilon: config.layer_norm_eps,
            intermediate: config.intermediate_size,
            token_types: config.type_vocab_size,
            positions: config.max_position_embeddings,
            first_position: if family == "bert" { 0 } else { config.pad_token_id + 1 },
        };
        if shape.vocabulary == 0 || shape.token_types == 0 || shape.longest() == 0 {
            return Err("vocab_size, type_vocab_size or max_position_embeddings leaves no room for text".into());
        }
        Ok(shape)
    }

    /// Most tokens of a text.
    pub(super) fn longest(&self) -> usize {
        self.positions.saturating_sub(self.first_position)
    }

    fn wanted(&self, precision: Precision) -> Vec<Wanted> {
        let [hidden, wide] = [self.hidden, self.intermediate].map(|size| size as i64);
        let tables = [
            ("word_embeddings", self.vocabulary),
            ("position_embeddings", self.positions),
            ("token_type_embeddings", self.token_types),
        ];
        let mut shapes: Vec<_> =
            tables.map(|(name, rows)| (format!("embeddings.{name}.weight"), vec![rows as i64, hidden])).into();
        let mut pair = |name: String, weight: Vec<i64>| {
            shapes.push((format!("{name}.bias"), vec![weight[0]]));
            shapes.push((format!("{name}.weight"), weight));
        };
        pair("embeddings.LayerNorm".into(), vec![hidden]);
        for layer in 0..self.layers {
            for part in ["self.query", "self.key", "self.value", "output.dense"] {
                pair(format!("encoder.layer.{layer}.attention.{part}"), vec![hidden, hidden]);
            }
            pair(format!("encoder.layer.{layer}.attention.output.LayerNorm"), vec![hidden]);
            pair(format!("encoder.layer.{layer}.intermediate.dense"), vec![wide, hidden]);
            pair(format!("encoder.layer.{layer}.output.dense"), vec![hidden, wide]);
            pair(format!("encoder.layer.{layer}.output.LayerNorm"), vec![hidden]);
        }
        // Matrices of the layers are kept as the products need them; everything else stays f32.
        let kind = |name: &str| {
            let dense = name.starts_with("encoder.") && !name.contains("LayerNorm");
            learn_torch::product_kind(precision).filter(|_| dense).unwrap_or(Kind::Float)
        };
        shapes.into_iter().map(|(name, shape)| Wanted { kind: kind(&name), name, shape }).collect()
    }
}

/// A BERT, RoBERTa or XLM-RoBERTa.
pub(super) struct Bert {
    shape: BertShape,
    /// All, or those that [`Self::packed`] has not taken.
    weights: Weights,
    precision: Precision,
    packed: Option<PackedLayers>,
}

impl Bert {
    pub(super) fn load(
        shape: BertShape,
        files: &WeightFiles,
        precision: Precision,
        device: Device,
    ) -> Result<Self, EncoderError> {
        let weights = Weights::load(files, &PREFIXES, shape.wanted(precision), device)?;
        Ok(Self { shape, weights, precision, packed: None })
    }

    /// Makes it one that takes packed texts.
    pub(super) fn pack(mut self) -> Result<Self, EncoderError> {
        let BertShape { layers, heads, epsilon, .. } = self.shape;
        self.packed = Some(PackedLayers::take(&mut self.weights, layers, heads, epsilon)?);
        Ok(self)
    }

    /// Whether it takes packed texts; else padded ones.
    pub(super) fn packs(&self) -> bool {
        self.packed.is_some()
    }

    /// Last hidden states `[B, L, D]` of padded texts.
    pub(super) fn hidden(&self, batch: &Batch) -> Result<Tensor, EncoderError> {
        let (count, length) = batch.ids.size2()?;
        let positions = self.positions()?.f_narrow(0, 0, length)?;
        let mut hidden = self.embed(&batch.ids, &positions)?;
        let attending = batch.present.f_view([count, 1, 1, length])?;
        let forward = LayerForward {
            heads: self.shape.heads as i64,
            eps: self.shape.epsilon,
            dropout: 0.0,
            train: false,
            precision: self.precision,
        };
        for layer in 0..self.shape.layers {
            let weights = LayerWeights::find(&format!("encoder.layer.{layer}"), |name| self.weights.get(name))?;
            hidden = bert::layer(&weights, &hidden, &Attention::Masked(&attending), &forward);
        }
        Ok(hidden)
    }

    /// Last hidden states `[T, D]` of packed texts, if it takes those: ids `[T]`, the place of each token in its text `[T]`.
    pub(super) fn packed_hidden(&self, ids: &Tensor, places: &Tensor, runs: &[Run]) -> Result<Tensor, EncoderError> {
        let layers = self.packed.as_ref().ok_or_else(|| EncoderError::NoTensor("of packed layers".into()))?;
        let positions = self.positions()?.f_index_select(0, places)?;
        layers.forward(self.embed(ids, &positions)?, runs)
    }

    /// What the places in a text add, by place: `[places, D]`.
    fn positions(&self) -> Result<Tensor, EncoderError> {
        let table = self.weights.get("embeddings.position_embeddings.weight")?;
        Ok(table.f_narrow(0, self.shape.first_position as i64, self.shape.longest() as i64)?)
    }

    /// Word + position + token-type embeddings, normalised: ids `[..]` and what their places add to `[.., D]`.
    fn embed(&self, ids: &Tensor, positions: &Tensor) -> Result<Tensor, EncoderError> {
        let table = |name: &str| self.weights.get(&format!("embeddings.{name}_embeddings.weight"));
        let words = Tensor::f_embedding(table("word")?, ids, -1, false, false)?;
        let kind_of_text = table("token_type")?.f_narrow(0, 0, 1)?;
        let sum = words.f_add(&kind_of_text)?.f_add(positions)?;
        let (scale, shift) =
            (self.weights.get("embeddings.LayerNorm.weight")?, self.weights.get("embeddings.LayerNorm.bias")?);
        Ok(sum.f_layer_norm(scale.size(), Some(scale), Some(shift), self.shape.epsilon, true)?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(family: &str, key: &str, value: serde_json::Value) -> Result<BertShape, String> {
        let mut config = json!({
            "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
            "intermediate_size": 1536, "max_position_embeddings": 514, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
            "position_embedding_type": "absolute", "pad_token_id": 1
        });
        config[key] = value;
        BertShape::read(family, config)
    }

    #[test]
    fn positions_start_where_the_family_starts_them() {
        assert_eq!(read("bert", "pad_token_id", json!(0)).unwrap().longest(), 514);
        assert_eq!(read("xlm-roberta", "pad_token_id", json!(1)).unwrap().longest(), 512);
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        for (key, value, named) in [
            ("hidden_act", json!("gelu_new"), "hidden_act is \"gelu_new\""),
            ("position_embedding_type", json!("relative_key"), "relative_key"),
            ("is_decoder", json!(true), "is_decoder"),
            ("num_attention_heads", json!(7), "multiple of num_attention_heads 7"),
            ("vocab_size", json!(0), "vocab_size"),
            ("vocab_size", json!("many"), "many"),
        ] {
            let error = read("bert", key, value).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
