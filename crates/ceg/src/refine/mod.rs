//! Content embeddings made fit for recommending, before any training.
//!
//! Input: the raw content embeddings of a dataset and, for smoothing, its training sequences. Output: rows of the same
//! dimension and order: [`whiten`], then [`smooth`], `x_i = normalise(c_i + smoothing * sum_j K_ij c_j)` over the unit-length
//! whitened rows `c`. Off by default: the published model takes the language model's vectors as they are. Items without
//! training interactions keep their own content. Held-out interactions are never looked at.

pub mod smooth;
pub mod whiten;

use std::ops::Range;
use std::path::Path;

use half::f16;
use learn_dataset::embeddings::Embeddings;
use learn_dataset::{Dataset, DatasetError};
use learn_domain::config::RefineConfig;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use self::smooth::{Cooccurrence, Neighbour};
use self::whiten::Whitening;
use crate::vectors::VectorError;
use crate::vectors::spool::Spool;

/// Entries of the co-occurrence graph in memory at once (24 bytes each).
const ENTRIES: usize = 1 << 25;

/// What is wrong with a row that whitening leaves without a direction.
pub(crate) const NOTHING: &str =
    "has nothing left once what all items share is taken out; set embed.refine.whitening = false";

/// Content embeddings cannot be refined.
#[derive(Debug, thiserror::Error)]
pub enum RefineError {
    #[error("all content embeddings are the same, so there is nothing to whiten; set embed.refine.whitening = false")]
    NoSpread,
    #[error("the row of item index {0}, counted from 0 in items/*.parquet, {NOTHING}")]
    Nothing(usize),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Vectors(#[from] VectorError),
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    #[error(transparent)]
    Device(#[from] learn_torch::TorchError),
}

/// The refinement of one dataset.
pub struct Refinement<'a> {
    base: Base<'a>,
    smoothing: Option<Smoothing<'a>>,
}

/// Raw rows, and what makes them base rows.
struct Base<'a> {
    raw: &'a Embeddings,
    whitening: Option<Whitening>,
}

struct Smoothing<'a> {
    graph: Cooccurrence<'a>,
    strength: f32,
    /// Base rows of all items.
    spool: Spool,
    /// Neighbours of the items of the latest range.
    known: (Range<usize>, Vec<Vec<Neighbour>>),
}

impl Base<'_> {
    /// Base rows `[items, D]` at unit length.
    fn rows(&self, items: Range<usize>) -> Result<Vec<f32>, RefineError> {
        let (first, shape) = (items.start, [items.len() as i64, self.raw.dim() as i64]);
        let raw: Vec<f16> = items.flat_map(|item| self.raw.row(item)).copied().collect();
        let mut rows = learn_torch::from_host(&raw, &shape, Device::Cpu)?.to_kind(Kind::Float);
        if let Some(whitening) = &self.whitening {
            rows = whitening.apply(&rows);
        }
        unit(&rows, first)
    }
}

/// Rows at unit length; `first` is the number of the first item.
fn unit(rows: &Tensor, first: usize) -> Result<Vec<f32>, RefineError> {
    let norms = rows.f_norm_scalaropt_dim(2.0, [-1_i64].as_slice(), true)?;
    let lengths: Vec<f32> = learn_torch::to_host(&norms)?;
    match lengths.iter().position(|&length| length.is_nan() || length < 1e-6) {
        Some(row) => Err(RefineError::Nothing(first + row)),
        None => Ok(learn_torch::to_host(&(rows / norms))?),
    }
}

impl<'a> Refinement<'a> {
    /// Measures a dataset; `scratch` is a directory with room for the rows once more (nothing is left there).
    ///
    /// # Errors
    /// There is nothing to whiten, or reading or keeping rows fails.
    pub fn new(
        dataset: &'a Dataset,
        raw: &'a Embeddings,
        settings: &RefineConfig,
        scratch: &Path,
    ) -> Result<Self, RefineError> {
        let whitening = if settings.whitening { Some(Whitening::measure(raw, settings.shrinkage)?) } else { None };
        let base = Base { raw, whitening };
        let smoothing = if settings.smoothing > 0.0 {
            let spool = Spool::new(scratch, raw.dim())?;
            for first in (0..raw.rows()).step_by(CHUNK) {
                let rows = base.rows(first..raw.rows().min(first + CHUNK))?;
                for (item, row) in (first..).zip(rows.chunks_exact(raw.dim())) {
                    spool.write(item, &row.iter().copied().map(f16::from_f32).collect::<Vec<_>>())?;
                }
            }
            let train = dataset.train();
            let sequences = (0..train.len()).map(|row| train.items(row)).collect();
            let graph = Cooccurrence::measure(sequences, raw.rows(), settings.smoothing_decay);
            Some(Smoothing { graph, strength: settings.smoothing as f32, spool, known: (0..0, Vec::new()) })
        } else {
            None
        };
        Ok(Self { base, smoothing })
    }

    /// Refined rows of these items, one after another; ask in ascending order.
    ///
    /// # Errors
    /// Reading fails, or a row has nothing left.
    pub fn rows(&mut self, items: Range<usize>) -> Result<Vec<f16>, RefineError> {
        let mut rows = self.base.rows(items.clone())?;
        if let Some(smoothing) = &mut self.smoothing {
            smoothing.add(items.clone(), self.base.raw, &mut rows)?;
            let shape = [items.len() as i64, self.base.raw.dim() as i64];
            rows = unit(&learn_torch::from_host(&rows, &shape, Device::Cpu)?, items.start)?;
        }
        Ok(rows.into_iter().map(f16::from_f32).collect())
    }
}

/// Rows in memory at once while base rows are made.
const CHUNK: usize = 4096;

impl Smoothing<'_> {
    fn add(&mut self, items: Range<usize>, raw: &Embeddings, rows: &mut [f32]) -> Result<(), RefineError> {
        self.know(&items, raw.rows());
        let (from, neighbours) = (self.known.0.start, &self.known.1);
        let own = rows.par_chunks_exact_mut(raw.dim()).zip(items);
        own.try_for_each(|(row, item)| {
            for neighbour in &neighbours[item - from] {
                let place = neighbour.item as usize;
                let weight = self.strength * neighbour.weight;
                for (sum, value) in row.iter_mut().zip(self.spool.read(place..place + 1)?) {
                    *sum += weight * value.to_f32();
                }
            }
            Ok(())
        })
    }

    /// Makes the neighbours of `items` known, together with as many later ones as memory allows.
    fn know(&mut self, items: &Range<usize>, all: usize) {
        if self.known.0.start <= items.start && items.end <= self.known.0.end {
            return;
        }
        let groups = self.graph.entries().div_ceil(ENTRIES).max(1);
        let end = all.min(items.end.max(items.start + all.div_ceil(groups)));
        // item indices are u32 everywhere
        self.known = (items.start..end, self.graph.neighbours(items.start as u32..end as u32));
    }
}
