//! The faults themselves: each is done and then seen to have happened.
//!
//! Input: a fault and the running job. Output: what proves that it fired. Invariants: nothing stays stopped, slow or
//! full after a fault, whether it fired or not; a kill leaves at least one participant.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::job::{Job, Status, Worker, is_stopped, send};
use super::sandbox::{self, Connection, Disk, Distress, Traffic};
use super::schedule::{Fault, Kind};
use crate::is_alive;

/// Longest wait for what must come.
const LIMIT: Duration = Duration::from_secs(60);
/// Longest hunt for a moment that must be hit.
const HUNT: Duration = Duration::from_secs(150);
/// So long a participant is stopped while it is looked whether it was caught where it should be.
const CAUGHT: Duration = Duration::from_millis(150);
/// So long it is taken for true who takes part.
const KNOWN: Duration = Duration::from_secs(2);
/// No line of a run's files is longer.
const LINE: u64 = 1 << 16;
/// Between two looks for a moment that must not be missed.
const WATCH: Duration = Duration::from_micros(500);

/// Does a fault; what proves that it has fired.
///
/// # Errors
/// It could not be done, or was not seen to have fired.
pub fn strike(job: &mut Job<'_>, fault: &Fault, disk: Option<&Disk>, evaluation: u64) -> Result<String> {
    match fault.kind {
        Kind::KillFirst => kill(job, |workers| workers.first().copied(), fault.quiet.is_some()),
        Kind::KillOther => {
            let choose = |workers: &[Worker]| Some(workers[1 + fault.pick as usize % (workers.len() - 1)]);
            kill(job, choose, fault.quiet.is_some())
        }
        Kind::PauseShort => {
            let victim = any(job, fault.pick)?;
            let paused = Paused::new(victim.pid)?;
            std::thread::sleep(fault.lasts);
            drop(paused);
            Ok(format!("rank {} was stopped", victim.rank))
        }
        Kind::PauseLong => {
            let known = job.lines("events.jsonl").len();
            let victim = any(job, fault.pick)?;
            let paused = Paused::new(victim.pid)?;
            let lost = job.event(known, "worker_lost", LIMIT, |event| event["worker"] == victim.worker)?;
            std::thread::sleep(fault.lasts);
            drop(paused);
            let (pid, cause) = (victim.pid, &lost["cause"]);
            let settled = job.wait("the woken worker, or another one, in its place", LIMIT, |job| {
                let status = job.status().ok()?;
                let now = status.participants();
                let back = now.iter().find(|now| now.pid == pid && now.worker != victim.worker);
                let full = status.state() == "running" && now.len() as u64 >= status.wanted();
                back.map(|back| Some(back.rank)).or_else(|| full.then_some(None))
            })?;
            let came = settled.map_or("another took its place".into(), |rank| format!("came back as rank {rank}"));
            Ok(format!("rank {} was lost ({cause}); {came}", victim.rank))
        }
        Kind::Scale => {
            let before = job.status().map(|status| status.wanted()).unwrap_or_default();
            job.launch("scale", &["--workers", &fault.workers.to_string(), "--no-wait"])?;
            let wanted = u64::from(fault.workers);
            job.wait("the wanted size", LIMIT, |job| (job.status().ok()?.wanted() == wanted).then_some(()))?;
            Ok(format!("{before} to {wanted} workers"))
        }
        Kind::BreakConnection => break_connection(job, fault.pick),
        Kind::SlowNetwork => {
            let network = Distress::begin(Traffic::Slow)?;
            std::thread::sleep(fault.lasts);
            let (delayed, dropped) = network.suffered()?;
            ensure!(delayed > 0, "no packet had to wait");
            Ok(format!("packets had to wait {delayed} times, {dropped} were dropped"))
        }
        Kind::StallNetwork => {
            let network = Distress::begin(Traffic::Lost)?;
            std::thread::sleep(fault.lasts);
            let (held, dropped) = network.suffered()?;
            // what is still held back then is lost with the queue
            ensure!(held + dropped > 0, "no packet was held back or dropped");
            Ok(format!("packets were held back {held} times, {dropped} were dropped"))
        }
        Kind::FullDisk => full_disk(job, disk.context("there is no disk to fill")?),
        Kind::KillInEvaluation => kill_in_evaluation(job, fault.pick, evaluation),
        Kind::KillInCheckpoint => kill_in_checkpoint(job),
        Kind::KillCoordinator => {
            let pid = job.coordinator()?;
            send("KILL", pid);
            let another = |job: &Job<'_>| job.coordinator().ok().filter(|&now| now != pid && job.status().is_ok());
            let now = job.wait("another coordinator", LIMIT, another)?;
            Ok(format!("process {pid} is gone, {now} has taken its place"))
        }
        Kind::PauseCoordinator => {
            let pid = job.coordinator()?;
            let paused = Paused::new(pid)?;
            std::thread::sleep(fault.lasts);
            drop(paused);
            job.wait("the same coordinator", LIMIT, |job| {
                (job.coordinator().ok()? == pid && job.status().is_ok()).then_some(())
            })?;
            Ok(format!("process {pid} was stopped"))
        }
    }
}

