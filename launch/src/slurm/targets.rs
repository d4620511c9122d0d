//! A file with the targets of a Slurm job for Prometheus' `file_sd_configs`: kept while a start of the job runs, since nobody
//! knows beforehand on which machine its coordinator will be.
//!
//! Input: the run's `coordinator.json`, and `/sd` of the coordinator there. Output: `DIR/JOB.json`, always whole; none when no
//! coordinator answers, and none after the start. A file that a killed start has left is taken away by the next one. Invariant: no
//! target in it is on the loopback, which is another machine's where Prometheus runs.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;
use learn_telemetry::stdio;
use serde_json::Value;
use ureq::Agent;

use super::address;
use crate::runs;

/// Pause between two questions to the coordinator.
const ASK: Duration = Duration::from_secs(10);
/// While there is no file yet.
const ASK_FIRST: Duration = Duration::from_secs(1);
/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps the file until it is dropped.
#[derive(Debug)]
pub struct Keeper {
    /// Its end is the word to stop.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// # Errors
    /// The folder is not there, or a file of an earlier start stays.
    pub fn start(run: &RunDir, folder: &Path, job: u32) -> Result<Self> {
        std::fs::read_dir(folder)
            .with_context(|| format!("cannot read {}, which --prometheus-targets names", folder.display()))?;
        let file = folder.join(format!("{job}.json"));
        remove(&file)?;
        let (stop, stopped) = channel();
        let run = run.clone();
        let thread = std::thread::spawn(move || {
            let (mut there, mut told) = (false, false);
            while stopped.recv_timeout(if there { ASK } else { ASK_FIRST }) == Err(RecvTimeoutError::Timeout) {
                match keep(&run, &file) {
                    Ok(kept) => {
                        there = kept.there;
                        if kept.left_out > 0 && !std::mem::replace(&mut told, true) {
                            stdio::say(format_args!(
                                "learn-launch: targets at 127.0.0.1 or the like are not written to {}: a Prometheus elsewhere \
                                 would ask its own machine. `--set cluster.bind=0.0.0.0` makes them others",
                                file.display()
                            ));
                        }
                    }
                    Err(error) => stdio::say(format_args!("learn-launch: {error:#}")),
                }
            }
            if let Err(error) = remove(&file) {
                stdio::say(format_args!("learn-launch: {error:#}"));
            }
        });
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // it has said what it had to say
            let _ended = thread.join();
        }
    }
}

/// What has become of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    there: bool,
    /// Groups with a target on the loopback.
    left_out: usize,
}

/// Writes what the coordinator says now, or takes the file away if there is nothing to say.
fn keep(run: &RunDir, file: &Path) -> Result<Kept> {
    let said = ask(run).unwrap_or_default();
    let all = said.len();
    let groups: Vec<Value> = said.into_iter().filter(|group| !is_local(group)).collect();
    let kept = Kept { there: !groups.is_empty(), left_out: all - groups.len() };
    if groups.is_empty() {
        return remove(file).map(|()| kept);
    }
    // a line
    let targets = format!("{}\n", Value::Array(groups));
    let old = std::fs::read_to_string(file).unwrap_or_default();
    if old != targets {
        runs::replace(file, targets.as_bytes())?;
    }
    Ok(kept)
}

/// A group of targets has one on the loopback.
fn is_local(group: &Value) -> bool {
    let targets = group["targets"].as_array().into_iter().flatten();
    targets.filter_map(Value::as_str).any(|target| address::is_loopback(address::host(target)))
}

/// The groups of targets; `None` if no coordinator answers.
fn ask(run: &RunDir) -> Option<Vec<Value>> {
    let address: CoordinatorAddress = runs::read_json(&run.coordinator()).ok()?;
    let agent: Agent = Agent::config_builder().timeout_global(Some(TIMEOUT)).proxy(None).build().into();
    // it needs no token, and nobody knows yet who answers there
    let request = agent.get(format!("{}/sd", address.http.trim_end_matches('/')));
    request.call().ok()?.body_mut().read_json().ok()
}

fn remove(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    /// A coordinator that answers once.
    fn serve(body: &'static str) -> (CoordinatorAddress, JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let http = format!("http://{}", listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0_u8; 4096];
            let length = stream.read(&mut request).unwrap();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            )
            .unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        (CoordinatorAddress { http, ..CoordinatorAddress::default() }, thread)
    }

    #[test]
    fn the_file_says_what_the_coordinator_says_and_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path().join("run"));
        std::fs::create_dir(run.root()).unwrap();
        std::fs::write(run.token(), "word").unwrap();
        let file = folder.path().join("12.json");
        let nothing = Kept { there: false, left_out: 0 };
        assert!(keep(&run, &file).unwrap() == nothing && !file.exists(), "there is no coordinator yet");
        let (address, asked) = serve(r#"[{"targets":["a:1"],"labels":{"job":"shop"}}]"#);
        std::fs::write(run.coordinator(), serde_json::to_vec(&address).unwrap()).unwrap();
        assert_eq!(keep(&run, &file).unwrap(), Kept { there: true, left_out: 0 });
        let request = asked.join().unwrap();
        assert!(request.starts_with("GET /sd "), "{request}");
        let request = request.to_lowercase();
        assert!(!request.contains("authorization") && !request.contains("word"), "it needs no token: {request}");
        let said: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(said[0]["targets"][0], "a:1");
        assert!(keep(&run, &file).unwrap() == nothing && !file.exists(), "it does not answer any more");
    }

    #[test]
    fn a_target_on_the_loopback_is_never_written() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        let file = folder.path().join("12.json");
        for (said, left_out, written) in [
            (r#"[{"targets":["127.0.0.1:80"]},{"targets":["[::1]:80"]},{"targets":["localhost:80"]}]"#, 3, None),
            (
                r#"[{"targets":["127.0.0.1:80"]},{"targets":["10.0.0.1:81"]}]"#,
                1,
                Some("[{\"targets\":[\"10.0.0.1:81\"]}]\n"),
            ),
            (r#"[{"targets":["127.0.0.1:80"]}]"#, 1, None),
        ] {
            let (address, asked) = serve(said);
            std::fs::write(run.coordinator(), serde_json::to_vec(&address).unwrap()).unwrap();
            assert_eq!(keep(&run, &file).unwrap(), Kept { there: written.is_some(), left_out });
            asked.join().unwrap();
            assert_eq!(std::fs::read_to_string(&file).ok().as_deref(), written, "{said}");
        }
    }

    #[test]
    fn what_a_killed_start_has_left_is_taken_away_and_nothing_stays_behind() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path().join("run"));
        let file = folder.path().join("12.json");
        std::fs::write(&file, "[]").unwrap();
        let keeper = Keeper::start(&run, folder.path(), 12).unwrap();
        assert!(!file.exists());
        std::fs::write(&file, "[]").unwrap();
        drop(keeper);
        assert!(!file.exists());
        let error = Keeper::start(&run, &folder.path().join("none"), 12).unwrap_err();
        assert!(error.to_string().contains("--prometheus-targets"), "{error}");
    }
}
