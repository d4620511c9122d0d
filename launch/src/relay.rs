//! A program that works for a command, whose last error becomes the command's own.
//!
//! Input: a command whose stderr is log lines in either format, and whatever else it says there. Output: its words on this
//! process's stderr as they come, but for the error that it ended with, which the caller says. Stdout is passed through, and
//! requests to stop are passed on.

use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::system::{self, End};

/// Pause between two looks for a request to stop.
const POLL: Duration = Duration::from_millis(50);

/// Runs `command` to its end; gives how it ended and the last error that it logged, if it failed.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command) -> io::Result<(ExitStatus, Option<String>)> {
    let requests = system::stop_requests();
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let (pid, over) = (child.id(), AtomicBool::new(false));
    let said = child.stderr.take();
    let held = thread::scope(|scope| {
        let stops = scope.spawn(|| pass_on_stops(pid, requests, &over));
        let held = said.map_or(Ok(None), listen);
        over.store(true, Ordering::Relaxed);
        stops.thread().unpark();
        held
    })?;
    let status = child.wait()?;
    match held {
        Some((line, _)) if status.success() => {
            tell(&line);
            Ok((status, None))
        }
        held => Ok((status, held.map(|(_, error)| error))),
    }
}

/// Tells what a program says until it says no more; gives the line of its last error, and what it says.
fn listen(said: impl Read) -> io::Result<Option<(Vec<u8>, String)>> {
    let mut held: Option<(Vec<u8>, String)> = None;
    let mut said = BufReader::new(said);
    let mut line = Vec::new();
    while said.read_until(b'\n', &mut line)? > 0 {
        let pass_on = match error_of(&String::from_utf8_lossy(&line)) {
            Some(error) => held.replace((std::mem::take(&mut line), error)).map(|(before, _)| before),
            None => Some(std::mem::take(&mut line)),
        };
        pass_on.iter().for_each(|line| tell(line));
    }
    Ok(held)
}

/// Until it is `over`, a request to stop this process, where those are caught, asks `pid` to end; the next one kills it.
fn pass_on_stops(pid: u32, before: usize, over: &AtomicBool) {
    let mut passed = before;
    while !over.load(Ordering::Relaxed) {
        let requests = system::stop_requests();
        if requests > passed {
            system::end(pid, if passed == before { End::Gracefully } else { End::AtOnce });
            passed = requests;
        }
        thread::park_timeout(POLL);
    }
}

/// If nobody reads stderr, there is nobody to tell that.
fn tell(line: &[u8]) {
    let _nobody = io::stderr().write_all(line);
}

/// What a log line says, if it is an error, in either format of [`learn_telemetry::log`].
fn error_of(line: &str) -> Option<String> {
    let line = line.trim_end();
    if line.starts_with('{') {
        let event: Value = serde_json::from_str(line).ok()?;
        return (event["level"] == "ERROR").then(|| event["fields"]["message"].as_str().map(str::to_owned))?;
    }
    let (time, message) = line.split_once(" ERROR ")?;
    (time.ends_with('Z') && !time.contains(' ')).then(|| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_found_in_either_format() {
        let error = |line: &str| error_of(line);
        let text = "2026-01-02T03:04:05.678901Z ERROR user `x` is not in the dataset\n";
        assert_eq!(error(text).as_deref(), Some("user `x` is not in the dataset"));
        let json = r#"{"role":"worker","pid":1,"timestamp":"t","level":"ERROR","fields":{"message":"no user \"x\""}}"#;
        assert_eq!(error(json).as_deref(), Some("no user \"x\""));
        for other in [
            "2026-01-02T03:04:05.678901Z  WARN an ERROR was passed over",
            "starts with the weights of runs/a: an ERROR is no log line",
            r#"{"level":"WARN","fields":{"message":"m"}}"#,
            "{ no JSON",
        ] {
            assert_eq!(error(other), None, "{other}");
        }
    }

    #[test]
    fn a_request_to_stop_is_passed_on() {
        system::catch_stop_signals();
        // the program itself has this process asked, and ends in peace only by what it hears
        let script = "trap 'exit 3' TERM; kill -TERM $PPID; while :; do sleep 0.05; done";
        assert_eq!(run(Command::new("sh").args(["-c", script])).unwrap().0.code(), Some(3));
    }

    #[test]
    fn the_last_error_of_a_failure_is_given() {
        let run = |script: &str| run(Command::new("sh").args(["-c", script])).unwrap();
        let error = |text: &str| format!("echo '2026-01-02T03:04:05Z ERROR {text}' >&2");
        let (status, said) = run(&format!("{}; {}; echo other >&2; exit 2", error("first"), error("last")));
        assert_eq!((status.code(), said.as_deref()), (Some(2), Some("last")));
        assert_eq!(run(&error("mended")).1, None, "it did not fail");
        let (status, said) = run("echo panicked >&2; kill -9 $$");
        assert_eq!((status.code(), said), (None, None));
    }
}
