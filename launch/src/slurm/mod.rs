//! A job on a Slurm cluster.
//!
//! Who runs where: `learn-launch slurm` writes a batch script ([`script`]) into the run directory and submits it
//! ([`client`]). On the first node of the allocation the script becomes `learn-launch slurm-job`, which starts and watches
//! the coordinator as a local job does, starts one step with one task a worker ([`JobStep`]), and decides what follows the
//! end ([`outcome`], [`restarts`]). Each task is `learn-launch slurm-task` ([`task`]): it starts a worker, and another one in its place.
//!
//! Input: Slurm's variables ([`variables`]). Invariants: variables that are missing or contradict each other are an error
//! that names them; who listens does so on the address that the others reach ([`address`]).

pub mod address;
pub mod bind;
pub mod client;
pub mod hostlist;
pub mod outcome;
pub mod queue;
pub mod restarts;
pub mod run;
pub mod script;
pub mod size;
mod step;
pub mod stopped;
pub mod targets;
pub mod task;
pub mod variables;

pub use step::JobStep;
pub use variables::{Allocation, TaskPlace, Variables, VariablesError};
