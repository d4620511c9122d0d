//! A frozen model of a directory as a [`TextEncoder`]: tokens, batches, padding and pooling, the same for all families.
//!
//! Input: texts. Output: the mean over a text's tokens (special tokens included, as sentence-transformers does) of the
//! last hidden state, at unit length, in f32. With bf16 or f16 the matrix products have that kind, while norms, softmax
//! statistics, the residual stream and pooling stay f32. Invariant: texts start at the left and padding changes no
//! vector: decoders cannot see it, encoders mask it, and the mean leaves it out. BERT-family encoders on the CPU have none.

use learn_domain::config::Precision;
use learn_domain::packing::Run;
use tch::{Device, Kind, Tensor};

use super::bert::Bert;
use super::decoder::Decoder;
use super::directory::Architecture;
use super::tokens::TextTokens;
use super::{Encoded, EncoderError, ModelDirectory, TextEncoder};
use crate::batch::{self, Layout};

/// How an encoder runs.
#[derive(Clone, Copy, Debug)]
pub struct EncoderSettings {
    /// Longest text in tokens; the model's own limits may be shorter.
    pub max_tokens: usize,
    /// Most tokens of one forward pass, padding included where there is any.
    pub batch_tokens: usize,
    pub precision: Precision,
}

impl EncoderSettings {
    /// A digest of what decides the vectors: the model's files and these settings (but not the batches).
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn fingerprint(&self, model: &ModelDirectory) -> Result<String, EncoderError> {
        let mut hasher = model.digest()?;
        hasher.update(&(self.longest(model) as u64).to_le_bytes());
        hasher.update(match self.precision {
            Precision::F32 => b"f32",
            Precision::Bf16 => b"bf16",
            Precision::F16 => b"f16",
        });
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Longest text of this model in tokens.
    pub(crate) fn longest(&self, model: &ModelDirectory) -> usize {
        self.max_tokens.min(model.longest)
    }
}

/// A frozen model with its tokenizer, on a device.
pub struct LocalEncoder {
    name: String,
    dim: usize,
    fingerprint: String,
    batch_tokens: usize,
    tokens: TextTokens,
    model: Model,
    device: Device,
}

enum Model {
    Bert(Bert),
    Decoder(Decoder),
}

/// Padded token ids.
pub(super) struct Batch {
    /// `[B, L]` i64; padding is 0, an id that exists.
    pub ids: Tensor,
    /// `[B, L]` bool: where there is a token.
    pub present: Tensor,
}

impl LocalEncoder {
    /// Loads the model of a directory onto a device.
    ///
    /// # Errors
    /// A file is damaged, or the weights are not those that `config.json` describes.
    pub fn load(model: ModelDirectory, settings: EncoderSettings, device: Device) -> Result<Self, EncoderError> {
        let fingerprint = settings.fingerprint(&model)?;
        let tokens = TextTokens::load(&model, settings.longest(&model))?;
        let (name, dim) = (model.name(), model.dim());
        let loaded = match model.architecture {
            Architecture::Bert(shape) => {
                let model = Bert::load(shape, &model.weights, settings.precision, device)?;
                // a GPU's threads would be idle in small blocks; on the CPU a padded token costs as much as any other
                Model::Bert(if device == Device::Cpu { model.pack()? } else { model })
            }
            Architecture::Decoder(shape) => {
                Model::Decoder(Decoder::load(shape, &model.weights, settings.precision, device)?)
            }
        };
        Ok(Self { name, dim, fingerprint, batch_tokens: settings.batch_tokens, tokens, model: loaded, device })
    }

    fn batch(&self, texts: &[&[u32]]) -> Result<Batch, EncoderError> {
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or_default();
        let padded = |text: &&[u32]| -> Vec<i64> {
            text.iter().map(|&id| i64::from(id)).chain(std::iter::repeat(0)).take(longest).collect()
        };
        let ids: Vec<i64> = texts.iter().flat_map(padded).collect();
        let lengths: Vec<i64> = texts.iter().map(|text| text.len() as i64).collect();
        let (count, longest) = (texts.len() as i64, longest as i64);
        let ids = learn_torch::from_host(&ids, &[count, longest], self.device)?;
        let lengths = learn_torch::from_host(&lengths, &[count, 1], self.device)?;
        let present = Tensor::f_arange(longest, (Kind::Int64, self.device))?.f_unsqueeze(0)?.f_lt_tensor(&lengths)?;
        Ok(Batch { ids, present })
    }

