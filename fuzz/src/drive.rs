//! The driver that needs no special build: golden inputs, mutated, for so long.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::mutate::{Numbers, mutated};
use crate::{MOST_MEMORY, Target};

/// An input that takes longer than this hangs.
const MOST_TIME: Duration = Duration::from_secs(5);
/// After this a target is not waited for any more.
const NEVER: Duration = Duration::from_secs(60);

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

/// Lets [`peak`] start anew from what the process has now, where the kernel can.
fn forget_peak() {
    // without it growth below an earlier peak is not seen
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The input that a target has now, and since when.
type Given = Arc<Mutex<Option<(Instant, Vec<u8>)>>>;

/// Ends the process when an input keeps its target for longer than [`NEVER`], and leaves that input behind.
struct Watchdog {
    at: Given,
    /// The thread ends with it.
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    fn new(name: &'static str) -> Self {
        let at = Given::default();
        let (alive, ended) = mpsc::channel();
        let watched = Arc::clone(&at);
        std::thread::spawn(move || {
            while ended.recv_timeout(MOST_TIME) == Err(mpsc::RecvTimeoutError::Timeout) {
                let at = watched.lock().unwrap_or_else(PoisonError::into_inner);
                let Some((_, input)) = at.as_ref().filter(|(since, _)| since.elapsed() > NEVER) else { continue };
                let path = std::env::temp_dir().join(format!("{name}-hangs"));
                let kept =
                    fs::write(&path, input).map_or_else(|error| error.to_string(), |()| path.display().to_string());
                eprintln!("{name}: an input of {} bytes never ends; it is in {kept}", input.len());
                std::process::exit(1);
            }
        });
        Self { at, _alive: alive }
    }

    fn at(&self, input: Option<&[u8]>) {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = input.map(|input| (Instant::now(), input.to_vec()));
    }
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
    forget_peak();
    let (started, before, watchdog) = (Instant::now(), peak(), Watchdog::new(target.name));
    let (mut outcome, mut numbers, mut given) = (Outcome::default(), Numbers::new(seed), 0);
    while outcome.finding.is_none() && (given < inputs.len() || started.elapsed() < time) {
        let input = match inputs.get(given) {
            Some(input) => input.clone(),
            None => mutated(&inputs, target.words, &mut numbers),
        };
        watchdog.at(Some(&input));
        try_one(target, &input, &mut outcome);
        watchdog.at(None);
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
