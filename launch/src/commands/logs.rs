//! `learn-launch logs`: what the processes of a run have said, and say.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use learn_domain::report::JobStatus;
use learn_domain::run_dir::RunDir;
use learn_telemetry::stdio;

use crate::api::Api;
use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::output::Output;
use crate::runs::{self, Life};
use crate::slurm::queue::{Inquiry, Queue};

pub const HELP: &str = "\
Examples:
  learn-launch logs runs/quickstart          the last lines of everybody
  learn-launch logs quickstart --rank 1 --follow
  learn-launch logs quickstart --coordinator -n 500
  learn-launch logs shop --slurm             what the batch script and srun said

Of several logs each line begins with whose it is. --follow ends when the job has ended, or with Ctrl-C (where nobody \
can tell from here, with Ctrl-C only); it goes on through a requeue by Slurm. With --json each line is a JSON object \
on a line of its own, with `log` (whose it is) and `line`. The files are those of the run's logs/ folder.";

/// Pause between two looks at the files.
const POLL: Duration = Duration::from_millis(200);
/// Pause between two questions whether the job still runs.
const ASK: Duration = Duration::from_secs(2);
/// Most bytes of a file that are searched for its last lines.
const TAIL_BYTES: u64 = 4 << 20;

/// Arguments of `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Only this rank, as the status numbers them (repeatable)
    #[arg(long, value_name = "R")]
    rank: Vec<u32>,
    /// Only this worker process: worker-N.log (repeatable)
    #[arg(long, value_name = "N")]
    worker: Vec<u32>,
    /// Only the coordinator
    #[arg(long)]
    coordinator: bool,
    /// Only the batch script and srun of a Slurm job
    #[arg(long)]
    slurm: bool,
    /// Begin with the last N lines of each
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    lines: usize,
    /// Go on with what is said from now on
    #[arg(short, long)]
    follow: bool,
}

impl LogsArgs {
    fn all(&self) -> bool {
        self.rank.is_empty() && self.worker.is_empty() && !self.coordinator && !self.slurm
    }
}

/// # Errors
/// There is no such run, rank or log.
pub fn run(args: &LogsArgs, output: &Output) -> Result<()> {
    let run = runs::find(&args.run.run, &args.run.runs_dir)?;
    let mut joins = Joins::default();
    let chosen = choose(args, &run, &mut joins)?;
    if chosen.is_empty() && !args.follow {
        let message = format!("{} has no such log yet", run.logs().display());
        return Err(Failure::Usage(message).into());
    }
    let mut screen = Screen { named: args.all() || chosen.len() > 1, json: output.json() };
    let mut logs: BTreeMap<String, Log> = BTreeMap::new();
    for path in chosen {
        logs.insert(name_of(&path), Log::open(path, Some(args.lines))?);
    }
    for (name, log) in &mut logs {
        if !screen.print(name, log.lines()?)? {
            return Ok(());
        }
    }
    if !args.follow {
        return Ok(());
    }
    let mut asked: Option<Instant> = None;
    let (mut inquiry, mut over) = (Inquiry::default(), false);
    loop {
        let mut silent = true;
        for (name, log) in &mut logs {
            let lines = log.lines()?;
            silent &= lines.is_empty();
            if !screen.print(name, lines)? {
                return Ok(());
            }
        }
        if over && silent {
            return Ok(());
        }
        if asked.is_none_or(|at| at.elapsed() >= ASK) {
            over = !goes_on(&run, &mut inquiry);
            asked = Some(Instant::now());
            // one that is missing now, in a regroup for example, was there or comes
            if let Ok(chosen) = choose(args, &run, &mut joins) {
                turn_to(chosen, &mut logs, args, &mut screen)?;
            }
        }
        std::thread::sleep(POLL);
    }
}

/// Follows the files of `chosen` from now on: a rank may have gone over to another process, and a new process has another file.
fn turn_to(chosen: Vec<PathBuf>, logs: &mut BTreeMap<String, Log>, args: &LogsArgs, screen: &mut Screen) -> Result<()> {
    for (name, log) in logs.iter_mut() {
        // the loop that asks for more finds out whether anybody reads
        let _reads = screen.print(name, log.lines()?)?;
    }
    let names: Vec<String> = chosen.iter().map(|path| name_of(path)).collect();
    logs.retain(|name, _| names.contains(name));
    // a file that comes while it is waited for is new from its beginning; that of a rank may be old
    let from_end = (!args.rank.is_empty()).then_some(args.lines);
    for path in chosen {
        if let Entry::Vacant(place) = logs.entry(name_of(&path)) {
            // two files of one rank have to be told apart
            screen.named |= !args.rank.is_empty();
            place.insert(Log::open(path, from_end)?);
        }
    }
    screen.named |= logs.len() > 1;
    Ok(())
}

