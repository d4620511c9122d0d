//! Python as a downloader: a virtual environment of our own, so that system Pythons that refuse pip (PEP 668) work.
//!
//! Which registry is asked is the user's pip configuration; none is named here.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::workspace::Workspace;

/// Minor versions of Python 3 that torch 2.11 has wheels for; others fetch one of these, since only its C++ libraries
/// are used.
const TORCH_PYTHONS: std::ops::RangeInclusive<u32> = 10..=14;

const PROBE: &str = "import sys, venv, ensurepip; print(sys.version_info[0], sys.version_info[1])";

/// The interpreter of our virtual environment.
pub struct Python {
    interpreter: PathBuf,
    minor: u32,
    raw_progress: bool,
}

impl Python {
    /// Makes the virtual environment if it is not there.
    ///
    /// # Errors
    /// If there is no usable Python; the message says which packages bring it.
    pub fn prepare(workspace: &Workspace) -> Result<Self> {
        Self::prepare_in(&workspace.venv())
    }

    /// As [`Python::prepare`], in a folder of its own.
    ///
    /// # Errors
    /// As [`Python::prepare`].
    pub fn prepare_in(venv: &Path) -> Result<Self> {
        let interpreter = venv.join("bin").join("python");
        if process::output("python", Command::new(&interpreter).args(["-m", "pip", "--version"])).is_err() {
            probe(Path::new("python3"))?;
            process::quiet(
                "Making a virtual environment for downloads",
                Command::new("python3").args(["-m", "venv", "--clear"]).arg(venv),
            )?;
        }
        let minor = probe(&interpreter)?;
        let pip = process::output("pip", Command::new(&interpreter).args(["-m", "pip", "--version"]))?;
        Ok(Self { interpreter, minor, raw_progress: pip_version(&pip) >= Some((24, 1)) })
    }

    /// Installs into a folder that no interpreter imports from.
    ///
    /// # Errors
    /// If pip fails.
    pub fn install_into(&self, step: &str, folder: &Path, arguments: &[&str]) -> Result<()> {
        let mut pip = self.pip("install");
        pip.arg("--target").arg(folder);
        if !TORCH_PYTHONS.contains(&self.minor) {
            pip.args(["--only-binary=:all:", "--python-version", "3.12"]);
        }
        process::quiet(step, pip.args(arguments))
    }

    /// Installs into the virtual environment itself.
    ///
    /// # Errors
    /// If pip fails.
    pub fn install(&self, step: &str, requirement: &str) -> Result<()> {
        process::quiet(step, self.pip("install").arg(requirement))
    }

    /// Downloads the wheel of one package without its dependencies; answers its path.
    ///
    /// # Errors
    /// If pip fails or leaves no wheel.
    pub fn download(&self, step: &str, requirement: &str, folder: &Path) -> Result<PathBuf> {
        let mut pip = self.pip("download");
        pip.args(["--no-deps", "--only-binary=:all:", "--dest"]).arg(folder).arg(requirement);
        process::quiet(step, &mut pip)?;
        let entries = std::fs::read_dir(folder).with_context(|| format!("{}: cannot list it", folder.display()))?;
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .with_context(|| format!("pip downloaded no wheel for {requirement}; check your pip configuration"))
    }

    /// Runs a script that is part of this program.
    ///
    /// # Errors
    /// If it fails.
    pub fn script(&self, step: &str, source: &str, arguments: &[&std::ffi::OsStr]) -> Result<()> {
        process::output(step, Command::new(&self.interpreter).args(["-c", source]).args(arguments)).map(drop)
    }

    /// Whether the virtual environment can import a module.
    pub fn has(&self, module: &str) -> bool {
        process::output("import", Command::new(&self.interpreter).args(["-c", &format!("import {module}")])).is_ok()
    }

    /// Whether a package of this version is installed; nothing is imported.
    pub fn has_version(&self, package: &str, version: &str) -> bool {
        let ask = format!("import importlib.metadata as m; print(m.version({package:?}))");
        let answer = process::output("python", Command::new(&self.interpreter).args(["-c", &ask]));
        answer.is_ok_and(|found| found.trim().split('+').next() == Some(version))
    }

    /// The interpreter's path.
    pub fn interpreter(&self) -> &Path {
        &self.interpreter
    }

    fn pip(&self, verb: &str) -> Command {
        let mut pip = Command::new(&self.interpreter);
        pip.args(["-m", "pip", verb, "--disable-pip-version-check", "--no-input"]);
        if self.raw_progress {
            pip.args(["--progress-bar", "raw"]);
        }
        pip
    }
}

/// The minor version of a Python 3 that can make virtual environments.
fn probe(python: &Path) -> Result<u32> {
    let remedy = "install Python 3.9 or newer with venv; on Debian or Ubuntu: sudo apt-get install -y python3-venv";
    let answer = process::output("python3", Command::new(python).args(["-c", PROBE]))
        .with_context(|| format!("{} with the modules venv and ensurepip is needed: {remedy}", python.display()))?;
    let mut numbers = answer.split_whitespace().map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(3)), Some(Ok(minor))) if minor >= 9 => Ok(minor),
        _ => bail!("{} is version {}: {remedy}", python.display(), answer.trim()),
    }
}

/// Of `pip 23.0.1 from …`.
fn pip_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().nth(1)?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pip_versions_are_compared_as_numbers() {
        assert_eq!(pip_version("pip 23.0.1 from /usr/lib/python3 (python 3.11)"), Some((23, 0)));
        assert!(pip_version("pip 24.0 from x") < Some((24, 1)));
        assert!(pip_version("pip 100.2 from x") >= Some((24, 1)));
        assert_eq!(pip_version("nonsense"), None);
    }

    #[test]
    fn examples_in_scripts_hold() {
        for script in ["tests/python/gguf_to_hf.py", "bench/pytorch/lengths.py"] {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(script);
            process::output("doctest", Command::new("python3").args(["-B", "-m", "doctest"]).arg(script)).unwrap();
        }
    }

    #[test]
    fn a_missing_python_comes_with_the_remedy() {
        let error = format!("{:#}", probe(Path::new("no-such-python")).unwrap_err());
        assert!(error.contains("apt-get install -y python3-venv"), "{error}");
    }
}
