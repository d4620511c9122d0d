//! Settings of a job's processes: how many, where they are, how long they wait for each other, and what they keep.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ByteSize, Span, TlsConfig};

/// Where tensors live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// CUDA if a GPU and libtorch's CUDA library are there, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

/// Processes, addresses, deadlines and queues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterConfig {
    /// Workers of the job (the world size it starts with).
    pub workers: u32,
    /// The job goes on with so many when others are lost, and waits for more (`join_timeout`) with fewer.
    pub min_workers: u32,
    /// Worker processes that `learn-launch` starts in place of lost ones, over the whole job; under Slurm each task has so
    /// many of its own at each start of the job. The data servers of `data_replicas` have so many together, besides.
    pub max_restarts: u32,
    /// Recoveries in a row without a finished step between them, after which the job is given up (exit code 7).
    pub max_recoveries: u32,
    pub device: DeviceKind,
    /// What the device of a worker can do at `training.precision`, in 10^12 floating-point operations per second (989 for
    /// bf16 on an H100), by which model FLOP utilisation is told; 0 = not known, then the operations alone are.
    pub device_peak_tflops: f64,
    /// Address that local processes bind to.
    pub bind: String,
    /// Port of the coordinator's gRPC (control and Flight); 0 = any free one.
    pub grpc_port: u16,
    /// Port of the coordinator's HTTP (metrics, status); 0 = any free one.
    pub http_port: u16,
    /// Workers report at this interval.
    pub heartbeat_interval: Span,
    /// A worker that was silent for this long is lost; the last one only after `coordinator_timeout`.
    pub heartbeat_timeout: Span,
    /// Workers wait this long for a coordinator or data service that is away, and go on as far as what they have fetched
    /// reaches; then they give up.
    pub coordinator_timeout: Span,
    /// `learn-launch` starts another coordinator in the place of one that was killed, so many times in a job.
    pub coordinator_restarts: u32,
    /// Data servers that `learn-launch` starts beside the coordinator, which serves the same data: for many workers on one
    /// machine. On other machines start `learn-coordinator data` yourself.
    pub data_replicas: u32,
    /// All workers must have joined within this; after losses `min_workers` of them.
    pub join_timeout: Span,
    /// Within this a step must be finished; then the log, the events and the status name the rank that the others wait for,
    /// and after twice as long it is lost. "0s" = 20 times the median step, but at least 30 s.
    pub progress_timeout: Span,
    /// A collective operation that takes longer fails.
    pub collective_timeout: Span,
    /// Ranks of one machine exchange by memory that they map, where the system lets them (not between containers). They
    /// read each other's `row_cache`. On CPUs item vectors go to the neighbour by it, too, and if all ranks are on one
    /// machine, each adds up its part of everybody's gradients where they lie. It changes no result; false: by sockets,
    /// as between machines, and each has its cache for itself.
    pub shared_memory: bool,
    /// A job that was asked to stop has this long to finish its step and write a checkpoint; then it ends without those
    /// who have not left. A worker that was told to leave a broken generation has as long, and is lost after it. "0s" = as
    /// long as `collective_timeout` and `heartbeat_timeout` together.
    pub stop_timeout: Span,
    /// Most steps that a worker fetches ahead. Starts at 2. After training has waited for data it grows by as many steps as
    /// would have hidden the wait; after a long time without waiting it shrinks by one.
    pub prefetch_steps: u32,
    /// Connections over which a worker fetches content embeddings at once. Each starts at a different data server. Requests
    /// below 1 MiB per connection use fewer. Unused if the worker maps the dataset's files.
    pub row_streams: u32,
    /// Host memory of a worker for content embeddings; evaluations of a training have a quarter as much besides.
    /// Workers of one machine read each other's (`shared_memory`), so together they hold as many rows as all of their
    /// caches have room for, each row about once.
    pub row_cache: ByteSize,
    /// Memory of a worker's device for content embeddings, so that they need not be copied to it again; 0 = none. On a CPU
    /// there is nothing to gain.
    pub device_row_cache: ByteSize,
    pub tls: TlsConfig,
}

impl ClusterConfig {
    /// Host memory of a worker for the content embeddings that the evaluations of a training read, beside `row_cache`: they take
    /// nothing from the steps.
    #[must_use]
    pub fn evaluation_row_cache(&self) -> ByteSize {
        ByteSize(self.row_cache.0 / 4)
    }

    /// How long workers may take from the request to stop to their leave.
    #[must_use]
    pub fn stop_within(&self) -> Duration {
        match self.stop_timeout.0 {
            Duration::ZERO => self.collective_timeout.0 + self.heartbeat_timeout.0,
            set => set,
        }
    }
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            workers: 2,
            min_workers: 1,
            max_restarts: 10,
            max_recoveries: 5,
            device: DeviceKind::Auto,
            device_peak_tflops: 0.0,
            bind: "127.0.0.1".into(),
            grpc_port: 0,
            http_port: 0,
            heartbeat_interval: Span::from_secs(1),
            heartbeat_timeout: Span::from_secs(15),
            coordinator_timeout: Span::from_secs(60),
            coordinator_restarts: 10,
            data_replicas: 0,
            join_timeout: Span::from_secs(120),
            progress_timeout: Span::from_secs(0),
            collective_timeout: Span::from_secs(120),
            shared_memory: true,
            stop_timeout: Span::from_secs(0),
            prefetch_steps: 8,
            row_streams: 2,
            row_cache: ByteSize(1 << 30),
            device_row_cache: ByteSize(0),
            tls: TlsConfig::default(),
        }
    }
}
