//! An embed job: a real coordinator in the test, and real `learn-embed` processes that it leases ranges to. The files
//! are the same, byte for byte, for any number of workers, and when one is killed on the way.

#![allow(clippy::unwrap_used)] // Helpers of tests stop the test, as tests do.

mod support;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use learn_coordinator::embedding::{EmbeddingCoordinator, Ended};
use learn_domain::config::Span;
use learn_domain::run_dir::RunDir;
use support::{SHARD, Workplace};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

const ITEMS: usize = 620;
const RANGES: usize = ITEMS.div_ceil(SHARD);

/// The shard files by name.
type Files = BTreeMap<OsString, Vec<u8>>;

/// A dataset and a coordinator over it.
struct Job {
    work: Workplace,
    runtime: Runtime,
    url: String,
    ended: JoinHandle<Result<Ended, learn_coordinator::CoordinatorError>>,
}

fn workplace() -> Workplace {
    let mut work = Workplace::new(ITEMS);
    work.config.embed.batch_tokens = 1; // one text a pass: long enough to be killed on the way
    work.config.cluster.heartbeat_timeout = Span(Duration::from_secs(3));
    work
}

impl Job {
    fn start(work: Workplace) -> Self {
        let run = RunDir::new(work.folder.path().join("job"));
        fs::create_dir(run.root()).unwrap();
        fs::write(run.config(), serde_json::to_vec(&work.config).unwrap()).unwrap();
        fs::write(run.secret(), "0123456789abcdef").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let coordinator = runtime.block_on(EmbeddingCoordinator::bind(run.root())).unwrap();
        let url = coordinator.address().grpc.clone();
        let ended = runtime.spawn(coordinator.run(std::future::pending()));
        Self { work, runtime, url, ended }
    }

    fn worker(&self) -> (Child, BufReader<ChildStdout>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_learn-embed"));
        command.args(["--coordinator", &self.url, "--threads", "1", "--progress-json", "--secret-file"]);
        command.arg(self.work.folder.path().join("job/secret")).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        (child, lines)
    }

    /// The files, once the job has ended well.
    fn files(self) -> Files {
        assert_eq!(self.runtime.block_on(self.ended).unwrap().unwrap(), Ended::Finished);
        self.work.done(&["--commit"]);
        files(&self.work)
    }
}

fn files(work: &Workplace) -> Files {
    let shards = work.shards().into_keys();
    shards.map(|path| (path.file_name().unwrap().to_owned(), fs::read(&path).unwrap())).collect()
}

/// What one process without a coordinator makes.
fn undisturbed() -> Files {
    let work = workplace();
    work.done(&[]);
    files(&work)
}

fn done(line: &str) -> usize {
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["total"], ITEMS);
    usize::try_from(line["done"].as_u64().unwrap()).unwrap()
}

#[test]
fn any_number_of_workers_makes_the_same_bytes() {
    let alone = undisturbed();
    assert_eq!(alone.len(), RANGES);
    for count in 1..=3 {
        let job = Job::start(workplace());
        let workers: Vec<_> = (0..count).map(|_| job.worker()).collect();
        let mut made = Vec::new();
        for (mut child, lines) in workers {
            made.push(done(&lines.lines().last().unwrap().unwrap()));
            assert!(child.wait().unwrap().success());
        }
        assert_eq!(made.iter().sum::<usize>(), ITEMS, "each range was made once: {made:?}");
        assert!(job.files() == alone, "{count} workers made other bytes");
    }
}

#[test]
fn the_range_of_a_killed_worker_is_taken_over() {
    let job = Job::start(workplace());
    let (mut first, lines) = job.worker();
    for line in lines.lines() {
        if done(&line.unwrap()) > 2 * SHARD {
            break;
        }
    }
    first.kill().unwrap();
    assert_eq!(first.wait().unwrap().signal(), Some(9), "it must not have ended by itself");
    let before = job.work.shards();
    assert!(before.len() >= 2 && before.len() < RANGES, "{} of {RANGES} ranges were made", before.len());
    assert!(job.work.refused(&["--commit"]).contains("shards are not done"));

    let (mut second, lines) = job.worker();
    let made = done(&lines.lines().last().unwrap().unwrap());
    assert!(second.wait().unwrap().success());
    assert!(made >= ITEMS - before.len() * SHARD && made < ITEMS, "{made} items of {ITEMS}");
    let after = job.work.shards();
    assert!(before.iter().all(|(path, written)| after[path] == *written), "a finished range was made again");
    assert!(job.files() == undisturbed());
}

#[test]
fn finished_ranges_of_an_earlier_job_are_kept() {
    let work = workplace();
    work.done(&[]);
    let before = work.shards();
    let (gone, _) = before.last_key_value().unwrap();
    fs::remove_file(gone).unwrap();
    let job = Job::start(work);
    let (mut child, lines) = job.worker();
    assert_eq!(done(&lines.lines().last().unwrap().unwrap()), ITEMS);
    assert!(child.wait().unwrap().success());
    let after = job.work.shards();
    assert!(before.iter().all(|(path, written)| path == gone || after[path] == *written));
    assert!(job.files() == undisturbed());
}

#[test]
fn a_worker_without_the_secret_or_without_a_coordinator_says_so() {
    let job = Job::start(workplace());
    let wrong = job.work.folder.path().join("wrong");
    fs::write(&wrong, "fedcba9876543210").unwrap();
    let refused = |url: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_learn-embed"));
        let output = command.args(["--coordinator", url, "--secret-file"]).arg(&wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = refused(&job.url);
    assert!(said.contains("secret of this run") && !said.contains("fedcba"), "{said}");
    assert!(refused("http://127.0.0.1:1").contains("http://127.0.0.1:1"));
}