/// A process that is stopped as long as this value lives.
struct Paused(u64);

impl Paused {
    fn new(pid: u64) -> Result<Self> {
        let paused = Self(pid);
        send("STOP", pid);
        let started = Instant::now();
        while !is_stopped(pid) {
            ensure!(started.elapsed() < LIMIT && is_alive(pid), "process {pid} could not be stopped");
            std::thread::sleep(WATCH);
        }
        Ok(paused)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        send("CONT", self.0);
    }
}

/// The participants that are alive, at least two.
fn participants(job: &mut Job<'_>) -> Result<Vec<Worker>> {
    job.wait("two participants", LIMIT, |job| {
        let alive: Vec<Worker> =
            job.status().ok()?.participants().into_iter().filter(|worker| is_alive(worker.pid)).collect();
        (alive.len() >= 2).then_some(alive)
    })
}

fn any(job: &mut Job<'_>, pick: u64) -> Result<Worker> {
    let workers = participants(job)?;
    Ok(workers[pick as usize % workers.len()])
}

fn gone(job: &mut Job<'_>, victim: Worker) -> Result<()> {
    job.wait("the killed process is gone", LIMIT, |_| (!is_alive(victim.pid)).then_some(()))
}

/// `alone`: the job was running, so that the coordinator takes note of the loss as an event.
fn kill(job: &mut Job<'_>, choose: impl Fn(&[Worker]) -> Option<Worker>, alone: bool) -> Result<String> {
    let known = job.lines("events.jsonl").len();
    let victim = choose(&participants(job)?).context("there is somebody")?;
    send("KILL", victim.pid);
    gone(job, victim)?;
    if alone { lost(job, known, victim) } else { Ok(format!("process {} of rank {} is gone", victim.pid, victim.rank)) }
}

fn lost(job: &mut Job<'_>, known: usize, victim: Worker) -> Result<String> {
    let lost = job.event(known, "worker_lost", LIMIT, |event| event["worker"] == victim.worker)?;
    Ok(format!("process {} of rank {} is gone ({})", victim.pid, victim.rank, lost["cause"]))
}

fn break_connection(job: &mut Job<'_>, pick: u64) -> Result<String> {
    let known = job.lines("events.jsonl").len();
    let between = |status: &Status| -> Result<Vec<Connection>> {
        let workers: Vec<u64> = status.participants().iter().map(|worker| worker.pid).collect();
        let all = sandbox::connections()?;
        let to_a_worker = |one: &Connection| {
            let other = all.iter().find(|other| other.local == one.peer && other.peer == one.local);
            other.is_some_and(|other| other.pid != one.pid && workers.contains(&other.pid))
        };
        Ok(all.iter().filter(|one| workers.contains(&one.pid) && to_a_worker(one)).cloned().collect())
    };
    let found = job.wait("connections between workers", LIMIT, |job| {
        between(&job.status().ok()?).ok().filter(|found| !found.is_empty())
    })?;
    let chosen = &found[pick as usize % found.len()];
    sandbox::reset(chosen)?;
    ensure!(!sandbox::connections()?.contains(chosen), "the connection is still there: {chosen:?}");
    let regrouped = job.event(known, "regrouping", LIMIT, |_| true)?;
    Ok(format!("{} to {} was reset ({})", chosen.local, chosen.peer, regrouped["reason"]))
}

