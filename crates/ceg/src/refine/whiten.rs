//! Whitening: content embeddings whose directions all count alike.
//!
//! A text encoder puts much of every vector into a few directions that all items of a catalogue share, so that cosines
//! mostly compare what is common. ZCA whitening (Bell and Sejnowski 1997; for text vectors Su et al., arXiv 2103.15316)
//! takes out the mean and divides by the spread along each principal direction, here with shrinkage towards the mean
//! spread, so that directions without signal are not blown up:
//!
//! `C = Q diag(l) Q^T`, `W = Q diag(1 / sqrt(l + shrinkage * mean(l))) Q^T`, `x -> normalise((x - mean) W)`.

use half::f16;
use learn_dataset::embeddings::Embeddings;
use tch::{Device, Kind, Tensor};

use super::RefineError;

/// Rows that the mean and the covariance are measured on, evenly spread over the catalogue.
const SAMPLE: usize = 1 << 18;
/// Rows in memory at once.
const CHUNK: usize = 4096;

/// The linear map of a catalogue.
pub struct Whitening {
    /// `[D]`
    mean: Tensor,
    /// `[D, D]`, symmetric.
    matrix: Tensor,
}

impl Whitening {
    /// Measures a catalogue.
    ///
    /// # Errors
    /// All rows are the same, or libtorch fails.
    pub fn measure(embeddings: &Embeddings, shrinkage: f64) -> Result<Self, RefineError> {
        let dim = embeddings.dim() as i64;
        let stride = embeddings.rows().div_ceil(SAMPLE).max(1);
        let sample: Vec<usize> = (0..embeddings.rows()).step_by(stride).collect();
        let options = (Kind::Double, Device::Cpu);
        let (mut sum, mut products) = (Tensor::zeros([dim], options), Tensor::zeros([dim, dim], options));
        for items in sample.chunks(CHUNK) {
            let rows: Vec<f16> = items.iter().flat_map(|&item| embeddings.row(item)).copied().collect();
            let rows = learn_torch::from_host(&rows, &[items.len() as i64, dim], Device::Cpu)?.to_kind(Kind::Double);
            sum += rows.sum_dim_intlist([0_i64].as_slice(), false, Kind::Double);
            products += rows.tr().matmul(&rows);
        }
        let count = sample.len().max(1) as f64;
        let mean = sum / count;
        let covariance = products / count - mean.outer(&mean);
        let (spread, directions) = covariance.f_linalg_eigh("L")?;
        // rounding can push an empty direction below 0; with fewer items than dimensions there are some
        let spread = spread.clamp_min(0.0);
        let some = spread.gt_tensor(&(spread.max() * 1e-9));
        let middle = spread.mean(Kind::Double).double_value(&[]);
        if middle <= f64::EPSILON {
            return Err(RefineError::NoSpread);
        }
        let scale = (spread + shrinkage * middle).rsqrt();
        let scale = scale.where_self(&some, &scale.zeros_like());
        let matrix = (&directions * scale.unsqueeze(0)).matmul(&directions.tr());
        Ok(Self { mean: mean.to_kind(Kind::Float), matrix: matrix.to_kind(Kind::Float) })
    }

    /// Whitened rows `[B, D]`, not normalised.
    pub fn apply(&self, rows: &Tensor) -> Tensor {
        (rows - &self.mean).matmul(&self.matrix)
    }
}
