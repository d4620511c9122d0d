//! One worker process, as the coordinator and its peers see it.
//!
//! Input: replies, pushed directives, what the collective gives, time. Output: calls, arrivals at the collective,
//! checkpoints. It follows `worker/src/session` and `worker/src/train`, with a hash of everything applied so far in the
//! place of parameters.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use learn_coordinator::job::JobError;
use learn_domain::membership::{Call, Departure, Directive, Refusal};
use learn_domain::recovery::Agreement;
use learn_domain::report::{Evaluation, StepRecord};
use learn_domain::{Generation, Rank, Step, WorkerId};
use learn_proto::convert::{AfterStep, Beginning, Heartbeat, StepReport};

use crate::group::Op;
use crate::world::{Happens, World};

/// What training has made so far.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub held: bool,
    pub finished: Step,
    /// Hash of all that was applied, in order.
    pub chain: u64,
    pub followed_up: bool,
    pub saved: Option<u64>,
    pub last: Vec<StepRecord>,
}

#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub generation: Generation,
    pub rank: Rank,
    pub world_size: u32,
}

#[derive(Clone, Debug)]
pub enum Request {
    Join(String),
    Heartbeat(Heartbeat),
    Ready { worker: WorkerId, generation: Generation, broken: Option<String> },
    Begin(Beginning),
    Report(StepReport),
    Commit { worker: WorkerId, generation: Generation, step: Step },
    Evaluation { worker: WorkerId, generation: Generation, evaluation: Evaluation },
    Leave(WorkerId, Departure),
}

#[derive(Clone, Debug)]
pub enum Reply {
    Joined(WorkerId),
    Order(Directive),
    Done,
}

/// Why a generation was aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    Regroup,
    Leave,
    Rejoin,
}

/// What comes when the reports of a generation are delivered.
#[derive(Clone, Debug)]
pub enum Then {
    Ready(Option<String>),
    Leave(Departure),
}

#[derive(Clone, Debug)]
pub enum Stage {
    Joining,
    Preparing,
    Ready,
    Waiting,
    Member,
    /// Rank 0 waits for its writer before it leaves.
    Finishing {
        done: bool,
    },
    Draining(Then),
    Leaving,
    Gone,
}

/// The checkpoint that is being written, and how far that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Disk(u64),
    /// On disk; the coordinator is being told as a member of this generation.
    Told(u64, Generation),
    /// To be told as a member of a generation after this one.
    Untold(u64, Generation),
}

#[derive(Debug)]
pub struct Process {
    pub alive: bool,
    pub paused: bool,
    pub deferred: Vec<Happens>,
    pub worker: Option<WorkerId>,
    pub place: Option<Place>,
    pub state: State,
    pub stopped_here: bool,
    /// Changes when a generation is left, so that what was meant for it does nothing any more.
    pub token: u64,
    pub calls: BTreeMap<u64, Request>,
    pub tries: u32,
    pub stage: Stage,
    pub heard: Directive,
    pub after: AfterStep,
    pub abort: Option<Abort>,
    pub left: Generation,
    pub operations: u64,
    pub agreement: Option<Agreement>,
    pub reports: VecDeque<Request>,
    pub reporting: bool,
    /// What is met when all reports are delivered.
    pub flushing: Option<Op>,
    pub writes: bool,
    pub write: Option<Write>,
    pub next_write: Option<u64>,
    pub begun: Generation,
}

impl Process {
    pub fn new() -> Self {
        Self {
            alive: true,
            paused: false,
            deferred: Vec::new(),
            worker: None,
            place: None,
            state: State { followed_up: true, ..State::default() },
            stopped_here: false,
            token: 0,
            calls: BTreeMap::new(),
            tries: 0,
            stage: Stage::Joining,
            heard: Directive::Wait,
            after: AfterStep::Continue,
            abort: None,
            left: Generation(0),
            operations: 0,
            agreement: None,
            reports: VecDeque::new(),
            reporting: false,
            flushing: None,
            writes: false,
            write: None,
            next_write: None,
            begun: Generation(0),
        }
    }

    pub fn is_first(&self) -> bool {
        self.place.is_some_and(|place| place.rank == Rank(0))
    }
}

impl World {
    /// Asks for a place in the job.
    pub fn enter(&mut self, p: usize) {
        let process = &mut self.processes[p];
        process.tries += 1;
        process.stage = Stage::Joining;
        process.worker = None;
        process.calls.clear();
        if let Some(Write::Told(step, _) | Write::Untold(step, _)) = process.write {
            process.write = Some(Write::Untold(step, Generation(0)));
        }
        let incarnation = format!("{p}-{}", process.tries);
        self.call(p, Request::Join(incarnation));
    }

