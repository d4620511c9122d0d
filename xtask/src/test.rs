//! `cargo xtask test`: format, lint, every test; ends with one line that counts what passed and failed.
//!
//! A stage that fails does not hide the ones after it; what could not be run is named as not run, never as passed.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::workspace::Workspace;
use crate::{process, quickstart, setup};

#[derive(Args, Default)]
pub struct Options {
    /// Leave out the tests that need more downloads (the MiniLM encoder's vectors, a pyarrow client).
    #[arg(long)]
    pub no_extras: bool,
}

/// # Errors
/// If a stage fails.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::run(workspace, &setup::Options::default())?;
    let mut report = Report::default();
    report.stage("format", || process::visible("cargo fmt", workspace.cargo().args(["fmt", "--all", "--check"])));
    report.stage("lint", || {
        let lint = ["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"];
        process::visible("cargo clippy", workspace.cargo().args(lint))
    });
    // The whole-system tests start the programs; building tests alone does not build those of every crate.
    report.stage("build", || quickstart::build(workspace));
    let nextest = setup::nextest(workspace);
    report.tests("tests", workspace, || {
        let mut tests = nextest?;
        process::visible("the tests", tests.args(["run", "--release", "--workspace", "--no-fail-fast"]))
    });
    report.stage_with_count("doc tests", || doc_tests(workspace));
    if options.no_extras {
        report.not_run.push("tests that need downloads: left out with --no-extras".into());
    } else {
        extras(workspace, &mut report);
    }
    report.close(workspace)
}

/// The tests of [`extras`], as nextest selects them.
const EXTRAS: &str = "test(minilm) | test(pyarrow)";

/// Tests that need more than the sources: marked ignored, run here with what they need.
fn extras(workspace: &Workspace, report: &mut Report) {
    report.stage("pyarrow", || setup::pyarrow(workspace));
    let nextest = setup::nextest(workspace);
    report.tests("tests that need downloads", workspace, || {
        let mut tests = nextest?;
        tests
            .args(["run", "--release", "--workspace", "--no-fail-fast", "--run-ignored", "only", "-E", EXTRAS])
            .env("LEARN_PYTHON", workspace.venv().join("bin").join("python"))
            .env("LEARN_MINILM", workspace.minilm());
        process::visible("the tests that need downloads", &mut tests)
    });
}

/// Runs the doc tests in view and counts them from their closing lines.
fn doc_tests(workspace: &Workspace) -> Result<Count> {
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--release", "--doc", "--workspace"]).stderr(Stdio::inherit());
    let printed = run_and_print(&mut cargo)?;
    let count = printed.1.lines().filter_map(Count::of_doc_tests).fold(Count::default(), Count::plus);
    if !printed.0 && count.failed == 0 {
        bail!("the doc tests did not build or run");
    }
    Ok(count)
}

fn run_and_print(command: &mut Command) -> Result<(bool, String)> {
    let output = command.output().context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{text}");
    Ok((output.status.success(), text))
}

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
}

impl Count {
    fn plus(self, other: Self) -> Self {
        Self { passed: self.passed + other.passed, failed: self.failed + other.failed }
    }

    /// `test result: ok. 3 passed; 0 failed; …`
    fn of_doc_tests(line: &str) -> Option<Self> {
        let words: Vec<_> = line.strip_prefix("test result: ")?.split_whitespace().collect();
        let before = |label: &str| {
            let place = words.iter().position(|word| word.trim_end_matches(';') == label)?;
            words.get(place.checked_sub(1)?)?.parse().ok()
        };
        Some(Self { passed: before("passed")?, failed: before("failed")? })
    }

    /// From the first tag of nextest's JUnit report: `<testsuites … tests="9" failures="1" errors="0" …>`.
    fn of_junit(text: &str) -> Option<Self> {
        let tag = text.split_once("<testsuites")?.1.split_once('>')?.0;
        let attribute = |name: &str| {
            let value = tag.split_once(&format!(" {name}=\""))?.1;
            value.split_once('"')?.0.parse::<u64>().ok()
        };
        let failed = attribute("failures")? + attribute("errors")?;
        Some(Self { passed: attribute("tests")?.checked_sub(failed)?, failed })
    }
}