fn full_disk(job: &mut Job<'_>, disk: &Disk) -> Result<String> {
    let known = job.lines("events.jsonl").len();
    let failed = job.wait("a checkpoint that fails", LIMIT, |job| {
        if let Err(error) = disk.fill() {
            return Some(Err(error));
        }
        let mut events = job.lines("events.jsonl").into_iter().skip(known);
        events.find(|event| event["event"] == "checkpoint_failed").map(Ok)
    });
    disk.empty()?;
    let failed = failed??;
    let step = failed["step"].as_u64().unwrap_or(0);
    let later = |job: &Job<'_>| job.status().ok().map(|status| status.last_checkpoint()).filter(|&last| last > step);
    let later = job.wait("a checkpoint after the disk was full", LIMIT, later)?;
    Ok(format!("the checkpoint of step {step} failed, that of step {later} is there"))
}

/// Catches a participant between the last step before an evaluation and the evaluation's record.
fn kill_in_evaluation(job: &mut Job<'_>, pick: u64, every: u64) -> Result<String> {
    let started = Instant::now();
    let [metrics, evaluations] = ["metrics.jsonl", "evaluations.jsonl"].map(|name| job.folder().join(name));
    let mut seen = 0;
    while started.elapsed() < HUNT {
        let Ok(status) = job.status() else { continue };
        let workers = status.participants();
        if status.state() != "running" || workers.len() < 2 {
            std::thread::sleep(WATCH);
            continue;
        }
        let victim = workers[pick as usize % workers.len()];
        // a long run's status takes longer to read than an evaluation takes
        let known = Instant::now();
        while known.elapsed() < KNOWN {
            let step = last_step(&metrics);
            let inside = || last_step(&metrics) == step && last_step(&evaluations) < step;
            if step == 0 || step == seen || !step.is_multiple_of(every) || !inside() {
                std::thread::sleep(WATCH);
                continue;
            }
            seen = step;
            let Ok(paused) = Paused::new(victim.pid) else { break };
            std::thread::sleep(CAUGHT);
            let events = job.lines("events.jsonl").len();
            let caught = inside();
            if caught {
                send("KILL", victim.pid);
            }
            drop(paused);
            if caught {
                gone(job, victim)?;
                return Ok(format!("after step {step}: {}", lost(job, events, victim)?));
            }
        }
    }
    bail!("no participant could be caught in an evaluation within {} s", HUNT.as_secs())
}

/// The step of a file's last whole line; 0 if there is none. A long run's file has megabytes, of which the end is read.
fn last_step(path: &Path) -> u64 {
    let end = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LINE)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = end().unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let last = whole.rsplit('\n').next().unwrap_or("");
    serde_json::from_str::<serde_json::Value>(last).ok().and_then(|line| line["step"].as_u64()).unwrap_or(0)
}

/// Catches the writer while the folder that becomes a checkpoint is there: `step-N.tmp-PID-START`.
fn kill_in_checkpoint(job: &mut Job<'_>) -> Result<String> {
    let started = Instant::now();
    let folder = job.folder().join("checkpoints");
    while started.elapsed() < HUNT {
        let names = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let unfinished = names.filter_map(|name| {
            let name = name.into_string().ok()?;
            let (pid, start) = name.rsplit_once(".tmp-")?.1.split_once('-')?;
            // what goes has another ending
            let pid: u64 = pid.parse().ok().filter(|_| !start.contains('-'))?;
            is_alive(pid).then_some((name, pid))
        });
        let Some((name, pid)) = unfinished.into_iter().next() else {
            std::thread::sleep(WATCH);
            continue;
        };
        let Ok(paused) = Paused::new(pid) else { continue };
        let Ok(status) = job.status() else { continue };
        let victim = status.participants().into_iter().find(|worker| worker.pid == pid);
        let caught = folder.join(&name).exists() && status.participants().len() >= 2;
        let Some(victim) = victim.filter(|_| caught) else { continue };
        let known = job.lines("events.jsonl").len();
        send("KILL", pid);
        drop(paused);
        gone(job, victim)?;
        ensure!(folder.join(&name).exists(), "{name} was finished after all");
        return Ok(format!("{name} was left: {}", lost(job, known, victim)?));
    }
    bail!("no checkpoint could be caught while it was written within {} s", HUNT.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_step_is_that_of_the_last_whole_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        assert_eq!(last_step(&path), 0, "no file yet");
        let mut text: String = (1..=5000).map(|step| format!("{{\"step\":{step},\"loss\":1.5}}\n")).collect();
        fs::write(&path, &text).unwrap();
        assert_eq!(last_step(&path), 5000);
        text += "{\"step\":5001,\"lo";
        fs::write(&path, &text).unwrap();
        assert_eq!(last_step(&path), 5000);
    }
}
