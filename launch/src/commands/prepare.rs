//! `learn-launch prepare`: from the files people have to a dataset directory.

use std::path::Path;

use anyhow::Result;
use clap::Args;
use learn_dataset::{
    InputFile, KeepOut, Preparation, PrepareError, PrepareOptions, PrepareReport, Progress, check, prepare_with,
};

use crate::cli::SettingsArgs;
use crate::failure::Failure;
use crate::output::{Output, Unit};
use crate::{dataset_work, render, system};

use super::embed;

pub const HELP: &str = "\
Examples:
  learn-launch prepare configs/quickstart.toml
  learn-launch prepare --set 'prepare.interactions.files=[\"clicks.parquet\"]' \\
      --set data.dataset=data/clicks
  learn-launch prepare my.toml --skip-bad-rows --replace

Reads Parquet, CSV, JSON Lines, RecBole atomic files and Amazon Reviews 2018/2023. Bad input is an error that names \
the file, the row or the key; --skip-bad-rows counts and reports it instead. The same dataset is kept with its \
content embeddings; with --replace another one takes its place, and they have to be made again. The one before is not \
kept: runs of it can be neither resumed nor evaluated any more, unless you copy it first. One that is being embedded, or \
that a job works with, is not replaced.";

/// Arguments of `prepare`.
#[derive(Debug, Args)]
pub struct PrepareArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Count and report rows that cannot be used instead of stopping at the first
    #[arg(long)]
    skip_bad_rows: bool,
    /// Replace the dataset that is there. It is not kept: its content embeddings go with it, and its runs can be neither
    /// resumed nor evaluated any more
    #[arg(long)]
    replace: bool,
    /// Only check the configuration and that the files are there, and say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// # Errors
/// The configuration is wrong, the input cannot be used, writing fails, or somebody asks to stop; nothing half-written stays.
pub fn run(args: &PrepareArgs, output: &Output) -> Result<()> {
    super::refuse_tasks("prepare")?;
    let skip = args.skip_bad_rows.then_some(true);
    let resolver = args.settings.resolver()?.flag("--skip-bad-rows", "prepare.skip_bad_rows", skip)?;
    let config = resolver.finish()?;
    if config.prepare.interactions.files.is_empty() {
        let message = "prepare.interactions.files is empty: name the file of interactions in the configuration, or with \
                       --set 'prepare.interactions.files=[\"clicks.csv\"]'";
        return Err(Failure::Usage(message.into()).into());
    }
    let out = config.data.dataset.clone();
    if args.dry_run {
        let files = check(&config.prepare).map_err(failure)?;
        return output.result(&plan(&files, &out), &config.prepare);
    }
    let name = dataset_name(&out);
    let options = PrepareOptions { replace: args.replace, ..PrepareOptions::default() };
    // a folder that is replaced goes, and what somebody makes in it
    let keep_out: Option<KeepOut> = Some(embed::keep_out);
    let preparation = Preparation { config: &config.prepare, name: &name, out: &out, options, keep_out };
    system::catch_stop_signals();
    let left = format!("{}.tmp-{}", out.display(), std::process::id());
    let killed = format!(
        "prepare was killed; {left} can be removed if it is there, unless it has a folder `old`: that is the dataset that \
         was in {}",
        out.display()
    );
    let work = |progress: &dyn Progress| prepare_with(&preparation, progress);
    let report = dataset_work::run(output.progress(Unit::Count), &killed, work).map_err(failure)?;
    let next = args.settings.command("embed");
    output.result(&format!("{}next: {next}", text(&report, &out)), &report)
}

fn failure(error: PrepareError) -> anyhow::Error {
    match error {
        PrepareError::Stopped => Failure::Stopped(error.to_string()).into(),
        other if other.is_usage() => Failure::Usage(other.to_string()).into(),
        other => other.into(),
    }
}

/// The dataset is called like its directory.
fn dataset_name(out: &Path) -> String {
    let absolute = std::path::absolute(out).unwrap_or_default();
    absolute.file_name().map_or_else(|| "dataset".into(), |name| name.to_string_lossy().into_owned())
}

/// What would be done.
fn plan(files: &[InputFile], out: &Path) -> String {
    let mut text = format!("would prepare {} from:\n", out.display());
    for file in files {
        text += &format!("  {} ({})\n", file.path.display(), render::bytes(file.bytes));
    }
    text
}

fn text(report: &PrepareReport, out: &Path) -> String {
    let counts = &report.manifest.counts;
    let verb = if report.kept { "unchanged" } else { "prepared" };
    let mut text = format!(
        "{}: {verb} in {}: {} users, {} items, {} interactions\n",
        super::shown(out),
        render::duration(report.seconds),
        render::count(counts.users),
        render::count(counts.items.into()),
        render::count(counts.interactions),
    );
    text += &format!(
        "  train {} users, valid {}, test {}; fingerprint {}\n",
        render::count(counts.train_users.into()),
        render::count(counts.valid_users.into()),
        render::count(counts.test_users.into()),
        report.manifest.fingerprint,
    );
    if let Some(labels) = &report.manifest.labels {
        text += &format!(
            "  {} of the interactions converted ({:.1} %)\n",
            render::count(labels.conversions),
            100.0 * labels.conversions as f64 / counts.interactions.max(1) as f64
        );
    }
    for step in &report.steps {
        let (interactions, users, items) = (step.interactions, step.users, step.items);
        text += &format!(
            "  after {}: {} interactions, {} users, {} items\n",
            step.name,
            render::count(interactions),
            render::count(users),
            render::count(items)
        );
    }
    for skipped in &report.skipped {
        text += &format!("  left out {} rows; the first: {}\n", render::count(skipped.count), skipped.first);
    }
    for (without, split) in [(report.valid_without_history, "valid"), (report.test_without_history, "test")] {
        if without > 0 {
            text +=
                &format!("  {} users have no history before {split} and are left out of it\n", render::count(without));
        }
    }
    for warning in &report.warnings {
        text += &format!("  warning: {warning}\n");
    }
    for left in &report.leftovers {
        text += &format!("  a killed run left {}; it can be removed\n", left.display());
    }
    text
}
