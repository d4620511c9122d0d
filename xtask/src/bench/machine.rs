//! What the measuring machine is.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::process;

/// What measuring writes.
const RESULTS: [&str; 2] = [":!bench/results", ":!docs/benchmarks.md"];

/// The hardware and what else a figure depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    pub processor: String,
    pub cores: usize,
    pub memory_gib: u64,
    /// Names of GPUs, if one was used.
    pub gpus: Vec<String>,
    pub system: String,
    /// The commit that was measured; "with changes" if the tree had any but results.
    pub revision: String,
}

impl Machine {
    /// This one.
    pub fn describe(device: &str, root: &Path) -> Self {
        let line = |path: &str, name: &str| field(&fs::read_to_string(path).unwrap_or_default(), name);
        let query = ["--query-gpu=name", "--format=csv,noheader"];
        let gpus = if device == "cuda" {
            process::output("nvidia-smi", Command::new("nvidia-smi").args(query)).unwrap_or_default()
        } else {
            String::new()
        };
        // the version alone: what a distribution or a host adds to it says nothing about speed
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let kibibytes = line("/proc/meminfo", "MemTotal").split(' ').next().and_then(|word| word.parse::<u64>().ok());
        Self {
            processor: line("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: kibibytes.unwrap_or_default().div_ceil(1 << 20),
            gpus: gpus.lines().map(str::to_owned).collect(),
            system: format!("Linux {}", release.trim().split('-').next().unwrap_or_default()),
            revision: revision(root),
        }
    }
}

/// The commit of a tree, and whether it has changes but those that measuring writes; empty without git.
pub fn revision(root: &Path) -> String {
    let git =
        |words: &[&str]| process::output("git", Command::new("git").args(words).current_dir(root)).unwrap_or_default();
    // what a part before has measured is not what is measured
    let changed = ["status", "--porcelain", "--untracked-files=no", "--", ".", RESULTS[0], RESULTS[1]];
    let changes = if git(&changed).trim().is_empty() { "" } else { " with changes" };
    format!("{}{changes}", git(&["rev-parse", "--short", "HEAD"]).trim())
}

/// The value of the first `NAME : VALUE`.
fn field(text: &str, name: &str) -> String {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    value.unwrap_or_default().trim().to_owned()
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} cores, {} GiB", self.processor, self.cores, self.memory_gib)?;
        for gpu in &self.gpus {
            write!(f, ", {gpu}")?;
        }
        if self.revision.is_empty() { Ok(()) } else { write!(f, " (at {})", self.revision) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_are_read() {
        let text = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: B\n";
        assert_eq!(field(text, "model name"), "A CPU @ 2 GHz");
        assert_eq!(field("MemTotal:       24000000 kB\n", "MemTotal"), "24000000 kB");
        assert_eq!(field(text, "absent"), "");
    }

    #[test]
    fn a_machine_is_a_line() {
        let machine = Machine {
            processor: "A CPU".into(),
            cores: 2,
            memory_gib: 24,
            revision: "abc".into(),
            ..Machine::default()
        };
        assert_eq!(machine.to_string(), "A CPU, 2 cores, 24 GiB (at abc)");
        assert!(Machine::describe("cpu", Path::new(".")).cores > 0);
    }
}
