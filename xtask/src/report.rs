//! What the stages of a task came to: one line each, and a closing line that counts what passed and failed.
//!
//! A stage that fails does not hide the ones after it; what could not be run is named as not run, never as passed.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: u64,
    pub failed: u64,
    /// Of those that passed, who did not at first.
    pub flaky: u64,
}

impl Count {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self { passed: self.passed + other.passed, failed: self.failed + other.failed, flaky: self.flaky + other.flaky }
    }

    /// `test result: ok. 3 passed; 0 failed; …`
    pub fn of_doc_tests(line: &str) -> Option<Self> {
        let words: Vec<_> = line.strip_prefix("test result: ")?.split_whitespace().collect();
        let before = |label: &str| {
            let place = words.iter().position(|word| word.trim_end_matches(';') == label)?;
            words.get(place.checked_sub(1)?)?.parse().ok()
        };
        Some(Self { passed: before("passed")?, failed: before("failed")?, flaky: 0 })
    }

    /// From the first tag of nextest's JUnit report: `<testsuites … tests="9" failures="1" errors="0" …>`, and its tests
    /// that passed when they were tried again, each with a `<flakyFailure` or more.
    fn of_junit(text: &str) -> Option<Self> {
        let tag = text.split_once("<testsuites")?.1.split_once('>')?.0;
        let attribute = |name: &str| {
            let value = tag.split_once(&format!(" {name}=\""))?.1;
            value.split_once('"')?.0.parse::<u64>().ok()
        };
        let failed = attribute("failures")? + attribute("errors")?;
        let flaky = text.split("<testcase").skip(1).filter(|test| test.contains("<flaky")).count() as u64;
        Some(Self { passed: attribute("tests")?.checked_sub(failed)?, failed, flaky })
    }
}

/// Stages of a task, and how they ended.
#[derive(Default)]
pub struct Report {
    lines: Vec<String>,
    not_run: Vec<String>,
    count: Count,
    failed_stages: usize,
}

impl Report {
    /// A stage without tests to count.
    pub fn stage(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        self.stage_with_count(name, || work().map(|()| Count::default()));
    }

    /// A stage that counts its tests.
    pub fn stage_with_count(&mut self, name: &str, work: impl FnOnce() -> Result<Count>) {
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

    /// Something could not be run, for this reason.
    pub fn not_run(&mut self, reason: String) {
        self.not_run.push(reason);
    }

    /// A stage of nextest; its counts come from the report that it writes.
    pub fn tests(&mut self, name: &str, workspace: &Workspace, work: impl FnOnce() -> Result<()>) {
        let junit = junit(workspace);
        // An earlier run's report must not be taken for this one's; if it cannot be removed it was not there.
        let _ = fs::remove_file(&junit);
        self.stage(name, work);
        match fs::read_to_string(&junit).ok().as_deref().and_then(Count::of_junit) {
            Some(count) => self.count = self.count.plus(count),
            None => self.not_run.push(format!("{name}: the test runner wrote no {}", workspace.shown(&junit))),
        }
    }

    /// Prints the stages and the closing line, and keeps them as `name` for whoever runs more commands afterwards.
    ///
    /// # Errors
    /// If a stage has failed.
    pub fn close(self, workspace: &Workspace, name: &str) -> Result<()> {
        let mut text = self.lines.join("\n");
        for reason in &self.not_run {
            text.push_str(&format!("\nNOT RUN: {reason}"));
        }
        if self.count.flaky > 0 {
            text.push_str(&format!("\nFLAKY: {} passed only when tried again", self.count.flaky));
        }
        text.push_str(&format!("\n{} passed, {} failed\n", self.count.passed, self.count.failed));
        println!("\n{text}");
        let path = workspace.report(name);
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
        assert_eq!(Count::of_doc_tests(line), Some(Count { passed: 3, failed: 1, flaky: 0 }));
        assert_eq!(Count::of_doc_tests("running 3 tests"), None);
    }

    #[test]
    fn a_junit_report_is_counted() {
        let text = r#"<?xml version="1.0"?>
<testsuites name="nextest-run" tests="9" failures="1" errors="1" uuid="x" time="0.1">
  <testsuite name="a" tests="4" failures="1">
    <testcase name="one"><flakyFailure type="x"/><flakyFailure type="x"/></testcase><testcase name="two"/>"#;
        assert_eq!(Count::of_junit(text), Some(Count { passed: 7, failed: 2, flaky: 1 }));
        assert_eq!(Count::of_junit("<testsuites name=\"cut"), None);
    }

    #[test]
    fn a_failed_stage_is_counted_and_does_not_stop_the_others() {
        let mut report = Report::default();
        report.stage("first", || bail!("no"));
        report.stage_with_count("second", || Ok(Count { passed: 2, failed: 0, flaky: 0 }));
        report.stage_with_count("third", || Ok(Count { passed: 1, failed: 1, flaky: 0 }));
        assert_eq!(report.failed_stages, 2);
        assert_eq!(report.count, Count { passed: 3, failed: 1, flaky: 0 });
        assert_eq!(report.lines.iter().filter(|line| line.contains("FAILED")).count(), 2);
    }
}
