//! What a process does inside a generation, as `worker/src/train` does it.
//!
//! Input: what the collective gives. Output: reports, checkpoints, and the end of its part. Invariants, asserted here: all
//! ranks apply the same step to the same state, and the hash after each step is that of a job that nothing disturbs.

use std::collections::BTreeMap;

use learn_coordinator::job::{BooksError, JobError};
use learn_domain::membership::Departure;
use learn_domain::plan::contiguous_part;
use learn_domain::progress::Work;
use learn_domain::recovery::{Agreement, agree};
use learn_domain::report::{Evaluation, Split, StepRecord};
use learn_domain::{Generation, Rank, Step, UserIndex};
use learn_proto::convert::{AfterStep, Beginning, StepReport};

use crate::group::{Entry, Op, Said};
use crate::process::{Place, Reply, Request, Stage, State, Then, Write};
use crate::world::{Happens, World};

impl World {
    /// Takes part in an operation after a moment of work.
    pub fn meet(&mut self, p: usize, op: Op) {
        let work = match op {
            Op::Step(_) => self.draws.below(self.times.step) + self.times.step / 2,
            _ => self.draws.below(10) + 1,
        };
        let token = self.processes[p].token;
        self.after(work, Happens::Arrive(p, token, op));
    }

    pub fn arrive(&mut self, p: usize, op: Op) {
        let process = &mut self.processes[p];
        process.operations += 1;
        let (token, number) = (process.token, process.operations);
        let Some(place) = process.place else { return };
        let State { finished, saved, .. } = process.state;
        let unwritten = process.is_first() && process.write.is_none() && saved == Some(finished.0);
        let unwritten = unwritten && !self.disk.contains_key(&finished.0);
        let follow_up = matches!(process.agreement, Some(Agreement::GoOn { follow_up: true, .. }));
        let after = if process.stopped_here { AfterStep::Stop } else { process.after };
        let again = op == Op::Again && (unwritten || follow_up);
        let entry = Entry { process: p, op, state: process.state.clone(), after, again };
        self.after(self.times.collective, Happens::Stalled(p, token, number));
        self.enter_operation(place, entry);
    }

    pub fn stalled(&mut self, p: usize, number: u64) {
        if self.processes[p].operations == number && matches!(self.processes[p].stage, Stage::Member) {
            self.fired.collective_timeouts += 1;
            self.break_off(p, "timeout");
        }
    }

    /// An operation has ended for this rank.
    pub fn met(&mut self, p: usize, said: Option<Said>) {
        let Some(said) = said else { return self.break_off(p, "peer lost") };
        let process = &mut self.processes[p];
        process.operations += 1;
        let Some(place) = process.place else { return };
        match said[0].op {
            Op::Connect => self.meet(p, Op::Agree),
            Op::Agree => {
                let holdings: Vec<_> = said.iter().map(Entry::holding).collect();
                let agreement = agree(&holdings);
                process.agreement = Some(agreement);
                match agreement {
                    Agreement::Start | Agreement::GoOn { source: Some(_), .. } => self.meet(p, Op::Transfer),
                    Agreement::GoOn { source: None, .. } => self.begin(p),
                }
            }
            Op::Transfer => {
                let source = match process.agreement {
                    Some(Agreement::GoOn { source: Some(source), .. }) => source,
                    _ => 0,
                };
                if source != place.rank.0 as usize {
                    self.fired.transfers += u64::from(said[source].state.held);
                }
                process.state = said[source].state.clone();
                let follow_up = matches!(process.agreement, Some(Agreement::GoOn { follow_up: true, .. }));
                process.state.followed_up = !follow_up;
                if !process.state.held {
                    process.state = State { held: true, chain: self.reference[0], ..process.state.clone() };
                }
                self.begin(p);
            }
            Op::Again => {
                let first = process.is_first();
                process.begun = place.generation;
                process.writes = first;
                // whoever wrote this checkpoint may not have come to tell
                let State { finished, saved, .. } = process.state;
                let written = saved == Some(finished.0) && self.disk.contains_key(&finished.0);
                if first && written && process.write.is_none() {
                    self.fired.told_again += 1;
                    process.write = Some(Write::Untold(finished.0, Generation(0)));
                }
                if !first {
                    (process.write, process.next_write) = (None, None);
                }
                self.tell_commit(p);
                if said.iter().any(|entry| entry.again) {
                    self.fired.followed_up += 1;
                    let state = &mut self.processes[p].state;
                    (state.followed_up, state.saved) = (false, None);
                    self.after_step(p);
                } else {
                    self.next_step(p);
                }
            }
            Op::Step(step) => match said.iter().map(|entry| entry.after).max() {
                Some(AfterStep::Stop) => {
                    self.save(p, true);
                    self.finish(p, false);
                }
                Some(AfterStep::Regroup) => {
                    self.fired.yielded += 1;
                    self.quit(p, Then::Ready(None));
                }
                _ => self.finished_step(p, place, step, &said),
            },
            Op::Evaluate(split, step) => {
                if place.rank == Rank(0) {
                    self.processes[p].flushing = Some(Op::Heard(split, step));
                    self.report_evaluation(p, split, step);
                } else {
                    self.meet(p, Op::Heard(split, step));
                }
            }
            Op::Heard(Split::Valid, step) => self.followed_up(p, step),
            Op::Heard(Split::Test, _) => self.quit(p, Then::Leave(Departure::Done)),
        }
    }

