//! Every metric once: name, kind, labels and help.
//!
//! Rule: `learn_<area>_<what>_<unit>[_total]`. Units are seconds, bytes, rows, users, tokens, steps, flops, nats and ratio;
//! a pure number (a learning rate, a norm, a generation) has none. Counters, and only they, end in `_total`.

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Counter,
    Gauge,
    /// With these upper bounds of its buckets.
    Histogram(&'static [f64]),
}

impl Kind {
    /// As Prometheus calls it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// Labels of its own; a worker's metrics carry `rank` besides.
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

/// Upper bounds in seconds for the phases of a step: 0.1 ms on a GPU to a minute on a small CPU.
const PHASE_BUCKETS: &[f64] =
    &[1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Upper bounds in seconds for remote calls.
const RPC_BUCKETS: &[f64] = &[1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0, 5.0, 30.0];
/// Upper bounds in seconds for going on after a loss.
const RECOVERY_BUCKETS: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Upper bounds in seconds for writing a checkpoint.
const CHECKPOINT_BUCKETS: &[f64] = &[0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0];

macro_rules! metrics {
    ($($id:ident = $name:literal, $kind:expr, [$($label:literal),*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Metric = Metric { name: $name, kind: $kind, labels: &[$($label),*], help: $help };
        )*
        /// All metrics, workers' first.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

metrics! {
    WORKER_LOSS = "learn_worker_loss_nats", Kind::Gauge, [],
        "Loss of the last step, mean over the global batch.";
    WORKER_LOSS_PART = "learn_worker_loss_part_nats", Kind::Gauge, ["part"],
        "Parts of the last step's loss, which add up to it: infonce or full_softmax, and cvr with its weight.";
    WORKER_ACCURACY = "learn_worker_accuracy_ratio", Kind::Gauge, [],
        "Share of the last step's pairs whose target scores above every negative.";
    WORKER_LEARNING_RATE = "learn_worker_learning_rate", Kind::Gauge, [],
        "Learning rate of the last step.";
    WORKER_GRADIENT_NORM = "learn_worker_gradient_norm", Kind::Gauge, [],
        "Global gradient norm of the last step before clipping.";
    WORKER_USERS = "learn_worker_users_total", Kind::Counter, [],
        "Users that this rank has trained.";
    WORKER_TOKENS = "learn_worker_tokens_total", Kind::Counter, [],
        "Sequence items that this rank has encoded, padding left out.";
    WORKER_ALIGNMENT = "learn_worker_alignment", Kind::Gauge, [],
        "Mean squared distance of a user's embedding to its targets', over a sample of this rank's pairs every ten steps.";
    WORKER_UNIFORMITY = "learn_worker_uniformity", Kind::Gauge, ["tower"],
        "Logarithm of the mean of exp(-2 d^2), d the distance of two embeddings of the same sample: 0 when all are one.";
    WORKER_MODEL_FLOPS = "learn_worker_model_flops_total", Kind::Counter, [],
        "Floating-point operations that the model needed for this rank's shares, padding and recomputation left out.";
    WORKER_PEAK_FLOPS = "learn_worker_peak_flops_per_second", Kind::Gauge, [],
        "What this rank's device can do, as cluster.device_peak_tflops says; 0 = not known.";
    WORKER_PHASE = "learn_worker_phase_seconds", Kind::Histogram(PHASE_BUCKETS), ["phase"],
        "Seconds that a step spent in each phase; a GPU's work counts in the next phase that waits for it.";
    WORKER_PREFETCHED = "learn_worker_prefetched_steps", Kind::Gauge, [],
        "Steps that are prepared and wait for the training thread.";
    WORKER_PREFETCH_DEPTH = "learn_worker_prefetch_depth_steps", Kind::Gauge, [],
        "Steps that may be prepared ahead, chosen by how long the training thread waits.";
    WORKER_RECEIVED = "learn_worker_received_bytes_total", Kind::Counter, ["source"],
        "Bytes received, by what they are: batches, rows or evaluation; mapped: rows from the dataset's own files instead.";
    WORKER_PADDING = "learn_worker_padding_ratio", Kind::Gauge, [],
        "Share of the encoder's rows that were padding in the last step.";
    WORKER_CHECKPOINT = "learn_worker_checkpoint_write_seconds", Kind::Histogram(CHECKPOINT_BUCKETS), [],
        "Seconds from the snapshot of a checkpoint to its rename.";
    WORKER_STEP = "learn_worker_finished_steps", Kind::Gauge, [],
        "Finished steps of the job as this rank knows them.";
    WORKER_GENERATION = "learn_worker_generation", Kind::Gauge, [],
        "Generation that this rank is in.";
    WORKER_CACHE_HITS = "learn_worker_cache_hit_rows_total", Kind::Counter, [],
        "Content embedding rows found in the worker's own caches in host memory, that of evaluations included.";
    WORKER_CACHE_NEIGHBOUR = "learn_worker_cache_neighbour_rows_total", Kind::Counter, [],
        "Content embedding rows found in the caches of other workers of the same machine.";
    WORKER_CACHE_MISSES = "learn_worker_cache_miss_rows_total", Kind::Counter, [],
        "Content embedding rows fetched over Flight.";
    WORKER_DEVICE_CACHE_HITS = "learn_worker_device_cache_hit_rows_total", Kind::Counter, [],
        "Content embedding rows found in the device's cache.";
    WORKER_COLLECTIVE = "learn_worker_collective_bytes_total", Kind::Counter, [],
        "Bytes that this rank's collective has sent and received.";
    WORKER_COLLECTIVE_SECONDS = "learn_worker_collective_seconds_total", Kind::Counter, [],
        "Seconds that this rank's training thread was inside collectives, most of them waiting: the slowest rank has the fewest. \
         Sums that are hidden behind the backward do not count.";
    WORKER_GPU_MEMORY = "learn_worker_gpu_memory_bytes", Kind::Gauge, ["kind"],
        "Memory of this rank's GPU: used, by whomever, and total; absent on the CPU.";
    PROCESS_MEMORY = "learn_process_resident_memory_bytes", Kind::Gauge, [],
        "Host memory that the process holds; what it has read in the row caches of other workers of its machine counts, too.";
    PROCESS_START = "learn_process_start_time_seconds", Kind::Gauge, [],
        "When the process started, in seconds since 1970.";

    JOB_STATE = "learn_job_state", Kind::Gauge, ["state"],
        "1 for the state that the job is in, 0 for the others.";
    JOB_GENERATION = "learn_job_generation", Kind::Gauge, [],
        "Number of the current membership.";
    JOB_WORKERS = "learn_job_workers", Kind::Gauge, [],
        "Workers that have joined and have neither left nor been lost.";
    JOB_STEPS = "learn_job_steps_total", Kind::Counter, [],
        "Steps over the global batch that were finished since the coordinator's start.";
    JOB_FINISHED = "learn_job_finished_steps", Kind::Gauge, [],
        "Finished steps of the job, those before a resume included.";
    JOB_PLANNED = "learn_job_planned_steps", Kind::Gauge, [],
        "Steps of the whole training; 0 of an evaluation.";
    JOB_STEP_AGE = "learn_job_step_age_seconds", Kind::Gauge, [],
        "Seconds since the last step was finished; since the coordinator's start before its first.";
    JOB_EPOCH = "learn_job_epoch", Kind::Gauge, [],
        "Epoch of the last finished step, from 0.";
    JOB_LOSS = "learn_job_loss_nats", Kind::Gauge, [],
        "Loss of the last finished step.";
    JOB_EVALUATION = "learn_job_evaluation", Kind::Gauge, ["split", "metric"],
        "Value of each metric of the last evaluation on a split.";
    JOB_RESTARTS = "learn_job_restarts_total", Kind::Counter, [],
        "Times that a scheduler has started the job again.";
    JOB_HEARTBEATS = "learn_job_heartbeats_total", Kind::Counter, [],
        "Heartbeats received.";
    JOB_WORKERS_JOINED = "learn_job_workers_joined_total", Kind::Counter, [],
        "Workers that have joined, those that came in place of lost ones included.";
    JOB_WORKERS_LOST = "learn_job_workers_lost_total", Kind::Counter, ["cause"],
        "Workers lost, by cause.";
    JOB_STALLS = "learn_job_stalls_total", Kind::Counter, ["cause"],
        "Times that no step was finished within the progress deadline, by the cause of whom the others waited for.";
    JOB_WORK_RATIO = "learn_job_work_ratio", Kind::Gauge, ["of_rank"],
        "A rank's own work in a step, smoothed, divided by the median of all ranks: above 1.5 it lags.";
    JOB_RECOVERY_SECONDS = "learn_job_recovery_seconds", Kind::Histogram(RECOVERY_BUCKETS), [],
        "From the end of a generation by a loss or a broken collective to the next finished step.";
    JOB_CHECKPOINTS = "learn_job_checkpoints_total", Kind::Counter, [],
        "Checkpoints committed.";
    JOB_CHECKPOINT_AGE = "learn_job_checkpoint_age_seconds", Kind::Gauge, [],
        "Seconds since the last checkpoint was committed; since the coordinator's start before its first.";
    JOB_LAST_CHECKPOINT = "learn_job_last_checkpoint_steps", Kind::Gauge, [],
        "Finished steps of the last committed checkpoint.";
    JOB_CHECKPOINT_FAILURES = "learn_job_checkpoint_failures_total", Kind::Counter, [],
        "Checkpoints that could not be written; the earlier ones stay.";
    JOB_CHECKPOINTS_SKIPPED = "learn_job_checkpoints_skipped_total", Kind::Counter, [],
        "Checkpoints that were due while those before were still being written.";
    JOB_NON_FINITE = "learn_job_non_finite_steps_total", Kind::Counter, ["action"],
        "Steps whose loss or gradient was not a finite number, by what was done: stop, skip or rollback.";
    RPC_SECONDS = "learn_rpc_duration_seconds", Kind::Histogram(RPC_BUCKETS), ["method"],
        "Seconds that the coordinator took to answer a control call.";
    JOB_STATE_WRITE_SECONDS = "learn_job_state_write_seconds", Kind::Histogram(RPC_BUCKETS), [],
        "Seconds that the coordinator took to keep what it decided before it answered.";
    FLIGHT_ROWS = "learn_flight_served_rows_total", Kind::Counter, [],
        "Rows that the data service has sent.";
    FLIGHT_BYTES = "learn_flight_served_bytes_total", Kind::Counter, ["kind"],
        "Bytes that the data service has sent, by what they are: batches, rows, evaluation, items or popularity.";

    EMBED_PLANNED = "learn_embed_planned_rows", Kind::Gauge, [],
        "Items of an embed job; 0 until its first process knows.";
    EMBED_FINISHED = "learn_embed_finished_rows", Kind::Gauge, [],
        "Items of an embed job that have their vector, those of ranges in work included.";
    EMBED_WORKERS = "learn_embed_workers", Kind::Gauge, [],
        "Processes of an embed job that have neither left nor fallen silent.";
}

/// The metrics as a Markdown table, for the documentation.
#[must_use]
pub fn markdown_table() -> String {
    let mut table = String::from("| name | kind | labels | meaning |\n|---|---|---|---|\n");
    for metric in ALL {
        let labels = metric.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        table += &format!("| `{}` | {} | {labels} | {} |\n", metric.name, metric.kind.as_str(), metric.help);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const UNITS: [&str; 10] =
        ["seconds", "bytes", "rows", "users", "tokens", "steps", "flops", "nats", "ratio", "heartbeats"];
    /// Pure numbers and counts of what the name says.
    const UNITLESS: [&str; 18] = [
        "learn_worker_learning_rate",
        "learn_worker_gradient_norm",
        "learn_worker_alignment",
        "learn_worker_uniformity",
        "learn_worker_generation",
        "learn_job_state",
        "learn_job_generation",
        "learn_job_workers",
        "learn_job_epoch",
        "learn_job_evaluation",
        "learn_job_restarts_total",
        "learn_job_workers_joined_total",
        "learn_job_workers_lost_total",
        "learn_job_stalls_total",
        "learn_job_checkpoints_total",
        "learn_job_checkpoint_failures_total",
        "learn_job_checkpoints_skipped_total",
        "learn_embed_workers",
    ];

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
    }

    #[test]
    fn names_follow_the_rule() {
        for Metric { name, kind, labels, help } in ALL {
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            let area = name.strip_prefix("learn_").and_then(|rest| rest.split('_').next()).unwrap();
            assert!(["worker", "process", "job", "rpc", "flight", "embed"].contains(&area), "{name}: area {area}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}: _total is for counters");
            let unit = name.trim_end_matches("_total").trim_end_matches("_per_second").rsplit('_').next().unwrap();
            assert!(UNITS.contains(&unit) || UNITLESS.contains(name), "{name} ends in no unit");
            assert!(!labels.contains(&"rank"), "{name}: rank comes from the exposition");
            assert!(help.ends_with('.') && help.len() > 10, "{name} needs a help sentence");
        }
    }

    #[test]
    fn buckets_grow() {
        for metric in ALL {
            if let Kind::Histogram(bounds) = metric.kind {
                assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]), "{}", metric.name);
            }
        }
    }
}
