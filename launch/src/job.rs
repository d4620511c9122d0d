//! One job: a coordinator on this machine and its workers, started, watched and reaped.
//!
//! Input: a run directory with its configuration and secret, and a task. Output: the job's last status, or a failure
//! that names the cause, the guilty process with the end of its log, and what to do. Invariants: nothing is started before
//! every byte of the dataset was compared with its checksum; a request to stop goes to the coordinator alone, which ends the
//! job gracefully; a second one kills; a worker that is lost is replaced as long as the job goes on ([`crate::crew`]), and so is
//! a coordinator that was killed; no process outlives [`run`].

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use learn_dataset::{Dataset, DatasetError};
use learn_domain::Config;
use learn_domain::report::{CoordinatorAddress, Evaluation, JobState, JobStatus, Task, exit};
use learn_domain::run_dir::RunDir;

use crate::api::Api;
use crate::crew::{self, Crew, Guilt, Team, View};
use crate::data_servers::DataServers;
use crate::failure::Failure;
use crate::operator;
use crate::output::{Output, Progress, Unit};
use crate::process::{self, Process, ProcessError};
use crate::runs::Claim;
use crate::slurm::JobStep;
use crate::system::{self, End};
use crate::{dataset_work, render, runs};

/// Pause between two looks at the processes.
const POLL: Duration = Duration::from_millis(50);
/// Pause between two looks at the status.
const STATUS_INTERVAL: Duration = Duration::from_millis(500);
/// Pause before a coordinator that could not be started in the place of one that was killed is started again.
const NEXT_START: Duration = Duration::from_secs(1);
/// A coordinator that is silent for this long at its start is said to be waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Workers may take this long to leave by themselves after their coordinator has ended. If it cannot have told them, that is
/// all: what they would still save has no ledger.
const LEAVE_BY_THEMSELVES: Duration = Duration::from_secs(3);
/// So long they may take when they were asked to.
const LEAVE: Duration = Duration::from_secs(30);
/// Beyond the timeouts, the coordinator may take this long to end a job that has lost a worker.
const NOTICE: Duration = Duration::from_secs(20);

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct JobSpec<'a> {
    pub run: &'a RunDir,
    /// Holds `config`; becomes the run's own once the coordinator has accepted it.
    pub config_file: &'a Path,
    pub config: &'a Config,
    pub task: &'a Task,
    pub workers: Workers<'a>,
    /// Times that a scheduler has started this job again.
    pub restarts: u32,
}

/// Who starts the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers<'a> {
    /// This process, on this machine.
    Here,
    /// Something else, wherever it likes: they come by `learn-worker join`.
    Elsewhere,
    /// A step of a Slurm job.
    Slurm(&'a JobStep),
}

impl Workers<'_> {
    /// As a flag `--no-workers` says.
    #[must_use]
    pub fn unless(elsewhere: bool) -> Self {
        if elsewhere { Self::Elsewhere } else { Self::Here }
    }

    /// Most that whoever starts them can start; none where that is not for this process to say.
    fn most(self) -> Option<usize> {
        (self == Self::Here).then(|| crew::most_processes(crew::cores()))
    }
}

impl<'a> JobSpec<'a> {
    /// A job whose workers run on this machine.
    #[must_use]
    pub fn local(run: &'a RunDir, config_file: &'a Path, config: &'a Config, task: &'a Task) -> Self {
        Self { run, config_file, config, task, workers: Workers::Here, restarts: 0 }
    }

