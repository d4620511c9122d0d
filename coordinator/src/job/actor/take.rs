//! What each command does to the job, and what is answered.
//!
//! Input: a [`Command`]. Output: answers, lines and entries of the turn. Invariant: an event of the membership goes to the job
//! through [`JobOwner::apply`] and its kin alone, so that no effect of it is forgotten.

use learn_domain::event::Happening;
use learn_domain::membership::{Departure, Directive, Effect};
use learn_domain::report::{Evaluation, Timed};
use learn_domain::{Generation, Step, WorkerId};
use learn_proto::convert::{Applicant, Beginning, Heartbeat, StepReport};
use tokio::sync::oneshot;

use super::{AskError, Command, JobOwner, Key, OwnerError, Reply, wall_time};
use crate::job::{JobError, figures};
use crate::journal::LineFile;

/// An event that has no other answer than that it was taken.
fn taken(effects: Vec<Effect>) -> ((), Vec<Effect>) {
    ((), effects)
}

impl JobOwner {
    pub(super) fn take(&mut self, command: Command) -> Result<(), OwnerError> {
        match command {
            Command::Join(applicant, reply) => self.join(applicant, reply)?,
            Command::Heartbeat(beat, reply) => self.heartbeat(beat, reply)?,
            Command::Attend(worker, reply) => {
                self.heard_of_one();
                let attendance = self.attendances.begin(worker, self.job.directive(worker));
                self.turn.answer(reply, attendance);
            }
            Command::Disconnected(worker, attendance) => self.disconnected(worker, attendance)?,
            Command::Ready { worker, generation, broken, reply } => {
                self.ready(worker, (generation, broken), reply)?;
            }
            Command::Begin(beginning, reply) => self.begin(beginning, reply)?,
            Command::Put(key, value, reply) => self.put(key, value, reply),
            Command::Get(key, reply) => self.get(key, reply),
            Command::Report(report, reply) => self.report(report, reply)?,
            Command::Commit(worker, generation, step, reply) => self.commit((worker, generation), step, reply),
            Command::Evaluation(worker, generation, evaluation, reply) => {
                self.evaluation((worker, generation), evaluation, reply)?;
            }
            Command::Event(worker, generation, happening, reply) => {
                self.event((worker, generation), happening, reply)?;
            }
            Command::Leave(worker, departure, reply) => self.leave(worker, departure, reply)?,
            Command::Stop(asked, reply) => {
                tracing::info!(how = ?asked, "the job is asked to stop");
                self.apply(|job, now| job.stop(now, asked))?;
                self.turn.answer(reply, ());
            }
            Command::NeverJoined(message, reply) => {
                tracing::warn!("{message}");
                self.apply(|job, now| job.never_joined(now, message))?;
                self.turn.answer(reply, ());
            }
            Command::Scale(workers, reply) => self.scale(workers, reply)?,
            Command::Status(reply) => {
                let status = self.job.status(self.now());
                self.turn.answer(reply, status);
            }
        }
        Ok(())
    }

    fn join(&mut self, applicant: Applicant, reply: Reply<Result<WorkerId, JobError>>) -> Result<(), OwnerError> {
        let answer = self.apply_or_refuse(|job, now| job.join(now, applicant))?;
        self.turn.answer(reply, answer);
        Ok(())
    }

    fn heartbeat(&mut self, beat: Heartbeat, reply: Reply<Directive>) -> Result<(), OwnerError> {
        self.heard_of_one();
        self.metrics.heartbeats_total.inc();
        let directive = self.apply_asked(|job, now| job.heartbeat(now, beat))?;
        self.turn.answer(reply, directive);
        Ok(())
    }

    fn disconnected(&mut self, worker: WorkerId, attendance: u64) -> Result<(), OwnerError> {
        // a worker that has come back by another connection is not lost
        if !self.attendances.end(worker, attendance) {
            return Ok(());
        }
        let excused = self.reunion.as_mut().is_some_and(|reunion| reunion.excuses(worker, attendance));
        if excused { Ok(()) } else { self.apply(|job, now| job.disconnected(now, worker)) }
    }

    fn ready(
        &mut self,
        worker: WorkerId,
        left: (Generation, Option<String>),
        reply: Reply<Result<(), JobError>>,
    ) -> Result<(), OwnerError> {
        let answer = self.apply_or_refuse(|job, now| job.ready(now, worker, left).map(taken))?;
        self.turn.answer(reply, answer);
        Ok(())
    }