    pub fn beat(&mut self, p: usize, worker: WorkerId) {
        let process = &self.processes[p];
        if process.worker != Some(worker) {
            return;
        }
        let beat = Heartbeat { worker, step: process.state.finished, ..Heartbeat::default() };
        self.send_once(p, Request::Heartbeat(beat));
        self.after(self.times.beat, Happens::Beat(p, worker));
    }

    /// An answer to a call that is still open.
    pub fn answered(&mut self, p: usize, request: Request, answer: Result<Reply, JobError>) {
        match (request, answer) {
            (Request::Join(_), Ok(Reply::Joined(worker))) => self.joined(p, worker),
            (Request::Join(_), Err(JobError::Refused(Refusal::Full))) => {
                self.after(1000, Happens::Enter(p));
            }
            (Request::Join(_), Err(JobError::Refused(Refusal::Over))) => self.exit(p),
            (Request::Heartbeat(beat), Ok(Reply::Order(directive))) => self.heard(p, beat.worker, directive),
            (Request::Ready { .. }, Ok(_) | Err(JobError::UnknownWorker(_))) => {
                self.processes[p].stage = Stage::Waiting;
                self.look(p);
            }
            (Request::Begin(beginning), answer) => self.begun(p, &beginning, answer),
            (Request::Report(_) | Request::Evaluation { .. }, answer) => {
                self.ended_only(answer);
                let process = &mut self.processes[p];
                process.reports.pop_front();
                process.reporting = false;
                self.deliver(p);
            }
            (Request::Commit { generation, step, .. }, answer) => self.committed_or_not(p, (generation, step), answer),
            (Request::Leave(..), _) => self.exit(p),
            (request, answer) => panic!("{request:?}: {answer:?}"),
        }
    }

    /// The only refusals of a member's message are those of an ended generation.
    fn ended_only(&mut self, answer: Result<Reply, JobError>) {
        match answer {
            Ok(_) => {}
            Err(JobError::StaleGeneration { .. }) => self.fired.stale += 1,
            Err(JobError::UnknownWorker(_)) => self.fired.unknown += 1,
            Err(error) => panic!("{error}"),
        }
    }

    fn joined(&mut self, p: usize, worker: WorkerId) {
        let process = &mut self.processes[p];
        process.worker = Some(worker);
        process.heard = Directive::Wait;
        process.left = Generation(0);
        process.abort = None;
        process.stage = Stage::Preparing;
        let prepare = if process.state.held { 1 } else { self.draws.below(1500) + 20 };
        let connect = self.draws.below(30) + 1;
        self.after(connect, Happens::Attend(p, worker));
        self.after(1, Happens::Beat(p, worker));
        self.after(prepare, Happens::Prepared(p, worker));
    }

    pub fn prepared(&mut self, p: usize, worker: WorkerId) {
        if self.processes[p].worker == Some(worker) && matches!(self.processes[p].stage, Stage::Preparing) {
            self.ready(p, None);
        }
    }

    fn ready(&mut self, p: usize, broken: Option<String>) {
        let process = &mut self.processes[p];
        process.stage = Stage::Ready;
        let Some(worker) = process.worker else { return };
        let generation = process.left;
        self.call(p, Request::Ready { worker, generation, broken });
    }

    /// An order, by a heartbeat or the open call.
    pub fn heard(&mut self, p: usize, worker: WorkerId, directive: Directive) {
        let process = &mut self.processes[p];
        if process.worker != Some(worker) {
            return;
        }
        let present = process.place.map(|place| place.generation);
        match &directive {
            Directive::Run { generation, call, .. } if Some(*generation) == present => {
                let after = match call {
                    Call::Continue => AfterStep::Continue,
                    Call::Regroup => AfterStep::Regroup,
                    Call::Stop(_) => AfterStep::Stop,
                };
                process.after = process.after.max(after);
            }
            Directive::Regroup(generation) if Some(*generation) == present => {
                process.abort.get_or_insert(Abort::Regroup);
            }
            Directive::Stop(_) => process.abort = Some(Abort::Leave),
            Directive::Unknown if process.abort != Some(Abort::Leave) => process.abort = Some(Abort::Rejoin),
            _ => {}
        }
        let overtaken = match (&directive, &process.heard) {
            (Directive::Run { generation: old, .. }, Directive::Run { generation: new, .. }) => old < new,
            _ => false,
        };
        if !overtaken {
            process.heard = directive;
        }
        if process.abort.is_some() && process.place.is_some() {
            self.break_off(p, "aborted");
        } else if matches!(self.processes[p].stage, Stage::Waiting) {
            self.look(p);
        }
    }

