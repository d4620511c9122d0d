//! Child processes that write a log and never outlive this one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use learn_domain::failure::is_failure;

use crate::system::{self, End};

/// Most bytes of a log that are read for its tail.
const TAIL_BYTES: u64 = 64 << 10;
/// Pause between two looks at a child that is about to end.
const POLL: Duration = Duration::from_millis(20);

/// A sibling binary cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("{name} is not beside learn-launch in {}: build it (`cargo build --release`) or install it there", .folder.display())]
    Missing { name: &'static str, folder: PathBuf },
    #[error("cannot find the folder of learn-launch: {0}")]
    NoFolder(io::Error),
    #[error("cannot start {name}: {source}")]
    Start { name: String, source: io::Error },
    #[error("cannot write the log {}: {source}", .path.display())]
    Log { path: PathBuf, source: io::Error },
}

/// The path of a binary that is installed beside this one.
///
/// # Errors
/// It is not there.
pub fn sibling(name: &'static str) -> Result<PathBuf, ProcessError> {
    let own = std::env::current_exe().map_err(ProcessError::NoFolder)?;
    let folder = own.parent().unwrap_or(Path::new("/")).to_owned();
    let path = folder.join(name);
    if path.is_file() { Ok(path) } else { Err(ProcessError::Missing { name, folder }) }
}

/// A running child; it is killed and reaped when this value goes.
#[derive(Debug)]
pub struct Process {
    pub name: String,
    pub log: PathBuf,
    child: Child,
    ended: Option<ExitStatus>,
    /// Length of the log when it started: what stands before was said by an earlier attempt.
    log_start: u64,
}

impl Process {
    /// Starts `command` in a process group of its own (so that Ctrl-C reaches only this process, which passes it on)
    /// with stdout and stderr appended to `log`.
    ///
    /// # Errors
    /// The log cannot be opened or the command not started.
    pub fn start(name: impl Into<String>, command: &mut Command, log: &Path) -> Result<Self, ProcessError> {
        Self::start_tied(name, command, log, End::Gracefully)
    }

    /// As [`Process::start`]; when this process ends, the child is asked to end as `how` says.
    ///
    /// # Errors
    /// The log cannot be opened or the command not started.
    pub fn start_tied(
        name: impl Into<String>,
        command: &mut Command,
        log: &Path,
        how: End,
    ) -> Result<Self, ProcessError> {
        let name = name.into();
        let (out, err) = (open_log(log)?, open_log(log)?);
        let log_start = err.metadata().map_err(|source| ProcessError::Log { path: log.into(), source })?.len();
        command.stdout(out).stderr(err).stdin(Stdio::null()).process_group(0);
        logs_alike(command);
        system::tie_to_parent(command, how);
        match command.spawn() {
            Ok(child) => Ok(Self { name, log: log.into(), child, ended: None, log_start }),
            Err(source) => Err(ProcessError::Start { name, source }),
        }
    }

    /// The last `count` lines that it has said.
    #[must_use]
    pub fn tail(&self, count: usize) -> Vec<String> {
        tail(&self.log, self.log_start, count)
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            // An error would mean that the child was reaped elsewhere, which nothing here does.
            self.ended = self.child.try_wait().unwrap_or_default();
        }
        self.ended
    }

    /// It has ended, and neither done, nor stopped as it was asked to, nor given the job up.
    pub fn failed(&mut self) -> bool {
        self.ended().is_some_and(|status| is_failure(status.code()))
    }

    pub fn ask_to_end(&mut self, how: End) {
        if self.ended().is_none() {
            system::end(self.pid(), how);
        }
    }

    /// Waits up to `limit`; `None` if it still runs then.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        while self.ended().is_none() && start.elapsed() < limit {
            std::thread::sleep(POLL);
        }
        self.ended()
    }
}

