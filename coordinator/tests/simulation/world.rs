//! Virtual time, the network, the coordinator's shell, the launcher, and the faults.
//!
//! Input: a seed. Output: a job that has ended, with everything asserted on the way. Nothing here waits or looks at a
//! clock: the same seed is the same history.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use learn_coordinator::job::{History, Job, JobError, JobSettings};
use learn_domain::config::Span;
use learn_domain::membership::{Departure, Directive, Effect, Outcome};
use learn_domain::plan::{Plan, PlanKey};
use learn_domain::random::{self, Draws};
use learn_domain::report::{DatasetFacts, StepRecord, Task};
use learn_domain::{Config, Generation, Incarnation, Step, WorkerId};
use learn_proto::convert::Applicant;

use crate::Fired;
use crate::group::{Entry, Group, Op, Said};
use crate::process::{Place, Process, Reply, Request, millis};

/// No job lives longer, in milliseconds.
const LIMIT: u64 = 1_800_000;
/// Between two looks of the coordinator at its deadlines.
const TICK: u64 = 200;

/// Durations in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub beat: u64,
    pub step: u64,
    pub collective: u64,
    pub resend: u64,
}

#[derive(Debug)]
pub enum Happens {
    Tick,
    Launch,
    Fault,
    Wake(usize),
    CalmsDown,
    /// A message reaches the coordinator.
    Request(usize, u64, Request),
    Disconnected(WorkerId, u64),
    /// A rank has gone, and its peers see it.
    Breaks(Generation),
    // everything below happens to a process
    Enter(usize),
    Attend(usize, WorkerId),
    Beat(usize, WorkerId),
    Prepared(usize, WorkerId),
    Reply(usize, u64, Request, Result<Reply, JobError>),
    Resend(usize, u64),
    Push(usize, WorkerId, Directive),
    Arrive(usize, u64, Op),
    Met(usize, u64, Generation, Option<Said>),
    Stalled(usize, u64, u64),
    Written(usize, u64),
}

impl Happens {
    fn process(&self) -> Option<usize> {
        match *self {
            Self::Tick
            | Self::Launch
            | Self::Fault
            | Self::Wake(_)
            | Self::CalmsDown
            | Self::Request(..)
            | Self::Disconnected(..)
            | Self::Breaks(_) => None,
            Self::Enter(p)
            | Self::Attend(p, _)
            | Self::Beat(p, _)
            | Self::Prepared(p, _)
            | Self::Reply(p, ..)
            | Self::Resend(p, _)
            | Self::Push(p, ..)
            | Self::Arrive(p, ..)
            | Self::Met(p, ..)
            | Self::Stalled(p, ..)
            | Self::Written(p, _) => Some(p),
        }
    }
}

/// Ordered by time, and by the order in which it was planned.
pub struct Planned(u64, u64, Happens);

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Planned {}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// An open call at the coordinator.
pub struct Attendance {
    pub process: usize,
    pub number: u64,
    pub told: Directive,
    /// Orders come in order.
    pub delivered: u64,
}

/// How unkind a history is.
pub struct Weather {
    pub faults: bool,
    /// Mean time between two faults.
    pub between: u64,
    pub until: u64,
    /// In thousandths.
    pub loss: u64,
    pub delay: u64,
    pub operator_stop: bool,
}