    pub fn begin(&mut self, p: usize) {
        let process = &self.processes[p];
        let (Some(place), Some(worker)) = (process.place, process.worker) else { return };
        if place.rank == Rank(0) {
            let (step, last) = (process.state.finished, process.state.last.clone());
            self.call(p, Request::Begin(Beginning { worker, generation: place.generation, step, last }));
        } else {
            self.meet(p, Op::Again);
        }
    }

    pub fn begun(&mut self, p: usize, beginning: &Beginning, answer: Result<Reply, JobError>) {
        let present = self.processes[p].place.map(|place| place.generation) == Some(beginning.generation);
        match answer {
            Ok(_) if present => self.meet(p, Op::Again),
            Err(JobError::StaleGeneration { .. } | JobError::UnknownWorker(_)) if present => {
                self.break_off(p, "the generation has ended");
            }
            Ok(_) | Err(JobError::StaleGeneration { .. } | JobError::UnknownWorker(_)) => {}
            // whoever held the state was lost before the newcomers had it
            Err(error @ JobError::Books(BooksError::Behind { .. })) if present => {
                self.fired.state_lost += 1;
                self.quit(p, Then::Leave(Departure::Failed(error.to_string())));
            }
            Err(error) => panic!("a generation that cannot begin: {error}"),
        }
    }

    pub fn next_step(&mut self, p: usize) {
        let next = self.processes[p].state.finished.0 + 1;
        if next > self.total_steps {
            self.finish(p, true);
        } else {
            self.meet(p, Op::Step(next));
        }
    }

    pub fn finished_step(&mut self, p: usize, place: Place, step: u64, said: &Said) {
        for entry in said.iter() {
            let State { finished, chain, .. } = &entry.state;
            assert_eq!((finished.0, *chain), (step - 1, self.reference[finished.0 as usize]), "all apply the same");
        }
        let (epoch, users) = self.planned(step);
        let chain = self.apply(self.processes[p].state.chain, step, &users);
        assert_eq!(chain, self.reference[step as usize]);
        let process = &mut self.processes[p];
        let record = StepRecord {
            step: Step(step),
            epoch,
            generation: place.generation,
            users: users.len() as u32,
            tokens: chain,
            ..StepRecord::default()
        };
        let last = process.state.last.iter().cloned().chain([record.clone()]).collect();
        process.state = State { finished: Step(step), chain, followed_up: false, last, ..process.state.clone() };
        let part = contiguous_part(users.len(), place.rank.0 as usize, place.world_size as usize);
        let report = StepReport {
            worker: process.worker.unwrap(),
            generation: place.generation,
            step: Step(step),
            epoch,
            users: users[part].iter().copied().map(UserIndex).collect(),
            work: Work::default(),
            record: (place.rank == Rank(0)).then_some(record),
        };
        process.reports.push_back(Request::Report(report));
        self.deliver(p);
        self.after_step(p);
    }

