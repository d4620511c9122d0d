//! Checks an encoder against the vectors that Hugging Face's transformers gave the same texts in f32 on a CPU.
//!
//! Input: a model with `texts.json` and `expected.safetensors` (tensor `rows`, `[texts, D]`), beside it or elsewhere; the
//! generators lie in `tests/golden`. Output: how far our vectors lie from those.

use std::path::{Path, PathBuf};

use tch::Device;

use crate::encoder::{EncoderError, EncoderSettings, LocalEncoder, ModelDirectory, TextEncoder};

/// A model, texts, and their vectors.
#[derive(Clone, Debug)]
pub struct Case {
    pub model: PathBuf,
    pub texts: PathBuf,
    pub expected: PathBuf,
}

/// How far the vectors of all texts lie from the expected ones.
#[derive(Clone, Copy, Debug)]
pub struct Distance {
    /// Largest difference of two numbers.
    pub largest: f64,
    /// Largest cosine distance of two vectors.
    pub cosine: f64,
}

impl Case {
    /// A folder with model, texts and vectors.
    #[must_use]
    pub fn of(folder: &Path) -> Self {
        let (texts, expected) = (folder.join("texts.json"), folder.join("expected.safetensors"));
        Self { model: folder.to_owned(), texts, expected }
    }

    /// Encodes the texts and compares.
    ///
    /// # Errors
    /// A file cannot be read or does not belong to the others, or the encoder fails.
    pub fn check(&self, settings: EncoderSettings, device: Device) -> Result<Distance, EncoderError> {
        let encoder = LocalEncoder::load(ModelDirectory::open(&self.model)?, settings, device)?;
        let text =
            std::fs::read(&self.texts).map_err(|source| EncoderError::Read { path: self.texts.clone(), source })?;
        let texts: Vec<String> = serde_json::from_slice(&text).map_err(|error| invalid(&self.texts, &error))?;
        let rows = encoder.encode(&texts, &mut |_| ())?.rows;
        let expected = self.rows()?;
        if rows.len() != expected.len() {
            return Err(invalid(&self.expected, &format!("{} values instead of {}", expected.len(), rows.len())));
        }
        Ok(Distance::between(&rows, &expected, encoder.dim()))
    }

    fn rows(&self) -> Result<Vec<f32>, EncoderError> {
        let tensors = learn_model::safetensors::read(&self.expected)?;
        let rows = tensors.iter().find(|(name, _)| name == "rows");
        let (_, rows) = rows.ok_or_else(|| invalid(&self.expected, &"there is no tensor rows"))?;
        Ok(learn_torch::to_host(rows)?)
    }
}

impl Distance {
    /// Between rows `[n, dim]`; a NaN is the farthest there is.
    fn between(ours: &[f32], theirs: &[f32], dim: usize) -> Self {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let apart = |(a, b)| 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        let differences = ours.iter().zip(theirs).map(|(a, b)| f64::from((a - b).abs()));
        Self {
            largest: largest(differences),
            cosine: largest(ours.chunks_exact(dim).zip(theirs.chunks_exact(dim)).map(apart)),
        }
    }
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |largest, value| if value.is_nan() { f64::INFINITY } else { largest.max(value) })
}

fn invalid(path: &Path, problem: &dyn std::fmt::Display) -> EncoderError {
    EncoderError::Invalid { path: path.to_owned(), problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_farthest_number_and_row_count() {
        let found = Distance::between(&[1.0, 0.0, 3.0, 4.0], &[1.0, 0.0, 4.0, 3.0], 2);
        assert_eq!(found.largest, 1.0);
        assert!((found.cosine - 0.04).abs() < 1e-12, "{}", found.cosine);
        assert_eq!(Distance::between(&[f32::NAN, 0.0], &[1.0, 0.0], 2).largest, f64::INFINITY);
        assert_eq!(Distance::between(&[0.0, 0.0], &[1.0, 0.0], 2).cosine, f64::INFINITY);
    }
}
