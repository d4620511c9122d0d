//! How often Slurm has started a job, with what success, and when that is enough.
//!
//! Each start is a line of `slurm/starts.jsonl` in the run directory. [`verdict`] is the rule, pure.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use learn_domain::Step;
use learn_domain::run_dir::RunDir;
use serde::{Deserialize, Serialize};

/// One start of the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Number of the Slurm job; another one after `--resubmit`.
    pub job: u32,
    /// `SLURM_RESTART_COUNT`.
    pub restart: u32,
    /// The checkpoint that it goes on from.
    pub checkpoint: Option<Step>,
    /// Seconds since the Unix epoch, for people.
    pub time: u64,
}

/// How often a job may be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Starts of one Slurm job after its first.
    pub restarts: u32,
    /// Starts in a row that brought no new checkpoint.
    pub fruitless: u32,
}

impl Budget {
    /// No job that gets on reaches it: at four hours a start these are years. Starts that bring nothing are `fruitless`.
    pub const RESTARTS: u32 = 10_000;
    pub const FRUITLESS: u32 = 3;
}

/// A job has been started too often.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Verdict {
    #[error("Slurm has started this job {0} times after the first (--max-restarts)")]
    Restarts(u32),
    #[error("{starts} starts in a row have brought no new checkpoint, {} (--max-fruitless)", since(.checkpoint))]
    Fruitless { starts: u32, checkpoint: Option<Step> },
}

fn since(checkpoint: &Option<Step>) -> String {
    checkpoint.map_or("there is none yet".into(), |step| format!("the last one is that of step {step}"))
}

/// Whether `now` may go on after the starts before it. Only those of the same Slurm job count: a new submission is an
/// operator's decision.
///
/// # Errors
/// It may not.
pub fn verdict(before: &[Start], now: &Start, budget: Budget) -> Result<(), Verdict> {
    let same_job = before.iter().rev().take_while(|start| start.job == now.job);
    let fruitless = same_job.take_while(|start| start.checkpoint == now.checkpoint).count();
    if fruitless >= budget.fruitless as usize {
        let starts = u32::try_from(fruitless).unwrap_or(u32::MAX);
        return Err(Verdict::Fruitless { starts, checkpoint: now.checkpoint });
    }
    if now.restart > budget.restarts { Err(Verdict::Restarts(budget.restarts)) } else { Ok(()) }
}

fn file(run: &RunDir) -> PathBuf {
    run.slurm().join("starts.jsonl")
}

/// The starts of a run, oldest first; a line that a killed process has cut short is left out.
///
/// # Errors
/// The file is there and cannot be read.
pub fn read(run: &RunDir) -> Result<Vec<Start>> {
    let path = file(run);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Adds a start.
///
/// # Errors
/// It cannot be written.
pub fn add(run: &RunDir, start: &Start) -> Result<()> {
    let path = file(run);
    // a line of its own, whatever a killed process has left
    let line = format!("\n{}\n", serde_json::to_string(start)?);
    std::fs::create_dir_all(run.slurm())
        .and_then(|()| OpenOptions::new().create(true).append(true).open(&path))
        .and_then(|mut file| file.write_all(line.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget { restarts: 5, fruitless: 3 };

    fn start(job: u32, restart: u32, checkpoint: u64) -> Start {
        Start { job, restart, checkpoint: (checkpoint > 0).then_some(Step(checkpoint)), time: 0 }
    }

    #[test]
    fn a_job_that_gets_on_is_started_until_its_budget_is_used_up() {
        let starts: Vec<Start> = (0..=6).map(|restart| start(1, restart, 10 * u64::from(restart))).collect();
        for now in 0..=5 {
            verdict(&starts[..now], &starts[now], BUDGET).unwrap();
        }
        let said = verdict(&starts[..6], &starts[6], BUDGET).unwrap_err();
        assert_eq!(said, Verdict::Restarts(5));
    }

    #[test]
    fn a_month_of_short_time_limits_is_within_the_default_budget() {
        let budget = Budget { restarts: Budget::RESTARTS, fruitless: Budget::FRUITLESS };
        // 31 days of one hour each start
        let starts: Vec<Start> = (0..=24 * 31).map(|restart| start(1, restart, 1 + u64::from(restart))).collect();
        for now in 0..starts.len() {
            verdict(&starts[..now], &starts[now], budget).unwrap();
        }
        // and a loop is caught at once all the same
        let (last, before) = (starts[starts.len() - 1].clone(), starts.len());
        let stuck: Vec<Start> = starts.into_iter().chain([last.clone(), last.clone()]).collect();
        let said = verdict(&stuck, &last, budget).unwrap_err();
        assert!(matches!(said, Verdict::Fruitless { starts: 3, .. }), "after {before} starts: {said}");
    }

    #[test]
    fn starts_without_a_new_checkpoint_end_it() {
        let starts = [start(1, 0, 0), start(1, 1, 10), start(1, 2, 10), start(1, 3, 10), start(1, 4, 10)];
        for now in 0..4 {
            verdict(&starts[..now], &starts[now], BUDGET).unwrap();
        }
        let said = verdict(&starts[..4], &starts[4], BUDGET).unwrap_err();
        assert_eq!(said, Verdict::Fruitless { starts: 3, checkpoint: Some(Step(10)) });
        assert!(said.to_string().contains("step 10"), "{said}");
        verdict(&starts[..4], &start(1, 4, 20), BUDGET).unwrap();
        let none = [start(1, 0, 0), start(1, 1, 0), start(1, 2, 0)];
        assert!(verdict(&none, &start(1, 3, 0), BUDGET).unwrap_err().to_string().contains("there is none yet"));
    }

    #[test]
    fn an_operator_who_submits_again_starts_from_nothing() {
        let starts = [start(1, 0, 10), start(1, 1, 10), start(1, 2, 10)];
        verdict(&starts, &start(2, 0, 10), BUDGET).unwrap();
    }

    #[test]
    fn starts_are_kept_even_behind_a_line_that_was_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        assert_eq!(read(&run).unwrap(), []);
        add(&run, &start(1, 0, 0)).unwrap();
        std::fs::OpenOptions::new().append(true).open(file(&run)).unwrap().write_all(b"{\"job\":").unwrap();
        add(&run, &start(1, 1, 10)).unwrap();
        assert_eq!(read(&run).unwrap(), [start(1, 0, 0), start(1, 1, 10)]);
    }
}