    pub fn after_step(&mut self, p: usize) {
        let step = self.processes[p].state.finished.0;
        if step > 0 && (step == self.total_steps || step.is_multiple_of(self.steps_per_epoch)) {
            self.meet(p, Op::Evaluate(Split::Valid, step));
        } else {
            self.followed_up(p, step);
        }
    }

    pub fn followed_up(&mut self, p: usize, step: u64) {
        let epoch_end = step == self.total_steps || step.is_multiple_of(self.steps_per_epoch);
        if step > 0 && (epoch_end || step.is_multiple_of(self.checkpoint_every)) {
            self.save(p, step == self.total_steps);
        }
        self.processes[p].state.followed_up = true;
        self.next_step(p);
    }

    pub fn report_evaluation(&mut self, p: usize, split: Split, step: u64) {
        let process = &mut self.processes[p];
        let (Some(worker), Some(place)) = (process.worker, process.place) else { return };
        let evaluation = Evaluation {
            split,
            step: Step(step),
            epoch: 0,
            users: 1,
            metrics: BTreeMap::from([("chain".to_owned(), self.reference[step as usize] as f64)]),
            seconds: 0.0,
            segments: Vec::new(),
            comparisons: Vec::new(),
        };
        process.reports.push_back(Request::Evaluation { worker, generation: place.generation, evaluation });
        self.deliver(p);
    }

    /// Hands the state to the writer, on rank 0.
    pub fn save(&mut self, p: usize, kept: bool) {
        let process = &mut self.processes[p];
        let step = process.state.finished.0;
        if step == 0 || process.state.saved == Some(step) || (process.next_write.is_some() && !kept) {
            return;
        }
        process.state.saved = Some(step);
        if !process.writes {
            return;
        }
        if process.write.is_some() {
            process.next_write = Some(step);
        } else {
            self.write(p, step);
        }
    }

    pub fn write(&mut self, p: usize, step: u64) {
        self.processes[p].write = Some(Write::Disk(step));
        let time = self.draws.below(400) + 10;
        self.after(time, Happens::Written(p, step));
    }

    pub fn written(&mut self, p: usize, step: u64) {
        let process = &mut self.processes[p];
        if process.write != Some(Write::Disk(step)) {
            return;
        }
        self.disk.insert(step, self.reference[step as usize]);
        process.write = Some(Write::Untold(step, Generation(0)));
        self.tell_commit(p);
    }

    /// Tells the coordinator of a checkpoint, once in each generation until it listens.
    pub fn tell_commit(&mut self, p: usize) {
        let process = &mut self.processes[p];
        let (Some(worker), Some(place), Some(Write::Untold(step, tried))) =
            (process.worker, process.place, process.write)
        else {
            return;
        };
        if place.generation > tried && process.begun == place.generation {
            process.write = Some(Write::Told(step, place.generation));
            self.call(p, Request::Commit { worker, generation: place.generation, step: Step(step) });
        }
    }

    pub fn committed_or_not(&mut self, p: usize, told: (Generation, Step), answer: Result<Reply, JobError>) {
        let (generation, step) = told;
        let process = &mut self.processes[p];
        if process.write != Some(Write::Told(step.0, generation)) {
            return;
        }
        match answer {
            Err(JobError::StaleGeneration { .. } | JobError::UnknownWorker(_)) => {
                self.fired.stale += 1;
                process.write = Some(Write::Untold(step.0, generation));
                return self.tell_commit(p);
            }
            Ok(_) | Err(JobError::NotRankZero { .. } | JobError::Books(_)) => {}
            Err(error) => panic!("{error}"),
        }
        process.write = None;
        match process.next_write.take() {
            Some(next) => self.write(p, next),
            None => {
                if let Stage::Finishing { done } = process.stage {
                    self.finish(p, done);
                }
            }
        }
    }

    /// The end of a task; rank 0 waits for its writer.
    pub fn finish(&mut self, p: usize, done: bool) {
        let process = &mut self.processes[p];
        if process.is_first() && process.writes && process.write.is_some() {
            process.stage = Stage::Finishing { done };
        } else if done {
            process.stage = Stage::Member;
            self.meet(p, Op::Evaluate(Split::Test, self.total_steps));
        } else {
            self.quit(p, Then::Leave(Departure::Stopped));
        }
    }
}
