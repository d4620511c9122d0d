//! What crosses the network between the processes of a job.
//!
//! Input: the `.proto` files beside this crate and the values of `learn-domain`. Output: generated messages and services
//! ([`v1`]), their conversions ([`convert`]), the job's secret ([`auth`]) and certificates ([`tls`]), clients of both ([`connect`]), and the Arrow Flight tickets and schemas
//! ([`flight`]). Invariant: no generated type is used outside this crate and the shells that serve or call it.
//!
//! `src/generated` is committed, so that a build needs neither `protoc` nor a build script; `tests/generated.rs` keeps
//! it up to date.

pub mod auth;
pub mod connect;
pub mod convert;
pub mod flight;
pub mod tls;

/// Messages and services of `learn.v1`.
#[allow(clippy::all, clippy::pedantic, missing_docs)]
#[rustfmt::skip]
pub mod v1 {
    include!("generated/learn.v1.rs");
}

/// The version of `learn.v1` that this build speaks; workers name theirs when they join.
pub const PROTOCOL: u32 = 5;

/// Longest key of the rendezvous store in bytes.
pub const MAX_KEY_BYTES: usize = 256;

/// Largest value of the rendezvous store in bytes.
pub const MAX_VALUE_BYTES: usize = 64 << 10;

/// Longest text of a worker's own description (host, device, phase, address) in bytes.
pub const MAX_TEXT_BYTES: usize = 1024;

/// Longest wait that one `Get` may ask for in milliseconds; a client that wants to wait longer asks again.
pub const MAX_WAIT_MILLIS: u32 = 60_000;
