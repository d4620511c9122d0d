//! `slurm/stopped`: an operator has asked the Slurm job of a run to stop by a signal, which Slurm itself might have sent, so
//! it must not go back into the queue. `learn-launch stop` leaves it before it sends one; each start takes it away. Who asks the
//! coordinator needs no such word: its status says so (`operator_stop`).

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use learn_domain::run_dir::RunDir;

use super::run::SlurmJob;
use crate::runs;

fn file(run: &RunDir) -> PathBuf {
    run.slurm().join("stopped")
}

/// Leaves the word, if the run is a job of Slurm's.
///
/// # Errors
/// It cannot be written.
pub fn leave(run: &RunDir) -> Result<()> {
    match SlurmJob::of(run) {
        Some(SlurmJob { job_id }) => runs::replace(&file(run), job_id.to_string().as_bytes()),
        None => Ok(()),
    }
}

/// Takes it away.
///
/// # Errors
/// It is there and stays there.
pub fn clear(run: &RunDir) -> Result<()> {
    match std::fs::remove_file(file(run)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", file(run).display()))
        }
        _ => Ok(()),
    }
}

/// An operator has asked this job to stop since it was started.
#[must_use]
pub fn is_left(run: &RunDir, job: u32) -> bool {
    std::fs::read_to_string(file(run)).is_ok_and(|text| text.trim() == job.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_known_to_the_job_that_it_is_meant_for_until_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        leave(&run).unwrap();
        assert!(!run.slurm().exists(), "no job of Slurm's");
        SlurmJob { job_id: 12 }.write(&run).unwrap();
        assert!(!is_left(&run, 12));
        leave(&run).unwrap();
        assert!(is_left(&run, 12) && !is_left(&run, 13));
        clear(&run).unwrap();
        clear(&run).unwrap();
        assert!(!is_left(&run, 12));
    }
}
