//! A Python environment of its own with what we are measured against: PyTorch whole (the libtorch of `setup` has no CUDA
//! libraries, so Python cannot import it), and packages that hold the other contestants. Versions are pinned.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::python::Python;
use crate::workspace::Workspace;

/// What is compared with, and what that needs.
const PACKAGES: [(&str, &str); 6] = [
    ("torch", "2.11.0"),
    ("transformers", "4.57.1"),
    ("numpy", "2.4.6"),
    ("pyarrow", "26.0.1"),
    ("polars", "2.1.0"),
    ("sentence-transformers", "5.7.0"),
];

/// Brings what is not there, and answers the interpreter.
///
/// # Errors
/// If there is no Python, or no registry has a package for this machine.
pub fn bench_python(workspace: &Workspace) -> Result<PathBuf> {
    let python = Python::prepare_in(&workspace.deps().join("bench"))?;
    for (package, version) in PACKAGES {
        if !python.has_version(package, version) {
            let requirement = format!("{package}=={version}");
            python
                .install(&format!("Installing {requirement} to be measured against"), &requirement)
                .context("the benchmarks beside PyTorch need it")?;
        }
    }
    Ok(python.interpreter().to_owned())
}
