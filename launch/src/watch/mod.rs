//! `status --watch`: a run, looked at again and again.
//!
//! Input: the run's status (its coordinator's, or the last on disk) and the lines of its files. Output: a line for
//! what has changed, or JSON lines with `--json`. Shape: [`scene`] reads, [`told`] says what is new as a pure function.

mod pace;
mod scene;
mod told;

use std::io::Write as _;
use std::time::Duration;

use anyhow::Result;
use learn_domain::run_dir::RunDir;
use scene::Watcher;
use told::Told;

use crate::output::Output;
use crate::system;

/// Pause between two looks at the run.
const LOOK: Duration = Duration::from_millis(500);
/// Pause between two looks at what the person wants.
const NAP: Duration = Duration::from_millis(50);

/// Shows a run until its job has ended, or somebody has seen enough.
///
/// # Errors
/// Its files cannot be read, or the output is closed.
pub fn run(run: RunDir, output: &Output) -> Result<()> {
    system::catch_stop_signals();
    let watcher = Watcher::new(run);
    tell(watcher, output.json())
}

/// Says what has changed, until the job has ended.
fn tell(mut watcher: Watcher, json: bool) -> Result<()> {
    let mut told = Told::default();
    loop {
        let scene = watcher.look()?;
        let lines = if json { told.json(&scene).into_iter().collect() } else { told.lines(&scene) };
        let mut out = std::io::stdout().lock();
        for line in lines {
            writeln!(out, "{line}")?;
        }
        out.flush()?;
        drop(out);
        if scene.over() || rest() {
            return Ok(());
        }
    }
}

/// Waits for the next look; true if this process was asked to end meanwhile.
fn rest() -> bool {
    let naps = LOOK.as_millis() / NAP.as_millis();
    (0..naps).any(|_| {
        std::thread::sleep(NAP);
        system::stop_requests() > 0
    })
}

#[cfg(test)]
pub mod tests;