#[derive(Default)]
struct Report {
    lines: Vec<String>,
    not_run: Vec<String>,
    count: Count,
    failed_stages: usize,
}

impl Report {
    fn stage(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        self.stage_with_count(name, || work().map(|()| Count::default()));
    }

    fn stage_with_count(&mut self, name: &str, work: impl FnOnce() -> Result<Count>) {
        let started = Instant::now();
        let result = work();
        let failed = match result {
            Ok(count) => {
                self.count = self.count.plus(count);
                count.failed > 0
            }
            Err(error) => {
                eprintln!("{name}: {error:#}");
                true
            }
        };
        self.failed_stages += usize::from(failed);
        let verdict = if failed { "FAILED" } else { "ok" };
        self.lines.push(format!("{name:<28} {verdict:<7} {:>7.1} s", started.elapsed().as_secs_f64()));
    }

    /// A stage of nextest; its counts come from the report that it writes.
    fn tests(&mut self, name: &str, workspace: &Workspace, work: impl FnOnce() -> Result<()>) {
        let junit = junit(workspace);
        // An earlier run's report must not be taken for this one's; if it cannot be removed it was not there.
        let _ = fs::remove_file(&junit);
        self.stage(name, work);
        match fs::read_to_string(&junit).ok().as_deref().and_then(Count::of_junit) {
            Some(count) => self.count = self.count.plus(count),
            None => self.not_run.push(format!("{name}: the test runner wrote no {}", workspace.shown(&junit))),
        }
    }

    /// Prints the stages and the closing line, and keeps them for whoever runs more commands afterwards.
    fn close(self, workspace: &Workspace) -> Result<()> {
        let mut text = self.lines.join("\n");
        for reason in &self.not_run {
            text.push_str(&format!("\nNOT RUN: {reason}"));
        }
        text.push_str(&format!("\n{} passed, {} failed\n", self.count.passed, self.count.failed));
        println!("\n{text}");
        let path = workspace.test_report();
        let folder = path.parent().context("the report has a folder")?;
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&path, &text))
            .with_context(|| format!("{}: cannot write the test report", path.display()))?;
        match self.failed_stages {
            0 => Ok(()),
            1 => bail!("1 stage failed"),
            stages => bail!("{stages} stages failed"),
        }
    }
}

/// Where `.config/nextest.toml` has nextest write its report, whatever cargo's target directory is.
fn junit(workspace: &Workspace) -> PathBuf {
    workspace.root().join("target").join("nextest").join("default").join("junit.xml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doc_test_lines_are_counted() {
        let line = "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out";
        assert_eq!(Count::of_doc_tests(line), Some(Count { passed: 3, failed: 1 }));
        assert_eq!(Count::of_doc_tests("running 3 tests"), None);
    }

    #[test]
    fn a_junit_report_is_counted() {
        let text = r#"<?xml version="1.0"?>
<testsuites name="nextest-run" tests="9" failures="1" errors="1" uuid="x" time="0.1">
  <testsuite name="a" tests="4" failures="1">"#;
        assert_eq!(Count::of_junit(text), Some(Count { passed: 7, failed: 2 }));
        assert_eq!(Count::of_junit("<testsuites name=\"cut"), None);
    }

    #[test]
    fn a_failed_stage_is_counted_and_does_not_stop_the_others() {
        let mut report = Report::default();
        report.stage("first", || bail!("no"));
        report.stage_with_count("second", || Ok(Count { passed: 2, failed: 0 }));
        report.stage_with_count("third", || Ok(Count { passed: 1, failed: 1 }));
        assert_eq!(report.failed_stages, 2);
        assert_eq!(report.count, Count { passed: 3, failed: 1 });
        assert_eq!(report.lines.iter().filter(|line| line.contains("FAILED")).count(), 2);
    }
}
