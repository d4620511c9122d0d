//! `cargo xtask gpu-check`: packs what checks the CUDA path elsewhere.
//!
//! Output: a folder below [`LIMIT`] bytes with stripped, compressed binaries, golden cases and `run.sh`, for a machine with
//! an NVIDIA GPU and PyTorch 2.11 that has neither network nor toolchain: `bash FOLDER/run.sh OUT_DIR`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::bench::machine::revision;
use crate::workspace::Workspace;
use crate::{files, process, quickstart, setup};

/// Most bytes of the packed folder.
const LIMIT: u64 = 50 << 20;
const BINARIES: [&str; 4] = ["learn-launch", "learn-coordinator", "learn-worker", "learn-embed"];
/// Examples that check golden cases, by package.
const EXAMPLES: [(&str, &str); 2] = [("learn-model", "golden"), ("learn-ceg", "encoders")];
/// Programs of tests that need a GPU: the name they get, and how cargo builds them.
pub const TESTS: [(&str, &[&str]); 3] = [
    ("nccl", &["--package", "learn-collective", "--test", "nccl"]),
    ("collective", &["--package", "learn-collective", "--lib"]),
    ("torch", &["--package", "learn-torch", "--lib"]),
];
/// What our step runs beside, in turns.
const SCRIPTS: &str = "bench/pytorch";
/// The cases of the tests: files of towers and losses, folders of encoders.
const GOLDEN_FILES: &str = "crates/model/tests/golden";
const ENCODERS: &str = "crates/ceg/tests/golden";

const PARTS: [(&str, &str); 5] = [
    ("run.sh", include_str!("../gpu-check/run.sh")),
    ("check.py", include_str!("../gpu-check/check.py")),
    ("beside.py", include_str!("../gpu-check/beside.py")),
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
    for (package, example) in EXAMPLES {
        let build = ["build", "--release", "--package", package, "--example", example];
        process::visible(&format!("the example {example}"), workspace.cargo().args(build))?;
    }

    let tests =
        TESTS.iter().map(|(name, words)| Ok((*name, test_program(workspace, words)?))).collect::<Result<Vec<_>>>()?;

    let out = options.out.clone().unwrap_or_else(|| workspace.target().join("gpu-check"));
    if out.exists() {
        ensure!(out.join("run.sh").is_file(), "{} is in the way; move it or name another --out", out.display());
        fs::remove_dir_all(&out).with_context(|| format!("{}: cannot remove it", out.display()))?;
    }
    pack(workspace, &out, &tests)?;
    let bytes = size(&out)?;
    ensure!(bytes < LIMIT, "{} holds {bytes} bytes; at most {LIMIT} can be carried", out.display());
    println!("packed {} ({:.1} MiB)", workspace.shown(&out), bytes as f64 / f64::from(1 << 20));
    println!("on a machine with an NVIDIA GPU and PyTorch 2.11: bash {}/run.sh OUT_DIR", workspace.shown(&out));
    Ok(())
}

/// Builds a program of tests and says where it lies.
fn test_program(workspace: &Workspace, words: &[&str]) -> Result<PathBuf> {
    let mut build = workspace.cargo();
    build.args(["test", "--release", "--no-run", "--message-format", "json-render-diagnostics"]).args(words);
    let messages = process::output(&format!("building the tests of {}", words[1]), &mut build)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let program = messages.filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?))).next_back();
    program.with_context(|| format!("cargo named no program of the tests of {}", words[1]))
}

fn pack(workspace: &Workspace, out: &Path, tests: &[(&str, PathBuf)]) -> Result<()> {
    let bin = out.join("bin");
    let golden = out.join("golden");
    let encoders = out.join("encoders");
    for folder in [&bin, &golden, &encoders] {
        files::make(folder)?;
    }
    let examples = workspace.target().join("release").join("examples");
    let examples = EXAMPLES.map(|(_, name)| examples.join(name));
    let mut programs: Vec<(OsString, PathBuf)> =
        tests.iter().map(|(name, binary)| ((*name).into(), binary.clone())).collect();
    for binary in BINARIES.iter().map(|name| workspace.binary(name)).chain(examples) {
        programs.push((binary.file_name().context("a binary has a name")?.to_owned(), binary));
    }
    for (name, binary) in programs {
        let packed = bin.join(name);
        files::copy(&binary, &packed)?;
        process::output("strip", Command::new("strip").arg(&packed))?;
        // run.sh unpacks them
        process::output("gzip", Command::new("gzip").arg("-9").arg(&packed))?;
    }
    files::copy_files(&workspace.root().join(GOLDEN_FILES), &golden, |file| {
        file.extension().is_some_and(|e| e == "safetensors")
    })?;
    for model in files::entries(&workspace.root().join(ENCODERS))?.iter().filter(|path| path.is_dir()) {
        let packed = encoders.join(model.file_name().context("a model has a name")?);
        files::make(&packed)?;
        files::copy_files(model, &packed, |_| true)?;
    }
    let scripts = out.join("pytorch");
    files::make(&scripts)?;
    files::copy_files(&workspace.root().join(SCRIPTS), &scripts, |file| file.extension().is_some_and(|e| e == "py"))?;
    for (name, content) in PARTS {
        files::write(&out.join(name), content)?;
    }
    files::write(&out.join("revision"), revision(workspace.root()))?;
    Ok(())
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
