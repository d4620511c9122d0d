//! `cargo xtask chaos`: a real job under a seeded schedule of faults, and whether anything was lost.

use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::workspace::Workspace;
use crate::{process, quickstart, setup};

#[derive(Args)]
pub struct Options {
    /// Minutes that the faults take, roughly.
    #[arg(long, default_value_t = 3.0)]
    pub minutes: f64,
    /// The schedule follows from it.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Workers that the job starts with, and has at most.
    #[arg(long, default_value_t = 4)]
    pub workers: u32,
    /// Let workers share memory, which is the default of a job, and leave out the faults that slow packets down.
    #[arg(long)]
    pub shared_memory: bool,
}

/// # Errors
/// If the build fails or something is lost; the message says what and where everything is kept.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::run(workspace, &setup::Options::default())?;
    quickstart::build(workspace)?;
    let mut chaos = Command::new(workspace.binary("learn-chaos"));
    let (minutes, seed) = (options.minutes.to_string(), options.seed.to_string());
    chaos.args(["--minutes", &minutes, "--seed", &seed, "--workers", &options.workers.to_string()]);
    chaos.args(options.shared_memory.then_some("--shared-memory"));
    process::visible("chaos", chaos.current_dir(workspace.root()))
}