/// Has a child log in the format of this process.
pub fn logs_alike(command: &mut Command) {
    if learn_telemetry::log::is_json() {
        command.env(learn_telemetry::log::FORMAT_VARIABLE, "json");
    }
}

fn open_log(log: &Path) -> Result<File, ProcessError> {
    let opened = OpenOptions::new().create(true).append(true).open(log);
    opened.map_err(|source| ProcessError::Log { path: log.into(), source })
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            system::end(self.pid(), End::AtOnce);
            let _reaped = self.child.wait();
        }
    }
}

/// How a process ended, in words.
#[must_use]
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(libc::SIGKILL)) => "killed (SIGKILL; perhaps the machine ran out of memory)".into(),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// The reason in the end of a log: the message of its last error without time and level, or else its last line.
#[must_use]
pub fn last_words(said: &[String]) -> Option<String> {
    let last = said.iter().rev().find(|line| !line.trim().is_empty())?;
    Some(said.iter().rev().find_map(|line| error_of(line)).unwrap_or_else(|| last.trim().to_owned()))
}

/// What a log line says, if it is an error, in either format of [`learn_telemetry::log`].
#[must_use]
pub fn error_of(line: &str) -> Option<String> {
    let line = line.trim();
    if line.starts_with('{') {
        let event: serde_json::Value = serde_json::from_str(line).ok()?;
        let message = event["fields"]["message"].as_str()?;
        return (event["level"] == "ERROR").then(|| message.to_owned());
    }
    let (time, message) = line.split_once(" ERROR ")?;
    let is_time = time.starts_with(|first: char| first.is_ascii_digit()) && time.ends_with('Z') && !time.contains(' ');
    is_time.then(|| message.trim().to_owned())
}

/// The last `count` lines of a log from byte `from` on; empty if there is none.
fn tail(log: &Path, from: u64, count: usize) -> Vec<String> {
    let read = || -> io::Result<Vec<String>> {
        let mut file = File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(TAIL_BYTES).max(from);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        let lines: Vec<_> = String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect();
        Ok(lines[lines.len().saturating_sub(count)..].to_vec())
    };
    read().unwrap_or_default()
}

