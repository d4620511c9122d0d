//! The weights of a BERT-family encoder.
//!
//! Input: `model.safetensors` and the settings that say what must be in it. Output: tensors by name on the device; what
//! an encoder does not need (heads, poolers, buffers) is left out. Invariant: every name is there with its shape, so a
//! pass over a loaded model cannot miss one.

use std::collections::BTreeMap;

use learn_domain::config::Precision;
use learn_model::bert::LayerWeights;
use learn_model::safetensors;
use tch::{Device, Kind, Tensor};

use super::{EncoderError, ModelDirectory};

/// Most names that an error lists.
const LISTED: usize = 5;

pub(super) struct Weights {
    tensors: BTreeMap<String, Tensor>,
    epsilon: f64,
    first_position: i64,
}

impl Weights {
    pub(super) fn load(model: &ModelDirectory, precision: Precision, device: Device) -> Result<Self, EncoderError> {
        let path = model.weights();
        let mut found: BTreeMap<String, Tensor> = safetensors::read(&path)?.into_iter().collect();
        let mut tensors = BTreeMap::new();
        let mut wrong = Vec::new();
        for (name, shape) in shapes(model) {
            // Models with a head keep their encoder below the family's name.
            let tensor = ["", "bert.", "roberta."].iter().find_map(|prefix| found.remove(&format!("{prefix}{name}")));
            match tensor {
                None => wrong.push(format!("{name} is missing")),
                Some(tensor) if tensor.size() != shape => {
                    wrong.push(format!("{name} has shape {:?} instead of {shape:?}", tensor.size()));
                }
                Some(tensor) => {
                    let kind = kind_of(&name, precision);
                    tensors.insert(name, tensor.f_to_device(device)?.f_to_kind(kind)?);
                }
            }
        }
        if !wrong.is_empty() {
            let more = wrong.len().saturating_sub(LISTED);
            wrong.truncate(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let problem = format!("does not hold what config.json describes: {}{more}", wrong.join("; "));
            return Err(EncoderError::Invalid { path, problem });
        }
        Ok(Self { tensors, epsilon: model.epsilon, first_position: model.first_position as i64 })
    }

    fn get(&self, name: &str) -> Result<&Tensor, EncoderError> {
        self.tensors.get(name).ok_or_else(|| EncoderError::NoTensor(name.to_owned()))
    }

    /// Word + position + token-type embeddings, normalised: ids `[B, L]` to `[B, L, D]`. Texts start at the left.
    pub(super) fn embed(&self, ids: &Tensor) -> Result<Tensor, EncoderError> {
        let length = ids.size2()?.1;
        let words = Tensor::f_embedding(self.get("embeddings.word_embeddings.weight")?, ids, -1, false, false)?;
        let positions = self.get("embeddings.position_embeddings.weight")?.f_narrow(0, self.first_position, length)?;
        let kind_of_text = self.get("embeddings.token_type_embeddings.weight")?.f_narrow(0, 0, 1)?;
        let sum = words.f_add(&kind_of_text)?.f_add(&positions)?;
        let (scale, shift) = (self.get("embeddings.LayerNorm.weight")?, self.get("embeddings.LayerNorm.bias")?);
        Ok(sum.f_layer_norm(scale.size(), Some(scale), Some(shift), self.epsilon, true)?)
    }

    pub(super) fn layer(&self, number: usize) -> Result<LayerWeights<'_>, EncoderError> {
        LayerWeights::find(&format!("encoder.layer.{number}"), |name| self.get(name))
    }
}

/// Matrices of the layers are kept as the products need them; everything else stays f32.
fn kind_of(name: &str, precision: Precision) -> Kind {
    let dense = name.starts_with("encoder.") && !name.contains("LayerNorm");
    if dense && precision == Precision::Bf16 { Kind::BFloat16 } else { Kind::Float }
}

fn shapes(model: &ModelDirectory) -> Vec<(String, Vec<i64>)> {
    let [hidden, wide] = [model.hidden, model.intermediate].map(|size| size as i64);
    let tables = [
        ("word_embeddings", model.vocabulary),
        ("position_embeddings", model.positions),
        ("token_type_embeddings", model.token_types),
    ];
    let mut shapes: Vec<_> =
        tables.map(|(name, rows)| (format!("embeddings.{name}.weight"), vec![rows as i64, hidden])).into();
    let mut pair = |name: String, weight: Vec<i64>| {
        shapes.push((format!("{name}.bias"), vec![weight[0]]));
        shapes.push((format!("{name}.weight"), weight));
    };
    pair("embeddings.LayerNorm".into(), vec![hidden]);
    for layer in 0..model.layers {
        for part in ["self.query", "self.key", "self.value", "output.dense"] {
            pair(format!("encoder.layer.{layer}.attention.{part}"), vec![hidden, hidden]);
        }
        pair(format!("encoder.layer.{layer}.attention.output.LayerNorm"), vec![hidden]);
        pair(format!("encoder.layer.{layer}.intermediate.dense"), vec![wide, hidden]);
        pair(format!("encoder.layer.{layer}.output.dense"), vec![hidden, wide]);
        pair(format!("encoder.layer.{layer}.output.LayerNorm"), vec![hidden]);
    }
    shapes
}
