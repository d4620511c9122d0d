//! Several ranks as processes of this machine, for measurements between them.
//!
//! Input: how many. The first rank is the process that the user has started; it starts the others with its own flags and
//! a number. Output: a seat for each, and a rendezvous in a directory that only they know. Ends with the last rank.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use clap::Args;
use learn_collective::Rendezvous;

use super::synthetic::Seat;
use crate::error::WorkerError;

/// Pause between two looks for a key.
const LOOK: Duration = Duration::from_millis(2);

/// What a rank that was started by the first one is told.
#[derive(Clone, Debug, Args)]
pub struct Member {
    #[arg(long, hide = true, requires = "folder")]
    rank: Option<usize>,
    #[arg(long, hide = true)]
    folder: Option<PathBuf>,
}

/// The ranks of a measurement, seen from one of them.
pub struct Crew {
    seat: Seat,
    folder: PathBuf,
    /// On the first rank.
    others: Vec<Child>,
    owned: bool,
}

impl Crew {
    /// Starts the other ranks, if this is the first one.
    ///
    /// # Errors
    /// If there is no room for their directory, or a process cannot be started.
    pub fn start(workers: u32, member: &Member) -> Result<Self, WorkerError> {
        let world_size = workers as usize;
        if let (Some(rank), Some(folder)) = (member.rank, &member.folder) {
            return Ok(Self {
                seat: Seat { rank, world_size },
                folder: folder.clone(),
                others: Vec::new(),
                owned: false,
            });
        }
        let folder = std::env::temp_dir().join(format!("learn-bench-{}", std::process::id()));
        fs::create_dir(&folder).map_err(|error| failed(&folder, &error))?;
        let mut crew = Self { seat: Seat { rank: 0, world_size }, folder, others: Vec::new(), owned: true };
        let program = std::env::current_exe().map_err(WorkerError::Runtime)?;
        for rank in 1..world_size {
            let mut command = Command::new(&program);
            command.args(std::env::args_os().skip(1)).arg("--rank").arg(rank.to_string());
            let child = command.arg("--folder").arg(&crew.folder).spawn().map_err(|error| failed(&program, &error))?;
            crew.others.push(child);
        }
        Ok(crew)
    }

    /// This process's rank.
    #[must_use]
    pub fn seat(&self) -> Seat {
        self.seat
    }

    /// Where the ranks of one collective meet; collectives differ in their names.
    #[must_use]
    pub fn rendezvous(&self, name: &str) -> impl Rendezvous + use<> {
        Folder { path: self.folder.clone(), name: name.to_owned() }
    }

    /// Waits for the other ranks.
    ///
    /// # Errors
    /// If one of them has failed.
    pub fn end(mut self) -> Result<(), WorkerError> {
        for (number, mut child) in std::mem::take(&mut self.others).into_iter().enumerate() {
            let status = child.wait().map_err(WorkerError::Runtime)?;
            if !status.success() {
                return Err(WorkerError::Usage(format!("rank {} failed ({status}); see above", number + 1)));
            }
        }
        Ok(())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for child in &mut self.others {
            // one that has ended already needs no end
            let _ = child.kill();
            let _ = child.wait();
        }
        if self.owned {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

fn failed(path: &Path, error: &std::io::Error) -> WorkerError {
    WorkerError::File { path: path.display().to_string(), reason: error.to_string() }
}

/// Keys as files of a directory.
struct Folder {
    path: PathBuf,
    name: String,
}

impl Folder {
    fn file(&self, key: &str) -> PathBuf {
        self.path.join(format!("{}-{}", self.name, key.replace('/', "-")))
    }
}

impl Rendezvous for Folder {
    fn put(&self, key: &str, value: Vec<u8>) -> Result<(), String> {
        let place = self.file(key);
        let aside = place.with_extension("part");
        fs::write(&aside, value).and_then(|()| fs::rename(&aside, &place)).map_err(|error| error.to_string())
    }

    fn get(&self, key: &str, wait: Duration) -> Result<Vec<u8>, String> {
        let started = Instant::now();
        loop {
            match fs::read(self.file(key)) {
                Ok(value) => return Ok(value),
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.to_string()),
                Err(_) if started.elapsed() > wait => return Err(format!("nobody put {key}")),
                Err(_) => std::thread::sleep(LOOK),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_collectives_do_not_mix() {
        let folder = tempfile::tempdir().unwrap();
        let named = |name: &str| Folder { path: folder.path().into(), name: name.into() };
        named("a").put("ring/0", b"here".to_vec()).unwrap();
        assert_eq!(named("a").get("ring/0", Duration::ZERO).unwrap(), b"here");
        assert!(named("b").get("ring/0", Duration::ZERO).unwrap_err().contains("ring/0"));
    }
}
