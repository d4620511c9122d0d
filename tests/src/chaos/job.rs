//! The job that is disturbed: started through `learn-launch`, watched through its files and its coordinator.
//!
//! Input: a site. Output: what the job says of itself. Invariant: it does not outlive this value.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{Site, is_alive};

/// Between two looks.
pub const LOOK: Duration = Duration::from_millis(20);
/// Longest wait for one answer of the coordinator.
const ANSWER: Duration = Duration::from_secs(2);
/// Steps that a generation must have finished before the job counts as recovered.
const STEPS: u64 = 3;

/// A worker as the status shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worker {
    pub worker: u64,
    pub rank: u64,
    pub pid: u64,
}

/// What the coordinator says.
#[derive(Clone, Debug)]
pub struct Status(pub Value);

impl Status {
    fn number(&self, pointer: &str) -> u64 {
        self.0.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
    }

    #[must_use]
    pub fn state(&self) -> &str {
        self.0["state"].as_str().unwrap_or("")
    }

    #[must_use]
    pub fn step(&self) -> u64 {
        self.number("/last_step/step")
    }

    #[must_use]
    pub fn generation(&self) -> u64 {
        self.number("/generation")
    }

    #[must_use]
    pub fn last_checkpoint(&self) -> u64 {
        self.number("/last_checkpoint")
    }

    #[must_use]
    pub fn wanted(&self) -> u64 {
        self.number("/wanted_workers")
    }

    /// Those with a rank, in rank order.
    #[must_use]
    pub fn participants(&self) -> Vec<Worker> {
        let all = self.0["workers"].as_array().into_iter().flatten();
        let mut found: Vec<Worker> = all
            .filter_map(|one| {
                let number = |key: &str| one[key].as_u64();
                Some(Worker { worker: number("worker")?, rank: number("rank")?, pid: number("pid")? })
            })
            .collect();
        found.sort_unstable_by_key(|worker| worker.rank);
        found
    }
}

/// A running job.
pub struct Job<'a> {
    site: &'a Site,
    pub name: &'static str,
    child: Option<Child>,
}

