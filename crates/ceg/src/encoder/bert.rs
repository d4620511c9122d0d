//! BERT-family encoders on libtorch.
//!
//! Input: texts. Output: the mean over a text's tokens (special tokens included, as sentence-transformers does) of the
//! last hidden state, at unit length, in f32. Word, position and token-type embeddings are added and normalised; the
//! layers are the ones of `learn-model`, attending to all tokens of the same text. With bf16 the layers' matrix products
//! are bf16, while embeddings, layer norms, softmax statistics and pooling stay f32.

use learn_domain::config::Precision;
use learn_model::bert::{self, Attention, LayerForward};
use tch::{Device, Kind, Tensor};

use super::tokens::TextTokens;
use super::weights::Weights;
use super::{EncoderError, ModelDirectory, TextEncoder};
use crate::batch;

/// How the encoder runs.
#[derive(Clone, Copy, Debug)]
pub struct BertSettings {
    /// Longest text in tokens; the model's own limits may be shorter.
    pub max_tokens: usize,
    /// Most tokens of one forward pass, padding included.
    pub batch_tokens: usize,
    pub precision: Precision,
}

impl BertSettings {
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
        });
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn longest(&self, model: &ModelDirectory) -> usize {
        self.max_tokens.min(model.longest)
    }
}

/// A frozen BERT or RoBERTa with its tokenizer.
pub struct BertEncoder {
    model: ModelDirectory,
    name: String,
    fingerprint: String,
    settings: BertSettings,
    tokens: TextTokens,
    weights: Weights,
    device: Device,
}

impl BertEncoder {
    /// Loads the encoder of a directory onto a device.
    ///
    /// # Errors
    /// A file is damaged, or the weights are not those that `config.json` describes.
    pub fn load(model: ModelDirectory, settings: BertSettings, device: Device) -> Result<Self, EncoderError> {
        let fingerprint = settings.fingerprint(&model)?;
        let tokens = TextTokens::load(&model, settings.longest(&model))?;
        let weights = Weights::load(&model, settings.precision, device)?;
        Ok(Self { name: model.name(), fingerprint, settings, tokens, weights, device, model })
    }

    /// Vectors of one batch, `[B, D]` f32.
    fn forward(&self, texts: &[&[u32]]) -> Result<Tensor, EncoderError> {
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or_default();
        // Padding is masked and not counted, so any id that exists will do.
        let padded = |text: &&[u32]| -> Vec<i64> {
            text.iter().map(|&id| i64::from(id)).chain(std::iter::repeat(0)).take(longest).collect()
        };
        let ids: Vec<i64> = texts.iter().flat_map(padded).collect();
        let lengths: Vec<i64> = texts.iter().map(|text| text.len() as i64).collect();
        let (count, longest) = (texts.len() as i64, longest as i64);
        let ids = learn_torch::from_host(&ids, &[count, longest], self.device)?;
        let lengths = learn_torch::from_host(&lengths, &[count, 1], self.device)?;
        let present = Tensor::f_arange(longest, (Kind::Int64, self.device))?.f_unsqueeze(0)?.f_lt_tensor(&lengths)?;

        let mut hidden = self.weights.embed(&ids)?;
        let attending = present.f_view([count, 1, 1, longest])?;
        let forward = LayerForward {
            heads: self.model.heads as i64,
            eps: self.model.epsilon,
            dropout: 0.0,
            train: false,
            precision: self.settings.precision,
        };
        for layer in 0..self.model.layers {
            hidden = bert::layer(&self.weights.layer(layer)?, &hidden, &Attention::Masked(&attending), &forward);
        }
        let present = present.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?;
        let sum = hidden.f_to_kind(Kind::Float)?.f_mul(&present)?.f_sum_dim_intlist(
            [1_i64].as_slice(),
            false,
            None::<Kind>,
        )?;
        // The direction of the mean is that of the sum.
        let norm = sum.f_norm_scalaropt_dim(2.0, [-1_i64].as_slice(), true)?;
        Ok(sum.f_div(&norm.f_clamp_min(f64::MIN_POSITIVE)?)?)
    }
}

impl TextEncoder for BertEncoder {
    fn name(&self) -> &str {
        &self.name
    }

    fn dim(&self) -> usize {
        self.model.hidden
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn encode(&self, texts: &[String], finished: &mut dyn FnMut(usize)) -> Result<Vec<f32>, EncoderError> {
        let tokens = self.tokens.encode(texts)?;
        let lengths: Vec<usize> = tokens.iter().map(Vec::len).collect();
        let dim = self.dim();
        let mut rows = vec![0.0; texts.len() * dim];
        for batch in batch::by_length(&lengths, self.settings.batch_tokens) {
            let part: Vec<&[u32]> = batch.iter().map(|&text| tokens[text].as_slice()).collect();
            let vectors: Vec<f32> = learn_torch::to_host(&tch::no_grad(|| self.forward(&part))?)?;
            for (&text, vector) in batch.iter().zip(vectors.chunks_exact(dim)) {
                rows[text * dim..][..dim].copy_from_slice(vector);
            }
            finished(batch.len());
        }
        Ok(rows)
    }
}
