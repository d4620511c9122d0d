//! libtorch 2.11: an exported one, or PyTorch's wheel, of which only the C++ libraries and headers are used.
//!
//! Without an NVIDIA GPU three wheels are enough for the CPU library (0.5 GB instead of 2.7): `libtorch_cpu.so` itself
//! needs nothing but the CUDA runtime and its profiling interface to load.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::Aside;
use crate::process;
use crate::python::Python;
use crate::workspace::Workspace;

const VERSION: &str = "2.11.0";
const CPU_WHEELS: [&str; 4] =
    ["--no-deps", "torch==2.11.0", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"];
const CUDA_WHEELS: [&str; 1] = ["torch==2.11.0"];

/// The folder of libtorch, brought if it is not there.
///
/// # Errors
/// If an exported `LIBTORCH` is not version 2.11, or the wheels cannot be had.
pub fn provide(workspace: &Workspace, python: &Python, want_cuda: bool) -> Result<PathBuf> {
    let own = workspace.own_libtorch();
    // Cargo sets the variable to our own folder unless the user has exported one.
    if let Some(exported) = env::var_os("LIBTORCH").map(PathBuf::from).filter(|exported| *exported != own) {
        check(&exported)
            .context("the exported LIBTORCH cannot be used; mend it, or unset it to have one downloaded")?;
        return Ok(exported);
    }
    let cuda = want_cuda || has_nvidia_gpu();
    if check(&own).is_ok() && (!cuda || has_cuda(&own)) {
        return Ok(own);
    }
    if !cfg!(target_os = "linux") {
        bail!("PyTorch's wheels serve as libtorch on Linux only; here, export LIBTORCH to a libtorch {VERSION} folder");
    }
    let (title, wheels) = match cuda {
        true => ("Downloading libtorch 2.11 with CUDA (about 2.7 GB)", &CUDA_WHEELS[..]),
        false => ("Downloading libtorch 2.11 for the CPU (about 0.5 GB)", &CPU_WHEELS[..]),
    };
    let aside = Aside::new(&workspace.deps().join("python"))?;
    python.install_into(title, aside.path(), wheels)?;
    check(&aside.path().join("torch")).context("the downloaded wheel holds no usable libtorch")?;
    aside.keep()?;
    Ok(own)
}

/// Whether a folder holds a libtorch of our version.
fn check(folder: &Path) -> Result<()> {
    let library = folder.join("lib").join("libtorch_cpu.so");
    ensure!(library.is_file(), "{} is missing", library.display());
    let version = version(folder)?;
    ensure!(
        version.split('+').next() == Some(VERSION),
        "{} is version {version}; version {VERSION} is needed",
        folder.display()
    );
    Ok(())
}

/// From `build-version` (a libtorch archive) or `version.py` (a wheel).
fn version(folder: &Path) -> Result<String> {
    if let Ok(text) = fs::read_to_string(folder.join("build-version")) {
        return Ok(text.trim().to_owned());
    }
    let path = folder.join("version.py");
    let text = fs::read_to_string(&path)
        .with_context(|| format!("{} has neither build-version nor version.py", folder.display()))?;
    wheel_version(&text).with_context(|| format!("{} names no version", path.display()))
}

fn wheel_version(text: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(line.trim_matches(['\'', '"', ' ']).to_owned())
}

fn has_nvidia_gpu() -> bool {
    Path::new("/dev/nvidia0").exists()
        || process::output("nvidia-smi", Command::new("nvidia-smi").arg("--list-gpus"))
            .is_ok_and(|gpus| !gpus.trim().is_empty())
}

fn has_cuda(own: &Path) -> bool {
    own.parent().is_some_and(|python| python.join("nvidia").join("cudnn").is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_a_wheel_is_read() {
        let text = "from typing import Optional\n\n__version__ = '2.11.0+cu130'\ndebug = False\n";
        assert_eq!(wheel_version(text).as_deref(), Some("2.11.0+cu130"));
        assert_eq!(wheel_version("debug = False\n"), None);
    }

    #[test]
    fn a_folder_of_another_version_is_refused() {
        let folder = env::temp_dir().join(format!("learn-xtask-libtorch-{}", std::process::id()));
        fs::create_dir_all(folder.join("lib")).unwrap();
        assert!(check(&folder).unwrap_err().to_string().contains("libtorch_cpu.so is missing"));
        fs::write(folder.join("lib").join("libtorch_cpu.so"), "").unwrap();
        assert!(check(&folder).unwrap_err().to_string().contains("neither build-version nor version.py"));
        fs::write(folder.join("build-version"), "2.9.1+cpu\n").unwrap();
        assert!(check(&folder).unwrap_err().to_string().contains("version 2.11.0 is needed"));
        fs::write(folder.join("build-version"), "2.11.0+cpu\n").unwrap();
        check(&folder).unwrap();
        fs::remove_dir_all(folder).unwrap();
    }
}
