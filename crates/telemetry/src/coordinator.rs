//! Metrics of the coordinator: the job, its control calls and its data service.

use prometheus::{Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use crate::age::Age;
use crate::data::DataMetrics;
use crate::exposition::Exposition;
use crate::names;

/// Handles of the coordinator's metrics; see [`names`] for their meaning.
#[derive(Clone, Debug)]
pub struct CoordinatorMetrics {
    pub exposition: Exposition,
    /// Label `state`; [`CoordinatorMetrics::set_state`] keeps exactly one at 1.
    pub job_state: IntGaugeVec,
    pub generation: IntGauge,
    pub workers: IntGauge,
    pub steps_total: IntCounter,
    pub finished_steps: IntGauge,
    pub planned_steps: IntGauge,
    pub step_age_seconds: Age,
    pub epoch: IntGauge,
    pub loss: Gauge,
    /// Labels `split`, `metric`.
    pub evaluation: GaugeVec,
    pub restarts_total: IntCounter,
    pub heartbeats_total: IntCounter,
    /// Label `method`.
    pub rpc_seconds: HistogramVec,
    pub state_write_seconds: Histogram,
    pub workers_joined_total: IntCounter,
    pub data: DataMetrics,
    /// Label `cause`.
    pub worker_lost_total: IntCounterVec,
    pub recovery_seconds: Histogram,
    /// Label `cause`.
    pub stalls_total: IntCounterVec,
    /// Label `of_rank`.
    pub work_ratio: GaugeVec,
    pub checkpoints_total: IntCounter,
    pub checkpoint_age_seconds: Age,
    pub last_checkpoint_step: IntGauge,
    pub checkpoint_failures_total: IntCounter,
    pub checkpoints_skipped_total: IntCounter,
    /// Label `action`.
    pub non_finite_total: IntCounterVec,
    states: &'static [&'static str],
}

impl CoordinatorMetrics {
    /// Metrics with a registry of their own, for a job that can be in one of `states`.
    #[must_use]
    pub fn new(states: &'static [&'static str]) -> Self {
        let exposition = Exposition::new();
        let e = &exposition;
        Self {
            job_state: e.int_gauge_vec(&names::JOB_STATE),
            generation: e.int_gauge(&names::JOB_GENERATION),
            workers: e.int_gauge(&names::JOB_WORKERS),
            steps_total: e.counter(&names::JOB_STEPS),
            finished_steps: e.int_gauge(&names::JOB_FINISHED),
            planned_steps: e.int_gauge(&names::JOB_PLANNED),
            step_age_seconds: e.age(&names::JOB_STEP_AGE),
            epoch: e.int_gauge(&names::JOB_EPOCH),
            loss: e.gauge(&names::JOB_LOSS),
            evaluation: e.gauge_vec(&names::JOB_EVALUATION),
            restarts_total: e.counter(&names::JOB_RESTARTS),
            heartbeats_total: e.counter(&names::JOB_HEARTBEATS),
            rpc_seconds: e.histogram_vec(&names::RPC_SECONDS),
            state_write_seconds: e.histogram(&names::JOB_STATE_WRITE_SECONDS),
            workers_joined_total: e.counter(&names::JOB_WORKERS_JOINED),
            data: DataMetrics::of(e),
            worker_lost_total: e.counter_vec(&names::JOB_WORKERS_LOST),
            stalls_total: e.counter_vec(&names::JOB_STALLS),
            work_ratio: e.gauge_vec(&names::JOB_WORK_RATIO),
            recovery_seconds: e.histogram(&names::JOB_RECOVERY_SECONDS),
            checkpoints_total: e.counter(&names::JOB_CHECKPOINTS),
            checkpoint_age_seconds: e.age(&names::JOB_CHECKPOINT_AGE),
            last_checkpoint_step: e.int_gauge(&names::JOB_LAST_CHECKPOINT),
            checkpoint_failures_total: e.counter(&names::JOB_CHECKPOINT_FAILURES),
            checkpoints_skipped_total: e.counter(&names::JOB_CHECKPOINTS_SKIPPED),
            non_finite_total: e.counter_vec(&names::JOB_NON_FINITE),
            exposition: exposition.clone(),
            states,
        }
    }

    /// The job is in `state` now, and in no other.
    pub fn set_state(&self, state: &str) {
        for known in self.states {
            self.job_state.with_label_values(&[known]).set(i64::from(*known == state));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_job_is_in_one_state() {
        let metrics = CoordinatorMetrics::new(&["gathering", "running"]);
        metrics.set_state("gathering");
        metrics.set_state("running");
        let text = metrics.exposition.render();
        assert!(text.contains(r#"learn_job_state{state="gathering"} 0"#), "{text}");
        assert!(text.contains(r#"learn_job_state{state="running"} 1"#), "{text}");
    }

    #[test]
    fn workers_and_coordinators_expose_every_metric_there_is() {
        let (worker, coordinator) = (crate::WorkerMetrics::new(), CoordinatorMetrics::new(&["running"]));
        worker.received_bytes_total.with_label_values(&["batches"]).inc();
        worker.loss_parts.with_label_values(&["infonce"]).set(1.0);
        worker.uniformity.with_label_values(&["user"]).set(-1.0);
        worker.gpu_memory_bytes.with_label_values(&["used"]).set(1.0);
        coordinator.set_state("running");
        coordinator.step_age_seconds.mark();
        coordinator.checkpoint_age_seconds.mark();
        coordinator.evaluation.with_label_values(&["valid", "mrr"]).set(0.1);
        coordinator.rpc_seconds.with_label_values(&["join"]).observe(0.1);
        coordinator.data.flight_bytes_total.with_label_values(&["rows"]).inc();
        coordinator.worker_lost_total.with_label_values(&["silent"]).inc();
        coordinator.non_finite_total.with_label_values(&["skip"]).inc();
        coordinator.stalls_total.with_label_values(&["data"]).inc();
        coordinator.work_ratio.with_label_values(&["0"]).set(1.0);
        let embedding = crate::EmbeddingMetrics::new();
        let text = worker.exposition.render() + &coordinator.exposition.render() + &embedding.exposition.render();
        let exposed: BTreeSet<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let known: Vec<_> =
            names::ALL.iter().map(|metric| format!("{} {}", metric.name, metric.kind.as_str())).collect();
        assert_eq!(exposed, known.iter().map(String::as_str).collect());
    }
}
