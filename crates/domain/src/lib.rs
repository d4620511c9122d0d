//! The rules of a LEARN training job, without IO.
//!
//! Input: plain values (configuration, events, clock readings, integers). Output: plain values (plans, samples,
//! effects, reports). Nothing here opens a file, a socket or a clock, so every rule is tested by calling it.
//!
//! - [`config`]: the one typed configuration of a job.
//! - [`plan`]: which users form step `s` of epoch `e`, and which rank takes which of them.
//! - [`prompt`]: how an item's fields become a text.
//! - [`sampling`]: how one user's sequence becomes history, targets and sampled positions.
//! - [`time_gap`]: how long after the item before it an item came, in buckets.
//! - [`lease`]: which worker makes which range of items, when content embeddings are made by several.
//! - [`embedding`]: what an embedding run says to people.
//! - [`told`]: what a program says of its work to the one that has started it.
//! - [`membership`]: who belongs to a job, as a state machine with explicit generations.
//! - [`phase`]: what a worker is at, or how it went.
//! - [`progress`]: who hangs and who lags.
//! - [`failure`]: whether a failure may pass, another process may do better, or any would come to the same.
//! - [`recovery`]: where the ranks of a new generation go on from, and whose state they take.
//! - [`ledger`]: the proof that an epoch used every user exactly once.
//! - [`schedule`]: the learning rate of a step.
//! - [`flops`]: what a step asks of a device, for model FLOP utilisation.
//! - [`ranking`]: what a rank is (ties included) and the metrics made of ranks.
//! - [`segments`] and [`resampling`]: parts of an evaluation, and means over users with their intervals.
//! - [`conversion`]: how good predicted conversions are.
//! - [`spelling`]: what a misspelt name was meant to be.
//! - [`event`]: what happens in a job beside its steps.
//! - [`curves`]: any number of steps in bounded memory, and in so many points.
//! - [`run_dir`] and [`report`]: where a run keeps what, and the values that its processes exchange about it.

pub mod config;
pub mod conversion;
pub mod curves;
pub mod embedding;
pub mod event;
pub mod failure;
pub mod flops;
pub mod ids;
pub mod lease;
pub mod ledger;
pub mod membership;
pub mod packing;
pub mod phase;
pub mod plan;
pub mod progress;
pub mod prompt;
pub mod random;
pub mod ranking;
pub mod recovery;
pub mod report;
pub mod resampling;
pub mod run_dir;
pub mod sampling;
pub mod schedule;
pub mod segments;
pub mod spelling;
pub mod time_gap;
pub mod told;

pub use config::Config;
pub use ids::{Generation, Incarnation, Rank, Step, UserIndex, WorkerId};
pub use phase::Phase;
