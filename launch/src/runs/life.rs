//! Whether a job works on a run, and keeping others from it meanwhile.
//!
//! Input: the coordinator's address (`coordinator.json`), if there is one, and the lock of the run, which its coordinator has as
//! long as anything of it still writes. Output: [`Life`]. Invariants: who makes a job of a run ready, or moves a run, has its lock
//! meanwhile ([`claim`]); a stranger at an address is shown neither token nor secret.

use std::fs::{File, TryLockError};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;

use super::read_json;
use crate::api::Api;
use crate::failure::Failure;
use crate::output::Output;
use crate::{process, system};

/// Who only looks whether a run is free has given its lock back this soon.
const LOOK: Duration = Duration::from_millis(200);
/// Pause between two tries of the lock meanwhile; who waits for longer pauses for as long as [`LOOK`].
const PAUSE: Duration = Duration::from_millis(20);

/// A job that its scheduler may have started again waits this long for the lock of the machine that it was on: if that has died,
/// the file server gives the lock up (NFSv4 after 90 s by default).
const LEASE: Duration = Duration::from_secs(120);

type TryLock = fn(&File) -> Result<(), TryLockError>;

/// The address of the run's coordinator if that process is alive on this machine, or answers from another.
#[must_use]
pub fn live(run: &RunDir) -> Option<CoordinatorAddress> {
    let address: CoordinatorAddress = read_json(&run.coordinator()).ok()?;
    let lives = match whereabouts(&address, &system::host_name()) {
        Whereabouts::Here => process::runs(address.pid, "learn-coordinator"),
        Whereabouts::Reachable => Api::new(run, &address).answers(),
        Whereabouts::OutOfReach => false,
    };
    lives.then_some(address)
}

/// Where a coordinator is, seen from a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whereabouts {
    Here,
    Reachable,
    /// On another machine, at an address that means that machine itself: whoever listens at it here is a stranger, who must
    /// not be shown token or secret.
    OutOfReach,
}

fn whereabouts(address: &CoordinatorAddress, here: &str) -> Whereabouts {
    if address.host.is_empty() || address.host == here {
        return Whereabouts::Here;
    }
    let authority = address.http.split_once("://").map_or(address.http.as_str(), |(_, rest)| rest);
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).trim_matches(['[', ']']);
    let itself = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if itself { Whereabouts::OutOfReach } else { Whereabouts::Reachable }
}

/// What is known of the coordinator of a run, wherever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Life {
    /// It can be asked.
    Live(CoordinatorAddress),
    /// The lock of the run is taken, and nobody can be asked: its job is being started, or is on another machine, whose address
    /// is this.
    Locked(Option<CoordinatorAddress>),
    /// It was on another machine and listened for that machine alone, and its lock cannot be tried from here.
    Unknown {
        address: CoordinatorAddress,
        why: String,
    },
    Gone,
}

impl Life {
    /// Why nobody else may work on the run; `None` if it is free.
    #[must_use]
    pub fn describe(&self, run: &RunDir) -> Option<String> {
        let shown = run.root().display();
        Some(match self {
            Self::Gone => return None,
            Self::Live(CoordinatorAddress { pid, host, .. }) => {
                let host = if host.is_empty() { "this machine" } else { host.as_str() };
                format!(
                    "{shown} is running now (coordinator pid {pid} on {host}); `learn-launch status {shown}` shows it, \
                     `learn-launch stop {shown}` ends it"
                )
            }
            Self::Locked(None) => format!(
                "{shown} is being started now, or is at its very end: another process has its lock; `learn-launch status \
                 {shown}` shows the job once it serves"
            ),
            Self::Locked(Some(CoordinatorAddress { pid, host, .. })) => format!(
                "{shown} is running now (coordinator pid {pid} on {host}): its lock is taken, and it cannot be asked from here. \
                 Use `learn-launch status` and `stop` on {host}; if that machine has died, wait until the file server gives \
                 its lock up (docs/assumptions.md)"
            ),
            Self::Unknown { address: CoordinatorAddress { pid, host, .. }, why } => format!(
                "nobody can tell from here whether {shown} is running: its coordinator (pid {pid}) was on {host} and listened \
                 there alone, and its lock cannot be tried ({why}). Use `learn-launch status` and `stop` on {host}; if it is \
                 gone for certain, remove {}",
                run.coordinator().display()
            ),
        })
    }
}

/// The lock of a run, which is its coordinator's, in the hands of this process: no job of the run starts meanwhile.
#[derive(Debug)]
pub struct Claim(Option<File>);

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(file) = &self.0 {
            // a child that is being started has the file open as well; where this fails the lock ends with the process
            let _ends = file.unlock();
        }
    }
}