    /// None if something else starts the workers.
    fn start_team(&self, address: &CoordinatorAddress) -> Result<Option<Box<dyn Team + 'a>>> {
        Ok(match self.workers {
            Workers::Here => Some(Box::new(Crew::start(self.run, self.config, self.task, address)?)),
            Workers::Slurm(step) => Some(Box::new(step.start(self.run, address)?)),
            Workers::Elsewhere => None,
        })
    }

    /// Compares every byte of the dataset with its checksum, so that no process of the job has to.
    ///
    /// # Errors
    /// A file is damaged, or somebody asks to stop.
    fn verify_dataset(&self, output: &Output) -> Result<()> {
        let (shown, way_back) = (self.run.root().display(), self.way_back(None));
        let killed = format!("{shown}: killed before it began; {way_back}");
        let open = || Dataset::open(&self.config.data.dataset);
        let verify = |progress: &dyn learn_dataset::Progress| open().and_then(|dataset| dataset.verify(progress));
        let verified = dataset_work::run(output.progress(Unit::Bytes).patient(), &killed, verify);
        verified.map_err(|error| match error {
            DatasetError::Stopped => Failure::Stopped(format!("{shown}: stopped before it began; {way_back}")).into(),
            error => {
                let message = format!("{error}\n{}", self.way_on(None));
                Failure::Child { code: exit::FAILED, message }.into()
            }
        })
    }

    /// From a stop that was asked for.
    fn way_back(&self, status: Option<&JobStatus>) -> String {
        match self.task {
            Task::Evaluate { .. } => "the same command evaluates from the start".into(),
            Task::Train { .. } => self.way_on(status),
        }
    }

    fn way_on(&self, status: Option<&JobStatus>) -> String {
        let shown = self.run.root().display();
        match (self.task, status.and_then(|status| status.last_checkpoint)) {
            (Task::Evaluate { .. }, _) => "run the evaluation again once the cause is mended".into(),
            (Task::Train { .. }, Some(step)) => format!("`learn-launch resume {shown}` continues from step {step}"),
            (Task::Train { resume_from: Some(_) }, None) => format!("`learn-launch resume {shown}` continues it"),
            (Task::Train { resume_from: None }, None) => {
                "there is no checkpoint yet; the same command with `--force` starts again".into()
            }
        }
    }
}

/// Runs a job to its end. `claim` is that of whoever has made its run ready: nobody else takes the run for free, or moves it,
/// until its coordinator is started.
///
/// Call it from the main thread: children are tied to the thread that starts them.
///
/// # Errors
/// The job failed, was stopped or lost a worker; the failure has the exit code that says which.
pub fn run(spec: &JobSpec<'_>, claim: Claim, output: &Output) -> Result<JobStatus> {
    system::catch_stop_signals();
    forget_address(spec.run)?;
    spec.verify_dataset(output)?;
    let mut job = LocalJob::start(spec, claim, output)?;
    if let Some(address) = job.wait_for_coordinator() {
        if matches!(spec.task, Task::Train { .. }) {
            output.note(&format!("status page: {}", runs::page(spec.run, &address, output.terminal())));
        }
        let api = Api::new(spec.run, &address);
        job.address = Some(address.clone());
        job.data_servers = Some(DataServers::start(spec.run, spec.config, &address)?);
        job.wait_for_data_servers(&api);
        // one that is asked to stop already needs nobody
        if job.stops == 0 {
            job.crew = spec.start_team(&address)?;
        }
        if job.crew.is_none() && job.stops == 0 {
            job.progress.line(&format!(
                "waiting for {}: learn-worker join --coordinator {} --secret-file {}",
                render::workers(spec.config.cluster.workers as usize),
                address.grpc,
                spec.run.secret().display(),
            ));
        }
        job.watch(&api);
    }
    job.conclude()
}

/// A crashed coordinator leaves its address behind, which must not be taken for that of who has claimed the run since.
///
/// # Errors
/// It cannot be removed.
pub fn forget_address(run: &RunDir) -> Result<()> {
    let address = run.coordinator();
    if address.exists() {
        std::fs::remove_file(&address).with_context(|| format!("cannot remove {}", address.display()))?;
    }
    Ok(())
}

/// The worker that failed before all had joined.
struct NeverJoined {
    number: u32,
    reason: String,
}

struct LocalJob<'a> {
    spec: JobSpec<'a>,
    output: &'a Output,
    progress: Progress,
    coordinator: Process,
    /// Coordinators that took the place of one that was killed.
    take_overs: u32,
    /// None until the coordinator serves, or if the workers are started elsewhere.
    crew: Option<Box<dyn Team + 'a>>,
    /// None until the coordinator serves.
    data_servers: Option<DataServers<'a>>,
    /// Requests to stop that were passed on.
    stops: usize,
    /// This side has killed the job.
    killed: bool,
    /// None until the coordinator serves.
    address: Option<CoordinatorAddress>,
    lost: Option<NeverJoined>,
    /// When the last worker was found to have ended before the coordinator.
    deserted: Option<Instant>,
    /// The job when it was last looked at.
    view: View,
    /// The last evaluations that were shown.
    evaluations: Vec<Evaluation>,
}

