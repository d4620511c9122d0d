//! `learn-launch config`: the resolved configuration, its JSON Schema, a check of a file, the reference file.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use learn_domain::Config;

use crate::cli::SettingsArgs;
use crate::failure::{self, Failure};
use crate::output::Output;
use crate::settings::{Catalogue, SettingsError, reference_toml};
use crate::study::{self, file::StudyFile};

pub const HELP: &str = "\
Examples:
  learn-launch config show configs/quickstart.toml --set training.epochs=3
  learn-launch config check my.toml configs/studies/*.toml
  learn-launch config schema > learn.schema.json
  learn-launch config reference > everything.toml

`learn-launch config FILE` is short for `config show FILE`. With --json the configuration is printed as JSON.";

/// Arguments of `config`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ConfigArgs {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    settings: SettingsArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print the configuration that defaults, file, environment and --set make together
    Show(SettingsArgs),
    /// Print the JSON Schema
    Schema,
    /// Check configurations and studies without using them
    Check {
        /// The files (TOML)
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Print every key with its default and its meaning, as TOML
    Reference,
}

/// # Errors
/// The configuration is wrong.
pub fn run(args: &ConfigArgs, output: &Output) -> Result<()> {
    match &args.action {
        None => show(&args.settings, output),
        Some(Action::Show(settings)) => show(settings, output),
        Some(Action::Schema) => {
            let schema = schemars::schema_for!(Config);
            output.result(&serde_json::to_string_pretty(&schema)?, &schema)
        }
        Some(Action::Check { files }) => check(files, output),
        Some(Action::Reference) => {
            let catalogue = Catalogue::of_config();
            output.result(&reference_toml(&catalogue), &Config::default())
        }
    }
}

/// Checks every file, whatever the others are like.
fn check(files: &[PathBuf], output: &Output) -> Result<()> {
    let mut problems = Vec::new();
    for file in files {
        match check_one(file) {
            Ok(()) => output.note(&format!("{}: ok", file.display())),
            Err(error) => problems.push(failure::message(&error)),
        }
    }
    if !problems.is_empty() {
        return Err(Failure::Usage(problems.join("\n")).into());
    }
    if output.json() { output.result("", &serde_json::json!({ "ok": true, "files": files })) } else { Ok(()) }
}

/// Checks a configuration, or a study with its base and its variants.
fn check_one(file: &Path) -> Result<()> {
    let resolved = |file: &Path| SettingsArgs { file: Some(file.into()), sets: Vec::new() }.resolver()?.finish();
    match resolved(file) {
        Err(SettingsError::Study { .. }) => {
            let study = StudyFile::read(file)?;
            let base = resolved(&study.study.config).with_context(|| format!("{}: study.config", file.display()))?;
            study::runs::check(&study, &base).with_context(|| file.display().to_string())
        }
        other => Ok(other.map(drop)?),
    }
}

fn show(settings: &SettingsArgs, output: &Output) -> Result<()> {
    let config = settings.resolver()?.finish()?;
    output.result(&toml::to_string(&config)?, &config)
}
