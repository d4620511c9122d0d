//! The worker processes of a job ([`Team`]); those of a local job: started, replaced when they are lost, and as many as the job wants.
//!
//! Input: the processes' ends and the coordinator's view of the job. Output: processes, and a line for each change.
//! Invariants: a process has a number, which is its GPU's and its log's; one that ended is replaced under the same number,
//! and only while the job goes on; `cluster.max_restarts` limits how often, and a process that cannot be started counts as one that
//! has failed: the others never end by it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use learn_domain::Config;
use learn_domain::ids::Rank;
use learn_domain::report::{CoordinatorAddress, JobState, JobStatus, Task};
use learn_domain::run_dir::RunDir;

use crate::failure;
use crate::process::{self, Process};
use crate::system::End;

/// One that ended sooner is not replaced before it would have been so old: what it failed by may pass.
pub(crate) const SHORT_LIFE: Duration = Duration::from_secs(5);
/// Lines of a guilty log that a failure shows.
pub(crate) const TAIL: usize = 15;

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

/// Most processes that a machine of so many cores is asked to run; more would only bring it down.
#[must_use]
pub fn most_processes(cores: usize) -> usize {
    (16 * cores).max(64)
}

struct Hand {
    process: Process,
    started: Instant,
    /// It took the place of one that failed.
    replacement: bool,
    /// Its end was taken note of.
    seen: bool,
    /// It was wanted when it failed, and `cluster.max_restarts` did not allow another.
    missed: bool,
    /// It was asked to end.
    asked: bool,
}

impl Hand {
    fn fate(&mut self) -> Fate {
        let life = match (self.process.ended().is_none(), self.process.failed()) {
            (true, _) => Life::Alive,
            (false, true) => Life::Failed,
            (false, false) => Life::Left,
        };
        let young = self.replacement && self.started.elapsed() < SHORT_LIFE;
        Fate { life, young, seen: self.seen, missed: self.missed }
    }
}

/// What has become of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Alive,
    /// In peace.
    Left,
    Failed,
}

/// What is known of a process.
#[derive(Clone, Copy, Debug)]
struct Fate {
    life: Life,
    /// A replacement that has started just now.
    young: bool,
    seen: bool,
    missed: bool,
}

impl Fate {
    /// Its place is taken. Who left in peace, or failed when there were too many, is gone; who is missed, or whose turn is
    /// still to come, is not replaced by a newcomer.
    fn counts(self) -> bool {
        match self.life {
            Life::Alive => true,
            Life::Left => false,
            Life::Failed => self.missed || !self.seen,
        }
    }
}

/// What is allowed.
#[derive(Clone, Copy, Debug)]
struct Rules {
    replaces: bool,
    restarts_left: u32,
}

/// What is done about the process of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// Another one in the place of one that failed.
    Replace,
    /// One more.
    Hire,
    /// Its end is taken note of; `missed`: it was wanted still.
    Note { missed: bool, tell: bool },
}

/// What brings the processes to what the job wants.
fn decide(fates: &BTreeMap<u32, Fate>, view: &View, rules: Rules) -> Vec<(u32, Action)> {
    let wanted = view.wanted as usize;
    let trains = rules.replaces && view.trains();
    let gathers = view.state == JobState::Gathering;
    let mut actions = Vec::new();
    let mut fates = fates.clone();
    let mut alive = fates.values().filter(|fate| fate.life == Life::Alive).count();
    let failed = fates.values().filter(|fate| fate.life == Life::Failed && fate.counts()).count();
    // with the last member the job ends, and another process would come in vain
    let goes_on = trains && (alive > 0 || failed < view.members as usize);
    let mut restarts_left = rules.restarts_left;
    for (&number, fate) in fates.iter_mut().filter(|(_, fate)| fate.life == Life::Failed && !fate.seen) {
        if goes_on && restarts_left > 0 && alive < wanted {
            if fate.young {
                continue;
            }
            restarts_left -= 1;
            alive += 1;
            fate.life = Life::Alive;
            actions.push((number, Action::Replace));
        } else {
            (fate.seen, fate.missed) = (true, alive < wanted);
            actions.push((number, Action::Note { missed: fate.missed, tell: trains }));
        }
    }
    // one that failed before all had joined ends the job
    let failed = gathers && fates.values().any(|fate| fate.life == Life::Failed);
    if goes_on || (rules.replaces && gathers && !failed) {
        let counts = |number: &u32| fates.get(number).is_some_and(|fate| fate.counts());
        let there = fates.values().filter(|fate| fate.counts()).count();
        let free = (0..).filter(|number| !counts(number)).take(wanted.saturating_sub(there));
        actions.extend(free.map(|number| (number, Action::Hire)));
    }
    actions
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
    /// Newcomers that could not be started, and when that was.
    unstarted: BTreeMap<u32, Instant>,
}

