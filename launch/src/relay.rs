//! A program that works for a command, whose progress and last error become the command's own.
//!
//! Input: a command whose stderr is log lines in either format, lines of [`Told`], and whatever else it says there. Output: how
//! far it is, and its other words on this process's stderr as they come, but for the error that it ended with, which the caller
//! says. What it prints on stdout is given at its end, when no bar is in the way; requests to stop are passed on.

use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use learn_domain::told::Told;

use crate::output::Progress;
use crate::process::error_of;
use crate::system::{self, End};

/// Pause between two looks for a request to stop.
const POLL: Duration = Duration::from_millis(50);

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    /// The last error that it logged, if it failed.
    pub error: Option<String>,
    /// What it printed.
    pub printed: String,
}

/// Runs `command` to its end, and shows its progress.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command, progress: &mut Progress) -> io::Result<Ended> {
    let requests = system::stop_requests();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (pid, over) = (child.id(), AtomicBool::new(false));
    let (printed, said) = (child.stdout.take(), child.stderr.take());
    let (printed, held) = thread::scope(|scope| {
        let stops = scope.spawn(|| pass_on_stops(pid, requests, &over));
        let reading = scope.spawn(|| printed.map_or(Ok(String::new()), io::read_to_string));
        let held = said.map_or(Ok(None), |said| listen(said, progress));
        let printed = reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        over.store(true, Ordering::Relaxed);
        stops.thread().unpark();
        (printed, held)
    });
    progress.finish();
    let (status, printed) = (child.wait()?, printed?);
    let error = match held? {
        Some((line, _)) if status.success() => {
            tell(&line);
            None
        }
        held => held.map(|(_, error)| error),
    };
    Ok(Ended { status, error, printed })
}

/// Tells what a program says until it says no more; gives the line of its last error, and what it says.
fn listen(said: impl Read, progress: &mut Progress) -> io::Result<Option<(Vec<u8>, String)>> {
    let mut held: Option<(Vec<u8>, String)> = None;
    let mut said = BufReader::new(said);
    let mut line = Vec::new();
    while said.read_until(b'\n', &mut line)? > 0 {
        if show(&line, progress) {
            line.clear();
            continue;
        }
        let pass_on = match error_of(&String::from_utf8_lossy(&line)) {
            Some(error) => held.replace((std::mem::take(&mut line), error)).map(|(before, _)| before),
            None => Some(std::mem::take(&mut line)),
        };
        pass_on.iter().for_each(|line| progress.above(|| tell(line)));
    }
    Ok(held)
}

/// Shows how far a program is, if that is what a line says.
fn show(line: &[u8], progress: &mut Progress) -> bool {
    match serde_json::from_slice(line) {
        Ok(Told::Stage { stage }) => progress.stage(&stage, None),
        Ok(Told::Counts { done, total }) => progress.at(done, total, String::new()),
        Ok(Told::Remarks { .. }) | Err(_) => return false,
    }
    true
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Output, Unit};

    /// What becomes of a script.
    fn ended(script: &str) -> Ended {
        let mut progress = Output::new(false, true).progress(Unit::Count);
        run(Command::new("sh").args(["-c", script]), &mut progress).unwrap()
    }

    #[test]
    fn a_request_to_stop_is_passed_on() {
        system::catch_stop_signals();
        // the program itself has this process asked, and ends in peace only by what it hears
        let script = "trap 'exit 3' TERM; kill -TERM $PPID; while :; do sleep 0.05; done";
        assert_eq!(ended(script).status.code(), Some(3));
    }

    #[test]
    fn the_last_error_of_a_failure_is_given() {
        let error = |text: &str| format!("echo '2026-01-02T03:04:05Z ERROR {text}' >&2");
        let failed = ended(&format!("{}; {}; echo other >&2; exit 2", error("first"), error("last")));
        assert_eq!((failed.status.code(), failed.error.as_deref()), (Some(2), Some("last")));
        assert_eq!(ended(&error("mended")).error, None, "it did not fail");
        let killed = ended("echo panicked >&2; kill -9 $$");
        assert_eq!((killed.status.code(), killed.error), (None, None));
    }

    #[test]
    fn what_a_program_prints_is_kept_though_it_is_much() {
        // more than a pipe holds
        let printed = ended("head -c 200000 /dev/zero | tr '\\0' x; echo said >&2").printed;
        assert!(printed.len() == 200_000 && printed.bytes().all(|byte| byte == b'x'));
    }

    #[test]
    fn lines_about_progress_are_known() {
        let mut progress = Output::new(false, true).progress(Unit::Count);
        let mut shown = |line: &str| show(line.as_bytes(), &mut progress);
        assert!(shown("{\"stage\":\"embed items\"}\n") && shown("{\"done\":1,\"total\":2}\n"));
        for other in ["loading\n", r#"{"role":"worker","level":"WARN","fields":{"message":"m"}}"#, "{ no JSON", ""] {
            assert!(!shown(other), "{other}");
        }
    }
}
