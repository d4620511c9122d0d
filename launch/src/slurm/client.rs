//! Slurm's programs: sbatch, squeue, scancel, scontrol.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use super::outcome::Reason;
use crate::process;

/// A job as squeue shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Queued {
    pub job_id: u32,
    /// `PENDING`, `RUNNING`, …
    pub state: String,
    /// Why it waits, or `None`.
    pub reason: String,
    pub nodes: String,
    pub time: String,
    pub time_limit: String,
}

impl Queued {
    /// Reads a line of [`FORMAT`].
    fn read(line: &str) -> Option<Self> {
        let mut fields = line.trim().split('|').map(str::to_owned);
        let mut next = || fields.next();
        let (job_id, state, reason) = (next()?.parse().ok()?, next()?, next()?);
        Some(Self { job_id, state, reason, nodes: next()?, time: next()?, time_limit: next()? })
    }

    /// It is in the queue and has not begun, or waits to begin again.
    #[must_use]
    pub fn waits(&self) -> bool {
        ["PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING"]
            .contains(&self.state.as_str())
    }

    #[must_use]
    pub fn runs(&self) -> bool {
        ["RUNNING", "SUSPENDED", "STOPPED", "SIGNALING"].contains(&self.state.as_str())
    }

    /// It has ended, and Slurm shows it for a while.
    #[must_use]
    pub fn ended(&self) -> bool {
        !self.waits() && !self.runs() && self.state != "COMPLETING"
    }

    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { job_id, state, reason, nodes, time, time_limit } = self;
        if self.waits() {
            format!("job {job_id} is {state} ({reason})")
        } else {
            format!("job {job_id} is {state} on {nodes}, {time} of {time_limit}")
        }
    }
}

const FORMAT: &str = "%A|%T|%r|%N|%M|%l";

/// Slurm was not asked, or has not answered as it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    #[error("{0} is not on the PATH of this machine: Slurm's programs are needed here (on a login node, mostly)")]
    Missing(String),
    #[error("cannot start {name}: {problem}")]
    NotStarted { name: String, problem: String },
    /// It ended with an error; `said` is Slurm's own message.
    #[error("{name} ended with {how}: {said}")]
    Failed { name: String, how: String, said: String },
    #[error("sbatch answered `{0}`, which is no job number")]
    NoNumber(String),
}

impl ClientError {
    /// A submission that ended so has left no job behind. One whose answer was lost on its way may have.
    #[must_use]
    pub fn nothing_submitted(&self) -> bool {
        // the controller's answer to a submission is one of these when it has not come (slurm_strerror)
        const LOST: [&str; 7] = [
            "timed out",
            "Zero Bytes were transmitted",
            "Message receive failure",
            "Unexpected message",
            "Connection reset",
            "Transport endpoint is not connected",
            "Communication shutdown failure",
        ];
        match self {
            Self::Missing(_) | Self::NotStarted { .. } => true,
            // a signal has ended it at an unknown moment
            Self::Failed { how, said, .. } => {
                how.starts_with("exit code") && !LOST.iter().any(|lost| said.contains(lost))
            }
            Self::NoNumber(_) => false,
        }
    }
}

/// Runs one of the programs; its stdout.
fn run(command: &mut Command) -> Result<String, ClientError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let answer = command.stdin(Stdio::null()).output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ClientError::Missing(name.clone()),
        _ => ClientError::NotStarted { name: name.clone(), problem: error.to_string() },
    })?;
    if !answer.status.success() {
        let said = String::from_utf8_lossy(&answer.stderr).trim().to_owned();
        return Err(ClientError::Failed { name, how: process::describe(answer.status), said });
    }
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

/// Submits a batch script; the number of the job.
///
/// # Errors
/// Slurm is not there or refuses it; the message is Slurm's own. Or it cannot be told whether there is a job now:
/// [`ClientError::nothing_submitted`].
pub fn submit(script: &Path) -> Result<u32, ClientError> {
    let said = run(Command::new("sbatch").arg("--parsable").arg(script))?;
    let number = said.trim().split(';').next().unwrap_or_default();
    number.parse().map_err(|_| ClientError::NoNumber(said.trim().to_owned()))
}

/// A job as Slurm knows it; `None` if it does not know it any more.
///
/// # Errors
/// Slurm cannot be asked.
pub fn queued(job: u32) -> Result<Option<Queued>, ClientError> {
    let job = job.to_string();
    match run(Command::new("squeue").args(["--noheader", "--states=all", "--jobs", &job, "--format", FORMAT])) {
        // of a heterogeneous job the first part comes first
        Ok(said) => Ok(said.lines().find_map(Queued::read)),
        Err(ClientError::Failed { said, .. }) if said.contains("Invalid job id") => Ok(None),
        Err(error) => Err(error),
    }
}

