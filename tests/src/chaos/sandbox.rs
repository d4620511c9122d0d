//! A network and a mount table of the run's own, so that faults of the network and the disk touch nothing else.
//!
//! Input: the rights of this user. Output: which kinds of fault are possible, and why others are not. The whole program
//! starts again inside `unshare`, as root or as root of its own user namespace.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::schedule::Kind;

/// Set in the program that was started again.
const INSIDE: &str = "LEARN_CHAOS_INSIDE";
/// Small enough to be filled in a moment, large enough for the checkpoints that are kept.
const DISK: &str = "size=16m";

/// What this machine allows.
pub struct Sandbox {
    pub kinds: Vec<Kind>,
    /// Kinds that are left out, with the reason.
    pub left_out: Vec<(Kind, String)>,
}

/// Starts this program again with a network and mount table of its own, if that is possible; comes back if it is not,
/// or inside, where it brings the network up.
///
/// # Errors
/// The program cannot be started again, or the network not be brought up.
pub fn enter() -> Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        // packets of Ethernet's size, so that a slow network has something to queue
        return run("ip", &["link", "set", "lo", "mtu", "1500", "up"]).map(drop);
    }
    let ways: [&[&str]; 2] = [&["--net", "--mount"], &["--user", "--map-root-user", "--net", "--mount"]];
    let Some(way) = ways.into_iter().find(|way| quiet(Command::new("unshare").args(*way).args(["ip", "-V"]))) else {
        return Ok(());
    };
    let own = std::env::current_exe().context("this program has a path")?;
    let mut again = Command::new("unshare");
    again.args(way).arg(own).args(std::env::args_os().skip(1)).env(INSIDE, "1");
    let error: io::Error = again.exec();
    Err(error).context("cannot start again inside unshare")
}

impl Sandbox {
    /// Looks what is possible.
    #[must_use]
    pub fn look() -> Self {
        let mut left_out = Vec::new();
        let inside = std::env::var_os(INSIDE).is_some();
        let without = "unshare gives no network and mount namespace here, or there is no ip (iproute2)";
        let mut need = |kinds: &[Kind], there: bool, why: &str| {
            if !there {
                left_out.extend(kinds.iter().map(|&kind| (kind, why.to_owned())));
            }
        };
        let network = [Kind::BreakConnection, Kind::SlowNetwork, Kind::StallNetwork];
        need(&network, inside, without);
        need(&[Kind::FullDisk], inside, without);
        if inside {
            let has = |program: &str| quiet(Command::new(program).arg("-V"));
            need(&[Kind::BreakConnection], has("ss"), "there is no ss (iproute2)");
            let bucket = Distress::begin(Traffic::Slow).is_ok();
            need(&[Kind::SlowNetwork, Kind::StallNetwork], bucket, "tc has no token bucket here (sch_tbf)");
        }
        let possible = |kind: &Kind| !left_out.iter().any(|(left_out, _)| left_out == kind);
        Self { kinds: Kind::ALL.into_iter().filter(possible).collect(), left_out }
    }

    /// Does without these kinds.
    pub fn leave_out(&mut self, kinds: &[Kind], why: &str) {
        self.kinds.retain(|kind| !kinds.contains(kind));
        self.left_out.extend(kinds.iter().map(|&kind| (kind, why.to_owned())));
    }

    /// Whether a disk of their own can be made for the checkpoints.
    #[must_use]
    pub fn has_disks(&self) -> bool {
        self.kinds.contains(&Kind::FullDisk)
    }
}

const NORMAL: [&str; 5] = ["qdisc", "del", "dev", "lo", "root"];

/// What becomes of the run's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// All of it through 24 Mbit/s, with at most a tenth of a second of it queued.
    Slow,
    /// Next to nothing comes through: packets are held back until the queue is full, the others dropped.
    Lost,
}

impl Traffic {
    fn words(self) -> [&'static str; 12] {
        let [rate, burst, limit] = match self {
            Self::Slow => ["24mbit", "16kb", "300kb"],
            Self::Lost => ["1kbit", "1600", "3200"],
        };
        ["qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", burst, "limit", limit]
    }
}

/// A network in distress, as long as this value lives.
pub struct Distress(());

