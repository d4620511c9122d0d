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
        let mut progress = Progress { bar, unit, plain: !self.terminal && !self.quiet, said: None };
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
    said: Option<Instant>,
}

impl Progress {
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
        let due = last || self.said.is_none_or(|at| at.elapsed() >= PLAIN_INTERVAL);
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
            stdio::say(line.trim_end());
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
