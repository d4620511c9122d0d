//! `slurm/bind`: `cluster.bind` as the operator has set it, because each start of a Slurm job puts an address of its own first
//! machine into the run's configuration.

use std::path::PathBuf;

use anyhow::Result;
use learn_domain::run_dir::RunDir;

use crate::runs;

/// Where it is kept.
#[must_use]
pub fn file(run: &RunDir) -> PathBuf {
    run.slurm().join("bind")
}

/// The operator's `cluster.bind`; `None` if the run never was a job of Slurm's.
#[must_use]
pub fn kept(run: &RunDir) -> Option<String> {
    let text = std::fs::read_to_string(file(run)).ok()?;
    Some(text.trim().to_owned()).filter(|bind| !bind.is_empty())
}

/// Keeps it.
///
/// # Errors
/// It cannot be written.
pub fn keep(run: &RunDir, bind: &str) -> Result<()> {
    runs::replace(&file(run), bind.as_bytes())
}

/// Keeps another one in its place, if one is kept.
///
/// # Errors
/// It cannot be written.
pub fn change(run: &RunDir, bind: &str) -> Result<()> {
    if kept(run).is_some_and(|kept| kept != bind) { keep(run, bind) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_kept_and_changed_for_those_alone_who_need_it() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        change(&run, "0.0.0.0").unwrap();
        assert_eq!(kept(&run), None, "the run is no job of Slurm's");
        keep(&run, "127.0.0.1").unwrap();
        change(&run, "0.0.0.0").unwrap();
        assert_eq!(kept(&run).as_deref(), Some("0.0.0.0"));
        std::fs::write(file(&run), "").unwrap();
        assert_eq!(kept(&run), None, "what a killed process of an older version has left says nothing");
    }
}
