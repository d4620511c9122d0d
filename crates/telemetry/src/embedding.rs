//! Metrics of an embed job's coordinator.

use prometheus::IntGauge;

use crate::exposition::Exposition;
use crate::names;

/// Handles of an embed job's metrics; see [`names`] for their meaning.
#[derive(Clone, Debug)]
pub struct EmbeddingMetrics {
    pub exposition: Exposition,
    pub planned_rows: IntGauge,
    pub finished_rows: IntGauge,
    pub workers: IntGauge,
}

impl EmbeddingMetrics {
    /// Metrics with a registry of their own.
    #[must_use]
    pub fn new() -> Self {
        let exposition = Exposition::new();
        Self {
            planned_rows: exposition.int_gauge(&names::EMBED_PLANNED),
            finished_rows: exposition.int_gauge(&names::EMBED_FINISHED),
            workers: exposition.int_gauge(&names::EMBED_WORKERS),
            exposition,
        }
    }
}

impl Default for EmbeddingMetrics {
    fn default() -> Self {
        Self::new()
    }
}
