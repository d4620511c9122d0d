//! The terminal of `status --watch`: the alternate screen, keys, and leaving it as it was.
//!
//! One thread looks at the run and one asks its processes, so that keys are obeyed while a coordinator does not answer. Both
//! end when nobody takes their words any more, and one that fails ends the screen. Invariants: the terminal is restored on
//! every way out ([`on_screen`]): `ratatui` restores it on a panic, signals are counted ([`system`]) and end the loop as `q`
//! does; without a terminal there is no process.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use crossterm::event::{self, Event};
use crossterm::terminal;
use learn_domain::ids::WorkerId;
use ratatui::DefaultTerminal;

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

/// What keys that are there already are waited for; none would be seen without a wait.
const MOMENT: Duration = Duration::from_millis(1);

/// Shows the screen until somebody leaves it; one line stays behind, with the last state.
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
    let scene = on_screen(|terminal| follow(terminal, &Sources::new(watcher), scene))?;
    if let Some(current) = &scene.current {
        // who has closed the terminal does not read it
        let _gone = writeln!(io::stdout().lock(), "{}", render::last_word(&current.status, current.freshness));
    }
    Ok(())
}

/// Lends the terminal out as a screen and takes it back, whatever comes of it.
fn on_screen<T>(work: impl FnOnce(&mut DefaultTerminal) -> Result<T>) -> Result<T> {
    let terminal = ratatui::try_init().context("the terminal cannot show a screen; `--plain` follows in lines");
    // it has gone, and shown its cursor again, before the screen is left
    let done = terminal.and_then(|mut terminal| work(&mut terminal));
    ratatui::restore();
    done
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
        wait = MOMENT;
    }
    Ok(if redraw { Answer::Redraw } else { Answer::Nothing })
}

/// Whose gauges are wanted.
fn asked(view: &View, scroll: usize) -> Vec<(WorkerId, String)> {
    let there = view.ranks.iter().skip(scroll).filter(|row| !row.metrics_url.is_empty());
    there.filter_map(|row| Some((row.worker?, row.metrics_url.clone()))).take(MOST_ASKED).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Command, Stdio};

    use super::*;

    /// Set for this test where it runs on a terminal.
    const ON_TERMINAL: &str = "LEARN_TEST_ON_TERMINAL";

    #[test]
    fn a_panic_leaves_the_terminal_as_it_was() {
        if std::env::var_os(ON_TERMINAL).is_some() {
            let _panics = on_screen::<()>(|terminal| {
                terminal.draw(|frame| frame.render_widget("drawn", frame.area()))?;
                panic!("a defect of the screen");
            });
        }
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let own = std::env::current_exe().unwrap();
        let name = std::thread::current().name().unwrap().to_owned();
        // this very test again, on a terminal of util-linux' `script`, with its settings before and after
        let session = format!(
            "stty rows 24 cols 80; stty -g > {before}; '{own}' --exact '{name}' --nocapture; stty -g > {after}",
            before = at("before").display(),
            after = at("after").display(),
            own = own.display(),
        );
        let mut script = Command::new("script");
        script.args(["--quiet", "--flush", "--command", &session, "/dev/null"]).env(ON_TERMINAL, "1");
        script.env("TERM", "xterm-256color").env("SHELL", "/bin/sh").stdin(Stdio::null()).stderr(Stdio::inherit());
        let written = String::from_utf8_lossy(&script.output().expect("util-linux has `script`").stdout).into_owned();
        let place = |part: &str| written.rfind(part).unwrap_or_else(|| panic!("{part:?} is not in {written:?}"));
        let (drawn, left) = (place("drawn"), place("\u{1b}[?1049l"));
        assert!(place("\u{1b}[?1049h") < drawn && drawn < left, "{written:?}");
        assert!(left < place("a defect of the screen"), "it is said where it stays to be read: {written:?}");
        assert!(place("\u{1b}[?25l") < place("\u{1b}[?25h"), "the cursor is there again: {written:?}");
        let settings = |name: &str| fs::read_to_string(at(name)).unwrap();
        assert!(!settings("before").is_empty());
        assert_eq!(settings("before"), settings("after"));
    }
}
