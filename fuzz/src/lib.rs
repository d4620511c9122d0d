//! A fuzz target for each parser that takes bytes from outside the program.
//!
//! Input: bytes that anybody may have made. Output: nothing; a target has passed when it comes back without a panic, soon, and
//! without memory beyond [`MOST_MEMORY`]. [`drive`] mutates golden inputs; it needs no special build and runs with the tests and
//! as `cargo xtask fuzz`. Invariants: a target is a function of its bytes; what once failed lies in `regressions` and is tried
//! by every run.

pub mod drive;
pub mod mutate;
mod seeds;
mod targets;

pub use targets::{TARGETS, Target, clean};

/// Bytes that a process may grow by, whatever a target is given.
pub const MOST_MEMORY: u64 = 512 << 20;
/// Largest input.
pub const MOST_BYTES: usize = 1 << 16;