/// Whether anything of the job lives, or will, or cannot be asked about for the moment.
fn goes_on(run: &RunDir, inquiry: &mut Inquiry) -> bool {
    match runs::life(run) {
        Life::Live(_) | Life::Locked(_) => true,
        // if Slurm cannot tell either, who reads the logs decides
        Life::Unknown { .. } => inquiry.of(run).is_none_or(|queue| !queue.ended()),
        Life::Gone => inquiry.of(run).as_ref().is_some_and(Queue::may_go_on),
    }
}

/// The files that the arguments name; those of everybody without any.
fn choose(args: &LogsArgs, run: &RunDir, joins: &mut Joins) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(run.logs()).with_context(|| format!("cannot read {}", run.logs().display()))?;
    let mut all: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    all.sort_by_key(|path| order(&name_of(path)));
    if args.all() {
        return Ok(all);
    }
    let ranks = if args.rank.is_empty() { BTreeMap::new() } else { workers_of_ranks(run)? };
    let mut names = Vec::new();
    for rank in &args.rank {
        let file = ranks.get(rank).and_then(|worker| {
            all.iter().find(|path| name_of(path).starts_with("worker-") && joins.last(path) == Some(*worker))
        });
        let Some(file) = file else {
            let known: Vec<String> = ranks.keys().map(u32::to_string).collect();
            let message = format!(
                "no log of rank {rank} in {}: the status knows the ranks {}; `--worker N` takes a file by its number",
                run.logs().display(),
                if known.is_empty() { "-".into() } else { known.join(", ") }
            );
            return Err(Failure::Usage(message).into());
        };
        names.push(name_of(file));
    }
    names.extend(args.worker.iter().map(|number| format!("worker-{number}")));
    if args.coordinator {
        names.push("coordinator".into());
    }
    if args.slurm {
        names.extend(["slurm".into(), "srun".into()]);
    }
    let chosen: Vec<PathBuf> = all.into_iter().filter(|path| names.contains(&name_of(path))).collect();
    let there: Vec<String> = chosen.iter().map(|path| name_of(path)).collect();
    match missing(&names, &there) {
        Some(name) => {
            let message = format!("there is no {name}.log in {}", run.logs().display());
            Err(Failure::Usage(message).into())
        }
        None => Ok(chosen),
    }
}

/// The first of the wanted names that is not there. Of the two of Slurm one may be missing: a script of one's own has its
/// output elsewhere, and srun's comes with the first step.
fn missing<'a>(wanted: &'a [String], there: &[String]) -> Option<&'a String> {
    const SLURM: [&str; 2] = ["slurm", "srun"];
    let of_slurm = |name: &str| SLURM.contains(&name) && there.iter().any(|name| SLURM.contains(&name.as_str()));
    wanted.iter().find(|name| !there.contains(name) && !of_slurm(name))
}

/// Slurm's logs, the coordinator's, the workers' by number.
fn order(name: &str) -> (u8, u32, String) {
    let number = name.strip_prefix("worker-").and_then(|number| number.parse().ok());
    let kind = match (name, number) {
        ("slurm", _) => 0,
        ("srun", _) => 1,
        ("coordinator", _) => 2,
        (_, Some(_)) => 3,
        _ => 4,
    };
    (kind, number.unwrap_or(0), name.to_owned())
}

