//! A file with the targets of a Slurm job for Prometheus' `file_sd_configs`: kept while a start of the job runs, since nobody
//! knows beforehand on which machine its coordinator will be.
//!
//! Input: the run's `coordinator.json`, and `/sd` of the coordinator there. Output: `DIR/JOB.json`, always whole; none when no
//! coordinator answers, and none after the start. One that a killed start has left is taken away by the next one.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;
use learn_telemetry::stdio;
use ureq::Agent;

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
            let mut there = false;
            while stopped.recv_timeout(if there { ASK } else { ASK_FIRST }) == Err(RecvTimeoutError::Timeout) {
                match keep(&run, &file) {
                    Ok(kept) => there = kept,
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

/// Writes what the coordinator says now, or takes the file away; whether it is there.
fn keep(run: &RunDir, file: &PathBuf) -> Result<bool> {
    let Some(targets) = ask(run) else { return remove(file).map(|()| false) };
    let old = std::fs::read_to_string(file).unwrap_or_default();
    if old != targets {
        runs::replace(file, targets.as_bytes())?;
    }
    Ok(true)
}

/// A line of JSON; `None` if no coordinator answers.
fn ask(run: &RunDir) -> Option<String> {
    let address: CoordinatorAddress = runs::read_json(&run.coordinator()).ok()?;
    let agent: Agent = Agent::config_builder().timeout_global(Some(TIMEOUT)).proxy(None).build().into();
    // it needs no token, and nobody knows yet who answers there
    let request = agent.get(format!("{}/sd", address.http.trim_end_matches('/')));
    let targets: serde_json::Value = request.call().ok()?.body_mut().read_json().ok()?;
    Some(format!("{targets}\n"))
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
        assert!(!keep(&run, &file).unwrap() && !file.exists(), "there is no coordinator yet");
        let (address, asked) = serve(r#"[{"targets":["a:1"],"labels":{"job":"shop"}}]"#);
        std::fs::write(run.coordinator(), serde_json::to_vec(&address).unwrap()).unwrap();
        assert!(keep(&run, &file).unwrap());
        let request = asked.join().unwrap();
        assert!(request.starts_with("GET /sd "), "{request}");
        let request = request.to_lowercase();
        assert!(!request.contains("authorization") && !request.contains("word"), "it needs no token: {request}");
        let said: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(said[0]["targets"][0], "a:1");
        assert!(!keep(&run, &file).unwrap() && !file.exists(), "it does not answer any more");
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
