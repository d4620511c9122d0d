//! Every test that is left out by default is run by one of the commands here.

use std::path::{Path, PathBuf};

use crate::workspace::Workspace;
use crate::{files, gpu_check, system, test};

/// Names the commands of those that measure.
const MEASUREMENTS: &str = include_str!("../../docs/reliability.md");

/// A test with `#[ignore = "..."]`.
struct LeftOut {
    file: PathBuf,
    reason: String,
    name: String,
}

impl LeftOut {
    /// Those of one source file.
    fn of(file: &Path, text: &str) -> Vec<Self> {
        let mut found = Vec::new();
        let mut lines = text.lines().map(str::trim);
        while let Some(line) = lines.next() {
            let Some(reason) = line.strip_prefix("#[ignore") else { continue };
            let name = lines.find_map(|line| line.split_once("fn ")?.1.split_once('('));
            let name = name.expect("an attribute stands before a function").0.to_owned();
            found.push(Self { file: file.to_owned(), reason: reason.to_owned(), name });
        }
        found
    }

    /// Of a folder, but for what is hidden, built or fetched.
    fn below(folder: &Path, found: &mut Vec<Self>) {
        for path in files::entries(folder).expect("it can be listed") {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() && !name.starts_with('.') && !["target", "runs", "data"].contains(&name) {
                Self::below(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.extend(Self::of(&path, &std::fs::read_to_string(&path).expect("it can be read")));
            }
        }
    }

    fn is_run(&self) -> bool {
        let file = self.file.to_str().unwrap_or_default();
        if self.reason.contains("cargo xtask test") {
            return test::EXTRAS.split(" | ").any(|word| {
                let word = word.trim_start_matches("test(").trim_end_matches(')');
                self.name.contains(word)
            });
        }
        if let Some((_, part)) = self.reason.split_once("cargo xtask system ") {
            let part = part.trim_end_matches(['"', ']']);
            return system::tests().contains(&part) && file.contains(&format!("/tests/tests/{part}"));
        }
        if self.reason.contains("needs an NVIDIA GPU") {
            return gpu_check::TESTS.iter().any(|(_, words)| self.is_of(words));
        }
        let test = self.file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        self.reason.contains("measure") && MEASUREMENTS.contains(&format!("--test {test} --run-ignored only"))
    }

    /// Whether the program that cargo builds from these words, `--package P --lib` or `--package P --test T`, holds it.
    fn is_of(&self, words: &[&str]) -> bool {
        let [_, package, kind @ ..] = words else { return false };
        let place = match kind {
            [_, test] => format!("/tests/{test}.rs"),
            _ => "/src/".to_owned(),
        };
        let folder = package.trim_start_matches("learn-");
        self.file.to_str().is_some_and(|file| file.contains(&format!("/{folder}{place}")))
    }
}

#[test]
fn every_test_that_is_left_out_is_run_by_a_command() {
    let mut found = Vec::new();
    LeftOut::below(Workspace::locate(None).expect("it is here").root(), &mut found);
    assert!(found.len() > 20, "{} were found", found.len());
    for test in found {
        assert!(test.is_run(), "{}: nothing runs {}: {}", test.file.display(), test.name, test.reason);
    }
}

#[test]
fn one_that_nothing_runs_is_seen() {
    let one = |file: &str, reason: &str| {
        let text = format!("#[test]\n#[ignore = \"{reason}\"]\nfn reads_it() {{}}\n");
        LeftOut::of(Path::new(file), &text).pop().expect("it is left out")
    };
    assert!(!one("/x/coordinator/tests/flight.rs", "needs pyarrow: cargo xtask test runs it").is_run());
    assert!(!one("/x/tests/tests/slurm.rs", "needs Chromium: cargo xtask system browser").is_run());
    assert!(!one("/x/crates/model/src/pch.rs", "needs an NVIDIA GPU").is_run());
    assert!(!one("/x/crates/model/src/pch.rs", "slow").is_run());
    assert!(!one("/x/tests/tests/road.rs", "a measurement").is_run());
    assert!(one("/x/crates/torch/src/rows.rs", "needs an NVIDIA GPU").is_run());
}