/// The job as its coordinator sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub state: JobState,
    /// Workers that the job wants to have.
    pub wanted: u32,
    /// Workers of the present generation.
    pub members: u32,
    /// There is something to train still.
    pub steps_left: bool,
}

impl View {
    /// Of a job that nobody could ask yet.
    #[must_use]
    pub fn at_start(config: &Config) -> Self {
        let workers = config.cluster.workers;
        Self { state: JobState::Gathering, wanted: workers, members: workers, steps_left: true }
    }

    /// The job is at its steps: another worker in the place of one that failed has something to do.
    #[must_use]
    pub fn trains(&self) -> bool {
        self.steps_left && matches!(self.state, JobState::Running | JobState::Regrouping)
    }
}

impl From<&JobStatus> for View {
    fn from(status: &JobStatus) -> Self {
        let finished = status.last_step.as_ref().map_or(0, |record| record.step.0);
        let steps_left = finished < status.total_steps;
        let (wanted, members) = (status.wanted_workers, status.world_size);
        Self { state: status.state.clone(), wanted, members, steps_left }
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

/// The processes of a job that train, however they are started.
pub trait Team {
    /// Whether one has failed and nobody has taken note of it yet: time to ask the coordinator.
    fn asks(&mut self) -> bool;
    /// Brings the team to what the job, as it is now, wants, as far as it can.
    fn follow(&mut self, view: &View) -> Changes;
    /// No process is left.
    fn is_gone(&mut self) -> bool;
    fn ask_to_end(&mut self, how: End);
    /// Waits up to `limit` until all have left.
    fn wait(&mut self, limit: Duration);
    /// What a failure is to be explained by: worker `number`, or the one that failed first.
    fn guilt(&mut self, number: Option<u32>) -> Option<Guilt>;
}

/// A process that a failure is explained by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guilt {
    pub name: String,
    /// How it ended, in words.
    pub how: String,
    pub log: PathBuf,
    /// The end of what it said.
    pub said: Vec<String>,
}

impl Guilt {
    /// Why a job could not begin.
    #[must_use]
    pub fn before_all_had_joined(&self) -> String {
        let said = process::last_words(&self.said).map(|said| format!(": {said}")).unwrap_or_default();
        format!("{} ended with {} before all workers had joined{said}", self.name, self.how)
    }

    /// Of a process of this machine.
    pub fn of(process: &mut Process) -> Self {
        let how = process.ended().map_or("did not end".into(), process::describe);
        Self { name: process.name.clone(), how, log: process.log.clone(), said: process.tail(TAIL) }
    }
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
            unstarted: BTreeMap::new(),
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
        self.hands.insert(
            number,
            Hand { process, started: Instant::now(), replacement, seen: false, missed: false, asked: false },
        );
        Ok(())
    }

    /// Another one in the place of one that ended as `how` says; a line about it. If it cannot be started, that is tried again
    /// as for one that has ended at once.
    fn replace(&mut self, number: u32, how: &str) -> String {
        self.restarts += 1;
        let then = match self.hire(number, true) {
            Ok(()) => "another takes its place".to_owned(),
            Err(error) => {
                if let Some(hand) = self.hands.get_mut(&number) {
                    (hand.started, hand.replacement) = (Instant::now(), true);
                }
                format!("another cannot be started: {}", failure::message(&error))
            }
        };
        let (count, most) = (self.restarts, self.config.cluster.max_restarts);
        format!("worker process {number} ended with {how}; {then} ({count} of {most} restarts)")
    }

    /// One more; a line about it. One that cannot be started is tried again as long as there are restarts, or once another number
    /// of workers is wanted.
    fn add(&mut self, number: u32) -> Option<String> {
        let most = self.config.cluster.max_restarts;
        let waits = |failed: &Instant| self.restarts >= most || failed.elapsed() < SHORT_LIFE;
        if self.unstarted.get(&number).is_some_and(waits) {
            return None;
        }
        let Err(error) = self.hire(number, false) else {
            self.unstarted.remove(&number);
            return Some(format!("worker process {number} joins"));
        };
        self.unstarted.insert(number, Instant::now());
        self.restarts = most.min(self.restarts + 1);
        let (count, why) = (self.restarts, failure::message(&error));
        Some(format!("worker process {number} cannot be started: {why} ({count} of {most} restarts)"))
    }
}

