//! Programs that building and testing need.

use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::workspace::Workspace;

/// The test runner's version that the tests are run with.
const NEXTEST: &str = "0.9.143";

/// # Errors
/// If there is no C++ compiler (`CXX` or `c++`); the message says which package brings it.
pub fn check_compiler() -> Result<()> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    process::output("C++ compiler", Command::new(&compiler).arg("--version")).map(drop).with_context(|| {
        format!("`{compiler}`, a C++ compiler, is needed; on Debian or Ubuntu: sudo apt-get install -y build-essential")
    })
}

/// A `cargo` command line that ends in `nextest`: the user's, or one of our own that is installed now.
///
/// # Errors
/// If it cannot be installed.
pub fn nextest(workspace: &Workspace) -> Result<Command> {
    let mut installed = workspace.cargo();
    if process::output("nextest", installed.args(["nextest", "--version"])).is_err() {
        let mut install = workspace.cargo();
        install.args(["install", "--locked", "cargo-nextest", "--version", NEXTEST, "--root"]).arg(workspace.tools());
        process::quiet("Installing the test runner cargo-nextest (some minutes)", &mut install)?;
    }
    let mut command = workspace.cargo();
    command.arg("nextest");
    Ok(command)
}