impl<'a> LocalJob<'a> {
    fn start(spec: &JobSpec<'a>, claim: Claim, output: &'a Output) -> Result<Self> {
        let run = spec.run;
        let mut command = Command::new(process::sibling("learn-coordinator")?);
        command.arg("--run-dir").arg(run.root()).arg("--task-json").arg(serde_json::to_string(spec.task)?);
        command.arg("--config").arg(spec.config_file);
        // this process has just verified the dataset
        command.args(["--restarts", &spec.restarts.to_string(), "--no-verify"]);
        if let Some(most) = spec.workers.most() {
            command.args(["--most-workers", &most.to_string()]);
        }
        drop(claim);
        let coordinator = Process::start("coordinator", &mut command, &run.coordinator_log())?;
        let mut progress = output.progress(Unit::Count);
        let title = match spec.task {
            Task::Train { .. } => "train",
            Task::Evaluate { .. } => "evaluate",
        };
        progress.stage(title, None);
        Ok(Self {
            spec: *spec,
            output,
            progress,
            coordinator,
            take_overs: 0,
            crew: None,
            data_servers: None,
            // a request that came before there was a coordinator is passed on to it
            stops: 0,
            killed: false,
            address: None,
            lost: None,
            deserted: None,
            view: View::at_start(spec.config),
            evaluations: Vec::new(),
        })
    }

    /// The coordinator's address once it serves; `None` if it has ended before.
    fn wait_for_coordinator(&mut self) -> Option<CoordinatorAddress> {
        let start = Instant::now();
        let mut said = false;
        while self.coordinator.ended().is_none() {
            match runs::read_json::<CoordinatorAddress>(&self.spec.run.coordinator()) {
                Ok(address) if address.pid == self.coordinator.pid() => return Some(address),
                _ => {}
            }
            if !said && start.elapsed() > PATIENCE {
                self.output.note("waiting for the coordinator");
                said = true;
            }
            self.pass_on_stops();
            std::thread::sleep(POLL);
        }
        None
    }

    /// Until all data servers that live serve, so that the workers find them at once; a job waits for none that is slow.
    fn wait_for_data_servers(&mut self, api: &Api) {
        let start = Instant::now();
        while start.elapsed() < PATIENCE && self.coordinator.ended().is_none() {
            let alive = self.data_servers.as_mut().map_or(0, DataServers::alive);
            if alive == 0 || api.job().is_ok_and(|status| status.data_servers.len() >= alive) {
                break;
            }
            self.pass_on_stops();
            std::thread::sleep(POLL);
        }
        self.look_after_data_servers();
    }

    fn look_after_data_servers(&mut self) {
        let Some(servers) = self.data_servers.as_mut().filter(|_| self.stops == 0) else { return };
        for line in servers.follow() {
            self.progress.line(&line);
        }
    }

    fn watch(&mut self, api: &Api) {
        loop {
            self.watch_one(api);
            if !self.take_over() {
                break;
            }
        }
        // The last evaluations and steps came after the last look.
        if let Ok(Some(status)) = runs::last_status(self.spec.run) {
            self.show(&status);
        }
        self.progress.finish();
    }

    /// Starts another coordinator if the last one was killed; it serves at the same address. `false` if it was not, or
    /// has been too often. The workers wait meanwhile, also for one that cannot be started at once.
    fn take_over(&mut self) -> bool {
        let Some(ended) = self.coordinator.ended() else { return false };
        let most = self.spec.config.cluster.coordinator_restarts;
        let how = process::describe(ended);
        while ended.code().is_none() && !self.killed && self.take_overs < most {
            self.take_overs += 1;
            let count = self.take_overs;
            let started = self.start_another();
            let then = match &started {
                Ok(_) => "another takes over".to_owned(),
                Err(error) => format!("another cannot be started: {error}"),
            };
            self.progress.line(&format!("the coordinator ended with {how}; {then} ({count} of {most} restarts)"));
            let Ok(coordinator) = started else {
                self.pass_on_stops();
                std::thread::sleep(NEXT_START);
                continue;
            };
            self.coordinator = coordinator;
            // it may not have heard of what the one before was asked for
            if self.wait_for_coordinator().is_some() {
                match self.stops {
                    0 => self.tell_who_never_joined(),
                    _ => self.coordinator.ask_to_end(End::Gracefully),
                }
            }
            return true;
        }
        false
    }

    fn start_another(&self) -> Result<Process, ProcessError> {
        let run = self.spec.run;
        let mut command = Command::new(process::sibling("learn-coordinator")?);
        command.arg("--run-dir").arg(run.root()).arg("--take-over");
        Process::start("coordinator", &mut command, &run.coordinator_log())
    }