/// Tries the lock of a run as its coordinator does: NFS locks for one writer only what is open for writing.
fn lock(run: &RunDir, how: TryLock) -> Result<File, TryLockError> {
    let file = File::options().read(true).write(true).open(run.secret()).map_err(TryLockError::Error)?;
    how(&file)?;
    Ok(file)
}

fn look(run: &RunDir, how: TryLock) -> (Life, Claim) {
    if let Some(address) = live(run) {
        return (Life::Live(address), Claim(None));
    }
    // the address says nothing more of who lives; a coordinator that has died may have left it
    let address = || read_json::<CoordinatorAddress>(&run.coordinator()).ok();
    let here = system::host_name();
    match lock(run, how) {
        Ok(file) => (Life::Gone, Claim(Some(file))),
        Err(TryLockError::WouldBlock) => {
            let elsewhere = address().filter(|address| whereabouts(address, &here) != Whereabouts::Here);
            (Life::Locked(elsewhere), Claim(None))
        }
        Err(TryLockError::Error(error)) => {
            let hidden = address().filter(|address| whereabouts(address, &here) == Whereabouts::OutOfReach);
            let unknown = |address| Life::Unknown { address, why: error.to_string() };
            (hidden.map_or(Life::Gone, unknown), Claim(None))
        }
    }
}

/// Whether a job works on the run. The lock decides where the coordinator's address cannot (docs/assumptions.md).
#[must_use]
pub fn life(run: &RunDir) -> Life {
    // those who only look do not see each other
    look(run, File::try_lock_shared).0
}

/// Keeps the run for this process, so that no other one changes it or starts its job. It is given back before the
/// coordinator starts.
///
/// # Errors
/// The run's job is alive, or may be, or another process has the run.
pub fn claim(run: &RunDir) -> Result<Claim> {
    claim_within(run, Duration::ZERO, |_| Ok(()))
}

/// As [`claim`], for a job that its scheduler may have started again because its machine has died: a lock that is taken is
/// waited for, which is said.
///
/// # Errors
/// As those of [`claim`]; this process was asked to stop.
pub fn claim_patiently(run: &RunDir, output: &Output) -> Result<Claim> {
    let mut said = false;
    claim_within(run, LEASE, |why| {
        if system::stop_requests() > 0 {
            let message = format!("{}: stopped before the job began; nothing is lost", run.root().display());
            return Err(Failure::Stopped(message).into());
        }
        if !std::mem::replace(&mut said, true) {
            output.note(&format!(
                "{why}\nif that machine has died, its lock will be free soon: waiting up to {} s for it",
                LEASE.as_secs()
            ));
        }
        Ok(())
    })
}

/// As [`claim`], but a lock that is taken is waited for, `patience` at most. `waits` hears again and again why the run is not
/// free, and may end it.
///
/// # Errors
/// As those of [`claim`], and that of `waits`.
fn claim_within(run: &RunDir, patience: Duration, mut waits: impl FnMut(&str) -> Result<()>) -> Result<Claim> {
    let started = Instant::now();
    loop {
        let (life, claim) = look(run, File::try_lock);
        let Some(why) = life.describe(run) else { return Ok(claim) };
        let waited = started.elapsed();
        if !matches!(life, Life::Locked(_)) || waited >= patience.max(LOOK) {
            // not the caller's mistake: a scheduler that tries again later finds the run free
            bail!("{why}");
        }
        if waited < LOOK {
            std::thread::sleep(PAUSE);
        } else {
            waits(&why)?;
            std::thread::sleep(LOOK);
        }
    }
}

