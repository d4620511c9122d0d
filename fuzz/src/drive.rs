//! The driver that needs no special build: golden inputs, mutated, for so long.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::mutate::{Numbers, mutated};
use crate::{MOST_MEMORY, Target};

/// An input that takes longer than this hangs.
const MOST_TIME: Duration = Duration::from_secs(5);

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub inputs: u64,
    pub slowest: Duration,
    /// Bytes that the process grew by.
    pub grown: u64,
    pub finding: Option<Finding>,
}

/// An input that a target does not survive.
#[derive(Clone, Debug)]
pub struct Finding {
    pub what: String,
    pub input: Vec<u8>,
}

/// Inputs that once failed.
///
/// # Errors
/// If the folder of the target cannot be read.
pub fn regressions(target: &Target) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions").join(target.name);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    paths.into_iter().map(|path| fs::read(&path).map(|bytes| (path, bytes))).collect()
}

/// Most memory that this process has had, in bytes.
fn peak() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() * 1024
}

/// Gives a target one input.
fn try_one(target: &Target, input: &[u8], outcome: &mut Outcome) {
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let took = started.elapsed();
    outcome.inputs += 1;
    outcome.slowest = outcome.slowest.max(took);
    let what = match result {
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            format!("it panics: {text}")
        }
        Ok(()) if took > MOST_TIME => format!("it takes {:.1} s", took.as_secs_f64()),
        Ok(()) => return,
    };
    outcome.finding = Some(Finding { what, input: input.to_vec() });
}

/// Tries the regressions and seeds, then mutated ones, for `time`, or until something is found.
///
/// # Errors
/// If the regressions cannot be read.
pub fn run(target: &Target, time: Duration, seed: u64) -> io::Result<Outcome> {
    let mut inputs: Vec<Vec<u8>> = regressions(target)?.into_iter().map(|(_, bytes)| bytes).collect();
    inputs.extend((target.seeds)());
    let (started, before) = (Instant::now(), peak());
    let (mut outcome, mut numbers, mut given) = (Outcome::default(), Numbers::new(seed), 0);
    while outcome.finding.is_none() && (given < inputs.len() || started.elapsed() < time) {
        match inputs.get(given) {
            Some(input) => try_one(target, input, &mut outcome),
            None => try_one(target, &mutated(&inputs, target.words, &mut numbers), &mut outcome),
        }
        given += 1;
        if given % 64 == 0 || outcome.slowest > MOST_TIME {
            outcome.grown = peak().saturating_sub(before);
        }
        if outcome.grown > MOST_MEMORY && outcome.finding.is_none() {
            let what = format!("the process grew by {} MiB", outcome.grown >> 20);
            outcome.finding = Some(Finding { what, input: Vec::new() });
        }
    }
    Ok(outcome)
}