impl<'a> Job<'a> {
    /// # Errors
    /// `learn-launch` cannot be started.
    pub fn start(site: &'a Site, name: &'static str, arguments: &[String]) -> Result<Self> {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let log = fs::File::create(site.path(&format!("{name}.log"))).context("the site is writable")?;
        let mut command = site.command(&words);
        command.stdout(log.try_clone().context("a file has a second handle")?).stderr(log);
        Ok(Self { site, name, child: Some(command.spawn().context("cannot start learn-launch")?) })
    }

    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.site.run_dir(self.name)
    }

    /// What its launcher has printed.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(self.site.path(&format!("{}.log", self.name))).unwrap_or_default()
    }

    fn address(&self) -> Result<Value> {
        let text = fs::read_to_string(self.folder().join("coordinator.json")).context("no coordinator.json")?;
        serde_json::from_str(&text).context("coordinator.json is not JSON")
    }

    /// The coordinator's process.
    ///
    /// # Errors
    /// There is none.
    pub fn coordinator(&self) -> Result<u64> {
        self.address()?["pid"].as_u64().context("coordinator.json has no pid")
    }

    /// # Errors
    /// The coordinator does not answer.
    pub fn status(&self) -> Result<Status> {
        let address = self.address()?;
        let host = address["http"].as_str().and_then(|url| url.strip_prefix("http://")).context("no address")?;
        let mut stream = TcpStream::connect_timeout(&host.parse().context("no host:port")?, ANSWER)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let token = fs::read_to_string(self.folder().join("token")).context("no token")?;
        let head = format!("Host: {host}\r\nAuthorization: Bearer {token}\r\nConnection: close");
        write!(stream, "GET /api/v1/job HTTP/1.1\r\n{head}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        if !head.starts_with("HTTP/1.1 200") {
            bail!("{}", head.lines().next().unwrap_or("no answer"));
        }
        Ok(Status(serde_json::from_str(body).context("the status is not JSON")?))
    }

    /// The launcher's end, if it has ended.
    fn ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// Looks again and again until there is something to see.
    ///
    /// # Errors
    /// Nothing within `limit`, or the job has ended.
    pub fn wait<T>(&mut self, what: &str, limit: Duration, mut look: impl FnMut(&Self) -> Option<T>) -> Result<T> {
        let started = Instant::now();
        loop {
            if let Some(seen) = look(self) {
                return Ok(seen);
            }
            if self.ended() {
                bail!("the job ended while this was awaited: {what}");
            }
            if started.elapsed() > limit {
                let status = self.status().map_or_else(|error| format!("{error:#}"), |status| status.0.to_string());
                bail!("in vain for {} s: {what}; status: {status}", limit.as_secs());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until all wanted workers take part and steps are finished; how long that took.
    ///
    /// # Errors
    /// It is not so within `limit`.
    pub fn recovered(&mut self, workers: u64, limit: Duration) -> Result<Duration> {
        let started = Instant::now();
        let mut seen: Option<(u64, u64)> = None;
        let what = format!("{workers} workers that finish steps");
        self.wait(&what, limit, |job| {
            let status = job.status().ok()?;
            let participants = status.participants();
            let complete = status.state() == "running"
                && status.wanted() == workers
                && participants.len() as u64 == workers
                && participants.iter().all(|worker| is_alive(worker.pid));
            if !complete {
                seen = None;
                return None;
            }
            match seen {
                Some((generation, step)) if generation == status.generation() => {
                    (status.step() >= step + STEPS).then_some(())
                }
                _ => {
                    seen = Some((status.generation(), status.step()));
                    None
                }
            }
        })?;
        Ok(started.elapsed())
    }

    /// The lines of one of the run's `.jsonl` files; a line that is being written is left out.
    #[must_use]
    pub fn lines(&self, file: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.folder().join(file)).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for an event after the first `known` ones.
    ///
    /// # Errors
    /// It does not come within `limit`.
    pub fn event(
        &mut self,
        known: usize,
        kind: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        self.wait(&format!("event {kind}"), limit, |job| {
            let events = job.lines("events.jsonl").into_iter().skip(known);
            events.into_iter().find(|event| event["event"] == kind && wanted(event))
        })
    }

    /// Waits for the launcher's end; gives its exit code.
    ///
    /// # Errors
    /// It does not end within `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<Option<i32>> {
        let started = Instant::now();
        while !self.ended() {
            if started.elapsed() > limit {
                bail!("the job did not end within {} s", limit.as_secs());
            }
            std::thread::sleep(LOOK);
        }
        let mut child = self.child.take().context("it was started")?;
        Ok(child.wait().context("its end can be asked for")?.code())
    }

    /// `learn-launch COMMAND RUN …`.
    ///
    /// # Errors
    /// It fails.
    pub fn launch(&self, command: &str, more: &[&str]) -> Result<Output> {
        let run = format!("runs/{}", self.name);
        let arguments = [&[command, &run], more].concat();
        let output = self.site.launch(&arguments);
        if !output.status.success() {
            bail!("learn-launch {}: {}", arguments.join(" "), crate::text(&output));
        }
        Ok(output)
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        // the job's other processes end with it
        if let Some(mut child) = self.child.take() {
            let _ended = child.kill().and_then(|()| child.wait());
        }
    }
}

/// Whether a process is stopped by a signal.
#[must_use]
pub fn is_stopped(pid: u64) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

/// Processes whose command line names `folder`.
#[must_use]
pub fn processes_of(folder: &Path) -> Vec<String> {
    let folder = folder.display().to_string();
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let line = |pid: String| {
        let words = fs::read(Path::new("/proc").join(&pid).join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&words).replace('\0', " ");
        (pid != own && line.contains(&folder)).then(|| format!("{pid}: {line}"))
    };
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter_map(line).collect()
}

/// A shell that sends signals: starting one for each would take longer than what is to be caught.
static SHELL: Mutex<Option<Child>> = Mutex::new(None);

/// Sends a signal, in the order of the calls; a process that has gone meanwhile is no error.
pub fn send(name: &str, pid: u64) {
    let mut shell = SHELL.lock().unwrap_or_else(PoisonError::into_inner);
    if shell.is_none() {
        // it ends with its standard input, which is this program's
        *shell = Command::new("sh").stdin(Stdio::piped()).stderr(Stdio::null()).spawn().ok();
    }
    let _sent =
        shell.as_mut().and_then(|shell| shell.stdin.as_mut()).map(|input| writeln!(input, "kill -{name} {pid}"));
}