    /// What a worker without a generation does with what it has heard.
    fn look(&mut self, p: usize) {
        let process = &mut self.processes[p];
        let left = process.left;
        match process.heard.clone() {
            Directive::Run { generation, rank, world_size, call } if generation > left => {
                process.place = Some(Place { generation, rank, world_size });
                process.left = generation;
                process.token += 1;
                process.abort = None;
                process.after = match call {
                    Call::Continue => AfterStep::Continue,
                    Call::Regroup => AfterStep::Regroup,
                    Call::Stop(_) => AfterStep::Stop,
                };
                process.stage = Stage::Member;
                self.meet(p, Op::Connect);
            }
            Directive::Stop(_) => self.leave(p, Departure::Failed("aborted".into())),
            Directive::Dismissed => self.leave(p, Departure::Done),
            Directive::Unknown => {
                self.fired.rejoined += u64::from(process.state.held);
                self.enter(p);
            }
            _ if process.stopped_here => self.leave(p, Departure::Stopped),
            Directive::Wait | Directive::Run { .. } | Directive::Regroup(_) => {}
        }
    }

    pub fn leave(&mut self, p: usize, departure: Departure) {
        let process = &mut self.processes[p];
        process.stage = Stage::Leaving;
        let Some(worker) = process.worker else { return self.exit(p) };
        self.call(p, Request::Leave(worker, departure));
    }

    fn exit(&mut self, p: usize) {
        self.processes[p].stage = Stage::Gone;
        self.end_process(p);
    }

    pub fn break_off(&mut self, p: usize, why: &str) {
        let then = match self.processes[p].abort {
            Some(Abort::Leave) => Then::Leave(Departure::Failed("aborted".into())),
            _ => Then::Ready(Some(why.to_owned())),
        };
        self.quit(p, then);
    }

    /// Leaves the generation; its reports are delivered first.
    pub fn quit(&mut self, p: usize, then: Then) {
        let process = &mut self.processes[p];
        process.token += 1;
        process.stage = Stage::Draining(then);
        process.flushing = None;
        let hard = !matches!(
            process.stage,
            Stage::Draining(Then::Ready(None) | Then::Leave(Departure::Done | Departure::Stopped))
        );
        if let Some(place) = process.place.take() {
            self.break_group(place.generation, hard);
        }
        self.processes[p].calls.retain(|_, request| !matches!(request, Request::Begin(_)));
        self.drained(p);
    }

    pub fn deliver(&mut self, p: usize) {
        let process = &mut self.processes[p];
        if process.reporting {
            return;
        }
        match process.reports.front().cloned() {
            Some(report) => {
                process.reporting = true;
                self.call(p, report);
            }
            None => self.drained(p),
        }
    }

    pub fn drained(&mut self, p: usize) {
        let process = &mut self.processes[p];
        if !process.reports.is_empty() {
            return;
        }
        if let Some(op) = process.flushing.take() {
            return self.meet(p, op);
        }
        match process.stage.clone() {
            Stage::Draining(Then::Ready(_)) if process.abort == Some(Abort::Rejoin) => {
                self.fired.rejoined += 1;
                self.enter(p);
            }
            Stage::Draining(Then::Ready(_)) if process.abort == Some(Abort::Leave) => {
                self.leave(p, Departure::Failed("aborted".into()));
            }
            Stage::Draining(Then::Ready(broken)) => self.ready(p, broken),
            Stage::Draining(Then::Leave(departure)) => self.leave(p, departure),
            _ => {}
        }
    }

    /// It panics, and says so with its last breath.
    pub fn crash(&mut self, p: usize) {
        let process = &mut self.processes[p];
        process.calls.clear();
        process.reports.clear();
        process.reporting = false;
        let Some(worker) = process.worker else { return self.exit(p) };
        process.token += 1;
        process.stage = Stage::Leaving;
        if let Some(place) = process.place.take() {
            self.break_group(place.generation, true);
        }
        self.call(p, Request::Leave(worker, Departure::Crashed("it panicked".into())));
    }

    /// Whether a fault that strikes this process strikes a generation.
    pub fn takes_part(&self, p: usize) -> bool {
        self.processes[p].place.is_some()
    }

    pub fn still_there(&self) -> Vec<String> {
        let alive = self.processes.iter().enumerate().filter(|(_, process)| process.alive);
        alive.map(|(p, process)| format!("{p}: {:?} {:?} {:?}", process.worker, process.stage, process.heard)).collect()
    }
}

/// Virtual time.
pub fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
