//! `learn-launch` as a built binary.

mod afterwards;
mod cli;
mod docs;
mod job;
mod lock;
mod slurm;
mod support;