/// # Errors
/// As those of [`claim`].
pub fn refuse_live(run: &RunDir) -> Result<()> {
    claim(run).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use learn_domain::Config;
    use learn_domain::report::exit;

    use super::super::{create, move_aside};
    use super::*;
    use crate::failure::exit_code;

    #[test]
    fn a_stranger_on_this_machine_is_not_taken_for_the_coordinator_of_another() {
        let at = |host: &str, http: &str| {
            let address = CoordinatorAddress { host: host.into(), http: http.into(), ..CoordinatorAddress::default() };
            whereabouts(&address, "login")
        };
        for loopback in ["http://127.0.0.1:4711", "http://127.8.0.1:1", "http://[::1]:4711", "http://localhost:80/"] {
            assert_eq!(at("node1", loopback), Whereabouts::OutOfReach, "{loopback}");
            assert_eq!(at("login", loopback), Whereabouts::Here, "{loopback}");
            assert_eq!(at("", loopback), Whereabouts::Here, "{loopback}");
        }
        for reachable in ["http://node1:4711", "http://10.0.0.7:80", "http://[fd00::1]:4711"] {
            assert_eq!(at("node1", reachable), Whereabouts::Reachable, "{reachable}");
        }
    }

    #[test]
    fn a_coordinator_that_is_gone_or_another_process_is_not_alive() {
        let folder = tempfile::tempdir().unwrap();
        let run = create(&folder.path().join("one"), &Config::default()).unwrap();
        let address = CoordinatorAddress { pid: std::process::id(), ..CoordinatorAddress::default() };
        fs::write(run.coordinator(), serde_json::to_vec(&address).unwrap()).unwrap();
        assert!(live(&run).is_none(), "this test is no coordinator");
        refuse_live(&run).unwrap();
    }

    /// A run with the address that a coordinator has left: on this machine if `host` is empty, else on that one, for it alone.
    fn run_of(folder: &Path, host: &str) -> (PathBuf, RunDir) {
        let root = folder.join("one");
        let run = create(&root, &Config::default()).unwrap();
        // no process has this number
        let (pid, http) = (u32::MAX, "http://127.0.0.1:9".into());
        let address = CoordinatorAddress { pid, host: host.into(), http, ..CoordinatorAddress::default() };
        fs::write(run.coordinator(), serde_json::to_vec(&address).unwrap()).unwrap();
        (root, run)
    }

    #[test]
    fn who_has_the_lock_lives_wherever_it_is_and_its_run_stays_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (root, run) = run_of(folder.path(), "node1");
        let coordinator = lock(&run, File::try_lock).unwrap();
        for (address, said) in [(true, "on node1"), (false, "being started")] {
            if !address {
                fs::remove_file(run.coordinator()).unwrap();
            }
            assert!(live(&run).is_none(), "nobody can be asked");
            assert!(matches!(life(&run), Life::Locked(at) if at.is_some() == address));
            for refused in [refuse_live(&run), move_aside(&root).map(drop), create(&root, &Config::default()).map(drop)]
            {
                let error = refused.unwrap_err();
                assert_eq!(exit_code(&error), exit::FAILED, "it may be free soon");
                let text = error.to_string();
                assert!(text.contains(said) && !text.contains("--force"), "{text}");
            }
        }
        assert!(run.config().exists() && fs::read_dir(folder.path()).unwrap().count() == 1);
        coordinator.unlock().unwrap();
        refuse_live(&run).unwrap();
    }

    #[test]
    fn whose_lock_is_free_is_dead_on_whatever_machine_it_was() {
        for host in ["", "node1"] {
            let folder = tempfile::tempdir().unwrap();
            let (root, run) = run_of(folder.path(), host);
            assert_eq!(life(&run), Life::Gone, "{host}");
            move_aside(&root).unwrap().unwrap();
        }
    }

    #[test]
    fn one_that_was_elsewhere_and_whose_lock_cannot_be_tried_may_live() {
        for (host, known) in [("", true), ("node1", false)] {
            let folder = tempfile::tempdir().unwrap();
            let (root, run) = run_of(folder.path(), host);
            fs::remove_file(run.secret()).unwrap();
            fs::create_dir(run.secret()).unwrap();
            assert_eq!(matches!(life(&run), Life::Gone), known, "{host}");
            assert_eq!(matches!(life(&run), Life::Unknown { .. }), !known, "{host}");
            if !known {
                let text = move_aside(&root).unwrap_err().to_string();
                assert!(text.contains("nobody can tell") && text.contains("coordinator.json"), "{text}");
                fs::remove_file(run.coordinator()).unwrap();
            }
            move_aside(&root).unwrap().unwrap();
        }
    }

    #[test]
    fn who_has_patience_gets_the_lock_of_a_machine_that_has_died() {
        let folder = tempfile::tempdir().unwrap();
        let (_root, run) = run_of(folder.path(), "node1");
        let dead = lock(&run, File::try_lock).unwrap();
        let patience = Duration::from_secs(600);
        let error = claim_within(&run, patience, |why| bail!("stopped, since {why}")).unwrap_err();
        assert!(error.to_string().contains("stopped") && error.to_string().contains("on node1"), "{error}");
        claim_within(&run, patience, |_| dead.unlock().map_err(anyhow::Error::from)).unwrap();
    }

    #[test]
    fn a_run_has_one_claim_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let (_root, run) = run_of(folder.path(), "");
        let claimed = claim(&run).unwrap();
        assert!(claim(&run).unwrap_err().to_string().contains("another process has its lock"));
        drop(claimed);
        let looks = lock(&run, File::try_lock_shared).unwrap();
        assert_eq!(life(&run), Life::Gone, "who only looks is no job");
        looks.unlock().unwrap();
        claim(&run).unwrap();
    }
}
