//! A task of the step: one worker, and another one in its place when it is lost.
//!
//! Input: Slurm's variables, the run directory, the coordinator's address. Output: the worker's log, and an exit code.
//! Invariants: a worker listens on the interface that leads to the coordinator; it ends with this process; a signal that
//! asks to stop is passed on.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use learn_domain::Config;
use learn_domain::config::DeviceKind;
use learn_domain::ids::Rank;
use learn_domain::report::{CoordinatorAddress, Task, exit};
use learn_domain::run_dir::RunDir;
use learn_telemetry::stdio;

use super::step::GivenUp;
use super::{TaskPlace, Variables, address};
use crate::api::Api;
use crate::crew::{SHORT_LIFE, TAIL, View, cores};
use crate::failure::Failure;
use crate::process::{self, Process};
use crate::system::{self, End};

/// Pause between two looks at the worker.
const POLL: Duration = Duration::from_millis(50);
/// Pause between two questions to the coordinator.
const ASK: Duration = Duration::from_millis(500);

/// What a task is told by the first node.
#[derive(Clone, Debug)]
pub struct TaskSpec<'a> {
    pub run: &'a RunDir,
    pub config: &'a Config,
    pub coordinator: &'a CoordinatorAddress,
}

/// Threads of a worker: those of the configuration, or a task's share of the cores that this process may use.
fn threads(config: &Config, place: &TaskPlace, cores: usize) -> usize {
    match (config.training.threads, place.cpus) {
        (0, Some(cpus)) => cores.min(cpus as usize),
        (0, None) => cores / place.local_tasks as usize,
        (threads, _) => threads as usize,
    }
    .max(1)
}

/// Runs a worker, and others in its place, to the end of the job.
///
/// # Errors
/// Slurm's variables make no sense, there is no GPU for a job that wants one, or the worker fails and the job does not go on.
pub fn run(spec: &TaskSpec<'_>, variables: &Variables) -> Result<()> {
    system::catch_stop_signals();
    let place = TaskPlace::read(variables)?;
    let ended = Hand::prepare(spec, &place, variables).and_then(|hand| hand.work());
    if let Err(error) = &ended
        && error.downcast_ref::<Reported>().is_none()
    {
        leave(spec, &place, crate::failure::message(error), Vec::new());
    }
    match ended {
        Err(error) => match error.downcast::<Reported>() {
            Ok(Reported(failure)) => Err(failure.into()),
            Err(error) => Err(error),
        },
        Ok(()) => Ok(()),
    }
}

/// A failure whose note was left.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Reported(Failure);

fn leave(spec: &TaskSpec<'_>, place: &TaskPlace, how: String, said: Vec<String>) {
    let log = spec.run.worker_log(Rank(place.number));
    let note = GivenUp { node: place.node.clone(), number: place.number, how, log, said };
    if let Err(error) = note.leave(spec.run) {
        stdio::say(format_args!("learn-launch: {error:#}"));
    }
}

struct Hand<'a> {
    spec: &'a TaskSpec<'a>,
    place: &'a TaskPlace,
    device: DeviceKind,
    /// The one GPU of several visible ones.
    gpu: Option<String>,
    bind: String,
    threads: usize,
}

impl<'a> Hand<'a> {
    fn prepare(spec: &'a TaskSpec<'a>, place: &'a TaskPlace, variables: &Variables) -> Result<Self> {
        let expected = spec.config.cluster.workers;
        if place.tasks != expected {
            let tasks = place.tasks;
            bail!("SLURM_STEP_NUM_TASKS={tasks}, but the job has {expected} workers: srun must start as many tasks");
        }
        let host = address::host(&spec.coordinator.grpc);
        if address::is_loopback(host) && spec.coordinator.host != system::host_name() {
            bail!(
                "the coordinator listens on {host} of {}, which {} cannot reach: set cluster.bind to an address that it can",
                spec.coordinator.host,
                place.node
            );
        }
        let (device, gpu) = place.device(spec.config.cluster.device, variables)?;
        let bind = address::of_worker(&spec.coordinator.grpc)?.to_string();
        Ok(Self { spec, place, device, gpu, bind, threads: threads(spec.config, place, cores()) })
    }

    fn command(&self, worker: &Path) -> Result<Command> {
        let device = serde_json::to_value(self.device)?;
        let threads = self.threads.to_string();
        let mut command = Command::new(worker);
        command
            .arg("join")
            .args(["--coordinator", &self.spec.coordinator.grpc])
            .arg("--secret-file")
            .arg(self.spec.run.secret())
            .args(["--device", device.as_str().unwrap_or("auto")])
            .args(["--threads", &threads])
            .args(["--bind", &self.bind])
            .env("OMP_NUM_THREADS", &threads);
        if let Some(gpu) = &self.gpu {
            command.env("CUDA_VISIBLE_DEVICES", gpu);
        }
        Ok(command)
    }

