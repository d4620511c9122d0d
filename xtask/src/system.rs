//! `cargo xtask system`: the tests against real programs that run beside a training: Slurm, Prometheus, a browser.
//!
//! Each part is a test program of `tests/tests`, all of it ignored by default, and the programs that it needs. On Debian and
//! Ubuntu as root what is missing is installed; elsewhere it is named. The tests start and stop what they need themselves.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};

use crate::report::Report;
use crate::workspace::Workspace;
use crate::{process, quickstart, setup};

#[derive(Args)]
pub struct Options {
    /// Which of them
    #[arg(value_enum, required = true)]
    parts: Vec<Part>,
}

/// What is tested against.
#[derive(Clone, Copy, ValueEnum)]
enum Part {
    Slurm,
    Prometheus,
    Browser,
}

impl Part {
    /// Its test program.
    fn test(self) -> &'static str {
        match self {
            Self::Slurm => "slurm",
            Self::Prometheus => "prometheus",
            Self::Browser => "browser",
        }
    }

    /// Programs that it needs, and the Debian packages that bring them.
    fn programs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Slurm => &[("slurmctld", "slurm-wlm"), ("munged", "munge"), ("ip", "iproute2")],
            Self::Prometheus => &[("prometheus", "prometheus"), ("promtool", "prometheus")],
            Self::Browser => &[("chromium", "chromium")],
        }
    }
}

/// The test programs.
#[cfg(test)]
pub fn tests() -> Vec<&'static str> {
    Part::value_variants().iter().map(|part| part.test()).collect()
}

/// # Errors
/// If a program is missing and cannot be installed, or a test fails.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::run(workspace, &setup::Options::default())?;
    let mut report = Report::default();
    report.stage("build", || quickstart::build(workspace));
    for &part in &options.parts {
        let name = part.test();
        report.tests(name, workspace, || {
            install(part)?;
            let mut tests = setup::nextest(workspace)?;
            tests.args(["run", "--release", "--workspace", "--no-fail-fast", "--run-ignored", "only", "-E"]);
            tests.arg(format!("package(learn-tests) & binary(={name})"));
            process::visible(name, &mut tests)
        });
    }
    report.close(workspace, "system")
}

/// Brings the programs that are missing, as root of a Debian.
fn install(part: Part) -> Result<()> {
    let mut packages: Vec<&str> =
        part.programs().iter().filter(|(program, _)| !is_there(program)).map(|&(_, package)| package).collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let root = process::output("id", Command::new("id").arg("-u"))?.trim() == "0";
    if !root || !is_there("apt-get") {
        bail!(
            "these programs are missing: {}; install them first (those are their Debian packages)",
            packages.join(", ")
        );
    }
    let step = format!("Installing {}", packages.join(" and "));
    process::quiet("Reading the package lists", Command::new("apt-get").args(["update", "-q"]))?;
    let mut apt = Command::new("apt-get");
    apt.args(["install", "-y", "-q", "--no-install-recommends"]).args(&packages);
    process::quiet(&step, apt.env("DEBIAN_FRONTEND", "noninteractive")).context("apt-get failed")
}

/// Debian keeps daemons where only root looks.
fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(|folder| Path::new(folder).to_owned());
    std::env::split_paths(&path).chain(more).any(|folder| folder.join(program).is_file())
}
