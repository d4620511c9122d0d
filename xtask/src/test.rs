//! `cargo xtask test`: format, lint, the tests; ends with one line that counts what passed and failed.
//!
//! A stage that fails does not hide the ones after it; what could not be run is named as not run, never as passed.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::report::{Count, Report};
use crate::workspace::Workspace;
use crate::{process, quickstart, setup};

#[derive(Args, Default)]
pub struct Options {
    /// Leave out the tests that need more downloads (the MiniLM encoder's vectors, a pyarrow client, schemas of Kubernetes,
    /// tensorboard).
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
        report.not_run("tests that need downloads: left out with --no-extras".into());
    } else {
        extras(workspace, &mut report);
    }
    report.close(workspace, "test")
}

/// The tests of [`extras`], as nextest selects them.
pub const EXTRAS: &str = "test(minilm) | test(pyarrow) | test(kubernetes) | test(tensorboard_reads)";

/// Tests that need more than the sources: marked ignored, run here with what they need.
fn extras(workspace: &Workspace, report: &mut Report) {
    report.stage("pyarrow", || setup::pyarrow(workspace));
    report.stage("schemas of Kubernetes", || setup::kubernetes_schemas(workspace));
    report.stage("tensorboard", || setup::tensorboard(workspace));
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
