//! `cargo xtask ci`: what CI runs, which is `.ci/run`.

use std::process::Command;

use anyhow::Result;

use crate::process;
use crate::workspace::Workspace;

/// # Errors
/// If a system package cannot be had, a test fails or the quickstart does.
pub fn run(workspace: &Workspace) -> Result<()> {
    process::visible("CI", Command::new(workspace.root().join(".ci").join("run")).current_dir(workspace.root()))
}
