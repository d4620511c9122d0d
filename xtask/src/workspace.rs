//! Where things lie: the one place that knows the repository's folders.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The repository that a task works in.
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// The given root, or the one that cargo runs this from.
    ///
    /// # Errors
    /// If there is no workspace at that place.
    pub fn locate(root: Option<PathBuf>) -> Result<Self> {
        let root = match root {
            Some(root) => root,
            None => {
                let package = env::var_os("CARGO_MANIFEST_DIR").context("run this as `cargo xtask`, or pass --root")?;
                Path::new(&package).parent().context("the xtask package has no parent folder")?.to_owned()
            }
        };
        let root = root.canonicalize().with_context(|| format!("{}: no such folder", root.display()))?;
        ensure!(
            root.join("Cargo.toml").is_file(),
            "{}: holds no Cargo.toml; pass the repository's root",
            root.display()
        );
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
        Ok(Self { root, target })
    }

    #[cfg(test)]
    pub fn with_target(root: &Path, target: &Path) -> Self {
        Self { root: root.to_owned(), target: target.to_owned() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's target directory (`CARGO_TARGET_DIR` or `target`).
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// A binary of the release profile.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.target.join("release").join(name)
    }

    /// What `setup` downloads; ignored by git.
    pub fn deps(&self) -> PathBuf {
        self.root.join(".deps")
    }

    /// The folder of libtorch that `.cargo/config.toml` names.
    pub fn own_libtorch(&self) -> PathBuf {
        self.deps().join("python").join("torch")
    }

    /// A virtual environment: pip for the downloads, pyarrow for one test.
    pub fn venv(&self) -> PathBuf {
        self.deps().join("venv")
    }

    /// The MovieLens-100K sample.
    pub fn movielens(&self) -> PathBuf {
        self.deps().join("ml-100k")
    }

    /// The MiniLM encoder.
    pub fn minilm(&self) -> PathBuf {
        self.deps().join("minilm")
    }

    /// Tools that `setup` installs with cargo.
    pub fn tools(&self) -> PathBuf {
        self.deps().join("cargo")
    }

    /// The closing lines of the last run of a task.
    pub fn report(&self, task: &str) -> PathBuf {
        self.target.join("xtask").join(format!("{task}.txt"))
    }

    /// `cargo` in the repository's root, with our own tools after the user's.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = env::split_paths(&path).chain([self.tools().join("bin")]);
        if let Ok(path) = env::join_paths(folders) {
            command.env("PATH", path);
        }
        command.current_dir(&self.root);
        // Set by cargo for this program, wrong for the packages it builds.
        for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME", "CARGO_PKG_VERSION"] {
            command.env_remove(name);
        }
        command
    }

    /// The path as a person in the repository's root would write it.
    pub fn shown<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}
