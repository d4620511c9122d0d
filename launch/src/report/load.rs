//! Everything that a run directory says, as far as it can be read.

use std::collections::BTreeMap;
use std::fs;

use learn_domain::Config;
use learn_domain::event::JobEvent;
use learn_domain::report::{Evaluation, JobStatus, StepRecord, Summary, Timed};
use learn_domain::run_dir::RunDir;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::commands::status::{self, Current};
use crate::lines::Follower;
use crate::render::Freshness;
use crate::slurm::queue::Inquiry;

/// One run, as its page shows it.
#[derive(Clone, Debug, Default)]
pub struct RunFacts {
    /// Among the runs of the page.
    pub name: String,
    /// Its directory, as it is shown.
    pub dir: String,
    /// `finished`, `running`, …, `unknown`.
    pub state: String,
    /// Why it was stopped or failed.
    pub cause: Option<String>,
    /// What could not be read, for people.
    pub problems: Vec<String>,
    /// By dotted key.
    pub config: BTreeMap<String, Value>,
    pub steps: Vec<Timed<StepRecord>>,
    pub evaluations: Vec<Timed<Evaluation>>,
    pub events: Vec<JobEvent>,
    pub status: Option<JobStatus>,
    pub summary: Option<Summary>,
}

impl RunFacts {
    /// Reads a run; what is missing or damaged becomes one of its problems.
    #[must_use]
    pub fn load(run: &RunDir, name: String, dir: String) -> Self {
        let mut facts = Self { name, dir, state: "unknown".into(), ..Self::default() };
        match status::current(run, &mut Inquiry::default()) {
            Ok(Some(Current { status, freshness, .. })) => {
                facts.state = match freshness {
                    Freshness::Stale => format!("{}, its coordinator is gone", status.state.name()),
                    Freshness::Live | Freshness::Ended | Freshness::Queued | Freshness::Unknown => {
                        status.state.name().into()
                    }
                };
                facts.cause.clone_from(&status.cause);
                facts.status = Some(status);
            }
            Ok(None) => facts.problems.push("status.json is not there: its coordinator has not come that far".into()),
            Err(error) => facts.problems.push(format!("{error:#}")),
        }
        match read::<Value>(&run.config()) {
            Ok(config) => facts.config = flat(&config),
            Err(problem) => facts.problems.push(problem),
        }
        if run.summary().exists() {
            match read(&run.summary()) {
                Ok(summary) => facts.summary = Some(summary),
                Err(problem) => facts.problems.push(problem),
            }
        } else if facts.state == "finished" {
            facts.problems.push("summary.json is not there though the job has finished".into());
        }
        facts.steps = facts.lines(run.metrics());
        // a run that was put together by hand may have lines twice or out of order
        facts.steps.sort_by_key(|step| step.value.step);
        facts.steps.dedup_by_key(|step| step.value.step);
        facts.evaluations = facts.lines(run.evaluations());
        facts.events = facts.lines(run.events());
        facts
    }

    fn lines<T: DeserializeOwned>(&mut self, path: std::path::PathBuf) -> Vec<T> {
        let shown = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut follower = Follower::new(path);
        match follower.read() {
            Ok(fresh) => {
                if follower.damaged > 0 {
                    self.problems.push(format!("{shown}: {} damaged lines are left out", follower.damaged));
                }
                fresh.values
            }
            Err(error) => {
                self.problems.push(format!("{shown} cannot be read: {error}"));
                Vec::new()
            }
        }
    }

    /// Steps that the job has by its configuration; the last one that is there if nobody knows.
    #[must_use]
    pub fn total_steps(&self) -> u64 {
        let last = self.steps.last().map_or(0, |step| step.value.step.0);
        self.status.as_ref().map_or(last, |status| status.total_steps.max(last))
    }
}

fn read<T: DeserializeOwned>(path: &std::path::Path) -> Result<T, String> {
    let shown = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bytes = fs::read(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    serde_json::from_slice(&bytes).map_err(|error| format!("{shown} is damaged: {error}"))
}

/// The leaves of a JSON object by their dotted keys; a list is a leaf.
pub fn flat(value: &Value) -> BTreeMap<String, Value> {
    fn walk(value: &Value, path: &str, leaves: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(members) if !members.is_empty() => {
                for (name, member) in members {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    walk(member, &path, leaves);
                }
            }
            leaf => {
                leaves.insert(path.to_owned(), leaf.clone());
            }
        }
    }
    let mut leaves = BTreeMap::new();
    walk(value, "", &mut leaves);
    leaves
}

/// The defaults, as [`RunFacts::config`] has them.
pub fn defaults() -> BTreeMap<String, Value> {
    serde_json::to_value(Config::default()).map(|value| flat(&value)).unwrap_or_default()
}
