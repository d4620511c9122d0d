//! The worker processes of a local job: started, replaced when they are lost, and as many as the job wants.
//!
//! Input: the processes' ends and the coordinator's view of the job. Output: processes, and a line for each change.
//! Invariants: a process has a number, which is its GPU's and its log's; one that ended is replaced under the same number,
//! and only while the job goes on; `cluster.max_restarts` limits how often.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use learn_domain::Config;
use learn_domain::ids::Rank;
use learn_domain::report::{CoordinatorAddress, JobState, JobStatus, Task};
use learn_domain::run_dir::RunDir;

use crate::process::{self, Process};
use crate::system::End;

/// A replacement that ended sooner is not replaced before it would have been so old: what it failed by may pass.
const SHORT_LIFE: Duration = Duration::from_secs(5);

/// Threads of one local worker.
#[must_use]
pub fn threads_per_worker(config: &Config, workers: u32) -> usize {
    match config.training.threads {
        0 => (cores() / workers.max(1) as usize).max(1),
        threads => threads as usize,
    }
}

/// Cores that this process may use.
#[must_use]
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

struct Hand {
    process: Process,
    started: Instant,
    /// It took the place of one that failed.
    replacement: bool,
    /// Its end was taken note of.
    seen: bool,
    /// It was asked to end.
    asked: bool,
}

/// The workers of one job.
pub struct Crew<'a> {
    run: &'a RunDir,
    config: &'a Config,
    replaces: bool,
    grpc: String,
    hands: BTreeMap<u32, Hand>,
    wanted: u32,
    restarts: u32,
}

/// The job as its coordinator sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub state: JobState,
    /// Workers that the job wants to have.
    pub wanted: u32,
    /// There is something to train still.
    pub steps_left: bool,
}

impl View {
    /// Of a job that nobody could ask yet.
    #[must_use]
    pub fn at_start(config: &Config) -> Self {
        Self { state: JobState::Gathering, wanted: config.cluster.workers, steps_left: true }
    }
}

impl From<&JobStatus> for View {
    fn from(status: &JobStatus) -> Self {
        let finished = status.last_step.as_ref().map_or(0, |record| record.step.0);
        let steps_left = finished < status.total_steps;
        Self { state: status.state.clone(), wanted: status.wanted_workers, steps_left }
    }
}

/// What came of a look at the crew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// For the person at the terminal.
    pub lines: Vec<String>,
    /// The number of a worker that failed before all had joined.
    pub lost: Option<u32>,
}

impl<'a> Crew<'a> {
    /// Starts all workers that the configuration asks for.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start(run: &'a RunDir, config: &'a Config, task: &Task, address: &CoordinatorAddress) -> Result<Self> {
        let mut crew = Self {
            run,
            config,
            replaces: matches!(task, Task::Train { .. }),
            grpc: address.grpc.clone(),
            hands: BTreeMap::new(),
            wanted: config.cluster.workers,
            restarts: 0,
        };
        for number in 0..crew.wanted {
            crew.hire(number, false)?;
        }
        Ok(crew)
    }

    fn hire(&mut self, number: u32, replacement: bool) -> Result<()> {
        let threads = threads_per_worker(self.config, self.wanted).to_string();
        let cluster = &self.config.cluster;
        let device = serde_json::to_value(cluster.device)?;
        let mut command = Command::new(process::sibling("learn-worker")?);
        command
            .arg("join")
            .args(["--coordinator", &self.grpc])
            .arg("--secret-file")
            .arg(self.run.secret())
            .args(["--device", device.as_str().unwrap_or("auto")])
            .args(["--ordinal", &number.to_string()])
            .args(["--threads", &threads])
            .args(["--bind", &cluster.bind])
            .env("OMP_NUM_THREADS", &threads);
        let log = self.run.worker_log(Rank(number));
        let process = Process::start(format!("worker process {number}"), &mut command, &log)?;
        self.hands.insert(number, Hand { process, started: Instant::now(), replacement, seen: false, asked: false });
        Ok(())
    }

    /// Whether a worker has failed and nobody has taken note of it yet: time to ask the coordinator.
    pub fn asks(&mut self) -> bool {
        self.hands.values_mut().any(|hand| !hand.seen && hand.process.failed())
    }

    /// Brings the crew to what the job, as it is now, wants.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn follow(&mut self, view: &View) -> Result<Changes> {
        let mut changes = Changes::default();
        let goes_on =
            self.replaces && view.steps_left && matches!(view.state, JobState::Running | JobState::Regrouping);
        let grows = goes_on || (self.replaces && view.state == JobState::Gathering);
        let mut there = self.hands.values_mut().filter_map(|hand| hand.process.ended().is_none().then_some(())).count();
        let fallen: Vec<u32> = self
            .hands
            .iter_mut()
            .filter_map(|(&number, hand)| (!hand.seen && hand.process.failed()).then_some(number))
            .collect();
        for number in fallen {
            let Some(hand) = self.hands.get_mut(&number) else { continue };
            let how = hand.process.ended().map_or_else(String::new, process::describe);
            let name = hand.process.name.clone();
            if view.state == JobState::Gathering {
                hand.seen = true;
                changes.lost.get_or_insert(number);
            } else if goes_on && self.restarts < self.config.cluster.max_restarts && there < view.wanted as usize {
                if hand.replacement && hand.started.elapsed() < SHORT_LIFE {
                    continue;
                }
                self.restarts += 1;
                there += 1;
                self.hire(number, true)?;
                let (count, most) = (self.restarts, self.config.cluster.max_restarts);
                changes
                    .lines
                    .push(format!("{name} ended with {how}; another takes its place ({count} of {most} restarts)"));
            } else {
                hand.seen = true;
                if goes_on {
                    changes.lines.push(format!("{name} ended with {how}; the others go on without it"));
                }
            }
        }
        if !grows || changes.lost.is_some() {
            return Ok(changes);
        }
        self.wanted = view.wanted;
        // those that left in peace were too many once; those that failed are not replaced this way
        let counts = |hand: &mut Hand| hand.process.ended().is_none() || hand.process.failed();
        let there = self.hands.values_mut().filter_map(|hand| counts(hand).then_some(())).count();
        let free = (0..).filter(|number| self.hands.get_mut(number).is_none_or(|hand| !counts(hand)));
        let free: Vec<u32> = free.take((self.wanted as usize).saturating_sub(there)).collect();
        for number in free {
            self.hire(number, false)?;
            changes.lines.push(format!("worker process {number} joins"));
        }
        Ok(changes)
    }

    /// No process is left.
    pub fn is_gone(&mut self) -> bool {
        self.hands.values_mut().all(|hand| hand.process.ended().is_some())
    }

    pub fn ask_to_end(&mut self, how: End) {
        for hand in self.hands.values_mut().filter_map(|hand| hand.process.ended().is_none().then_some(hand)) {
            hand.asked = true;
            hand.process.ask_to_end(how);
        }
    }

    /// Waits up to `limit` until all have left.
    pub fn wait(&mut self, limit: Duration) {
        let start = Instant::now();
        for hand in self.hands.values_mut() {
            hand.process.wait(limit.saturating_sub(start.elapsed()));
        }
    }

    /// The worker that a failure is to be explained by: `number`, or the one that failed first.
    pub fn guilty(&mut self, number: Option<u32>) -> Option<&mut Process> {
        let by_itself = |hand: &mut Hand| !hand.asked && hand.process.failed();
        let first = self.hands.iter_mut().find_map(|(&number, hand)| by_itself(hand).then_some(number));
        let hand = self.hands.get_mut(&number.or(first)?)?;
        Some(&mut hand.process)
    }
}
