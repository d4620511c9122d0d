//! `status --watch`: a run, looked at again and again.
//!
//! Input: the run's status (its coordinator's, or the last on disk), the lines of its files, and what its processes say of
//! themselves. Output: a screen on a terminal; elsewhere and with `--plain` a line for what has changed, and JSON lines with
//! `--json`. Shape: [`scene`] reads; [`view`] decides what is shown and [`keys`] what of it, as pure functions; [`draw`] puts
//! it on a screen of any size and [`told`] in lines; [`screen`] is the loop around them.

mod draw;
mod gauges;
mod keys;
mod pace;
mod picture;
mod scene;
mod screen;
mod told;
mod view;

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use learn_domain::run_dir::RunDir;
use learn_telemetry::stdio;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use scene::Watcher;
use told::Told;

use crate::output::Output;
use crate::system;

/// Pause between two looks at the run.
const LOOK: Duration = Duration::from_millis(500);
/// Pause between two looks at what the person wants.
const NAP: Duration = Duration::from_millis(50);

/// Shows a run until its job has ended, or somebody has seen enough; in lines if `plain`, or where no screen is possible.
///
/// # Errors
/// Its files cannot be read, or the output cannot be written.
pub fn run(run: RunDir, plain: bool, output: &Output) -> Result<()> {
    system::catch_stop_signals();
    let watcher = Watcher::new(run);
    if !plain && !output.json() && screen::possible() { screen::show(watcher) } else { tell(watcher, output.json()) }
}

/// The screen as it would be now on a terminal of so many columns and rows, as an SVG picture.
///
/// # Errors
/// The run's files cannot be read.
pub fn picture(run: RunDir, columns: u16, rows: u16) -> Result<String> {
    let mut watcher = Watcher::new(run);
    let name = watcher.name();
    let ((want, wanted), (say, said)) = (mpsc::channel(), mpsc::channel());
    let asking = std::thread::spawn(move || gauges::ask(&wanted, &say));
    let mut scene = watcher.look()?;
    // seconds of steps are those between two rounds
    for _ in 0..2 {
        let there = scene.current.iter().flat_map(|current| &current.status.workers).filter(|worker| !worker.left);
        want.send(there.map(|worker| (worker.worker, worker.metrics_url.clone())).collect())?;
        let gauges: BTreeMap<_, _> = said.recv()?;
        std::thread::sleep(LOOK);
        scene = watcher.look()?;
        scene.gauges = gauges;
    }
    drop(want);
    asking.join().ok().context("asking the processes has failed")?;
    let view = view::view(&name, &scene, false);
    let mut terminal = Terminal::new(TestBackend::new(columns, rows))?;
    terminal.draw(|frame| draw::draw(frame, &view, &keys::Choice::default(), draw::Look { colour: true }))?;
    Ok(picture::svg(terminal.backend().buffer()))
}

/// Says what has changed, until the job has ended or nobody reads it any more.
fn tell(mut watcher: Watcher, json: bool) -> Result<()> {
    let mut told = Told::default();
    loop {
        let scene = watcher.look()?;
        let lines = if json { told.json(&scene).into_iter().collect() } else { told.lines(&scene) };
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        if !stdio::print(&text)? || scene.over() || rest() {
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
