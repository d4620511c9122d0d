//! `cargo xtask ci`: what `.ci/run` does after it has brought the system's packages.

use std::fs;

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{quickstart, test};

/// # Errors
/// If a test or the quickstart fails.
pub fn run(workspace: &Workspace) -> Result<()> {
    test::run(workspace, &test::Options::default())?;
    quickstart::run(workspace, &quickstart::Options { epochs: Some(1), force: true })?;
    // The tests' closing lines again, below everything that the quickstart printed.
    println!("\n{}", fs::read_to_string(workspace.test_report())?);
    Ok(())
}
