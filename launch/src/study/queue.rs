//! Works through the runs of a study, some at a time, each as `learn-launch` in a process of its own.
//!
//! Input: what is left to do. Output: the runs that failed, with their reason. Invariants: a request to stop is passed on
//! to every running job, which then writes a checkpoint; no child outlives this process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use learn_domain::report::exit;

use super::runs::{Left, Missing, StudyRun};
use crate::failure::{self, Failure};
use crate::output::{Output, Progress, Unit};
use crate::process::{self, Process};
use crate::settings::ENVIRONMENT_PREFIX;
use crate::system::{self, End};
use crate::{render, runs};

/// Pause between two looks at the children.
const POLL: Duration = Duration::from_millis(50);
/// Pause between two looks at their status.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);
/// Lines of a log in which the reason of a failure is looked for.
const TAIL: usize = 40;

/// Why runs have no result, by name.
pub type Failures = BTreeMap<String, String>;

/// Makes the datasets that are not there.
///
/// # Errors
/// A dataset cannot be made: the runs on it could not even start.
pub fn make_datasets(missing: &[Missing], logs: &Path, output: &Output) -> Result<()> {
    for one in missing {
        let steps: &[&str] = if one.prepare { &["prepare", "embed"] } else { &["embed"] };
        for step in steps {
            output.note(&format!("{step} {}", one.dataset.display()));
            let mut command = launch(&[step])?;
            command.arg(&one.file);
            let log = logs.join(format!("{step}.log"));
            let mut child = Process::start(format!("learn-launch {step}"), &mut command, &log)?;
            let stops = system::stop_requests();
            while child.ended().is_none() {
                if system::stop_requests() > stops {
                    child.ask_to_end(End::Gracefully);
                }
                std::thread::sleep(POLL);
            }
            if let Some(reason) = reason(&mut child) {
                let message = format!("`learn-launch {step} {}` failed: {reason}", one.file.display());
                return Err(Failure::Child { code: exit::FAILED, message }.into());
            }
        }
    }
    Ok(())
}

/// Trains what is left, at most `slots` runs at a time; `logs` gets what each command says.
///
/// # Errors
/// The study was stopped, or a process could not be started.
pub fn work(planned: &mut [StudyRun], slots: usize, logs: &Path, output: &Output) -> Result<Failures> {
    system::catch_stop_signals();
    let todo = (0..planned.len()).filter(|&run| planned[run].left != Left::Nothing);
    let mut queue = Queue {
        waiting: todo.rev().collect(),
        running: Vec::new(),
        failures: Failures::new(),
        stops: system::stop_requests(),
        first_stop: system::stop_requests(),
        progress: output.progress(Unit::Count),
        done: planned.iter().filter(|run| run.left == Left::Nothing).count(),
    };
    queue.progress.stage("study", Some(planned.len() as u64));
    let mut asked: Option<Instant> = None;
    loop {
        queue.pass_on_stops();
        while !queue.stopped() && queue.running.len() < slots.max(1) {
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
    if queue.stopped() {
        return Err(Failure::Stopped("the study was stopped; start it again to go on where it was".into()).into());
    }
    Ok(queue.failures)
}

struct Queue {
    /// The next one last.
    waiting: Vec<usize>,
    running: Vec<(usize, Process)>,
    failures: Failures,
    stops: usize,
    first_stop: usize,
    progress: Progress,
    done: usize,
}

impl Queue {
    fn stopped(&self) -> bool {
        self.stops > self.first_stop
    }

    fn pass_on_stops(&mut self) {
        let requests = system::stop_requests();
        if requests == self.stops {
            return;
        }
        let how = if self.stopped() { End::AtOnce } else { End::Gracefully };
        self.stops = requests;
        self.progress.line("stopping the jobs of the study; once more to kill");
        for (_, child) in &mut self.running {
            child.ask_to_end(how);
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
                Some(reason) if self.stops > self.first_stop => {
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

/// This program, without the settings of the environment: a run's file holds all of them, already resolved.
fn launch(arguments: &[&str]) -> Result<Command> {
    let own: PathBuf = std::env::current_exe().context("cannot find learn-launch itself")?;
    let mut command = Command::new(own);
    command.args(arguments);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with(ENVIRONMENT_PREFIX)) {
            command.env_remove(name);
        }
    }
    Ok(command)
}

/// Why an ended child failed, in its own words if it has said some.
fn reason(child: &mut Process) -> Option<String> {
    let status = child.ended()?;
    if status.success() {
        return None;
    }
    let lines = process::tail(&child.log, TAIL);
    let said = lines.iter().rev().find_map(|line| line.strip_prefix("learn-launch: "));
    Some(said.map_or_else(|| process::describe(status), str::to_owned))
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