/// Ends a job.
///
/// # Errors
/// Slurm is not there or refuses.
pub fn cancel(job: u32) -> Result<(), ClientError> {
    run(Command::new("scancel").arg(job.to_string())).map(drop)
}

/// SIGTERM to the batch script of a job alone.
///
/// # Errors
/// Slurm is not there or refuses.
pub fn ask_to_stop(job: u32) -> Result<(), ClientError> {
    run(Command::new("scancel").args(["--batch", "--signal=TERM", &job.to_string()])).map(drop)
}

/// Puts a running job back into the queue.
///
/// # Errors
/// Slurm is not there or refuses.
pub fn requeue(job: u32) -> Result<(), ClientError> {
    run(Command::new("scontrol").args(["requeue", &job.to_string()])).map(drop)
}

/// Why Slurm ends a job that is running.
///
/// # Errors
/// Slurm cannot be asked.
pub fn reason(job: u32) -> Result<Reason, ClientError> {
    // its state is COMPLETING by now, whatever the cause
    let format = "JobID:16,Reason:48,PreemptTime:32";
    let job = job.to_string();
    let mut command = Command::new("squeue");
    run(command.args(["--noheader", "--states=all", "--jobs", &job, "--Format", format])).map(|said| read_reason(&said))
}

fn read_reason(said: &str) -> Reason {
    let mut words = said.lines().next().unwrap_or_default().split_whitespace().skip(1);
    match (words.next(), words.next()) {
        (Some("TimeLimit"), _) => Reason::TimeLimit,
        (_, Some(time)) if time.starts_with(|letter: char| letter.is_ascii_digit()) => Reason::Preempted,
        _ => Reason::Other,
    }
}

/// The address of a node in Slurm's configuration.
#[must_use]
pub fn node_address(node: &str) -> Option<String> {
    let said = run(Command::new("scontrol").args(["--oneliner", "show", "node", node])).ok()?;
    field(&said, "NodeAddr").map(str::to_owned)
}

/// The value of `name=value` among words.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_squeue_is_read() {
        let waiting = Queued::read("12|PENDING|Resources||0:00|1:00:00\n").unwrap();
        assert!(waiting.waits() && !waiting.runs() && !waiting.ended());
        assert_eq!(waiting.describe(), "job 12 is PENDING (Resources)");
        let running = Queued::read("12|RUNNING|None|node[1-2]|0:32|UNLIMITED").unwrap();
        assert!(running.runs() && !running.waits() && !running.ended());
        assert_eq!(running.describe(), "job 12 is RUNNING on node[1-2], 0:32 of UNLIMITED");
        assert!(Queued::read("12|TIMEOUT|TimeLimit|node1|1:00|1:00").unwrap().ended());
        assert!(!Queued::read("12|COMPLETING|None|node1|1:00|1:00").unwrap().ended());
        assert_eq!(Queued::read("slurm_load_jobs error"), None);
    }

    #[test]
    fn only_an_answer_that_was_lost_may_have_left_a_job() {
        let failed =
            |how: &str, said: &str| ClientError::Failed { name: "sbatch".into(), how: how.into(), said: said.into() };
        for refused in [
            "sbatch: error: invalid partition specified: none\nsbatch: error: Batch job submission failed: Invalid partition \
             name specified",
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "sbatch: error: Invalid --time specification",
        ] {
            assert!(failed("exit code 1", refused).nothing_submitted(), "{refused}");
        }
        for lost in [
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        ] {
            assert!(!failed("exit code 1", lost).nothing_submitted(), "{lost}");
        }
        assert!(!failed("killed by signal 9", "").nothing_submitted());
        assert!(!ClientError::NoNumber("hello".into()).nothing_submitted());
        assert!(ClientError::Missing("sbatch".into()).nothing_submitted());
    }

    #[test]
    fn the_reason_of_an_end_is_read() {
        let line = |reason: &str, time: &str| read_reason(&format!("{:<16}{reason:<48}{time:<32}\n", "12"));
        assert_eq!(line("TimeLimit", "N/A"), Reason::TimeLimit);
        assert_eq!(line("None", "2026-11-28T21:13:07"), Reason::Preempted);
        assert_eq!(line("None", "N/A"), Reason::Other);
        assert_eq!(read_reason(""), Reason::Other, "Slurm does not know the job any more");
    }

    #[test]
    fn a_field_of_scontrol_is_found() {
        let said = "NodeName=node2 Arch=x86_64 NodeAddr=10.0.0.2 NodeHostName=node2";
        assert_eq!(field(said, "NodeAddr"), Some("10.0.0.2"));
        assert_eq!(field(said, "Addr"), None);
    }
}