pub struct World {
    pub draws: Draws,
    pub times: Times,
    pub processes: Vec<Process>,
    pub fired: Fired,
    /// Hash after each step of a job that nothing disturbs.
    pub reference: Vec<u64>,
    pub total_steps: u64,
    pub steps_per_epoch: u64,
    pub checkpoint_every: u64,
    /// Checkpoints: step and hash.
    pub disk: BTreeMap<u64, u64>,
    pub now: u64,
    pub planned: BinaryHeap<Reverse<Planned>>,
    pub number: u64,
    pub job: Job,
    pub plan: Plan,
    pub weather: Weather,
    pub groups: BTreeMap<Generation, Group>,
    pub attendances: BTreeMap<WorkerId, Attendance>,
    pub commits: BTreeMap<Step, Vec<(usize, u64, Request)>>,
    pub journal: Vec<StepRecord>,
    pub generation: Generation,
    pub begun: Generation,
    pub committed: Step,
    pub outcome: Option<Outcome>,
    pub restarts: u32,
    pub done: bool,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut draws = Draws::new(&[seed, 0x5151]);
        let mut pick = |bound: u64| draws.below(bound);
        let (users, batch, epochs) = (pick(40) as u32 + 12, pick(7) as u32 + 2, pick(3) as u32 + 1);
        let mut config = Config::default();
        config.cluster.workers = pick(6) as u32 + 1;
        config.cluster.min_workers = pick(u64::from(config.cluster.workers)) as u32 + 1;
        config.cluster.max_recoveries = pick(6) as u32 + 3;
        config.cluster.heartbeat_timeout = Span(millis(5000));
        config.cluster.join_timeout = Span(millis(30_000));
        config.cluster.stop_timeout = Span(millis(20_000));
        let times = Times { beat: 1000, step: pick(300) + 20, collective: pick(15_000) + 1_500, resend: 400 };
        let weather = Weather {
            faults: pick(20) > 0,
            between: pick(6_000) + 300,
            until: pick(60_000) + 2_000,
            loss: pick(30),
            delay: pick(40) + 2,
            operator_stop: pick(6) == 0,
        };
        let checkpoint_every = pick(6) + 1;
        let plan = Plan::new(PlanKey { fingerprint: "f".into(), seed, users, global_batch: batch }).unwrap();
        let steps_per_epoch = plan.steps_per_epoch();
        let total_steps = steps_per_epoch * u64::from(epochs);
        let job = Job::new(JobSettings {
            config,
            task: Task::Train { resume_from: None },
            dataset: DatasetFacts { train_users: users, ..DatasetFacts::default() },
            plan: plan.clone(),
            total_steps,
            restarts: 0,
            most_workers: None,
            history: History::default(),
        });
        let mut world = Self {
            draws,
            times,
            processes: Vec::new(),
            fired: Fired::default(),
            reference: vec![random::mix(seed)],
            total_steps,
            steps_per_epoch,
            checkpoint_every,
            disk: BTreeMap::new(),
            now: 0,
            planned: BinaryHeap::new(),
            number: 0,
            job,
            plan,
            weather,
            groups: BTreeMap::new(),
            attendances: BTreeMap::new(),
            commits: BTreeMap::new(),
            journal: Vec::new(),
            generation: Generation(0),
            begun: Generation(0),
            committed: Step(0),
            outcome: None,
            restarts: 0,
            done: false,
        };
        for step in 1..=total_steps {
            let (_, users) = world.planned(step);
            let chain = world.apply(world.reference[step as usize - 1], step, &users);
            world.reference.push(chain);
        }
        world
    }

    pub fn planned(&self, step: u64) -> (u32, Vec<u32>) {
        let position = self.plan.position(Step(step - 1));
        (position.epoch, self.plan.users(position).into_iter().map(|user| user.0).collect())
    }

    pub fn apply(&self, chain: u64, step: u64, users: &[u32]) -> u64 {
        users.iter().fold(random::key(&[chain, step]), |chain, &user| random::key(&[chain, user.into()]))
    }

    /// Lives until the job has ended and every process that can has gone.
    pub fn live(mut self) -> (Fired, Outcome) {
        self.after(0, Happens::Launch);
        self.after(TICK, Happens::Tick);
        if self.weather.faults {
            self.after(self.weather.between, Happens::Fault);
        }
        let mut left_over = LIMIT;
        while let Some(Reverse(Planned(at, _, happens))) = self.planned.pop() {
            self.now = at;
            assert!(at < LIMIT, "the job never ends: {:#?} {:?}", self.job.status(millis(at)), self.still_there());
            if self.outcome.is_some() {
                left_over = left_over.min(at + 60_000);
                if self.processes.iter().all(|process| !process.alive) || at > left_over {
                    break;
                }
            }
            self.happens(happens);
        }
        assert!(self.still_there().is_empty(), "left over: {:?}", self.still_there());
        let outcome = self.outcome.clone().unwrap();
        self.check_end(&outcome);
        (self.fired, outcome)
    }

    pub fn after(&mut self, time: u64, happens: Happens) {
        self.number += 1;
        self.planned.push(Reverse(Planned(self.now + time, self.number, happens)));
    }

    pub fn time(&self) -> Duration {
        millis(self.now)
    }

    fn happens(&mut self, happens: Happens) {
        if let Some(p) = happens.process() {
            let process = &mut self.processes[p];
            if !process.alive {
                return;
            }
            if process.paused {
                return process.deferred.push(happens);
            }
        }
        match happens {
            Happens::Tick => {
                let now = self.time();
                let effects = self.job.tick(now);
                self.carry_out(effects);
                self.tell();
                self.after(TICK, Happens::Tick);
            }
            Happens::Launch => self.launch(),
            Happens::Fault => self.fault(),
            Happens::CalmsDown => (self.weather.loss, self.weather.delay) = (5, 20),
            Happens::Wake(p) => self.wake(p),
            Happens::Request(p, call, request) => self.serve(p, call, request),
            Happens::Disconnected(worker, number) => {
                if self.attendances.get(&worker).is_some_and(|attendance| attendance.number == number) {
                    self.attendances.remove(&worker);
                    let effects = self.job.disconnected(self.time(), worker);
                    self.carry_out(effects);
                    self.tell();
                }
            }
            Happens::Breaks(generation) => self.break_group(generation, true),
            Happens::Enter(p) => self.enter(p),
            Happens::Attend(p, worker) => self.attend(p, worker),
            Happens::Beat(p, worker) => self.beat(p, worker),
            Happens::Prepared(p, worker) => self.prepared(p, worker),
            Happens::Reply(p, call, request, answer) => {
                let known = self.processes[p].calls.remove(&call).is_some();
                if known || matches!(request, Request::Heartbeat(_)) {
                    self.answered(p, request, answer);
                }
            }
            Happens::Resend(p, call) => {
                if let Some(request) = self.processes[p].calls.get(&call).cloned() {
                    self.fired.resent += 1;
                    self.send(p, call, request);
                    self.after(self.times.resend, Happens::Resend(p, call));
                }
            }
            Happens::Push(p, worker, directive) => self.heard(p, worker, directive),
            Happens::Arrive(p, token, op) => {
                if self.processes[p].token == token {
                    self.arrive(p, op);
                }
            }
            Happens::Met(p, token, generation, said) => {
                let whole = self.groups.get_mut(&generation).is_none_or(|group| said.is_none() || group.hear(p));
                if self.processes[p].token == token {
                    self.met(p, said.filter(|_| whole));
                }
            }
            Happens::Stalled(p, token, number) => {
                if self.processes[p].token == token {
                    self.stalled(p, number);
                }
            }
            Happens::Written(p, step) => self.written(p, step),
        }
    }

    // ---- network ----

    /// Calls until there is an answer.
    pub fn call(&mut self, p: usize, request: Request) {
        self.number += 1;
        let call = self.number;
        self.processes[p].calls.insert(call, request.clone());
        self.send(p, call, request);
        self.after(self.times.resend, Happens::Resend(p, call));
    }

    pub fn send_once(&mut self, p: usize, request: Request) {
        self.send(p, 0, request);
    }

    fn send(&mut self, p: usize, call: u64, request: Request) {
        if self.lost() {
            return;
        }
        let delay = self.delay();
        if self.draws.below(50) == 0 {
            self.fired.duplicated += 1;
            let again = self.delay() * 3;
            self.after(again, Happens::Request(p, call, request.clone()));
        }
        self.after(delay, Happens::Request(p, call, request));
    }

    fn lost(&mut self) -> bool {
        let lost = self.draws.below(1000) < self.weather.loss;
        self.fired.lost_messages += u64::from(lost);
        lost
    }

    pub fn delay(&mut self) -> u64 {
        self.draws.below(self.weather.delay) + 1
    }

    fn attend(&mut self, p: usize, worker: WorkerId) {
        if self.processes[p].worker != Some(worker) {
            return;
        }
        self.number += 1;
        let told = self.job.directive(worker);
        let attendance = Attendance { process: p, number: self.number, told: told.clone(), delivered: self.now };
        self.attendances.insert(worker, attendance);
        self.push(worker, told);
    }

    fn push(&mut self, worker: WorkerId, directive: Directive) {
        let delay = self.delay();
        let Some(attendance) = self.attendances.get_mut(&worker) else { return };
        attendance.told = directive.clone();
        attendance.delivered = attendance.delivered.max(self.now + delay);
        let (p, time) = (attendance.process, attendance.delivered - self.now);
        self.after(time, Happens::Push(p, worker, directive));
    }

    // ---- the coordinator ----

    fn serve(&mut self, p: usize, call: u64, request: Request) {
        let now = self.time();
        let answer = match request.clone() {
            Request::Join(name) => {
                let applicant = Applicant {
                    incarnation: Incarnation(name),
                    host: String::new(),
                    pid: p as u32,
                    device: "cpu".into(),
                    metrics_url: String::new(),
                };
                self.job.join(now, applicant).map(|(worker, effects)| {
                    self.carry_out(effects);
                    Reply::Joined(worker)
                })
            }
            Request::Heartbeat(beat) => {
                let (directive, effects) = self.job.heartbeat(now, beat);
                self.carry_out(effects);
                Ok(Reply::Order(directive))
            }
            Request::Ready { worker, generation, broken } => {
                self.job.ready(now, worker, (generation, broken)).map(|effects| {
                    self.carry_out(effects);
                    Reply::Done
                })
            }
            Request::Begin(beginning) => {
                let (generation, step) = (beginning.generation, beginning.step);
                let begun = self.job.begin(now, beginning);
                // a repeated message may come late
                if begun.is_ok() && self.begun < generation {
                    assert!(step >= self.committed, "a committed step is lost");
                    self.begun = generation;
                }
                begun.map(|records| {
                    self.fired.unreported += records.len() as u64;
                    records.into_iter().for_each(|record| self.journal(Some(record)));
                    Reply::Done
                })
            }
            Request::Report(report) => self.job.report(now, report).map(|record| {
                self.journal(record);
                Reply::Done
            }),
            Request::Commit { worker, generation, step } => match self.job.commit(worker, generation, step) {
                Ok(()) => {
                    self.commits.entry(step).or_default().push((p, call, request));
                    return self.tell();
                }
                Err(error) => Err(error),
            },
            Request::Evaluation { worker, generation, evaluation } => {
                self.job.evaluation(worker, generation, evaluation).map(|_| Reply::Done)
            }
            Request::Leave(worker, departure) => {
                self.done |= departure == Departure::Done;
                self.job.leave(now, worker, departure).map(|effects| {
                    self.carry_out(effects);
                    Reply::Done
                })
            }
        };
        self.reply(p, call, request, answer);
        self.tell();
    }

    fn reply(&mut self, p: usize, call: u64, request: Request, answer: Result<Reply, JobError>) {
        if !self.lost() {
            let delay = self.delay();
            self.after(delay, Happens::Reply(p, call, request, answer));
        }
    }

    fn journal(&mut self, record: Option<StepRecord>) {
        let Some(record) = record else { return };
        assert_eq!(record.step.0, self.journal.len() as u64 + 1, "the journal has no gap and no repeat");
        assert_eq!(record.tokens, self.reference[record.step.0 as usize], "nothing disturbs the curve");
        self.journal.push(record);
    }

    /// Ledgers that are complete, and orders that have changed.
    pub fn tell(&mut self) {
        for (step, ledger) in self.job.complete_commits() {
            self.check_ledger(step, &ledger);
            assert_eq!(self.disk.get(&step.0), Some(&self.reference[step.0 as usize]), "what is committed is durable");
            self.committed = self.committed.max(step);
            self.fired.commits += 1;
            for (p, call, request) in self.commits.remove(&step).unwrap_or_default() {
                self.reply(p, call, request, Ok(Reply::Done));
            }
        }
        let changed: Vec<(WorkerId, Directive)> = self
            .attendances
            .iter()
            .map(|(&worker, attendance)| (worker, attendance, self.job.directive(worker)))
            .filter(|(_, attendance, directive)| attendance.told != *directive)
            .map(|(worker, _, directive)| (worker, directive))
            .collect();
        for (worker, directive) in changed {
            self.push(worker, directive);
        }
    }

    pub fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Formed { generation, members } => {
                    assert_eq!(generation.0, self.generation.0 + 1);
                    self.generation = generation;
                    for (rank, &worker) in members.iter().enumerate() {
                        let place = self.job.member(worker, generation).unwrap();
                        assert_eq!(place.0 as usize, rank, "ranks are dense");
                        let mut here = self.processes.iter().filter(|process| process.worker == Some(worker));
                        let inside = here.any(|process| process.place.is_some());
                        assert!(!inside, "worker {worker} is still in the generation before");
                    }
                    self.fired.generations += 1;
                    self.groups.insert(generation, Group::new(members.len()));
                }
                Effect::Lost(loss) => *self.fired.losses.entry(loss.cause.label()).or_default() += 1,
                Effect::Dismissed(_) => self.fired.dismissed += 1,
                Effect::Ended(outcome) => assert!(self.outcome.replace(outcome).is_none(), "a job ends once"),
                Effect::Admitted(_) | Effect::Refused(_) | Effect::NewcomerLost(..) => {}
                Effect::Regrouping(_) | Effect::Stop(_) => {}
            }
        }
    }

    // ---- the collective ----

    pub fn enter_operation(&mut self, place: Place, entry: Entry) {
        let (p, op) = (entry.process, entry.op);
        let token = self.processes[p].token;
        let Some(group) = self.groups.get_mut(&place.generation) else { return };
        if group.is_broken() {
            return self.after(2, Happens::Met(p, token, place.generation, None));
        }
        let Some(said) = group.arrive(place.rank.0, entry) else { return };
        if let Op::Step(_) = op {
            assert_eq!(place.generation, self.generation, "an old generation trains");
        }
        for entry in said.iter() {
            let (p, delay) = (entry.process, self.draws.below(15) + 1);
            let token = self.processes[p].token;
            self.after(delay, Happens::Met(p, token, place.generation, Some(said.clone())));
        }
    }

    pub fn break_group(&mut self, generation: Generation, hard: bool) {
        let Some(group) = self.groups.get_mut(&generation) else { return };
        let (waiting, in_part) = group.break_up(hard.then_some(&mut self.draws));
        self.fired.ended_for_some += u64::from(in_part);
        // whoever has left waits no more
        let here = |p: &usize| self.processes[*p].place.is_some_and(|place| place.generation == generation);
        for p in waiting.into_iter().filter(here).collect::<Vec<_>>() {
            let (token, delay) = (self.processes[p].token, self.draws.below(40) + 1);
            self.after(delay, Happens::Met(p, token, generation, None));
        }
    }
}