impl Distress {
    /// # Errors
    /// If it cannot be done.
    pub fn begin(traffic: Traffic) -> Result<Self> {
        run("tc", &traffic.words()).map(|_| Self(()))
    }

    /// How many packets had to wait or were dropped so far.
    ///
    /// # Errors
    /// If it cannot be said.
    pub fn suffered(&self) -> Result<(u64, u64)> {
        let shown = run("tc", &["-s", "qdisc", "show", "dev", "lo"])?;
        let after = |word: &str| {
            let mut words = shown.split([' ', ',', ')']).skip_while(|one| *one != word).skip(1);
            words.next().and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        Ok((after("overlimits"), after("(dropped")))
    }
}

impl Drop for Distress {
    fn drop(&mut self) {
        if !quiet(Command::new("tc").args(NORMAL)) {
            eprintln!("the network could not be made normal again");
        }
    }
}

/// An established connection on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    pub local: String,
    pub peer: String,
    pub pid: u64,
}

/// The established TCP connections with their processes, each from both ends.
///
/// # Errors
/// If `ss` fails.
pub fn connections() -> Result<Vec<Connection>> {
    Ok(parse_connections(&run("ss", &["-tnpH", "state", "established"])?))
}

/// `Recv-Q Send-Q Local:Port Peer:Port users:(("learn-worker",pid=12,fd=9))`
fn parse_connections(text: &str) -> Vec<Connection> {
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let pid = line.split_once("pid=")?.1.split(',').next()?.parse().ok()?;
        Some(Connection { local: (*words.get(2)?).to_owned(), peer: (*words.get(3)?).to_owned(), pid })
    };
    text.lines().filter_map(parse).collect()
}

/// Resets a connection, for both its ends.
///
/// # Errors
/// If it cannot be done.
pub fn reset(connection: &Connection) -> Result<()> {
    run("ss", &["-K", "-t", "src", &connection.local, "dst", &connection.peer]).map(drop)
}

/// A small disk in the place of a folder.
pub struct Disk {
    folder: PathBuf,
}

impl Disk {
    /// # Errors
    /// If it cannot be mounted.
    pub fn mount(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        run("mount", &["-t", "tmpfs", "-o", DISK, "tmpfs", &folder.display().to_string()])?;
        Ok(Self { folder: folder.to_owned() })
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    /// Leaves no free byte; again and again, because an old checkpoint that is removed makes room for a new one.
    ///
    /// # Errors
    /// If it is not that which ends the writing.
    pub fn fill(&self) -> Result<()> {
        let mut zeros = io::repeat(0);
        let file = std::fs::OpenOptions::new().create(true).append(true).open(self.filler());
        match file.and_then(|mut file| io::copy(&mut zeros, &mut file)) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(()),
            other => bail!("the disk was to be filled, but: {other:?}"),
        }
    }

    /// # Errors
    /// If it cannot be done.
    pub fn empty(&self) -> Result<()> {
        std::fs::remove_file(self.filler()).context("cannot make room on the disk again")
    }

    /// Puts what it holds on the disk below, where it stays.
    ///
    /// # Errors
    /// If it cannot be copied.
    pub fn unmount(self) -> Result<()> {
        let (folder, aside) = (self.folder.display().to_string(), self.folder.with_extension("aside"));
        let aside = aside.display().to_string();
        // a writer that was killed may have left the disk full
        if self.filler().exists() {
            self.empty()?;
        }
        run("cp", &["-a", &folder, &aside])?;
        run("umount", &[&folder])?;
        run("cp", &["-aT", &aside, &folder])?;
        std::fs::remove_dir_all(&aside).with_context(|| format!("cannot remove {aside}"))
    }
}

/// Whether a program runs well; what it says is nobody's business.
fn quiet(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ss_are_read() {
        let text =
            "0 0 127.0.0.1:4500 127.0.0.1:38000 users:((\"learn-worker\",pid=12,fd=9))\n0 0 127.0.0.1:1 127.0.0.1:2\n";
        let known = Connection { local: "127.0.0.1:4500".into(), peer: "127.0.0.1:38000".into(), pid: 12 };
        assert_eq!(parse_connections(text), [known]);
    }
}
