//! What the metrics say of a job.
//!
//! Input: the job, and what happens in it. Output: values of [`CoordinatorMetrics`]. Invariant: a counter that an alert
//! watches is there from the start with each of its labels, so that its first increase is one.

use learn_domain::config::NonFinite;
use learn_domain::event::Happening;
use learn_domain::membership::LossCause;
use learn_domain::progress::Cause;
use learn_domain::report::{Evaluation, StepRecord, Task};
use learn_telemetry::CoordinatorMetrics;

use super::Job;

/// A job was stopped by a worker that said why nobody can go on.
pub(super) const FAILED: &str = "failed";

/// The job as this coordinator finds it: new, resumed or taken over.
pub(super) fn begin(metrics: &CoordinatorMetrics, job: &Job) {
    for cause in LossCause::LABELS.into_iter().chain([FAILED]) {
        metrics.worker_lost_total.with_label_values(&[cause]);
    }
    for cause in Cause::ALL {
        metrics.stalls_total.with_label_values(&[&cause.to_string()]);
    }
    for action in NonFinite::ALL {
        metrics.non_finite_total.with_label_values(&[&action.to_string()]);
    }
    metrics.restarts_total.inc_by(job.restarts().into());
    // alerts tell a training from an evaluation by it
    let planned = match job.settings.task {
        Task::Train { .. } => job.settings.total_steps,
        Task::Evaluate { .. } => 0,
    };
    metrics.planned_steps.set(planned as i64);
    if let Some(last) = &job.last_step {
        last_step(metrics, last);
    }
    if let Some(step) = job.last_checkpoint {
        metrics.last_checkpoint_step.set(step.0 as i64);
    }
    job.evaluations.iter().for_each(|evaluated| evaluation(metrics, evaluated));
    metrics.step_age_seconds.mark();
    metrics.checkpoint_age_seconds.mark();
}

fn last_step(metrics: &CoordinatorMetrics, record: &StepRecord) {
    metrics.finished_steps.set(record.step.0 as i64);
    metrics.loss.set(record.loss);
    metrics.epoch.set(i64::from(record.epoch));
}

/// A step was finished.
pub(super) fn step(metrics: &CoordinatorMetrics, record: &StepRecord) {
    metrics.steps_total.inc();
    metrics.step_age_seconds.mark();
    last_step(metrics, record);
}

/// The last evaluation of its split.
pub(super) fn evaluation(metrics: &CoordinatorMetrics, evaluation: &Evaluation) {
    let split = evaluation.split.to_string();
    for (name, value) in &evaluation.metrics {
        metrics.evaluation.with_label_values(&[&split, name]).set(*value);
    }
}

/// Counts what has happened beside the steps.
pub(super) fn happening(metrics: &CoordinatorMetrics, happening: &Happening) {
    match happening {
        Happening::NonFinite { action, .. } => {
            metrics.non_finite_total.with_label_values(&[&action.to_string()]).inc();
        }
        Happening::CheckpointFailed { .. } => metrics.checkpoint_failures_total.inc(),
        Happening::CheckpointSkipped { .. } => metrics.checkpoints_skipped_total.inc(),
        Happening::WorkerLost { cause, .. } | Happening::NewcomerLost { cause, .. } => {
            metrics.worker_lost_total.with_label_values(&[cause.label()]).inc();
        }
        Happening::Stalled { stall, .. } => {
            metrics.stalls_total.with_label_values(&[&stall.cause.to_string()]).inc();
        }
        Happening::MetricMissing { .. }
        | Happening::Regrouping { .. }
        | Happening::Formed { .. }
        | Happening::WorkerDismissed { .. }
        | Happening::Lagging { .. }
        | Happening::KeepsUp { .. }
        | Happening::LedgerInexact(..)
        | Happening::Restarted { .. }
        | Happening::TakenOver => {}
    }
}

/// State and membership, whenever they may have changed.
pub(super) fn membership(metrics: &CoordinatorMetrics, job: &Job) {
    metrics.set_state(job.state().name());
    metrics.generation.set(job.generation().0 as i64);
    metrics.workers.set(job.present_count() as i64);
}

/// Each rank's own work, divided by the median of all; it changes with every step.
pub(super) fn work(metrics: &CoordinatorMetrics, job: &Job) {
    for (rank, ratio) in job.work_ratios() {
        metrics.work_ratio.with_label_values(&[&rank.to_string()]).set(ratio);
    }
}

#[cfg(test)]
mod tests {
    use learn_domain::Step;
    use learn_domain::report::Split;

    use super::*;
    use crate::job::actor::STATES;
    use crate::job::{History, JobSettings, tests};

    #[test]
    fn a_resumed_job_shows_what_it_had_and_what_may_happen_to_it() {
        let record = |step| StepRecord { step: Step(step), loss: 2.5, users: 4, ..StepRecord::default() };
        let history = History {
            step: Step(2),
            trained: [record(1), record(2)].into_iter().collect(),
            evaluations: vec![tests::evaluation(Split::Valid, 2, 0.25)],
            ..History::default()
        };
        let job = Job::new(JobSettings { history, ..tests::settings(1) });
        let metrics = CoordinatorMetrics::new(STATES);
        begin(&metrics, &job);
        step(&metrics, &record(3));
        happening(&metrics, &Happening::CheckpointSkipped { step: Step(3) });
        let text = metrics.exposition.render();
        for line in [
            "learn_job_steps_total 1",
            "learn_job_finished_steps 3",
            "learn_job_planned_steps 4",
            "learn_job_loss_nats 2.5",
            "learn_job_last_checkpoint_steps 2",
            "learn_job_checkpoints_skipped_total 1",
            r#"learn_job_evaluation{metric="ndcg@10",split="valid"} 0.25"#,
            r#"learn_job_workers_lost_total{cause="failed"} 0"#,
            r#"learn_job_stalls_total{cause="network"} 0"#,
            r#"learn_job_non_finite_steps_total{action="rollback"} 0"#,
        ] {
            assert!(text.lines().any(|said| said == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn an_evaluation_plans_no_steps() {
        let task = Task::Evaluate { checkpoint: String::new(), split: Split::Test };
        let job = Job::new(JobSettings { task, ..tests::settings(1) });
        let metrics = CoordinatorMetrics::new(STATES);
        begin(&metrics, &job);
        assert_eq!(metrics.planned_steps.get(), 0);
    }
}
