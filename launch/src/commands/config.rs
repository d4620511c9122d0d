//! `learn-launch config`: the resolved configuration, its JSON Schema, a check of a file, the reference file.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use learn_domain::Config;

use crate::cli::SettingsArgs;
use crate::output::Output;
use crate::settings::{Catalogue, reference_toml};

pub const HELP: &str = "\
Examples:
  learn-launch config show configs/quickstart.toml --set training.epochs=3
  learn-launch config check my.toml
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
    /// Check files without using them
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
        Some(Action::Check { files }) => {
            for file in files {
                SettingsArgs { file: Some(file.clone()), sets: Vec::new() }.resolver()?.finish()?;
                output.note(&format!("{}: ok", file.display()));
            }
            if output.json() { output.result("", &serde_json::json!({ "ok": true, "files": files })) } else { Ok(()) }
        }
        Some(Action::Reference) => {
            let catalogue = Catalogue::of_config();
            output.result(&reference_toml(&catalogue), &Config::default())
        }
    }
}

fn show(settings: &SettingsArgs, output: &Output) -> Result<()> {
    let config = settings.resolver()?.finish()?;
    output.result(&toml::to_string(&config)?, &config)
}
