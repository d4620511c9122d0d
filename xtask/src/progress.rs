//! Progress of a long part: a spinner or bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One long part; says that it starts, how far it is and how long it took.
pub struct Progress {
    title: String,
    started: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub fn start(title: impl Into<String>) -> Self {
        let title = title.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_prefix(title.clone());
            bar.set_style(style("{spinner} {prefix} [{elapsed}] {wide_msg}"));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("{title} ...");
        }
        Self { title, started: Instant::now(), bar }
    }

    /// What it is doing right now.
    pub fn note(&self, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(message.to_owned());
        }
    }

    /// Bytes done of bytes in all.
    pub fn bytes(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            if bar.length() != Some(total) {
                bar.set_length(total);
                bar.set_style(style("{spinner} {prefix} [{elapsed}] {wide_bar} {bytes}/{total_bytes} ({eta})"));
            }
            bar.set_position(done);
        }
    }

    pub fn done(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: done in {:.1} s", self.title, self.started.elapsed().as_secs_f64());
    }

    pub fn failed(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: FAILED after {:.1} s", self.title, self.started.elapsed().as_secs_f64());
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}
