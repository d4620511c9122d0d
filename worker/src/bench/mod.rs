//! `learn-worker bench`: the speed of one part alone, on made-up data.
//!
//! - [`step`]: a training step, by one rank or by several.
//! - [`loss`]: InfoNCE with its gradient, and the memory that it needs.
//! - [`collective`]: the operations between ranks.
//! - [`checkpoint`]: what a step loses while a checkpoint is written.
//!
//! Each part has its flags, a result that is printed as text or as JSON, and a function from one to the other. [`synthetic`]
//! makes models and batches, [`lengths`] the lengths of histories, [`crew`] the processes of several ranks.

pub mod arguments;
mod ceiling;
pub mod checkpoint;
pub mod collective;
pub mod crew;
pub mod lengths;
pub mod loss;
pub mod memory;
pub mod statistics;
pub mod step;
pub mod synthetic;

use std::fmt::Display;

use clap::Subcommand;
use learn_telemetry::stdio;
use serde::Serialize;

use crate::error::WorkerError;

/// A part and its flags.
#[derive(Debug, Subcommand)]
pub enum Part {
    /// A training step, by one rank or several: users and tokens per second
    #[command(after_help = step::HELP)]
    Step(step::StepArgs),
    /// InfoNCE with its gradient: seconds, and peak memory against the full matrix of scores
    #[command(after_help = loss::HELP)]
    Loss(loss::LossArgs),
    /// All-reduce, gather and reduce-scatter between processes of this machine
    #[command(after_help = collective::HELP)]
    Collective(collective::CollectiveArgs),
    /// What a step loses while a checkpoint is written
    #[command(after_help = checkpoint::HELP)]
    Checkpoint(checkpoint::CheckpointArgs),
}

impl Part {
    /// Measures, and prints the result.
    ///
    /// # Errors
    /// If the flags make no sense or the measured part fails.
    pub fn run(&self) -> Result<(), WorkerError> {
        match self {
            Self::Step(args) => match step::run(args)? {
                Some(result) => print(args.json, &result),
                None => Ok(()),
            },
            Self::Loss(args) => print(args.json, &loss::run(args)?),
            Self::Collective(args) => match collective::run(args)? {
                Some(result) => print(args.json, &result),
                None => Ok(()),
            },
            Self::Checkpoint(args) => print(args.json, &checkpoint::run(args)?),
        }
    }
}

fn print(json: bool, result: &(impl Serialize + Display)) -> Result<(), WorkerError> {
    let text = match json {
        true => serde_json::to_string_pretty(result)
            .map_err(|error| WorkerError::Defect(format!("the result as JSON: {error}")))?,
        false => result.to_string(),
    };
    stdio::print(&format!("{text}\n")).map(drop).map_err(WorkerError::Stdout)
}
