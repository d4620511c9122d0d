//! Builders for whole-system tests: a small dataset, a job on the real binaries, and what it wrote.
//!
//! The binaries are those of this build (`cargo test --workspace` builds them all); everything is written to a
//! temporary directory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

pub mod browser;
pub mod chaos;
pub mod slurm;
pub mod terminal;

/// A folder with inputs, one dataset and any number of runs.
pub struct Site {
    folder: TempDir,
}

/// Shape of the synthetic data.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub users: usize,
    pub items: usize,
    pub dim: usize,
}

/// Small enough to train in seconds, large enough to give each of four ranks several users.
pub const SMALL: Shape = Shape { users: 90, items: 50, dim: 16 };

/// The path of one of this build's binaries.
///
/// # Panics
/// If it was not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let folder = own.parent().expect("a program lies in a folder");
    // tests lie in target/PROFILE/deps
    let profile = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let path = profile.join(name);
    assert!(path.exists(), "{} is missing: run `cargo test --workspace`, which builds it", path.display());
    path
}

impl Site {
    /// Prepares a dataset with content embeddings through `learn-launch`.
    ///
    /// # Panics
    /// If a command fails.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        let site = Self::with(shape, CONFIG);
        succeeds(&site.launch(&["embed", "job.toml"]));
        site
    }

    /// Prepares a dataset without content embeddings through `learn-launch`.
    ///
    /// # Panics
    /// If a command fails.
    #[must_use]
    pub fn without_content(shape: Shape) -> Self {
        Self::with(shape, CONFIG)
    }

    /// With conversion labels: a user likes the items of its group.
    ///
    /// # Panics
    /// If a command fails.
    #[must_use]
    pub fn labelled(shape: Shape) -> Self {
        let files = "files = [\"interactions.csv\"]\n";
        let site = Self::with(shape, &CONFIG.replace(files, &format!("{files}label = \"liked\"\n")));
        succeeds(&site.launch(&["embed", "job.toml"]));
        site
    }

    /// Interactions, items and vectors as files, and nothing prepared.
    ///
    /// # Panics
    /// If they cannot be written.
    #[must_use]
    pub fn raw(shape: Shape) -> Self {
        Self::files(shape, CONFIG)
    }

    fn with(shape: Shape, config: &str) -> Self {
        let site = Self::files(shape, config);
        succeeds(&site.launch(&["prepare", "job.toml"]));
        site
    }

    fn files(shape: Shape, config: &str) -> Self {
        let site = Self { folder: tempfile::tempdir().expect("a temporary directory") };
        fs::write(site.path("interactions.csv"), interactions(shape)).expect("the folder is writable");
        fs::write(site.path("items.csv"), items(shape)).expect("the folder is writable");
        fs::write(site.path("vectors.npy"), vectors(shape)).expect("the folder is writable");
        fs::write(site.path("job.toml"), config).expect("the folder is writable");
        site
    }

    /// Whether the folder stays when this value goes.
    pub fn keep(&mut self, keep: bool) {
        self.folder.disable_cleanup(keep);
    }

    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[must_use]
    pub fn run_dir(&self, name: &str) -> PathBuf {
        self.path("runs").join(name)
    }

    /// `learn-launch` with arguments, in this folder.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("learn-launch"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// Runs `learn-launch` to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn launch(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("learn-launch starts")
    }

    /// Starts `learn-launch` and leaves it running.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("learn-launch starts")
    }

    /// Arguments of `train` for a run with overrides.
    #[must_use]
    pub fn train<'a>(&self, overrides: &[&'a str]) -> Vec<&'a str> {
        let mut arguments = vec!["train", "job.toml"];
        for one in overrides {
            arguments.extend(["--set", one]);
        }
        arguments
    }

    /// `learn-launch status RUN --json`.
    ///
    /// # Panics
    /// If it fails or is not JSON.
    #[must_use]
    pub fn status(&self, run: &str) -> Value {
        let output = self.launch(&["status", &format!("runs/{run}"), "--json"]);
        succeeds(&output);
        serde_json::from_slice(&output.stdout).expect("status --json prints JSON")
    }

    /// The records of a run's `metrics.jsonl`.
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    pub fn steps(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.run_dir(run).join("metrics.jsonl")).expect("the run has metrics");
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    /// The lines of a run's `events.jsonl`.
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    pub fn events(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.run_dir(run).join("events.jsonl")).expect("the run has events");
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    /// The losses of a run, step by step.
    #[must_use]
    pub fn losses(&self, run: &str) -> Vec<f64> {
        self.steps(run).iter().map(|record| record["loss"].as_f64().unwrap_or(f64::NAN)).collect()
    }

    /// The bytes of a checkpoint's file.
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    pub fn checkpoint_file(&self, run: &str, step: u64, file: &str) -> Vec<u8> {
        let path = self.run_dir(run).join("checkpoints").join(format!("step-{step:010}")).join(file);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

/// Fails the test with a command's output unless it exited with 0.
///
/// # Panics
/// If it did not.
pub fn succeeds(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", text(output));
}

/// What a command printed.
#[must_use]
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Head and body of the answer to a GET of `http://HOST:PORT/PATH`; `headers` are further lines of the request, each with its
/// `\r\n`.
///
/// # Panics
/// If nobody answers there.
#[must_use]
pub fn get(url: &str, headers: &str) -> String {
    let rest = url.strip_prefix("http://").expect("it is an address");
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let mut stream = TcpStream::connect(host).expect("the server listens");
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers in UTF-8");
    answer
}

/// The f32 tensors of a `.safetensors` file by name.
///
/// # Panics
/// If it is no such file.
#[must_use]
pub fn f32_tensors(bytes: &[u8]) -> BTreeMap<String, Vec<f32>> {
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).expect("a JSON header");
    let values = f32_values(bytes);
    let tensors = header.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__");
    let part = |tensor: &Value| {
        let offset = |at: usize| tensor["data_offsets"][at].as_u64().expect("an offset") as usize / 4;
        values[offset(0)..offset(1)].to_vec()
    };
    tensors.map(|(name, tensor)| (name.clone(), part(tensor))).collect()
}

