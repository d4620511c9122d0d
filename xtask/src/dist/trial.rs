//! A packed archive, tried as on another machine: unpacked elsewhere, an empty environment, a job from end to end.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::elf::Needs;
use super::{LIBTORCH, PROGRAMS};
use crate::{files, process};

/// Learned item vectors: no encoder is needed.
const CONFIG: &str = r#"
[job]
name = "trial"
[data]
dataset = "dataset"
[prepare.interactions]
files = ["interactions.csv"]
[model]
item_input = "id"
layers = 1
heads = 2
hidden = 16
output_dim = 8
[training]
epochs = 1
global_batch = 16
[cluster]
workers = 2
device = "cpu"
"#;

/// # Errors
/// If a program needs something of this machine, or the job does not succeed.
pub fn run(archive: &Path, name: &str, libtorch: &Path) -> Result<()> {
    let ground = std::env::temp_dir().join(format!("learn-dist-{}", std::process::id()));
    files::make(&ground)?;
    let tried = attempt(archive, name, libtorch, &ground);
    let removed = std::fs::remove_dir_all(&ground).with_context(|| format!("{}: cannot remove it", ground.display()));
    tried.and(removed)
}

fn attempt(archive: &Path, name: &str, libtorch: &Path, ground: &Path) -> Result<()> {
    process::quiet("Unpacking it elsewhere", Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(ground))?;
    let root = ground.join(name);
    for (program, needs_libtorch) in PROGRAMS {
        let needs = Needs::of(&root.join("bin").join(program))?;
        needs.is_relocatable(needs_libtorch).with_context(|| format!("bin/{program} is not relocatable"))?;
    }
    // what `install --cpu` would bring
    let place = root.join(LIBTORCH);
    std::os::unix::fs::symlink(libtorch, &place).with_context(|| format!("{}: cannot link it", place.display()))?;

    let work = ground.join("work");
    files::make(&work)?;
    files::write(&work.join("interactions.csv"), interactions())?;
    files::write(&work.join("trial.toml"), CONFIG)?;
    let here = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(root.join("bin").join(program));
        command.args(arguments).current_dir(&work).env_clear();
        command
    };
    for (program, _) in PROGRAMS {
        process::output(program, &mut here(program, &["--version"]))?;
    }
    process::quiet("doctor, in an empty environment", &mut here("learn-launch", &["doctor", "trial.toml"]))?;
    process::quiet("prepare", &mut here("learn-launch", &["prepare", "trial.toml"]))?;
    process::quiet("train, two workers", &mut here("learn-launch", &["train", "trial.toml"]))?;
    let summary: PathBuf = work.join("runs").join("trial").join("summary.json");
    ensure!(summary.is_file(), "the training left no {}", summary.display());
    Ok(())
}

/// Forty users who walk along a ring of items.
fn interactions() -> String {
    let mut text = String::from("user_id,item_id,timestamp\n");
    for user in 0..40 {
        for place in 0..8 {
            // writing into a string cannot fail
            let _ = writeln!(text, "u{user},i{},{}", (user * 7 + place) % 30, 1000 + place);
        }
    }
    text
}
