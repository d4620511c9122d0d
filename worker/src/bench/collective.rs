//! `bench collective`: the operations between ranks, over TCP on this machine.
//!
//! Input: ranks and a size. Output: seconds and gigabytes per second of each operation, where the bytes are those of the
//! whole buffer (sum and scatter: what each rank gives in; gather: what each rank gets).

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use clap::Args;
use learn_collective::{Buffer, Collective, CollectiveError, Group, connect_tcp};
use learn_domain::Config;
use serde::Serialize;

use super::crew::{Crew, Member};
use super::statistics::Spread;
use super::synthetic::group;
use crate::error::WorkerError;

pub const HELP: &str = "\
Each rank is a process of this machine; they form the ring that workers on CPUs use, and share memory as those do on \
one machine. bench/pytorch/collective.py measures gloo the same way.

Examples:
  learn-launch bench collective --workers 4
  learn-launch bench collective --sockets    # as between machines
  learn-launch bench collective --workers 2 --mib 256 --json";

/// Flags of `bench collective`.
#[derive(Clone, Debug, Args)]
pub struct CollectiveArgs {
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=64))]
    workers: u32,
    /// Size of the buffer; 128 MiB are the gradients of the published model with 4 layers
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=16384))]
    mib: u32,
    /// Times that each operation is measured, after one that is not
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Move everything by sockets
    #[arg(long)]
    sockets: bool,
    #[command(flatten)]
    member: Member,
    #[arg(long)]
    pub json: bool,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct CollectiveResult {
    pub backend: &'static str,
    pub workers: u32,
    pub bytes: usize,
    pub operations: BTreeMap<&'static str, Operation>,
}

/// One operation.
#[derive(Clone, Debug, Serialize)]
pub struct Operation {
    pub seconds: Vec<f64>,
    pub median_gigabytes_per_second: f64,
}

impl fmt::Display for CollectiveResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ranks over {}, {} MiB", self.workers, self.backend, self.bytes >> 20)?;
        for (name, operation) in &self.operations {
            let spread = Spread::of(&operation.seconds);
            write!(
                f,
                "\n{name:<15} {:.2} GB/s ({:.0} ms, {:.0} to {:.0})",
                operation.median_gigabytes_per_second,
                1e3 * spread.median,
                1e3 * spread.min,
                1e3 * spread.max
            )?;
        }
        Ok(())
    }
}

/// Measures on all ranks; the first one has the result.
///
/// # Errors
/// If a rank cannot be started or fails.
pub fn run(args: &CollectiveArgs) -> Result<Option<CollectiveResult>, WorkerError> {
    let crew = Crew::start(args.workers, &args.member)?;
    let group = Group { shares_memory: !args.sockets, ..group(crew.seat(), &Config::default()) };
    let mut ring = connect_tcp(group, &crew.rendezvous("ring"))?;
    let operations = measure(&mut *ring, args)?;
    drop(ring);
    let first = crew.seat().rank == 0;
    crew.end()?;
    let bytes = (args.mib as usize) << 20;
    Ok(first.then_some(CollectiveResult {
        backend: if args.sockets { "sockets" } else { "shared memory" },
        workers: args.workers,
        bytes,
        operations,
    }))
}

fn measure(ring: &mut dyn Collective, args: &CollectiveArgs) -> Result<BTreeMap<&'static str, Operation>, WorkerError> {
    let (rank, ranks) = (ring.rank(), ring.world_size());
    let elements = (args.mib as usize) << 18;
    let counts: Vec<usize> = (0..ranks).map(|part| elements / ranks + usize::from(part < elements % ranks)).collect();
    let mut whole = vec![1.0_f32; elements];
    let mut part = vec![1.0_f32; counts[rank]];
    let mut times: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for repetition in 0..=args.repetitions {
        for name in ["all_reduce", "all_gather", "reduce_scatter"] {
            ring.barrier()?;
            let started = Instant::now();
            one(ring, name, &counts, (&mut whole, &mut part))?;
            // over when the last rank has it
            ring.barrier()?;
            if repetition > 0 {
                times.entry(name).or_default().push(started.elapsed().as_secs_f64());
            }
        }
    }
    let gigabytes = (elements * size_of::<f32>()) as f64 / 1e9;
    let operation =
        |seconds: Vec<f64>| Operation { median_gigabytes_per_second: gigabytes / Spread::of(&seconds).median, seconds };
    Ok(times.into_iter().map(|(name, seconds)| (name, operation(seconds))).collect())
}

fn one(
    ring: &mut dyn Collective,
    name: &str,
    counts: &[usize],
    (whole, part): (&mut Vec<f32>, &mut Vec<f32>),
) -> Result<(), CollectiveError> {
    let (mut whole, mut part) = (Buffer::f32(whole), Buffer::f32(part));
    match name {
        "all_reduce" => ring.all_reduce_sum(&mut whole),
        "all_gather" => ring.all_gather(counts, &mut part, &mut whole),
        _ => ring.reduce_scatter_sum(counts, &mut whole, &mut part),
    }
}
