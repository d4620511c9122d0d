//! The worker: one process per GPU (or per CPU slot) that takes part in a job.
//!
//! - [`session`]: join, heartbeats, the task, leave. [`control`]: the connection to the coordinator. [`retry`]: waiting for
//!   one that is away.
//! - [`feed`]: the data path, ahead of the training thread.
//! - [`train`]: steps; reads like `forward -> gather -> loss -> scatter -> backward -> reduce -> update`.
//! - [`checkpoint`]: the state on disk. [`init`]: weights as a start. [`evaluate`]: full ranking.
//! - [`offline`], [`export`], [`recommend`]: a finished model without a job; [`progress`]: how far they are.
//! - [`bench`], [`doctor`]: what the machine can do.

pub mod bench;
pub mod checkpoint;
pub mod control;
pub mod conversions;
pub mod cvr_features;
pub mod doctor;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod feed;
pub mod init;
pub mod offline;
mod panic;
pub mod progress;
pub mod recommend;
pub mod retry;
pub mod session;
pub mod train;
