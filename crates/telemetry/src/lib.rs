//! What the processes of a job say about themselves: logs and metrics.
//!
//! - [`log`]: the one tracing set-up of every binary; [`place`]: what each of its lines says of the process's place.
//! - [`names`]: every metric once, with its kind, labels and help.
//! - [`WorkerMetrics`], [`CoordinatorMetrics`], [`DataMetrics`], [`EmbeddingMetrics`]: typed handles; a metric that is not in [`names`] cannot be made.
//! - [`Exposition`] and [`serve`]: the Prometheus text format over HTTP.
//! - [`mod@host`]: the name of this machine, and how others reach it.
//! - [`stdio`]: messages and results for whoever has started a process.
//! - [`server`]: the HTTP server of every process, with its limits.
//!
//! Input: numbers from the trainer's own progress. Output: log lines on stderr, `/metrics` and `/healthz`.
//! Invariant: a handle is cheap (an atomic or a short lock), so the training thread may use it in every step.

mod age;
mod coordinator;
mod data;
mod embedding;
mod exposition;
pub mod host;
pub mod log;
pub mod names;
pub mod place;
mod process;
pub mod server;
pub mod stdio;
mod worker;

pub use age::Age;
pub use coordinator::CoordinatorMetrics;
pub use data::DataMetrics;
pub use embedding::EmbeddingMetrics;
pub use exposition::{Exposition, router, serve};
pub use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
};
pub use worker::WorkerMetrics;