    fn begin(&mut self, beginning: Beginning, reply: Reply<Result<(), JobError>>) -> Result<(), OwnerError> {
        let answer = self.job.begin(self.now(), beginning);
        self.forget_beyond()?;
        for record in answer.iter().flatten() {
            self.enter_step(record)?;
        }
        self.turn.answer(reply, answer.map(drop));
        Ok(())
    }

    fn put(&mut self, key: Key, value: Vec<u8>, reply: Reply<Result<(), AskError>>) {
        let member = self.job.running_member(key.worker, key.generation).map_err(AskError::from);
        let answer = member.and_then(|_| Ok(self.store.put(key.key.clone(), value.clone())?));
        if answer.is_ok() {
            self.turn.key(key.key, value);
        }
        self.turn.answer(reply, answer);
    }

    fn get(&mut self, key: Key, reply: Reply<Result<oneshot::Receiver<Vec<u8>>, JobError>>) {
        let answer = self.job.running_member(key.worker, key.generation).map(|_| {
            let (value, answer) = oneshot::channel();
            self.store.get(key.key, value);
            answer
        });
        self.turn.answer(reply, answer);
    }

    fn report(&mut self, report: StepReport, reply: Reply<Result<(), JobError>>) -> Result<(), OwnerError> {
        let answer = self.job.report(self.now(), report);
        self.forget_beyond()?;
        if let Ok(Some(record)) = &answer {
            self.enter_step(record)?;
            if let Some(since) = self.recovering.take() {
                self.metrics.recovery_seconds.observe(since.elapsed().as_secs_f64());
            }
        }
        self.turn.answer(reply, answer.map(drop));
        Ok(())
    }

    fn commit(
        &mut self,
        (worker, generation): (WorkerId, Generation),
        step: Step,
        reply: Reply<Result<oneshot::Receiver<()>, JobError>>,
    ) {
        let answer = self.job.commit(worker, generation, step).map(|()| {
            let (done, durable) = oneshot::channel();
            self.commits.entry(step).or_default().push(done);
            durable
        });
        self.turn.answer(reply, answer);
    }

    fn evaluation(
        &mut self,
        (worker, generation): (WorkerId, Generation),
        evaluation: Evaluation,
        reply: Reply<Result<(), JobError>>,
    ) -> Result<(), OwnerError> {
        let answer = self.job.evaluation(worker, generation, evaluation);
        self.forget_beyond()?;
        if let Ok(Some(evaluation)) = &answer {
            tracing::info!(split = %evaluation.split, step = %evaluation.step, metrics = ?evaluation.metrics, "evaluated");
            figures::evaluation(&self.metrics, evaluation);
            self.turn.line(LineFile::Evaluations, &Timed { time: Some(wall_time()), value: evaluation })?;
        }
        self.turn.answer(reply, answer.map(|_| ()));
        Ok(())
    }

    fn event(
        &mut self,
        (worker, generation): (WorkerId, Generation),
        happening: Happening,
        reply: Reply<Result<(), JobError>>,
    ) -> Result<(), OwnerError> {
        let answer = self.job.member(worker, generation).map(drop);
        if answer.is_ok() {
            self.note(generation, happening)?;
        }
        self.turn.answer(reply, answer);
        Ok(())
    }

    fn leave(
        &mut self,
        worker: WorkerId,
        departure: Departure,
        reply: Reply<Result<(), JobError>>,
    ) -> Result<(), OwnerError> {
        tracing::info!(%worker, ?departure, "worker leaves");
        let answer = self.apply_or_refuse(|job, now| job.leave(now, worker, departure).map(taken))?;
        self.turn.answer(reply, answer);
        Ok(())
    }

    fn scale(&mut self, workers: u32, reply: Reply<Result<u32, JobError>>) -> Result<(), OwnerError> {
        let answer = self.apply_or_refuse(|job, now| job.scale(now, workers).map(taken))?;
        let wanted = self.job.wanted();
        if answer.is_ok() {
            tracing::info!(workers = wanted, "workers are wanted");
        }
        self.turn.answer(reply, answer.map(|()| wanted));
        Ok(())
    }
}
