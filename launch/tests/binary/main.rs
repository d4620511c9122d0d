//! `learn-launch` as a built binary.

mod cli;
mod job;
mod support;