    /// The last hidden states of a batch, `[B, L, D]` f32; what stands at padding means nothing.
    fn hidden(&self, batch: &Batch) -> Result<Tensor, EncoderError> {
        let hidden = match &self.model {
            Model::Bert(model) => model.hidden(batch)?,
            Model::Decoder(model) => model.hidden(batch)?,
        };
        Ok(hidden.f_to_kind(Kind::Float)?)
    }

    /// The model, if it takes packed texts.
    fn packs(&self) -> Option<&Bert> {
        match &self.model {
            Model::Bert(model) => Some(model).filter(|model| model.packs()),
            Model::Decoder(_) => None,
        }
    }

    /// Sums over the tokens of each text's last hidden states, `[B, D]` f32.
    fn padded_sums(&self, texts: &[&[u32]]) -> Result<Tensor, EncoderError> {
        let batch = self.batch(texts)?;
        let padding = batch.present.f_logical_not()?.f_unsqueeze(-1)?;
        let kept = self.hidden(&batch)?.f_masked_fill(&padding, 0.0)?;
        Ok(kept.f_sum_dim_intlist([1_i64].as_slice(), false, None::<Kind>)?)
    }

    /// The same of texts in order of their lengths, without padding.
    fn packed_sums(&self, model: &Bert, texts: &[&[u32]]) -> Result<Tensor, EncoderError> {
        let ids: Vec<i64> = texts.iter().flat_map(|text| text.iter().map(|&id| i64::from(id))).collect();
        let places: Vec<i64> = texts.iter().flat_map(|text| 0..text.len() as i64).collect();
        let runs: Vec<Run> = texts
            .chunk_by(|a, b| a.len() == b.len())
            .map(|texts| Run { count: texts.len(), length: texts[0].len() })
            .collect();
        let tokens = [ids.len() as i64];
        let ids = learn_torch::from_host(&ids, &tokens, self.device)?;
        let places = learn_torch::from_host(&places, &tokens, self.device)?;
        let hidden = model.packed_hidden(&ids, &places, &runs)?;
        let sizes: Vec<i64> = runs.iter().map(|run| run.tokens() as i64).collect();
        let sum = |(block, run): (&Tensor, &Run)| {
            let block = block.f_view([run.count as i64, run.length as i64, -1])?;
            block.f_sum_dim_intlist([1_i64].as_slice(), false, None::<Kind>)
        };
        let blocks = hidden.f_split_with_sizes(sizes.as_slice(), 0)?;
        Ok(Tensor::f_cat(&blocks.iter().zip(&runs).map(sum).collect::<Result<Vec<_>, _>>()?, 0)?)
    }

    /// Vectors of one batch, `[B, D]` f32.
    fn vectors(&self, texts: &[&[u32]]) -> Result<Tensor, EncoderError> {
        let sum = match self.packs() {
            Some(model) => self.packed_sums(model, texts)?,
            None => self.padded_sums(texts)?,
        };
        // The direction of the mean is that of the sum.
        let norm = sum.f_norm_scalaropt_dim(2.0, [-1_i64].as_slice(), true)?;
        Ok(sum.f_div(&norm.f_clamp_min(f64::MIN_POSITIVE)?)?)
    }
}

impl TextEncoder for LocalEncoder {
    fn name(&self) -> &str {
        &self.name
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn encode(&self, texts: &[String], finished: &mut dyn FnMut(usize)) -> Result<Encoded, EncoderError> {
        let (tokens, cut) = self.tokens.encode(texts)?;
        let lengths: Vec<usize> = tokens.iter().map(Vec::len).collect();
        let dim = self.dim;
        let mut rows = vec![0.0; texts.len() * dim];
        let layout = if self.packs().is_some() { Layout::Packed } else { Layout::Padded };
        for batch in batch::by_length(&lengths, self.batch_tokens, layout) {
            let part: Vec<&[u32]> = batch.iter().map(|&text| tokens[text].as_slice()).collect();
            let vectors: Vec<f32> = learn_torch::to_host(&tch::no_grad(|| self.vectors(&part))?)?;
            for (&text, vector) in batch.iter().zip(vectors.chunks_exact(dim)) {
                rows[text * dim..][..dim].copy_from_slice(vector);
            }
            finished(batch.len());
        }
        Ok(Encoded { rows, cut })
    }
}

#[cfg(test)]
mod tests;