/// The f32 tensors of a `.safetensors` file, all values in file order.
///
/// # Panics
/// If it is no such file.
#[must_use]
pub fn f32_values(bytes: &[u8]) -> Vec<f32> {
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).expect("a JSON header");
    let kinds = header.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__");
    assert!(kinds.clone().all(|(_, tensor)| tensor["dtype"] == "F32"), "{header}");
    bytes[8 + header_bytes..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Numbers that look random and are the same on every machine.
fn noise(parts: &[usize]) -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for &part in parts {
        state = (state ^ part as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state ^= state >> 29;
        state = state.wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 32;
    }
    state
}

/// Each user walks through one of five groups of items, with some steps outside, from seconds to days apart.
fn interactions(shape: Shape) -> String {
    let mut text = String::from("user_id,item_id,timestamp,liked\n");
    for user in 0..shape.users {
        let group = user % 5;
        let length = 6 + noise(&[user, 1]) as usize % 14;
        let mut time = user as u64;
        for place in 0..length {
            let stray = noise(&[user, place, 2]).is_multiple_of(5);
            let draw = noise(&[user, place, 3]) as usize;
            let item = if stray { draw % shape.items } else { (draw % (shape.items / 5)) * 5 + group };
            let liked = u8::from(item % 5 == group);
            time += 1 << (noise(&[user, place, 5]) % 20);
            text.push_str(&format!("user-{user:03},item-{item:03},{time},{liked}\n"));
        }
    }
    text
}

fn items(shape: Shape) -> String {
    let rows = (0..shape.items).map(|item| format!("item-{item:03},Thing {item} of group {}\n", item % 5));
    std::iter::once("item_id,title\n".to_owned()).chain(rows).collect()
}

/// Content embeddings: the group's direction plus noise, as an `.npy` file in item order.
fn vectors(shape: Shape) -> Vec<u8> {
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {}), }}", shape.items, shape.dim);
    dict.extend(std::iter::repeat_n(' ', 128 - 11 - dict.len()));
    dict.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((dict.len() as u16).to_le_bytes());
    bytes.extend(dict.as_bytes());
    for item in 0..shape.items {
        for place in 0..shape.dim {
            let random = (noise(&[item, place, 4]) % 2000) as f32 / 1000.0 - 1.0;
            let group = if place % 5 == item % 5 { 1.0 } else { 0.0 };
            bytes.extend((group + 0.5 * random).to_le_bytes());
        }
    }
    bytes
}

const CONFIG: &str = r#"
[job]
runs_dir = "runs"

[data]
dataset = "dataset"

[prepare.interactions]
files = ["interactions.csv"]

[prepare.items]
files = ["items.csv"]
title = "title"

[embed]
from = "vectors.npy"

[model]
layers = 1
heads = 2
hidden = 16
output_dim = 8
dropout = 0.0

[sampling]
history = 8
targets = 4
user_positions = 3
item_positions = 2

[optimizer]
warmup_steps = 5

[training]
epochs = 4
global_batch = 16
threads = 1

[evaluation]
cutoffs = [1, 10]

[cluster]
workers = 1
device = "cpu"
heartbeat_interval = "200ms"
heartbeat_timeout = "5s"
"#;

/// Whether a process is there and has not ended (a zombie has).
#[must_use]
pub fn is_alive(pid: u64) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z')))
}

/// Waits until the metrics of a run hold `steps` lines, as a person would follow them.
///
/// # Panics
/// If it cannot be followed.
pub fn follow(site: &Site, run: &str, steps: usize) {
    follow_file(&site.run_dir(run).join("metrics.jsonl"), "", steps);
}

/// Waits until a file has so many lines with `part` in them.
///
/// # Panics
/// If it cannot be followed.
pub fn follow_file(path: &Path, part: &str, wanted: usize) {
    let mut follow = Command::new("tail")
        .args(["--retry", "-n", "+1", "-F"])
        .arg(path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("tail starts");
    let lines = BufReader::new(follow.stdout.take().expect("it is piped")).lines();
    let with_part = lines.filter(|line| line.as_ref().is_ok_and(|line| line.contains(part)));
    assert_eq!(with_part.take(wanted).count(), wanted);
    follow.kill().expect("tail runs");
    follow.wait().expect("tail ends");
}

/// Sends a signal by its name without `SIG`.
///
/// # Panics
/// If it cannot be sent.
pub fn signal(name: &str, pid: u64) {
    // the shell has `kill` built in; a program of that name may not be there
    let sent = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().expect("sh starts");
    assert!(sent.success());
}
