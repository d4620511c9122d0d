//! Running other programs: in full view, behind a progress line, or for their output.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result};

use crate::progress::Progress;

/// Lines of a quiet program that are shown when it fails.
const SHOWN_LINES: usize = 40;

/// A program ended without success; the task ends with its exit code.
#[derive(Debug)]
pub struct StepFailed {
    step: String,
    pub code: i32,
    detail: String,
}

impl std::fmt::Display for StepFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} failed with exit code {}", self.step, self.code)?;
        if !self.detail.is_empty() {
            write!(f, "; its last lines:\n{}", self.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for StepFailed {}

fn check(step: &str, status: ExitStatus, detail: String) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    // A program that a signal ended has no code.
    Err(StepFailed { step: step.into(), code: status.code().unwrap_or(1), detail }.into())
}

/// Runs a program that talks to the user itself.
///
/// # Errors
/// If it cannot be started or fails.
pub fn visible(step: &str, command: &mut Command) -> Result<()> {
    eprintln!("$ {}", shown(command));
    let status = command.status().with_context(|| format!("{step}: cannot start {:?}", command.get_program()))?;
    check(step, status, String::new())
}

/// Runs a program behind a progress line; its last lines are shown only if it fails.
///
/// # Errors
/// If it cannot be started or fails.
pub fn quiet(step: &str, command: &mut Command) -> Result<()> {
    let progress = Progress::start(step);
    let result = follow(step, command, &progress);
    if result.is_ok() {
        progress.done()
    } else {
        progress.failed()
    }
    result
}

/// The standard output of a program.
///
/// # Errors
/// If it cannot be started, fails or prints something that is not text.
pub fn output(step: &str, command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{step}: cannot start {:?}", command.get_program()))?;
    check(step, output.status, String::from_utf8_lossy(&output.stderr).trim_end().to_owned())?;
    String::from_utf8(output.stdout).with_context(|| format!("{step}: its output is not UTF-8"))
}

fn follow(step: &str, command: &mut Command, progress: &Progress) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{step}: cannot start {:?}", command.get_program()))?;
    let (send, receive) = mpsc::channel();
    let mut tail: Vec<String> = Vec::new();
    thread::scope(|scope| {
        for pipe in [
            child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
            child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
        ]
        .into_iter()
        .flatten()
        {
            let send = send.clone();
            scope.spawn(move || {
                for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                    if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        for line in receive {
            if let Some((done, total)) = raw_progress(&line) {
                progress.bytes(done, total);
            } else if !line.is_empty() {
                progress.note(line.trim());
                tail.push(line);
                if tail.len() > SHOWN_LINES {
                    tail.remove(0);
                }
            }
        }
    });
    let status = child.wait().with_context(|| format!("{step}: lost its process"))?;
    check(step, status, tail.join("\n"))
}

/// A line of `pip --progress-bar raw`.
fn raw_progress(line: &str) -> Option<(u64, u64)> {
    let (done, total) = line.trim().strip_prefix("Progress ")?.split_once(" of ")?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words
        .map(|word| {
            let word = word.to_string_lossy();
            if word.contains([' ', '(', '|']) { format!("'{word}'") } else { word.into_owned() }
        })
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_the_exit_code_and_the_last_words() {
        let error = quiet("speak", Command::new("sh").args(["-c", "echo said; echo why >&2; exit 3"])).unwrap_err();
        let failed = error.downcast_ref::<StepFailed>().expect("a StepFailed");
        assert_eq!(failed.code, 3);
        let message = error.to_string();
        assert!(message.contains("said") && message.contains("why"), "{message}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = output("look", &mut Command::new("no-such-program-here")).unwrap_err();
        assert!(error.to_string().contains("no-such-program-here"), "{error}");
    }

    #[test]
    fn raw_progress_lines_are_read() {
        assert_eq!(raw_progress("Progress 10 of 200"), Some((10, 200)));
        assert_eq!(raw_progress("Progress ten of 200"), None);
        assert_eq!(raw_progress("Downloading torch"), None);
    }
}
