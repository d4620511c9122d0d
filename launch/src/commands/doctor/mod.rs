//! `learn-launch doctor`: what this machine has, what is missing and how to mend it.

mod machine;
mod parts;

use anyhow::{Result, bail};
use clap::Args;
use learn_domain::Config;
use learn_domain::config::DeviceKind;
use learn_domain::report::exit;
use serde::Serialize;

use crate::cli::SettingsArgs;
use crate::crew;
use crate::failure::Failure;
use crate::output::Output;
use crate::settings::Given;

pub const HELP: &str = "\
Examples:
  learn-launch doctor
  learn-launch doctor configs/quickstart.toml --json

Exit code 1 if something that the configuration needs is missing; warnings do not count.";

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    settings: SettingsArgs,
}

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Something will be slow or may fail.
    Warning,
    /// Training with this configuration cannot work.
    Missing,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub verdict: Verdict,
    pub found: String,
    /// What to do; nothing if all is well.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warning, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn missing(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Missing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// # Errors
/// The configuration is wrong, or something it needs is missing.
pub fn run(args: &DoctorArgs, output: &Output) -> Result<()> {
    let resolver = args.settings.resolver()?;
    let given = resolver.given();
    let checks = examine(&resolver.finish()?, &given);
    output.result(&render(&checks), &checks)?;
    let missing: Vec<_> =
        checks.iter().filter(|check| check.verdict == Verdict::Missing).map(|check| check.name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    // The report itself is the JSON result; a second document would spoil it.
    let message = format!("missing: {}", missing.join(", "));
    Err(Failure::Reported { code: exit::FAILED, message }.into())
}

/// What a job on this machine would fail for at once; `workers`: they run here, too.
///
/// # Errors
/// Something is missing.
pub(super) fn refuse_lacks(config: &Config, workers: bool) -> Result<()> {
    if workers {
        refuse_crowd(config.cluster.workers, crew::cores())?;
    }
    let mut checks = vec![machine::ports(config)];
    // it takes libtorch a second to say; without this wish there is always the CPU
    if workers && config.cluster.device == DeviceKind::Cuda {
        checks.extend(parts::devices(config));
    }
    match checks.into_iter().find(|check| check.verdict == Verdict::Missing) {
        None => Ok(()),
        Some(Check { name, found, remedy, .. }) => bail!("{name}: {found}; {}", remedy.unwrap_or_default()),
    }
}

/// # Errors
/// So many workers would only bring this machine down.
fn refuse_crowd(workers: u32, cores: usize) -> Result<()> {
    let most = crew::most_processes(cores);
    if workers as usize <= most {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "cluster.workers: {workers} workers are too many for the {cores} cores of this machine, which takes {most} at most; lower \
         it, or start the workers elsewhere: `--no-workers` starts the coordinator alone"
    ))
    .into())
}

fn examine(config: &Config, given: &Given) -> Vec<Check> {
    let mut checks = machine::checks(config);
    checks.extend(parts::checks(config, given));
    checks
}

fn render(checks: &[Check]) -> String {
    let mut out = String::new();
    for Check { name, verdict, found, remedy } in checks {
        let word = match verdict {
            Verdict::Ok => "ok     ",
            Verdict::Warning => "warning",
            Verdict::Missing => "MISSING",
        };
        out += &format!("{word}  {name:<16}  {found}\n");
        if let Some(remedy) = remedy {
            out += &format!("{:>9}{:<16}  -> {remedy}\n", "", "");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_machine_is_flooded_with_workers() {
        for (workers, cores) in [(1, 1), (64, 1), (64, 2), (128, 8)] {
            refuse_crowd(workers, cores).unwrap();
        }
        for (workers, cores) in [(65, 1), (129, 8), (100_000, 64)] {
            let text = refuse_crowd(workers, cores).unwrap_err().to_string();
            assert!(text.starts_with(&format!("cluster.workers: {workers} workers")), "{text}");
            assert!(text.contains(&format!("{cores} cores")) && text.contains("`--no-workers`"), "{text}");
        }
    }

    #[test]
    fn each_trouble_shows_its_remedy_below() {
        let text = render(&[
            Check::ok("cores", "8"),
            Check::warning("open files", "256", "ulimit -n 4096"),
            Check::missing("libtorch", "not found", "cargo xtask setup"),
        ]);
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        assert!(lines[0].starts_with("ok") && lines[0].ends_with("8"));
        assert!(lines[1].starts_with("warning  open files") && lines[2] == "-> ulimit -n 4096");
        assert!(lines[3].starts_with("MISSING  libtorch") && lines[4] == "-> cargo xtask setup");
    }
}
