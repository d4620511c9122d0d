//! `cargo xtask gpu-check`: packs what checks the CUDA path elsewhere.
//!
//! Output: a folder below [`LIMIT`] bytes with stripped, compressed binaries, golden files and `run.sh`, for a machine with
//! an NVIDIA GPU and PyTorch 2.11 that has neither network nor toolchain: `bash FOLDER/run.sh OUT_DIR`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::workspace::Workspace;
use crate::{process, quickstart, setup};

/// Most bytes of the packed folder.
const LIMIT: u64 = 64 << 20;
const BINARIES: [&str; 4] = ["learn-launch", "learn-coordinator", "learn-worker", "learn-embed"];
/// The example of the model crate that checks golden files, and the folder of the files that its tests use.
const GOLDEN_EXAMPLE: &str = "golden";
const GOLDEN_FILES: &str = "crates/model/tests/golden";

const PARTS: [(&str, &str); 4] = [
    ("run.sh", include_str!("../gpu-check/run.sh")),
    ("check.py", include_str!("../gpu-check/check.py")),
    ("make_data.py", include_str!("../gpu-check/make_data.py")),
    ("gpu-check.toml", include_str!("../gpu-check/gpu-check.toml")),
];

#[derive(Args, Default)]
pub struct Options {
    /// The folder to pack into; default: `target/gpu-check`.
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// # Errors
/// If something cannot be built, copied or is too large.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::run(workspace, &setup::Options::default())?;
    quickstart::build(workspace)?;
    let example = ["build", "--release", "--package", "learn-model", "--example", GOLDEN_EXAMPLE];
    process::visible("the golden example", workspace.cargo().args(example))?;

    let out = options.out.clone().unwrap_or_else(|| workspace.target().join("gpu-check"));
    if out.exists() {
        ensure!(out.join("run.sh").is_file(), "{} is in the way; move it or name another --out", out.display());
        fs::remove_dir_all(&out).with_context(|| format!("{}: cannot remove it", out.display()))?;
    }
    pack(workspace, &out)?;
    let bytes = size(&out)?;
    ensure!(bytes < LIMIT, "{} holds {bytes} bytes; at most {LIMIT} can be carried", out.display());
    println!("packed {} ({:.1} MiB)", workspace.shown(&out), bytes as f64 / f64::from(1 << 20));
    println!("on a machine with an NVIDIA GPU and PyTorch 2.11: bash {}/run.sh OUT_DIR", workspace.shown(&out));
    Ok(())
}

fn pack(workspace: &Workspace, out: &Path) -> Result<()> {
    let bin = out.join("bin");
    let golden = out.join("golden");
    for folder in [&bin, &golden] {
        fs::create_dir_all(folder).with_context(|| format!("{}: cannot make it", folder.display()))?;
    }
    let example = workspace.target().join("release").join("examples").join(GOLDEN_EXAMPLE);
    for binary in BINARIES.iter().map(|name| workspace.binary(name)).chain([example]) {
        let packed = bin.join(binary.file_name().context("a binary has a name")?);
        copy(&binary, &packed)?;
        process::output("strip", Command::new("strip").arg(&packed))?;
        // run.sh unpacks them
        process::output("gzip", Command::new("gzip").arg("-9").arg(&packed))?;
    }
    for file in golden_files(&workspace.root().join(GOLDEN_FILES))? {
        copy(&file, &golden.join(file.file_name().context("a golden file has a name")?))?;
    }
    for (name, content) in PARTS {
        let path = out.join(name);
        fs::write(&path, content).with_context(|| format!("{}: cannot write it", path.display()))?;
    }
    Ok(())
}

fn golden_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("{}: cannot list it", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    ensure!(!files.is_empty(), "{} holds no golden files", folder.display());
    files.sort();
    Ok(files)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("{}: cannot list it", folder.display()))? {
        let entry = entry?;
        bytes += if entry.file_type()?.is_dir() { size(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(bytes)
}
