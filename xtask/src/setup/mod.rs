//! Makes everything present that building, the tests and the quickstart need. What is there already is kept.
//!
//! Every download lands beside its place and is renamed when it is complete and checked, so a run that was killed
//! leaves nothing that a later one takes for finished.

mod bench;
mod libtorch;
mod samples;
mod tools;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::python::Python;
use crate::workspace::Workspace;

pub use bench::bench_python;
pub use tools::nextest;

#[derive(Args, Default)]
pub struct Options {
    /// Bring libtorch's CUDA libraries even if this machine has no NVIDIA GPU.
    #[arg(long)]
    pub cuda: bool,
}

/// # Errors
/// If a part is missing and cannot be brought; the message says what to do.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    fs::create_dir_all(workspace.deps()).with_context(|| format!("{}: cannot make it", workspace.deps().display()))?;
    let _lock = lock(&workspace.deps().join("lock"))?;
    tools::check_compiler()?;
    let python = Python::prepare(workspace)?;
    let torch = libtorch::provide(workspace, &python, options.cuda)?;
    samples::provide(workspace, &python)?;
    eprintln!(
        "setup: complete (libtorch in {}, data in {}, encoder in {})",
        workspace.shown(&torch),
        workspace.shown(&workspace.movielens()),
        workspace.shown(&workspace.minilm())
    );
    Ok(())
}

/// Brings `pyarrow` into the virtual environment.
///
/// # Errors
/// If there is no Python, or no registry has it for this machine; `--no-extras` leaves out what needs it.
pub fn pyarrow(workspace: &Workspace) -> Result<()> {
    let python = Python::prepare(workspace)?;
    if !python.has("pyarrow.flight") {
        python
            .install("Installing pyarrow for the Arrow Flight test", "pyarrow")
            .context("the Arrow Flight test needs pyarrow; `cargo xtask test --no-extras` leaves it out")?;
        ensure!(python.has("pyarrow.flight"), "pyarrow was installed but cannot be imported");
    }
    Ok(())
}

/// Brings what the test of the Kubernetes examples reads schemas with into the virtual environment.
///
/// # Errors
/// As [`pyarrow`].
pub fn kubernetes_schemas(workspace: &Workspace) -> Result<()> {
    let python = Python::prepare(workspace)?;
    for (module, package) in
        [("kubernetes_validate", "kubernetes-validate"), ("kubeflow_trainer_api", "kubeflow-trainer-api")]
    {
        if !python.has(module) {
            python
                .install(&format!("Installing {package} for the test of the Kubernetes examples"), package)
                .context("`cargo xtask test --no-extras` leaves the test out")?;
        }
    }
    Ok(())
}

/// Brings `tensorboard` (44 MB with what it needs) into the virtual environment.
///
/// # Errors
/// If there is no Python, or no registry has it for this machine; `--no-extras` leaves out what needs it.
pub fn tensorboard(workspace: &Workspace) -> Result<()> {
    let python = Python::prepare(workspace)?;
    let module = "tensorboard.backend.event_processing.event_accumulator";
    if !python.has(module) {
        python
            .install("Installing tensorboard for the test of the event files", "tensorboard")
            .context("the test of the event files needs tensorboard; `cargo xtask test --no-extras` leaves it out")?;
        ensure!(python.has(module), "tensorboard was installed but cannot be imported");
    }
    Ok(())
}

/// Two set-ups at once would step on each other's half-made folders.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("{}: cannot create it", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another setup to end ...");
        file.lock().with_context(|| format!("{}: cannot lock it", path.display()))?;
    }
    Ok(file)
}

/// A folder that takes its name only when it is complete.
struct Aside {
    partial: PathBuf,
    place: PathBuf,
}

impl Aside {
    fn new(place: &Path) -> Result<Self> {
        let mut partial = place.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        remove(&partial)?;
        fs::create_dir_all(&partial).with_context(|| format!("{}: cannot make it", partial.display()))?;
        Ok(Self { partial, place: place.to_owned() })
    }

    fn path(&self) -> &Path {
        &self.partial
    }

    fn keep(self) -> Result<()> {
        remove(&self.place)?;
        fs::rename(&self.partial, &self.place)
            .with_context(|| format!("cannot rename {} to {}", self.partial.display(), self.place.display()))
    }
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}: cannot remove it", folder.display()))
        }
        _ => Ok(()),
    }
}