    fn watch_one(&mut self, api: &Api) {
        let mut asked: Option<Instant> = None;
        while self.coordinator.ended().is_none() {
            let interval = if self.crew.as_mut().is_some_and(|crew| crew.asks()) { POLL } else { STATUS_INTERVAL };
            if asked.is_none_or(|at| at.elapsed() >= interval) {
                match api.job() {
                    Ok(status) => {
                        self.show(&status);
                        self.view = View::from(&status);
                        self.look_after_crew();
                    }
                    // one that cannot be asked yet has not gathered anybody
                    Err(_) if self.view.state == JobState::Gathering => self.look_after_crew(),
                    Err(_) => {}
                }
                asked = Some(Instant::now());
            }
            self.pass_on_stops();
            self.look_after_data_servers();
            self.look_after_deserted();
            std::thread::sleep(POLL);
        }
    }

    fn show(&mut self, status: &JobStatus) {
        let new = render::newer(&self.evaluations, status);
        for evaluation in new {
            self.progress.line(&render::evaluation(evaluation));
        }
        // A restarted coordinator may know fewer evaluations than were shown.
        if !new.is_empty() {
            self.evaluations.clone_from(&status.evaluations);
        }
        let doing = render::doing(status);
        match self.spec.task {
            // An evaluation has no steps of its own.
            Task::Evaluate { .. } => self.progress.doing(format!("{doing} ({})", render::duration(status.seconds))),
            Task::Train { .. } => {
                let done = status.last_step.as_ref().map_or(0, |step| step.step.0);
                self.progress.at(done, status.total_steps, doing);
            }
        }
    }

    fn pass_on_stops(&mut self) {
        let requests = system::stop_requests();
        if requests == self.stops {
            return;
        }
        if self.stops == 0 && requests == 1 {
            self.progress.line(match self.spec.task {
                Task::Train { .. } => "stopping after the current step, with a checkpoint; once more to kill",
                Task::Evaluate { .. } => "stopping the evaluation; once more to kill",
            });
            self.coordinator.ask_to_end(End::Gracefully);
        } else {
            self.progress.line("killing all processes of the job");
            self.kill_all();
        }
        self.stops = requests;
    }

    fn kill_all(&mut self) {
        self.killed = true;
        self.crew.iter_mut().for_each(|crew| crew.ask_to_end(End::AtOnce));
        self.data_servers.iter_mut().for_each(|servers| servers.ask_to_end(End::AtOnce));
        self.coordinator.ask_to_end(End::AtOnce);
    }

    /// Replaces workers that are lost; one that is lost before all have joined ends the job.
    fn look_after_crew(&mut self) {
        let Some(crew) = self.crew.as_mut().filter(|_| self.stops == 0 && self.lost.is_none()) else { return };
        let changes = crew.follow(&self.view);
        for line in &changes.lines {
            self.progress.line(line);
        }
        if let Some(number) = changes.lost {
            let reason = crew.guilt(Some(number)).map(|guilt| guilt.before_all_had_joined());
            let reason =
                reason.unwrap_or_else(|| format!("worker process {number} ended before all workers had joined"));
            self.lost = Some(NeverJoined { number, reason });
            self.tell_who_never_joined();
        }
    }

    /// Ends a job that cannot begin. Should the coordinator not take the reason, it ends as if it were stopped.
    fn tell_who_never_joined(&mut self) {
        let (Some(lost), Some(address)) = (&self.lost, &self.address) else { return };
        if let Err(error) = operator::never_joined(self.spec.run, address, &lost.reason) {
            tracing::debug!("{error}");
            self.coordinator.ask_to_end(End::Gracefully);
        }
    }

    /// The coordinator learns by itself that nobody is left; when it does not act in time, this side ends the job.
    fn look_after_deserted(&mut self) {
        if !self.crew.as_mut().is_some_and(|crew| crew.is_gone()) {
            self.deserted = None;
            return;
        }
        let since = *self.deserted.get_or_insert_with(Instant::now);
        let cluster = &self.spec.config.cluster;
        // the last worker is waited for as long as it would try to come back
        if since.elapsed() > cluster.heartbeat_timeout.0.max(cluster.coordinator_timeout.0) + NOTICE {
            self.kill_all();
        }
    }

