//! `cargo xtask fuzz`: every parser of what comes from outside, under mutated golden inputs.

use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::workspace::Workspace;
use crate::{process, setup};

#[derive(Args)]
pub struct Options {
    /// Only this target; `--list` names them.
    pub target: Option<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// Number that names the row of inputs.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print the targets and what they read.
    #[arg(long)]
    pub list: bool,
}

/// # Errors
/// If the build fails, there is no such target, or one of them does not survive an input.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::run(workspace, &setup::Options::default())?;
    let mut build = workspace.cargo();
    build.args(["build", "--release", "--package", "learn-fuzz", "--bins"]);
    process::quiet("Building the fuzz targets", &mut build)?;
    let mut fuzz = Command::new(workspace.binary("learn-fuzz"));
    if options.list {
        return process::visible("the list", fuzz.arg("--list"));
    }
    let (seconds, seed) = (options.seconds.to_string(), options.seed.to_string());
    fuzz.args(["--seconds", &seconds, "--seed", &seed]).args(&options.target);
    process::visible("fuzzing", &mut fuzz)?;
    println!("fuzz: nothing found");
    Ok(())
}
