//! Where words go: results to stdout, progress and messages to stderr.
//!
//! Progress bars are drawn only on a terminal; elsewhere long work is reported in plain lines. Invariant: who does not read
//! them any more ends no command ([`stdio`]).

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use learn_telemetry::stdio;
use serde::Serialize;

use crate::render;

/// Pause between two plain progress lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// What is over sooner is no plain line worth where somebody is [patient](Progress::patient).
const MOMENT: Duration = Duration::from_secs(1);

/// How a command talks.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
    quiet: bool,
    terminal: bool,
}

impl Output {
    #[must_use]
    pub fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet, terminal: std::io::stderr().is_terminal() }
    }

    #[must_use]
    pub fn json(&self) -> bool {
        self.json
    }

    #[must_use]
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// Messages are read on a terminal, and go nowhere else.
    #[must_use]
    pub fn terminal(&self) -> bool {
        self.terminal
    }

    /// A message for people.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            stdio::say(text);
        }
    }

    /// The result: `text` for people, or `value` as JSON. That nobody reads it is no error.
    ///
    /// # Errors
    /// Stdout cannot be written.
    pub fn result(&self, text: &str, value: &impl Serialize) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string_pretty(value)? } else { text.trim_end().to_owned() };
        stdio::print(&format!("{text}\n"))?;
        Ok(())
    }

    /// The progress of something that takes long.
    #[must_use]
    pub fn progress(&self, unit: Unit) -> Progress {
        let bar = ProgressBar::no_length();
        if self.quiet || !self.terminal {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let plain = !self.terminal && !self.quiet;
        let mut progress = Progress { bar, unit, plain, patience: Duration::ZERO, began: Instant::now(), said: None };
        progress.count_in(unit);
        progress
    }
}

/// What a progress bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Count,
}

/// A bar on a terminal, a line now and then elsewhere.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    unit: Unit,
    plain: bool,
    /// So long after its beginning a stage has its first plain line.
    patience: Duration,
    /// When the stage began.
    began: Instant,
    /// When it had its last plain line.
    said: Option<Instant>,
}

impl Progress {
    /// Without plain lines about stages that are over in a moment.
    #[must_use]
    pub fn patient(self) -> Self {
        Self { patience: MOMENT, ..self }
    }

    /// What is counted from now on.
    pub fn count_in(&mut self, unit: Unit) {
        self.unit = unit;
        let counts = match unit {
            Unit::Bytes => "{bytes}/{total_bytes} {bytes_per_sec}",
            Unit::Count => "{human_pos}/{human_len}",
        };
        let template = format!("{{prefix:16}} {{wide_bar}} {counts} {{eta}} {{msg}}");
        // The template is one of two constants; should it be refused, the plain style stays.
        if let Ok(style) = ProgressStyle::with_template(&template) {
            self.bar.set_style(style);
        }
    }

    /// Starts (again) under a name, with a total if it is known.
    pub fn stage(&mut self, name: &str, total: Option<u64>) {
        self.bar.reset();
        match total {
            Some(total) => self.bar.set_length(total),
            None => self.bar.unset_length(),
        }
        self.bar.set_prefix(name.to_owned());
        self.began = Instant::now();
        self.said = None;
    }

    pub fn at(&mut self, position: u64, total: u64, message: String) {
        self.bar.set_length(total);
        self.bar.set_position(position);
        self.bar.set_message(message);
        self.say(false);
    }

    /// What is done, where nobody counts how much of it.
    pub fn doing(&mut self, message: String) {
        self.bar.set_message(message);
        self.say(false);
    }

    pub fn advance(&mut self, amount: u64) {
        self.bar.inc(amount);
        self.say(false);
    }

    fn say(&mut self, last: bool) {
        let due = last || is_due(self.began.elapsed(), self.said.map(|at| at.elapsed()), self.patience);
        if self.plain && due {
            self.said = Some(Instant::now());
            let shown = |amount: u64| match self.unit {
                Unit::Bytes => render::bytes(amount),
                Unit::Count => amount.to_string(),
            };
            let counted = match (self.bar.length(), self.bar.position()) {
                (None, 0) => String::new(),
                (None, position) => format!("{} ", shown(position)),
                (Some(total), position) => format!("{}/{} ", shown(position), shown(total)),
            };
            let line = format!("{}: {counted}{}", self.bar.prefix(), self.bar.message());
            stdio::say(line.trim_end_matches([':', ' ']));
        }
    }

    /// A line above the bar.
    pub fn line(&self, text: &str) {
        if self.plain {
            stdio::say(text);
        } else {
            self.bar.println(text);
        }
    }

    /// Has somebody else write to the terminal, above the bar.
    pub fn above(&self, write: impl FnOnce()) {
        // one that has not begun would be drawn below
        if self.bar.prefix().is_empty() { write() } else { self.bar.suspend(write) }
    }

    /// The end: the bar goes, the last plain line stays. A second call changes nothing.
    pub fn finish(&mut self) {
        if !self.bar.is_finished() {
            if self.said.is_some() {
                self.say(true);
            }
            self.bar.finish_and_clear();
        }
    }
}

/// Whether a stage that began so long ago is to have a plain line, given how long ago it had its last one.
fn is_due(began: Duration, said: Option<Duration>, patience: Duration) -> bool {
    said.map_or(began >= patience, |said| said >= PLAIN_INTERVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_has_a_line_at_once_or_after_a_moment_and_then_now_and_then() {
        let seconds = Duration::from_secs_f64;
        for (began, said, patience, due) in [
            (0.0, None, Duration::ZERO, true),
            (0.9, None, MOMENT, false),
            (1.0, None, MOMENT, true),
            (10.9, Some(9.9), MOMENT, false),
            (11.0, Some(10.0), MOMENT, true),
        ] {
            assert_eq!(is_due(seconds(began), said.map(seconds), patience), due, "{began} {said:?}");
        }
    }
}