fn name_of(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Which worker has which rank now, or had it last.
fn workers_of_ranks(run: &RunDir) -> Result<BTreeMap<u32, u32>> {
    let live = runs::live(run).and_then(|address| Api::new(run, &address).job().ok());
    let status: Option<JobStatus> = match live {
        Some(status) => Some(status),
        None => runs::last_status(run)?,
    };
    let workers = status.map(|status| status.workers).unwrap_or_default();
    Ok(workers.into_iter().filter_map(|worker| Some((worker.rank?.0, worker.worker.0))).collect())
}

/// Which workers have joined from which log; each file is read once, as it grows.
#[derive(Debug, Default)]
struct Joins(BTreeMap<PathBuf, Joined>);

#[derive(Debug, Default)]
struct Joined {
    /// Bytes that were looked at: whole lines.
    at: u64,
    last: Option<u32>,
}

impl Joins {
    /// The number that the last worker of a log has got when it joined.
    fn last(&mut self, path: &Path) -> Option<u32> {
        let joined = self.0.entry(path.to_owned()).or_default();
        // what cannot be read now is read at the next look
        let _again = joined.read(path);
        joined.last
    }
}

impl Joined {
    fn read(&mut self, path: &Path) -> io::Result<()> {
        let mut file = File::open(path)?;
        if file.metadata()?.len() < self.at {
            *self = Self::default();
        }
        file.seek(SeekFrom::Start(self.at))?;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
            self.at += line.len() as u64;
            let text = String::from_utf8_lossy(&line);
            if text.contains("joined") {
                self.last = worker_number(&text).or(self.last);
            }
            line.clear();
        }
        Ok(())
    }
}

/// The field `worker` of a line of a log, plain or JSON.
fn worker_number(line: &str) -> Option<u32> {
    let behind = ["worker=", "\"worker\":"].into_iter().find_map(|field| Some(line.split_once(field)?.1))?;
    let digits: String = behind.trim_start_matches('"').chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// A file that is read as it grows.
struct Log {
    path: PathBuf,
    at: u64,
    /// A line that has not ended yet.
    begun: Vec<u8>,
}

impl Log {
    /// From the beginning, or with the last `from_end` lines.
    fn open(path: PathBuf, from_end: Option<usize>) -> Result<Self> {
        let at = match from_end {
            None => 0,
            Some(lines) => start_of_last(&path, lines).with_context(|| format!("cannot read {}", path.display()))?,
        };
        Ok(Self { path, at, begun: Vec::new() })
    }

    /// The lines that were added.
    fn lines(&mut self) -> Result<Vec<String>> {
        let mut read = || -> io::Result<()> {
            let mut file = File::open(&self.path)?;
            if file.metadata()?.len() < self.at {
                // it was begun anew
                (self.at, self.begun) = (0, Vec::new());
            }
            file.seek(SeekFrom::Start(self.at))?;
            self.at += file.read_to_end(&mut self.begun)? as u64;
            Ok(())
        };
        match read() {
            // a run that was moved aside
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            read => read.with_context(|| format!("cannot read {}", self.path.display()))?,
        }
        let Some(end) = self.begun.iter().rposition(|&byte| byte == b'\n') else { return Ok(Vec::new()) };
        let rest = self.begun.split_off(end + 1);
        let whole = std::mem::replace(&mut self.begun, rest);
        Ok(String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect())
    }
}

/// Where the last `count` whole lines of a file begin.
fn start_of_last(path: &Path, count: usize) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let from = length.saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let ends: Vec<usize> =
        bytes.iter().enumerate().filter_map(|(at, &byte)| (byte == b'\n').then_some(at + 1)).collect();
    let Some(&end) = ends.last() else { return Ok(from) };
    let start = match ends.len().checked_sub(count.saturating_add(1)) {
        Some(before) => ends[before],
        None if from == 0 => 0,
        None => ends[0],
    };
    Ok(from + start.min(end) as u64)
}

/// Where lines go.
struct Screen {
    /// Each line begins with whose it is.
    named: bool,
    json: bool,
}

