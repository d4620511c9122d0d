//! `learn-fuzz`: the targets under mutated golden inputs, or one target on the inputs of files.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use learn_fuzz::{TARGETS, Target, clean, drive};

/// Fuzzes the parsers of everything that comes from outside.
#[derive(Parser)]
#[command(name = "learn-fuzz", version)]
struct Arguments {
    /// Only this target
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Number that names the row of inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Give the target these files instead, each once
    #[arg(long, num_args = 1.., requires = "target")]
    files: Vec<PathBuf>,
    /// Print the names of the targets
    #[arg(long)]
    list: bool,
    /// Write the target's golden inputs into this folder
    #[arg(long, requires = "target")]
    write_seeds: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = run(&Arguments::parse());
    clean();
    result.unwrap_or_else(|error| {
        eprintln!("learn-fuzz: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let wanted = |target: &&Target| arguments.target.as_ref().is_none_or(|name| name == target.name);
    let targets: Vec<&Target> = TARGETS.iter().filter(wanted).collect();
    ensure!(!targets.is_empty(), "there is no such target; `--list` names them");
    if arguments.list {
        for target in targets {
            println!("{:<16} {}", target.name, target.reads);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(folder) = &arguments.write_seeds {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        for (number, seed) in (targets[0].seeds)().iter().enumerate() {
            let path = folder.join(format!("seed-{number}"));
            std::fs::write(&path, seed).with_context(|| path.display().to_string())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    for path in &arguments.files {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        (targets[0].run)(&bytes);
        println!("{}: {} survives {} bytes", path.display(), targets[0].name, bytes.len());
    }
    if !arguments.files.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    for target in targets {
        let outcome = drive::run(target, Duration::from_secs(arguments.seconds), arguments.seed)?;
        println!(
            "{}: {} inputs, the slowest took {} ms, memory grew by {} MiB",
            target.name,
            outcome.inputs,
            outcome.slowest.as_millis(),
            outcome.grown >> 20
        );
        if let Some(finding) = outcome.finding {
            let path = std::env::temp_dir().join(format!("{}-{}", target.name, arguments.seed));
            std::fs::write(&path, &finding.input).with_context(|| path.display().to_string())?;
            bail!("{}: {}; the input is in {}", target.name, finding.what, path.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}