    fn conclude(mut self) -> Result<JobStatus> {
        self.progress.finish();
        if let Some(crew) = &mut self.crew {
            if self.lost.is_some() {
                crew.ask_to_end(End::Gracefully);
            }
            let untold = self.coordinator.ended().is_none_or(|ended| matches!(ended.code(), None | Some(exit::FAILED)));
            crew.wait(LEAVE_BY_THEMSELVES);
            if !untold {
                // one that still asks for a place would ask for long: nobody gives it one any more
                crew.ask_to_end(End::Gracefully);
                crew.wait(LEAVE);
            }
        }
        if let Some(servers) = &mut self.data_servers {
            // the coordinator has told them, unless it was killed
            servers.ask_to_end(End::Gracefully);
            servers.wait(LEAVE_BY_THEMSELVES);
        }
        let status = runs::last_status(self.spec.run)?;
        let Some(ended) = self.coordinator.ended() else {
            // Unreachable by construction (all callers wait for it); dropping `self` kills it all the same.
            anyhow::bail!("the coordinator did not end");
        };
        let shown = self.spec.run.root().display();
        let step = status.as_ref().and_then(|status| status.last_step.as_ref()).map_or(0, |step| step.step.0);
        let at = at_step(self.spec.task, step);
        let lost = self.lost.as_ref().map(|lost| lost.reason.clone());
        let cause = lost.or_else(|| status.as_ref().and_then(|status| status.cause.clone()));
        if self.stops > 1 {
            let message = format!("{shown}: killed{at}; {}", self.spec.way_back(status.as_ref()));
            return Err(Failure::Child { code: exit::FAILED, message }.into());
        }
        match (ended.code(), &self.lost, status) {
            (Some(exit::OK), _, Some(status)) => Ok(status),
            // it was asked to end before it served, perhaps before it could hear it: nothing was trained
            (None | Some(exit::STOPPED), None, status) if self.stops == 1 && self.address.is_none() => {
                let message = format!("{shown}: stopped before it began; {}", self.spec.way_back(status.as_ref()));
                Err(Failure::Stopped(message).into())
            }
            (Some(exit::STOPPED), None, status) => {
                let cause = cause.map(|cause| format!(" ({cause})")).unwrap_or_default();
                let message = format!("{shown}: stopped{at}{cause}; {}", self.spec.way_back(status.as_ref()));
                Err(Failure::Stopped(message).into())
            }
            (Some(exit::DIVERGED), _, status) => {
                let cause = cause.unwrap_or_default();
                let mut message = format!("{shown}: {cause}; {}", self.spec.way_on(status.as_ref()));
                if matches!(self.spec.task, Task::Train { .. }) {
                    message += "\na step that is not finite has its users in events.jsonl; `--set training.non_finite=skip` \
                                (or rollback) gets past it";
                }
                Err(Failure::Diverged(message).into())
            }
            (Some(exit::UNSAVED), _, status) => {
                let cause = cause.unwrap_or_default();
                let message = format!("{shown}: at step {step}, {cause}; {}", self.spec.way_on(status.as_ref()));
                Err(Failure::Unsaved(message).into())
            }
            (code, _, status) => {
                let message = self.explain(cause, status.as_ref());
                Err(match code {
                    Some(exit::WORKER_LOST) => Failure::WorkerLost(message),
                    _ if self.lost.is_some() => Failure::WorkerLost(message),
                    code => Failure::Child { code: code.filter(|code| *code != 0).unwrap_or(exit::FAILED), message },
                }
                .into())
            }
        }
    }

    /// The cause, the guilty process, the end of its log, the way on.
    fn explain(&mut self, cause: Option<String>, status: Option<&JobStatus>) -> String {
        let lost = self.lost.as_ref().map(|lost| lost.number);
        let guilt = self.crew.as_mut().and_then(|crew| crew.guilt(lost));
        let Guilt { name, how, log, said } = guilt.unwrap_or_else(|| Guilt::of(&mut self.coordinator));
        // that of one that has never joined says so itself
        let ended = if lost.is_some() { String::new() } else { format!("{name} ended with {how}; ") };
        let cause = cause.unwrap_or_else(|| format!("{name} ended early"));
        let mut message = format!("the job failed: {cause}\n{ended}the end of {}:\n", log.display());
        for line in said {
            message += &format!("  | {line}\n");
        }
        message + &self.spec.way_on(status)
    }
}

/// Where a job was; an evaluation has no steps.
fn at_step(task: &Task, step: u64) -> String {
    match task {
        Task::Train { .. } => format!(" at step {step}"),
        Task::Evaluate { .. } => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_workers_of_this_machine_are_limited_by_it() {
        assert_eq!(Workers::unless(false).most(), Some(crew::most_processes(crew::cores())));
        assert_eq!(Workers::unless(true).most(), None);
    }
}
