//! Works through the runs of a study, some at a time, each as `learn-launch` in a process of its own.
//!
//! Input: what is left to do. Output: the runs that failed, with their reason. Invariants: a request to stop is passed on
//! to every running job, which then writes a checkpoint; no child outlives this process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::children::{POLL, Stops, launch, reason};
use super::datasets::Unmade;
use super::runs::{Left, StudyRun};
use crate::failure;
use crate::output::{Output, Progress, Unit};
use crate::process::Process;
use crate::{render, runs};

/// Pause between two looks at their status.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);

/// Why runs have no result, by name.
pub type Failures = BTreeMap<String, String>;

/// How runs are worked through.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// Most runs at a time.
    pub slots: usize,
    /// Gets what each command says.
    pub logs: &'a Path,
    /// Runs on these have failed before they start.
    pub unmade: &'a [Unmade],
}

/// Trains what is left.
///
/// # Errors
/// The study was stopped, or a process could not be started.
pub fn work(planned: &mut [StudyRun], terms: Terms<'_>, stops: Stops, output: &Output) -> Result<Failures> {
    let Terms { slots, logs, unmade } = terms;
    let todo = (0..planned.len()).filter(|&run| planned[run].left != Left::Nothing);
    let hindered = |run: usize| unmade.iter().find(|dataset| dataset.hinders(&planned[run]));
    let reason = |run: usize| Some((planned[run].name().to_owned(), hindered(run)?.reason.clone()));
    let waiting: Vec<usize> = todo.clone().filter(|&run| hindered(run).is_none()).rev().collect();
    let mut queue = Queue {
        done: planned.len() - waiting.len(),
        waiting,
        running: Vec::new(),
        failures: todo.filter_map(reason).collect(),
        stops,
        progress: output.progress(Unit::Count),
    };
    queue.progress.stage("study", Some(planned.len() as u64));
    let mut asked: Option<Instant> = None;
    loop {
        queue.pass_on_stops();
        while !queue.stops.asked() && queue.running.len() < slots.max(1) {
            let Some(run) = queue.waiting.pop() else { break };
            queue.start(run, &planned[run], logs)?;
        }
        if queue.running.is_empty() {
            break;
        }
        queue.reap(planned);
        if asked.is_none_or(|at| at.elapsed() >= STATUS_INTERVAL) {
            queue.show(planned);
            asked = Some(Instant::now());
        }
        std::thread::sleep(POLL);
    }
    queue.progress.finish();
    queue.stops.check()?;
    Ok(queue.failures)
}

struct Queue {
    /// The next one last.
    waiting: Vec<usize>,
    running: Vec<(usize, Process)>,
    failures: Failures,
    stops: Stops,
    progress: Progress,
    done: usize,
}

impl Queue {
    fn pass_on_stops(&mut self) {
        if self.stops.pass_on(self.running.iter_mut().map(|(_, child)| child)) {
            self.progress.line("stopping the jobs of the study; once more to kill");
        }
    }

    fn start(&mut self, number: usize, run: &StudyRun, logs: &Path) -> Result<()> {
        let command = &mut match run.left {
            Left::Resume => launch(&["resume"])?,
            _ => launch(&["train"])?,
        };
        match run.left {
            Left::Resume => command.arg(run.dir.root()),
            Left::Train => command.arg(&run.file),
            _ => command.arg(&run.file).arg("--force"),
        };
        let log = logs.join(format!("{}.log", run.name()));
        self.progress.line(&format!(
            "{}: {}",
            run.name(),
            if run.left == Left::Resume { "resumed" } else { "started" }
        ));
        self.running.push((number, Process::start(run.name(), command, &log)?));
        Ok(())
    }

    fn reap(&mut self, planned: &mut [StudyRun]) {
        let mut ended = self.running.extract_if(.., |(_, child)| child.ended().is_some()).collect::<Vec<_>>();
        for (number, child) in &mut ended {
            let run = &mut planned[*number];
            self.done += 1;
            let looked = run.look();
            let reason = reason(child).or_else(|| looked.err().map(|error| failure::message(&error)));
            let reason = reason.or_else(|| (run.left != Left::Nothing).then(|| "it wrote no summary".into()));
            match reason {
                None => self.progress.line(&format!("{}: finished", run.name())),
                // it ended because the study does
                Some(reason) if self.stops.asked() => {
                    self.progress.line(&format!("{}: {reason}", run.name()));
                }
                Some(reason) => {
                    let log = child.log.display();
                    self.progress.line(&format!("{}: failed: {reason} (log: {log})", run.name()));
                    self.failures.insert(run.name().to_owned(), reason);
                }
            }
        }
    }

    fn show(&mut self, planned: &[StudyRun]) {
        let doing = self.running.iter().map(|(number, _)| {
            let run = &planned[*number];
            let status = runs::last_status(&run.dir).ok().flatten();
            let done = status.as_ref().and_then(|status| status.last_step.as_ref()).map_or(0, |step| step.step.0);
            let all = status.map_or(0, |status| status.total_steps);
            format!("{} {}/{}", run.name(), render::count(done), render::count(all))
        });
        let doing: Vec<String> = doing.collect();
        self.progress.at(self.done as u64, planned.len() as u64, doing.join(", "));
    }
}

/// The folder for what the commands of a study say.
///
/// # Errors
/// It cannot be made.
pub fn logs(root: &Path) -> Result<PathBuf> {
    let logs = root.join("logs");
    std::fs::create_dir_all(&logs).map_err(|error| anyhow!("cannot make {}: {error}", logs.display()))?;
    Ok(logs)
}