impl Team for Crew<'_> {
    fn asks(&mut self) -> bool {
        self.hands.values_mut().any(|hand| !hand.seen && hand.process.failed())
    }

    fn follow(&mut self, view: &View) -> Changes {
        let mut changes = Changes::default();
        if self.wanted != view.wanted {
            self.unstarted.clear();
        }
        self.wanted = view.wanted;
        let most = self.config.cluster.max_restarts;
        let rules = Rules { replaces: self.replaces, restarts_left: most.saturating_sub(self.restarts) };
        let fates = self.hands.iter_mut().map(|(&number, hand)| (number, hand.fate())).collect();
        for (number, action) in decide(&fates, view, rules) {
            let name = format!("worker process {number}");
            let how = |hand: &mut Hand| hand.process.ended().map_or_else(String::new, process::describe);
            let how = self.hands.get_mut(&number).map_or_else(String::new, how);
            match action {
                Action::Replace => changes.lines.push(self.replace(number, &how)),
                Action::Hire => changes.lines.extend(self.add(number)),
                Action::Note { missed, tell } => {
                    if let Some(hand) = self.hands.get_mut(&number) {
                        (hand.seen, hand.missed) = (true, missed);
                    }
                    if view.state == JobState::Gathering {
                        changes.lost.get_or_insert(number);
                    } else if tell {
                        let left = self.hands.values_mut().any(|hand| hand.process.ended().is_none());
                        let then = if left { "the others go on without it" } else { "no worker is left here" };
                        changes.lines.push(format!("{name} ended with {how}; {then}"));
                    }
                }
            }
        }
        changes
    }

    fn is_gone(&mut self) -> bool {
        self.hands.values_mut().all(|hand| hand.process.ended().is_some())
    }

    fn ask_to_end(&mut self, how: End) {
        for hand in self.hands.values_mut().filter_map(|hand| hand.process.ended().is_none().then_some(hand)) {
            hand.asked = true;
            hand.process.ask_to_end(how);
        }
    }

    fn wait(&mut self, limit: Duration) {
        let start = Instant::now();
        for hand in self.hands.values_mut() {
            hand.process.wait(limit.saturating_sub(start.elapsed()));
        }
    }

    fn guilt(&mut self, number: Option<u32>) -> Option<Guilt> {
        let by_itself = |hand: &mut Hand| !hand.asked && hand.process.failed();
        let first = self.hands.iter_mut().find_map(|(&number, hand)| by_itself(hand).then_some(number));
        let hand = self.hands.get_mut(&number.or(first)?)?;
        Some(Guilt::of(&mut hand.process))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const ALIVE: Fate = Fate { life: Life::Alive, young: false, seen: false, missed: false };
    const FAILED: Fate = Fate { life: Life::Failed, ..ALIVE };
    const LEFT: Fate = Fate { life: Life::Left, ..ALIVE };
    const RULES: Rules = Rules { replaces: true, restarts_left: 2 };

    fn decided(fates: &[Fate], wanted: u32, state: JobState, rules: Rules) -> Vec<(u32, Action)> {
        let fates = (0..).zip(fates.iter().copied()).collect();
        decide(&fates, &View { state, wanted, members: 3, steps_left: true }, rules)
    }

    fn running(fates: &[Fate], wanted: u32) -> Vec<(u32, Action)> {
        decided(fates, wanted, JobState::Running, RULES)
    }

    #[test]
    fn one_that_failed_is_replaced_while_there_are_restarts() {
        assert_eq!(running(&[ALIVE, FAILED], 2), [(1, Action::Replace)]);
        assert_eq!(running(&[ALIVE, ALIVE], 2), []);
        let young = Fate { young: true, ..FAILED };
        assert_eq!(running(&[ALIVE, young], 2), [], "not yet");
        let none = Rules { restarts_left: 0, ..RULES };
        let missed = (1, Action::Note { missed: true, tell: true });
        assert_eq!(decided(&[ALIVE, FAILED], 2, JobState::Running, none), [missed]);
        let noted = Fate { seen: true, missed: true, ..FAILED };
        assert_eq!(decided(&[ALIVE, noted], 2, JobState::Running, none), []);
        assert_eq!(decided(&[ALIVE, noted], 3, JobState::Running, none), [(2, Action::Hire)]);
        let one = Rules { restarts_left: 1, ..RULES };
        assert_eq!(decided(&[FAILED, FAILED], 2, JobState::Running, one), [(0, Action::Replace), missed]);
    }

    #[test]
    fn the_last_member_is_not_replaced() {
        let missed = |number| (number, Action::Note { missed: true, tell: true });
        let of_members = |fates: &[Fate], members| {
            let fates = (0..).zip(fates.iter().copied()).collect();
            decide(&fates, &View { state: JobState::Running, wanted: 2, members, steps_left: true }, RULES)
        };
        assert_eq!(of_members(&[FAILED], 1), [missed(0)]);
        assert_eq!(of_members(&[Fate { seen: true, missed: true, ..FAILED }], 1), [], "nor another one hired");
        assert_eq!(of_members(&[FAILED, FAILED], 2), [missed(0), missed(1)]);
        assert_eq!(of_members(&[FAILED, FAILED], 3), [(0, Action::Replace), (1, Action::Replace)], "one is elsewhere");
        assert_eq!(of_members(&[FAILED, ALIVE], 1), [(0, Action::Replace)], "one that joins");
    }

    #[test]
    fn one_that_failed_when_there_were_too_many_is_not_missed_later() {
        let surplus = (1, Action::Note { missed: false, tell: true });
        assert_eq!(running(&[ALIVE, FAILED, ALIVE], 2), [surplus]);
        let noted = Fate { seen: true, ..FAILED };
        assert_eq!(running(&[ALIVE, noted, ALIVE], 4), [(1, Action::Hire), (3, Action::Hire)]);
        assert_eq!(running(&[ALIVE, LEFT, ALIVE], 4), [(1, Action::Hire), (3, Action::Hire)]);
    }

    #[test]
    fn a_failure_before_all_have_joined_is_told_and_nobody_is_hired() {
        let lost = [(0, Action::Note { missed: true, tell: false })];
        assert_eq!(decided(&[FAILED, ALIVE], 3, JobState::Gathering, RULES), lost);
        assert_eq!(decided(&[ALIVE], 2, JobState::Gathering, RULES), [(1, Action::Hire)]);
        assert_eq!(decided(&[LEFT], 2, JobState::Stopping, RULES), []);
        let evaluates = Rules { replaces: false, ..RULES };
        assert_eq!(decided(&[LEFT], 2, JobState::Running, evaluates), []);
    }

    fn hand(folder: &Path, script: &str, ended: bool) -> Hand {
        let mut process =
            Process::start("worker", Command::new("sh").args(["-c", script]), &folder.join("log")).unwrap();
        if ended {
            process.wait(Duration::from_secs(10)).unwrap();
        }
        Hand { process, started: Instant::now(), replacement: false, seen: false, missed: false, asked: false }
    }

    fn before(time: Duration) -> Instant {
        Instant::now().checked_sub(time).unwrap()
    }

    #[test]
    fn one_that_cannot_be_started_costs_a_restart_and_no_other_worker() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        let mut config = Config::default();
        config.cluster.max_restarts = 3;
        let hands = [hand(folder.path(), "exec sleep 600", false), hand(folder.path(), "exit 1", true)];
        let mut crew = Crew {
            run: &run,
            config: &config,
            replaces: true,
            grpc: String::new(),
            hands: (0..).zip(hands).collect(),
            wanted: 2,
            restarts: 0,
            unstarted: BTreeMap::new(),
        };
        let mut view = View { state: JobState::Running, wanted: 2, members: 2, steps_left: true };
        // beside the tests there is no learn-worker
        let said = crew.follow(&view).lines;
        assert_eq!(said.len(), 1);
        assert!(said[0].contains("exit code 1; another cannot be started: learn-worker"), "{said:?}");
        assert!(said[0].ends_with("(1 of 3 restarts)"), "{said:?}");
        assert_eq!(crew.follow(&view), Changes::default(), "it is tried again later");

        view.wanted = 3;
        let said = crew.follow(&view).lines;
        assert!(
            said[0].contains("worker process 2 cannot be started") && said[0].ends_with("(2 of 3 restarts)"),
            "{said:?}"
        );
        assert_eq!(crew.follow(&view), Changes::default());
        crew.unstarted.insert(2, before(SHORT_LIFE));
        assert!(crew.follow(&view).lines[0].ends_with("(3 of 3 restarts)"));
        crew.unstarted.insert(2, before(SHORT_LIFE));
        let said = crew.follow(&view).lines;
        assert_eq!(
            said,
            ["worker process 1 ended with exit code 1; the others go on without it"],
            "no restart is left"
        );
        assert_eq!(crew.follow(&view), Changes::default());
        assert!(!crew.is_gone(), "the other one works");
    }
}
