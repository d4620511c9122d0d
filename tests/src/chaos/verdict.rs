//! What must be true when a disturbed job has ended.
//!
//! Input: its run, and how to run an undisturbed one. Output: how far the parameters are apart. Invariant: whatever is
//! wrong is said, not only the first thing.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::job::processes_of;
use crate::{Site, binary, f32_values, succeeds};

/// Losses and parameters may differ so much, f32 against f32 in another order of sums.
const TOLERANCE: f64 = 1e-5;
/// The undisturbed run.
const CALM: &str = "calm";

/// Checks a run of `steps` steps; gives the largest difference of a parameter. `was_full`: the best checkpoint may not
/// have been written, and another one been tested then.
///
/// # Errors
/// All that is not as it must be.
pub fn check(site: &Site, name: &str, steps: u64, was_full: bool, calm: &[String]) -> Result<f64> {
    let mut wrong: Vec<String> = Vec::new();
    let mut must = |holds: bool, what: String| {
        if !holds {
            wrong.push(what);
        }
    };
    let left = processes_of(&site.path(""));
    must(left.is_empty(), format!("processes are left: {left:?}"));
    let status = site.status(name);
    must(status["state"] == "finished", format!("the job is {}", status["state"]));
    must(status["ledger"]["exact"] == true, format!("the ledger is not exact: {}", status["ledger"]));
    must(status["last_step"]["step"] == steps, format!("it ended at step {}", status["last_step"]["step"]));
    let numbers: Vec<u64> = site.steps(name).iter().map(|record| record["step"].as_u64().unwrap_or(0)).collect();
    must(numbers == (1..=steps).collect::<Vec<_>>(), first_wrong_step(&numbers));
    for problem in checkpoints(&site.run_dir(name), steps)? {
        must(false, problem);
    }

    succeeds(&site.launch(&calm.iter().map(String::as_str).collect::<Vec<_>>()));
    for (step, (calm, disturbed)) in (1..).zip(site.losses(CALM).iter().zip(site.losses(name))) {
        let close = (calm - disturbed).abs() < TOLERANCE;
        must(close, format!("step {step}: loss {disturbed} instead of {calm}"));
        if !close {
            break;
        }
    }
    let places = |run: &str| -> Vec<(Value, Value)> {
        let status = site.status(run);
        let all = status["evaluations"].as_array().into_iter().flatten();
        let tested = |one: &Value| was_full && one["split"] == "test";
        all.map(|one| (one["split"].clone(), if tested(one) { Value::Null } else { one["step"].clone() })).collect()
    };
    let (expected, evaluated) = (places(CALM), places(name));
    must(evaluated == expected, format!("evaluations {evaluated:?} instead of {expected:?}"));
    let parameters = |run: &str| f32_values(&site.checkpoint_file(run, steps, "model.safetensors"));
    let (expected, found) = (parameters(CALM), parameters(name));
    must(expected.len() == found.len(), "another number of parameters".into());
    let differences = expected.iter().zip(&found).map(|(a, b)| f64::from((a - b).abs()));
    // a difference that is no number is not small
    let largest = differences.fold(0.0, |largest: f64, one| if one <= largest { largest } else { one });
    must(largest < TOLERANCE, format!("parameters differ by {largest}"));
    if wrong.is_empty() { Ok(largest) } else { bail!(wrong.join("\n")) }
}

fn first_wrong_step(numbers: &[u64]) -> String {
    let wrong = (1..).zip(numbers).find(|(expected, number)| expected != *number);
    match wrong {
        Some((expected, number)) => format!("metrics.jsonl has step {number} where {expected} should be"),
        None => format!("metrics.jsonl has {} steps", numbers.len()),
    }
}

/// What is wrong with the files of a run's checkpoints.
fn checkpoints(run: &Path, steps: u64) -> Result<Vec<String>> {
    let output = Command::new(binary("learn-worker")).args(["checkpoints", "--json", "--run"]).arg(run).output();
    let output = output.context("cannot start learn-worker")?;
    let listed: Vec<Value> = serde_json::from_slice(&output.stdout).context("the checkpoints are no JSON")?;
    let mut wrong: Vec<String> =
        listed.iter().filter(|one| !one["reason"].is_null()).map(|one| format!("not whole: {one}")).collect();
    let last = format!("step-{steps:010}");
    if !listed.iter().any(|one| one["path"].as_str().is_some_and(|path| path.ends_with(&last))) {
        wrong.push(format!("there is no checkpoint {last}: {listed:?}"));
    }
    Ok(wrong)
}
