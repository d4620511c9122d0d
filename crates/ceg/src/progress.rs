//! How far a process is: JSON lines for the program that started it, or a bar for a person.
//!
//! Input: counts of finished items, and the names of stages. Output: `{"done":n,"total":m}` and `{"stage":"…"}` lines on
//! stdout, a bar on stderr when that is a
//! terminal, or nothing. Lines come at most every [`INTERVAL`], always one at the start and one at the end of a shard.

use std::io::{IsTerminal, Write};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use learn_domain::told::{INTERVAL, Told};

const STYLE: &str = "{prefix:>8} [{bar:40}] {human_pos}/{human_len} items, {per_sec}, {eta} left";

enum Sink {
    Json { last: Instant },
    Bar(ProgressBar),
    Silent,
}

/// Progress of one process.
pub struct Progress {
    done: u64,
    total: u64,
    sink: Sink,
}

impl Progress {
    /// JSON lines on stdout.
    #[must_use]
    pub fn json() -> Self {
        Self { done: 0, total: 0, sink: Sink::Json { last: Instant::now() } }
    }

    /// A bar on stderr if that is a terminal, else nothing.
    #[must_use]
    pub fn terminal() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::silent();
        }
        // The template is a constant; the fallback is indicatif's own bar.
        let style = ProgressStyle::with_template(STYLE).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self { done: 0, total: 0, sink: Sink::Bar(ProgressBar::new(0).with_style(style).with_prefix("embed")) }
    }

    /// Nothing.
    #[must_use]
    pub fn silent() -> Self {
        Self { done: 0, total: 0, sink: Sink::Silent }
    }

    /// Says how many items there are and how many of them need no work any more.
    pub fn start(&mut self, done: u64, total: u64) {
        (self.done, self.total) = (done, total);
        if let Sink::Bar(bar) = &self.sink {
            bar.set_length(total);
            bar.set_position(done);
            bar.reset_eta();
        }
        self.report();
    }

    /// Adds finished items.
    pub fn advance(&mut self, items: u64) {
        self.done += items;
        match &self.sink {
            Sink::Json { last } if last.elapsed() >= INTERVAL => self.report(),
            Sink::Bar(bar) => bar.set_position(self.done),
            Sink::Json { .. } | Sink::Silent => {}
        }
    }

    /// Writes the count now: a shard is on disk.
    pub fn report(&mut self) {
        if let Sink::Json { last } = &mut self.sink {
            *last = Instant::now();
            tell(&Told::Counts { done: self.done, total: self.total });
        }
    }

    /// What is under way from now on.
    pub fn stage(&mut self, stage: &str) {
        match &self.sink {
            Sink::Json { .. } => tell(&Told::Stage { stage: stage.into() }),
            Sink::Bar(bar) => bar.println(stage),
            Sink::Silent => {}
        }
    }

    /// The end: leaves a terminal clean.
    pub fn finish(&mut self) {
        match &self.sink {
            Sink::Bar(bar) => bar.finish_and_clear(),
            Sink::Json { .. } | Sink::Silent => {}
        }
    }
}

/// Writes a line on stdout.
pub fn tell(told: &Told) {
    let mut out = std::io::stdout().lock();
    // Numbers and texts can always be written as JSON. Whoever listened may be gone; the work goes on without them.
    let _ = serde_json::to_string(told).map(|line| writeln!(out, "{line}"));
    let _ = out.flush();
}
