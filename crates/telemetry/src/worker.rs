//! Metrics of one rank.

use std::time::Duration;

use learn_domain::Phase;
use prometheus::{Counter, Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge};

use crate::exposition::Exposition;
use crate::names;

/// Handles of a worker's metrics; see [`names`] for their meaning.
#[derive(Clone, Debug)]
pub struct WorkerMetrics {
    pub exposition: Exposition,
    pub loss: Gauge,
    /// Label `part`.
    pub loss_parts: GaugeVec,
    pub accuracy: Gauge,
    pub learning_rate: Gauge,
    pub gradient_norm: Gauge,
    pub users_total: IntCounter,
    pub tokens_total: IntCounter,
    pub alignment: Gauge,
    /// Label `tower`.
    pub uniformity: GaugeVec,
    pub model_flops_total: IntCounter,
    pub peak_flops_per_second: Gauge,
    /// Label `phase`, one of [`Phase::STEP`].
    pub phase_seconds: HistogramVec,
    pub prefetched_steps: IntGauge,
    pub prefetch_depth: IntGauge,
    /// Label `source`.
    pub received_bytes_total: IntCounterVec,
    pub padding_share: Gauge,
    pub checkpoint_seconds: Histogram,
    pub step: IntGauge,
    pub generation: IntGauge,
    pub cache_hits_total: IntCounter,
    pub cache_neighbour_rows_total: IntCounter,
    pub cache_misses_total: IntCounter,
    pub device_cache_hits_total: IntCounter,
    pub collective_bytes_total: IntCounter,
    pub collective_seconds_total: Counter,
    /// Label `kind`.
    pub gpu_memory_bytes: GaugeVec,
}

impl WorkerMetrics {
    /// Metrics with a registry of their own; the rank follows with `exposition.set_label("rank", …)`.
    #[must_use]
    pub fn new() -> Self {
        let exposition = Exposition::new();
        let e = &exposition;
        let metrics = Self {
            loss: e.gauge(&names::WORKER_LOSS),
            loss_parts: e.gauge_vec(&names::WORKER_LOSS_PART),
            accuracy: e.gauge(&names::WORKER_ACCURACY),
            learning_rate: e.gauge(&names::WORKER_LEARNING_RATE),
            gradient_norm: e.gauge(&names::WORKER_GRADIENT_NORM),
            users_total: e.counter(&names::WORKER_USERS),
            tokens_total: e.counter(&names::WORKER_TOKENS),
            alignment: e.gauge(&names::WORKER_ALIGNMENT),
            uniformity: e.gauge_vec(&names::WORKER_UNIFORMITY),
            model_flops_total: e.counter(&names::WORKER_MODEL_FLOPS),
            peak_flops_per_second: e.gauge(&names::WORKER_PEAK_FLOPS),
            phase_seconds: e.histogram_vec(&names::WORKER_PHASE),
            prefetched_steps: e.int_gauge(&names::WORKER_PREFETCHED),
            prefetch_depth: e.int_gauge(&names::WORKER_PREFETCH_DEPTH),
            received_bytes_total: e.counter_vec(&names::WORKER_RECEIVED),
            padding_share: e.gauge(&names::WORKER_PADDING),
            checkpoint_seconds: e.histogram(&names::WORKER_CHECKPOINT),
            step: e.int_gauge(&names::WORKER_STEP),
            generation: e.int_gauge(&names::WORKER_GENERATION),
            cache_hits_total: e.counter(&names::WORKER_CACHE_HITS),
            cache_neighbour_rows_total: e.counter(&names::WORKER_CACHE_NEIGHBOUR),
            cache_misses_total: e.counter(&names::WORKER_CACHE_MISSES),
            device_cache_hits_total: e.counter(&names::WORKER_DEVICE_CACHE_HITS),
            collective_bytes_total: e.counter(&names::WORKER_COLLECTIVE),
            collective_seconds_total: e.float_counter(&names::WORKER_COLLECTIVE_SECONDS),
            gpu_memory_bytes: e.gauge_vec(&names::WORKER_GPU_MEMORY),
            exposition: exposition.clone(),
        };
        for phase in Phase::STEP {
            metrics.phase_seconds.with_label_values(&[phase.as_str()]);
        }
        metrics
    }

    /// A step spent `duration` in `phase`.
    pub fn observe(&self, phase: Phase, duration: Duration) {
        self.phase_seconds.with_label_values(&[phase.as_str()]).observe(duration.as_secs_f64());
    }
}

impl Default for WorkerMetrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_carry_the_rank_once_it_is_known() {
        let metrics = WorkerMetrics::new();
        metrics.loss.set(2.5);
        assert!(metrics.exposition.render().contains("\nlearn_worker_loss_nats 2.5\n"));
        metrics.exposition.set_label("rank", 0);
        metrics.exposition.set_label("rank", 1);
        metrics.observe(Phase::Gather, Duration::from_millis(2));
        let text = metrics.exposition.render();
        assert!(text.contains(r#"learn_worker_loss_nats{rank="1"} 2.5"#), "{text}");
        assert!(text.contains(r#"learn_worker_phase_seconds_count{phase="gather",rank="1"} 1"#), "{text}");
        assert!(text.contains(r#"learn_worker_phase_seconds_count{phase="reduce",rank="1"} 0"#), "{text}");
    }
}