/// Whether `pid` runs now and is a process called `name`; a zombie does not run.
#[must_use]
pub fn runs(pid: u32, name: &str) -> bool {
    // `PID (COMMAND) STATE …`; the command is cut to 15 bytes and may hold spaces and parentheses.
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let Some((command, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") ")) else { return false };
    let shown = &name[..name.len().min(15)];
    command == shown && !rest.starts_with(['Z', 'X'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(folder: &Path) -> Process {
        Process::start("sleeper", Command::new("sleep").arg("600"), &folder.join("log")).unwrap()
    }

    #[test]
    fn a_dropped_process_is_killed_and_reaped() {
        let folder = tempfile::tempdir().unwrap();
        let process = sleeper(folder.path());
        let pid = process.pid();
        assert!(runs(pid, "sleep") && !runs(pid, "learn-coordinator"));
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn asking_gracefully_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut process = sleeper(folder.path());
        assert_eq!(process.wait(Duration::ZERO), None);
        process.ask_to_end(End::Gracefully);
        let status = process.wait(Duration::from_secs(10)).unwrap();
        assert!(process.failed());
        assert_eq!(describe(status), "killed by signal 15");
    }

    #[test]
    fn children_die_with_a_killed_parent() {
        // A parent in between: a shell cannot set the death signal, so the child of this test is started by a copy of
        // the test through `Process`, and the middle process is the one that is killed.
        if let Some(folder) = std::env::var_os("LEARN_TEST_MIDDLE") {
            let process = sleeper(Path::new(&folder));
            std::fs::write(Path::new(&folder).join("pid.part"), process.pid().to_string()).unwrap();
            std::fs::rename(Path::new(&folder).join("pid.part"), Path::new(&folder).join("pid")).unwrap();
            loop {
                std::thread::park();
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let mut middle = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process::tests::children_die_with_a_killed_parent", "--nocapture"])
            .env("LEARN_TEST_MIDDLE", folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let grandchild: u32 = loop {
            if let Ok(text) = std::fs::read_to_string(folder.path().join("pid")) {
                break text.parse().unwrap();
            }
            std::thread::sleep(POLL);
        };
        assert!(runs(grandchild, "sleep"));
        middle.kill().unwrap();
        middle.wait().unwrap();
        let start = Instant::now();
        while runs(grandchild, "sleep") {
            assert!(start.elapsed() < Duration::from_secs(20), "the grandchild was orphaned");
            std::thread::sleep(POLL);
        }
    }

    #[test]
    fn output_goes_to_the_log_and_its_tail_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let script = "for i in 1 2 3 4; do echo line $i; done; echo trouble >&2; exit 3";
        let mut process = Process::start("talker", Command::new("sh").args(["-c", script]), &log).unwrap();
        let status = process.wait(Duration::from_secs(10)).unwrap();
        assert_eq!(describe(status), "exit code 3");
        assert_eq!(process.tail(2), ["line 4", "trouble"]);
        assert_eq!(tail(&folder.path().join("none"), 0, 2), Vec::<String>::new());
    }

    #[test]
    fn what_an_earlier_attempt_said_is_not_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let said = |script: &str| {
            let mut process = Process::start("talker", Command::new("sh").args(["-c", script]), &log).unwrap();
            process.wait(Duration::from_secs(10)).unwrap();
            process.tail(9)
        };
        assert_eq!(said("echo out of memory; exit 1"), ["out of memory"]);
        assert_eq!(said("exit 1"), Vec::<String>::new());
        assert_eq!(said("echo disk full; exit 1"), ["disk full"]);
    }

    #[test]
    fn an_error_is_found_in_either_format() {
        let text = "2026-01-02T03:04:05.678901Z ERROR user `x` is not in the dataset\n";
        assert_eq!(error_of(text).as_deref(), Some("user `x` is not in the dataset"));
        let json = r#"{"role":"worker","pid":1,"timestamp":"t","level":"ERROR","fields":{"message":"no user \"x\""}}"#;
        assert_eq!(error_of(json).as_deref(), Some("no user \"x\""));
        for other in [
            "2026-01-02T03:04:05.678901Z  WARN an ERROR was passed over",
            "starts with the weights of runs/a: an ERROR is no log line",
            "3:04 ERROR of a program with another clock",
            "Z ERROR without a time",
            r#"{"level":"WARN","fields":{"message":"m"}}"#,
            r#"{"level":"ERROR","message":"of another program"}"#,
            "{ no JSON",
        ] {
            assert_eq!(error_of(other), None, "{other}");
        }
    }

    #[test]
    fn the_reason_is_the_last_error_in_either_format_or_the_last_line() {
        let words = |lines: &[&str]| last_words(&lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>());
        let (text, json) = (
            "2026-11-30T01:00:00.5Z ERROR no CUDA device: no driver",
            r#"{"role":"worker","level":"ERROR","fields":{"message":"no CUDA device: no driver"}}"#,
        );
        for error in [text, json] {
            let said = words(&["2026-11-30T01:00:00Z  INFO started role=\"worker\"", error, "{}", " "]);
            assert_eq!(said.as_deref(), Some("no CUDA device: no driver"));
        }
        let loader = "learn-worker: error while loading shared libraries: libtorch.so";
        assert_eq!(words(&["an ERROR of another kind", loader, ""]).as_deref(), Some(loader));
        assert_eq!(words(&["", "  "]), None);
    }

    #[test]
    fn what_cannot_start_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Process::start("ghost", &mut Command::new("/no/such/binary"), &folder.path().join("log"));
        assert!(error.unwrap_err().to_string().starts_with("cannot start ghost: "));
        assert!(sibling("learn-nothing").unwrap_err().to_string().contains("is not beside learn-launch"));
    }
}