impl Screen {
    /// `false` if nobody reads any more.
    fn print(&self, name: &str, lines: Vec<String>) -> Result<bool> {
        let whole = |line: String| match (self.json, self.named) {
            (true, _) => format!("{}\n", serde_json::json!({ "log": name, "line": line })),
            (false, true) => format!("{name:<11} | {line}\n"),
            (false, false) => format!("{line}\n"),
        };
        Ok(stdio::print(&lines.into_iter().map(whole).collect::<String>())?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use learn_domain::Config;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_logs_of_a_job_that_cannot_be_asked_are_followed_as_long_as_it_has_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let run = runs::create(&folder.path().join("one"), &Config::default()).unwrap();
        let mut inquiry = Inquiry::default();
        assert!(!goes_on(&run, &mut inquiry));
        let lock = File::options().read(true).write(true).open(run.secret()).unwrap();
        lock.try_lock().unwrap();
        assert!(goes_on(&run, &mut inquiry));
    }

    #[test]
    fn the_worker_of_a_line_is_found_in_either_format() {
        assert_eq!(worker_number("INFO joined worker=12 coordinator=\"http://x\""), Some(12));
        assert_eq!(worker_number(r#"{"fields":{"message":"joined","worker":"7"}}"#), Some(7));
        assert_eq!(worker_number(r#"{"worker":7}"#), Some(7));
        assert_eq!(worker_number("INFO joined"), None);
    }

    #[test]
    fn the_last_worker_of_a_growing_log_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker-0.log");
        let mut joins = Joins::default();
        assert_eq!(joins.last(&path), None);
        std::fs::write(&path, b"INFO joined worker=1\n\xff\nINFO joi").unwrap();
        assert_eq!(joins.last(&path), Some(1));
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"ned worker=5\nstep\n").unwrap();
        assert_eq!(joins.last(&path), Some(5));
        std::fs::write(&path, "INFO joined worker=7\n").unwrap();
        assert_eq!(joins.last(&path), Some(7), "it was begun anew");
    }

    #[test]
    fn only_one_of_slurms_logs_may_be_missing() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let wanted = names(&["worker-3", "slurm", "srun"]);
        assert_eq!(missing(&wanted, &names(&["worker-3", "slurm"])), None);
        assert_eq!(missing(&wanted, &names(&["slurm", "srun"])).unwrap(), "worker-3");
        assert_eq!(missing(&wanted, &names(&["worker-3"])).unwrap(), "slurm");
    }

    #[test]
    fn a_rank_is_followed_to_its_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two] = ["worker-0.log", "worker-1.log"].map(|name| folder.path().join(name));
        std::fs::write(&one, "a\n").unwrap();
        std::fs::write(&two, "b\nc\n").unwrap();
        let args = LogsArgs {
            run: RunArgs { run: "r".into(), runs_dir: "runs".into() },
            rank: vec![0],
            worker: vec![],
            coordinator: false,
            slurm: false,
            lines: 1,
            follow: true,
        };
        let mut screen = Screen { named: false, json: false };
        let mut logs = BTreeMap::from([("worker-0".to_owned(), Log::open(one, Some(1)).unwrap())]);
        turn_to(vec![two], &mut logs, &args, &mut screen).unwrap();
        assert_eq!(logs.keys().collect::<Vec<_>>(), ["worker-1"]);
        assert!(screen.named);
        assert_eq!(logs.get_mut("worker-1").unwrap().lines().unwrap(), ["c"]);
    }

    #[test]
    fn a_growing_file_gives_each_whole_line_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker-0.log");
        std::fs::write(&path, "one\ntwo\nthr").unwrap();
        let mut log = Log::open(path.clone(), Some(1)).unwrap();
        assert_eq!(log.lines().unwrap(), ["two"]);
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"ee\nfour\n").unwrap();
        assert_eq!(log.lines().unwrap(), ["three", "four"]);
        assert!(log.lines().unwrap().is_empty());
        std::fs::write(&path, "anew\n").unwrap();
        assert_eq!(log.lines().unwrap(), ["anew"]);
        std::fs::remove_file(&path).unwrap();
        assert!(log.lines().unwrap().is_empty());
    }

    #[test]
    fn more_lines_than_there_are_is_all_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker-0.log");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        for count in [2, 3, usize::MAX] {
            assert_eq!(start_of_last(&path, count).unwrap(), 0, "{count}");
        }
        assert_eq!(start_of_last(&path, 1).unwrap(), 4);
        assert_eq!(start_of_last(&path, 0).unwrap(), 8);
    }

    #[test]
    fn logs_stand_in_the_order_of_the_job() {
        let mut names = ["worker-10", "other", "coordinator", "worker-2", "srun", "slurm"];
        names.sort_by_key(|name| order(name));
        assert_eq!(names, ["slurm", "srun", "coordinator", "worker-2", "worker-10", "other"]);
    }

    proptest! {
        #[test]
        fn the_last_lines_are_the_last_lines(lines in prop::collection::vec("[a-z]{0,6}", 0..12), count in 0_usize..15) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("log");
            std::fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
            let read = Log::open(path, Some(count)).unwrap().lines().unwrap();
            prop_assert_eq!(&read[..], &lines[lines.len().saturating_sub(count)..]);
        }
    }
}
