//! The terminal of `status --watch`: the alternate screen, keys, and leaving it as it was.
//!
//! One thread looks at the run and one asks its processes, so that keys are obeyed while a coordinator does not answer. Both
//! end when nobody takes their words any more, and one that fails ends the screen. Invariants: the terminal is restored on
//! every way out: `ratatui` restores it on a panic, signals are counted ([`system`]) and end the loop as `q` does; without a
//! terminal there is no process.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use learn_domain::ids::WorkerId;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event};
use ratatui::crossterm::terminal;

use super::draw::{self, LEAST, Look};
use super::gauges::{self, Gauges};
use super::keys::{Answer, Choice};
use super::scene::{Scene, Watcher};
use super::view::{self, View};
use super::{LOOK, NAP};
use crate::{render, system};

/// Most processes that are asked for their gauges: those that the table shows first.
const MOST_ASKED: usize = 64;

/// Whether stdin and stdout are a terminal that a screen can be drawn on.
pub fn possible() -> bool {
    let terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    let large = || terminal::size().is_ok_and(|(columns, rows)| columns >= LEAST.0 && rows >= LEAST.1);
    terminal && !dumb && large()
}

/// Shows the screen until somebody leaves it; the last state stays behind as text.
///
/// # Errors
/// The terminal or the run's files cannot be used.
pub fn show(mut watcher: Watcher) -> Result<()> {
    // an unreadable run is said on the plain terminal
    let scene = watcher.look()?;
    thread::spawn(|| {
        // a window that was closed may take the shell with it that would have passed SIGHUP on
        system::wait_for_hangup();
        std::process::exit(0);
    });
    let terminal = ratatui::try_init();
    let shown =
        terminal.context("the terminal cannot show a screen; `--plain` follows in lines").and_then(|mut terminal| {
            let sources = Sources::new(watcher);
            follow(&mut terminal, &sources, scene)
        });
    ratatui::restore();
    let scene = shown?;
    if let Some(current) = &scene.current {
        // who has closed the terminal does not read it
        let _gone = write!(io::stdout().lock(), "{}", render::status(&current.status, current.freshness));
    }
    Ok(())
}

/// The threads that find out.
struct Sources {
    name: String,
    scenes: Receiver<Result<Scene>>,
    gauges: Receiver<BTreeMap<WorkerId, Gauges>>,
    asked: Sender<Vec<(WorkerId, String)>>,
}

impl Sources {
    fn new(watcher: Watcher) -> Self {
        let name = watcher.name();
        let (say_scene, scenes) = mpsc::channel();
        thread::spawn(move || look(watcher, &say_scene));
        let ((asked, wanted), (say, gauges)) = (mpsc::channel(), mpsc::channel());
        thread::spawn(move || gauges::ask(&wanted, &say));
        Self { name, scenes, gauges, asked }
    }
}

/// Looks again and again, until nobody wants to know.
fn look(mut watcher: Watcher, say: &Sender<Result<Scene>>) {
    loop {
        thread::sleep(LOOK);
        if say.send(watcher.look()).is_err() {
            return;
        }
    }
}

/// The newest word of a source, if there is one.
fn newest<T>(source: &Receiver<T>, what: &str) -> Result<Option<T>> {
    let mut newest = None;
    loop {
        match source.try_recv() {
            Ok(word) => newest = Some(word),
            Err(TryRecvError::Empty) => return Ok(newest),
            // its thread has panicked, which has said why
            Err(TryRecvError::Disconnected) => bail!("the watch of {what} has ended; start it again"),
        }
    }
}

fn follow(terminal: &mut DefaultTerminal, sources: &Sources, mut scene: Scene) -> Result<Scene> {
    let look = Look::from_env();
    let mut choice = Choice::default();
    let mut gauges = BTreeMap::new();
    // of what is shown while the screen stands still
    let mut held: Option<Scene> = None;
    loop {
        scene.gauges.clone_from(&gauges);
        let shown = view::view(&sources.name, held.as_ref().unwrap_or(&scene), choice.newest);
        // the thread behind it tells by the other channel if it has ended
        let _asked = sources.asked.send(asked(&shown, choice.scroll));
        terminal.draw(|frame| draw::draw(frame, &shown, &choice, look))?;
        loop {
            if system::stop_requests() > 0 {
                return Ok(scene);
            }
            let answer = next(&mut choice, &shown)?;
            match answer {
                Answer::Leave => return Ok(scene),
                // a terminal of another size is drawn as a whole
                Answer::Repaint => terminal.resize(terminal.size()?.into())?,
                Answer::Redraw | Answer::Nothing => {}
            }
            let fresh = newest(&sources.scenes, "the run")?;
            let news = fresh.is_some();
            if let Some(fresh) = fresh {
                scene = fresh?;
            }
            if let Some(said) = newest(&sources.gauges, "its processes")? {
                gauges = said;
            }
            held = if choice.paused { Some(held.unwrap_or_else(|| scene.clone())) } else { None };
            if answer != Answer::Nothing || news {
                break;
            }
        }
    }
}

/// What the keyboard or the terminal asks for within a short time.
fn next(choice: &mut Choice, shown: &View) -> Result<Answer> {
    let mut wait = NAP;
    let mut redraw = false;
    // several keys that are there already are taken at once
    while event::poll(wait)? {
        match event::read()? {
            Event::Key(key) => match choice.press(key, draw::rows(shown, choice.pane)) {
                answer @ (Answer::Leave | Answer::Repaint) => return Ok(answer),
                answer => redraw |= answer == Answer::Redraw,
            },
            Event::Resize(..) => redraw = true,
            _ => {}
        }
        wait = Duration::ZERO;
    }
    Ok(if redraw { Answer::Redraw } else { Answer::Nothing })
}

/// Whose gauges are wanted.
fn asked(view: &View, scroll: usize) -> Vec<(WorkerId, String)> {
    let there = view.ranks.iter().skip(scroll).filter(|row| !row.metrics_url.is_empty());
    there.filter_map(|row| Some((row.worker?, row.metrics_url.clone()))).take(MOST_ASKED).collect()
}
