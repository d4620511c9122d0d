//! `learn-launch report`: one page about runs, side by side.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use learn_domain::run_dir::RunDir;
use serde_json::json;

use crate::output::Output;
use crate::report::{RunFacts, html};
use crate::runs;

pub const HELP: &str = "\
Examples:
  learn-launch report quickstart        (writes runs/quickstart/report.html)
  learn-launch report runs/base runs/wide --out compare.html

The page needs no network and no other file: open it, send it, print it. It has the runs' states, test metrics with \
intervals, curves, what differs in their settings, events and environment. Runs may be running, stopped, failed or \
damaged: they are shown as far as they can be read.";

/// Arguments of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Directories of runs, or their names in --runs-dir
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The page [default: report.html in the run's directory, or here if there are several runs]
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Directory of all runs
    #[arg(long, value_name = "DIR", default_value = "runs", env = "LEARN__JOB__RUNS_DIR")]
    runs_dir: PathBuf,
}

/// # Errors
/// A run is not there, or the page cannot be written.
pub fn run(args: &ReportArgs, output: &Output) -> Result<()> {
    let found = args.runs.iter().map(|run| runs::find(run, &args.runs_dir)).collect::<Result<Vec<_>>>()?;
    let names = names(&found);
    let load = |(run, name): (&RunDir, String)| RunFacts::load(run, name, super::shown_run(run));
    let facts: Vec<RunFacts> = found.iter().zip(names).map(load).collect();
    let out = match (&args.out, found.as_slice()) {
        (Some(out), _) => out.clone(),
        (None, [one]) => one.root().join("report.html"),
        (None, _) => PathBuf::from("report.html"),
    };
    let mut aside = out.clone().into_os_string();
    aside.push(".tmp");
    std::fs::write(&aside, html(&facts))
        .and_then(|()| std::fs::rename(&aside, &out))
        .with_context(|| format!("cannot write {}; name another file with --out", out.display()))?;
    let mut text = format!("{}\n", super::shown(&out));
    for run in &facts {
        text += &format!("  {}: {}\n", run.name, run.state);
        for problem in &run.problems {
            text += &format!("    {problem}\n");
        }
    }
    let runs: Vec<_> = facts
        .iter()
        .map(|run| json!({ "name": run.name, "dir": run.dir, "state": run.state, "problems": run.problems }))
        .collect();
    output.result(&text, &json!({ "report": out, "runs": runs }))
}

/// The names of their directories; with as much of the path before as tells two apart.
fn names(runs: &[RunDir]) -> Vec<String> {
    let parts = |run: &RunDir, depth: usize| {
        let all: Vec<_> = run.root().components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        all[all.len().saturating_sub(depth)..].join("/")
    };
    let most = runs.iter().map(|run| run.root().components().count()).max().unwrap_or(1);
    let mut names: Vec<String> = runs.iter().map(|run| parts(run, 1)).collect();
    for depth in 2..=most {
        let mut seen: BTreeMap<&String, usize> = BTreeMap::new();
        names.iter().for_each(|name| *seen.entry(name).or_default() += 1);
        let twice: Vec<bool> = names.iter().map(|name| seen[name] > 1).collect();
        for (at, _) in twice.iter().enumerate().filter(|(_, twice)| **twice) {
            names[at] = parts(&runs[at], depth);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_the_same_name_are_told_apart() {
        let named = |paths: &[&str]| names(&paths.iter().map(RunDir::new).collect::<Vec<_>>());
        assert_eq!(named(&["/a/x", "/b/y"]), ["x", "y"]);
        assert_eq!(named(&["/a/x", "/b/x", "/b/y"]), ["a/x", "b/x", "y"]);
        assert_eq!(named(&["/1/a/x", "/2/a/x"]), ["1/a/x", "2/a/x"]);
        assert_eq!(named(&["/a/x", "/a/x"]).len(), 2, "the same run twice");
    }
}