    fn start(&self) -> Result<Process> {
        let mut command = self.command(&process::sibling("learn-worker")?)?;
        let log = self.spec.run.worker_log(Rank(self.place.number));
        let name = format!("worker process {}", self.place.number);
        // not gracefully: a worker that is asked to stop stops the whole job, and here one place alone is lost
        Ok(Process::start_tied(name, &mut command, &log, End::AtOnce)?)
    }

    fn work(&self) -> Result<()> {
        // a request that came before there was a worker is passed on to it
        let (mut stops, mut restarts) = (0, 0);
        let mut process = self.start()?;
        loop {
            let started = Instant::now();
            let ended = loop {
                if let Some(ended) = process.ended() {
                    break ended;
                }
                if system::stop_requests() > stops {
                    stops = system::stop_requests();
                    process.ask_to_end(End::Gracefully);
                }
                std::thread::sleep(POLL);
            };
            if !process.failed() {
                let code = ended.code().unwrap_or(exit::FAILED);
                let message = format!("worker process {}: {}", self.place.number, process::describe(ended));
                return if code == exit::OK { Ok(()) } else { Err(Reported(Failure::Child { code, message }).into()) };
            }
            let how = process::describe(ended);
            let most = self.spec.config.cluster.max_restarts;
            if stops == 0 && restarts < most && self.goes_on() {
                if restarts > 0 {
                    std::thread::sleep(SHORT_LIFE.saturating_sub(started.elapsed()));
                }
                restarts += 1;
                stdio::say(format_args!(
                    "worker process {} on {} ended with {how}; another takes its place ({restarts} of {most} restarts)",
                    self.place.number, self.place.node
                ));
                process = self.start()?;
                continue;
            }
            leave(self.spec, self.place, how.clone(), process.tail(TAIL));
            let message = format!("worker process {} ended with {how}", self.place.number);
            let code = ended.code().unwrap_or(exit::FAILED);
            return Err(Reported(Failure::Child { code, message }).into());
        }
    }

    /// Whether the job has a use for another worker; a coordinator that is away is waited for as workers do.
    fn goes_on(&self) -> bool {
        let api = Api::new(self.spec.run, self.spec.coordinator);
        let asked = Instant::now();
        while asked.elapsed() < self.spec.config.cluster.coordinator_timeout.0 && system::stop_requests() == 0 {
            if let Ok(status) = api.job() {
                return matches!(status.task, Task::Train { .. }) && View::from(&status).trains();
            }
            std::thread::sleep(ASK);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(cpus: Option<u32>) -> TaskPlace {
        TaskPlace { job: 1, number: 0, tasks: 4, local: 0, local_tasks: 2, nodes: 2, node: "n".into(), cpus }
    }

    #[test]
    fn a_worker_sees_the_one_gpu_that_its_task_has_taken() {
        let (run, config, coordinator) = (RunDir::new("/r"), Config::default(), CoordinatorAddress::default());
        let spec = TaskSpec { run: &run, config: &config, coordinator: &coordinator };
        for gpu in [Some("5"), None] {
            let hand = Hand {
                spec: &spec,
                place: &place(None),
                device: DeviceKind::Cuda,
                gpu: gpu.map(str::to_owned),
                bind: "10.0.0.1".into(),
                threads: 2,
            };
            let command = hand.command(Path::new("learn-worker")).unwrap();
            let set = command.get_envs().find(|(name, _)| *name == "CUDA_VISIBLE_DEVICES").and_then(|(_, value)| value);
            assert_eq!(set.and_then(|value| value.to_str()), gpu, "without one of several it is Slurm's");
            assert!(!command.get_args().any(|argument| argument == "--ordinal"), "the visible one is number 0");
        }
    }

    #[test]
    fn a_worker_takes_its_share_of_the_cores() {
        let mut config = Config::default();
        assert_eq!(threads(&config, &place(Some(7)), 7), 7, "bound to its own");
        assert_eq!(threads(&config, &place(Some(7)), 4), 4, "no more than there are");
        assert_eq!(threads(&config, &place(None), 16), 8, "not bound: shared with the others of the node");
        assert_eq!(threads(&config, &place(None), 1), 1);
        config.training.threads = 3;
        assert_eq!(threads(&config, &place(Some(7)), 7), 3);
    }
}
