//! Checkpoints of a training: what goes into one, and what happens when it cannot be written.
//!
//! Input: the state after the last finished step. Output: a snapshot for the writer, on rank 0. Invariants: training waits
//! a moment at most for a slow disk, but for a checkpoint that is to be kept (the best, the last); whatever waits for the
//! writer stops waiting when its generation ends, since the writer may wait for the next; a checkpoint that could not be
//! written is an event, and only that of the end is an error, after it was tried again.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use learn_collective::{CollectiveError, Rendezvous};
use learn_domain::Phase;
use learn_domain::event::Happening;
use learn_model::Parameters;
use tch::{Device, Tensor};

use super::meet::{FOREVER, one_says};
use super::{Stepper, Trainer};
use crate::checkpoint::{self, CheckpointError, Pace, Snapshot, State, Writer, Written};
use crate::control::{ControlError, Member};
use crate::error::WorkerError;
use crate::session::{Session, Signals, Turn};

/// Pauses before the last checkpoint is tried again.
const RETRIES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];

/// How often a wait for the writer looks whether the generation is still there.
const LOOK: Duration = Duration::from_millis(100);

/// By this key rank 0 says that the last checkpoint is durable, or could not be written.
const SETTLED: &str = "settled";

/// A checkpoint that is due by the interval holds the training back so long at most.
const HOLD_BACK: Duration = Duration::from_secs(1);

/// How much a checkpoint is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// By the interval: left out if one is still being written and another waits.
    Due,
    /// The best or the last one: waits its turn.
    Kept,
}

impl Trainer<'_> {
    /// Hands the state after the last finished step to the writer, once; never parameters that are not finite.
    ///
    /// # Errors
    /// If the generation was ended while this waited for the writer; or the writer has ended.
    pub(super) fn save(&mut self, turn: &Turn, need: Need) -> Result<(), WorkerError> {
        if self.saved == Some(self.finished) || !self.finite() {
            return Ok(());
        }
        self.hold();
        if need == Need::Due && self.writer.as_mut().is_some_and(|writer| !writer.ready(HOLD_BACK)) {
            turn.member.report_event(&Happening::CheckpointSkipped { step: self.finished })?;
            return Ok(());
        }
        let Some(writer) = &mut self.writer else {
            self.saved = Some(self.finished);
            return Ok(());
        };
        self.session.progress.enter(Phase::Checkpoint);
        wait_for_place(writer, &self.session.signals)?;
        self.saved = Some(self.finished);
        let (dataset, stepper) = (&self.session.admission.dataset, &self.stepper);
        let state = State {
            version: checkpoint::VERSION,
            step: self.finished,
            epoch: (self.finished.0 / self.steps_per_epoch) as u32,
            fingerprint: dataset.fingerprint.clone(),
            embeddings_fingerprint: dataset.embeddings_fingerprint.clone(),
            input_dim: dataset.embedding_dim,
            signature: signature(&stepper.parameters),
            optimizer_step: stepper.optimizer.steps(),
            best: self.best.clone(),
            init: self.init.clone(),
            non_finite: self.non_finite,
            config: self.config.clone(),
            files: std::collections::BTreeMap::new(),
        };
        writer.save(snapshot(state, stepper))?;
        Ok(())
    }

    /// Waits on every rank until the checkpoint of the last finished step is durable; it is tried again if it could not be
    /// written.
    ///
    /// # Errors
    /// [`WorkerError::Unsaved`] on rank 0, as the others need not know; or that the generation was ended meanwhile: the
    /// coordinator records a checkpoint when all ranks have reported its step, and the next generation does so for one that
    /// is lost.
    pub(super) fn finish(&mut self, turn: &Turn) -> Result<(), WorkerError> {
        self.session.progress.enter(Phase::Finishing);
        let written = self.settle_last(turn);
        when_settled(&turn.member, turn.is_first(), written, FOREVER)
    }

    /// The part of a rank that has a writer.
    fn settle_last(&mut self, turn: &Turn) -> Result<(), WorkerError> {
        let mut pauses = RETRIES.iter();
        while let Some(writer) = &mut self.writer {
            let Err(error) = settle(writer, &self.session.signals)? else { break };
            let Some(pause) = pauses.next() else { return Err(WorkerError::Unsaved(error)) };
            std::thread::sleep(*pause);
            self.saved = None;
            self.save(turn, Need::Kept)?;
        }
        Ok(())
    }
}

/// Waits until a snapshot can be handed over.
///
/// # Errors
/// If the generation was ended meanwhile.
fn wait_for_place(writer: &mut Writer, signals: &Signals) -> Result<(), CollectiveError> {
    while !writer.ready(LOOK) {
        if signals.aborted().is_some() {
            return Err(CollectiveError::Aborted);
        }
    }
    Ok(())
}

/// Waits until everything handed over is durable or has failed; gives why the newest snapshot could not be written.
///
/// # Errors
/// If the generation was ended meanwhile; the writer is as it was.
pub(super) fn settle(writer: &mut Writer, signals: &Signals) -> Result<Result<(), CheckpointError>, CollectiveError> {
    loop {
        if let Some(settled) = writer.settle_within(LOOK) {
            return Ok(settled);
        }
        if signals.aborted().is_some() {
            return Err(CollectiveError::Aborted);
        }
    }
}

/// Lets every rank go on once the first one has come to the end of its writing, however that was; the others wait so long at
/// most.
fn when_settled(
    rendezvous: &dyn Rendezvous,
    is_first: bool,
    written: Result<(), WorkerError>,
    wait: Duration,
) -> Result<(), WorkerError> {
    // the generation has ended, and the others hear of that
    if written.as_ref().is_err_and(|error| error.reach().passes()) {
        return written;
    }
    one_says(rendezvous, SETTLED, is_first.then(Vec::new), wait)?;
    written
}

/// A copy of the whole state that the next step does not change.
pub(crate) fn snapshot(state: State, stepper: &Stepper) -> Snapshot {
    let model = stepper.parameters.iter().map(|(name, tensor)| (name.to_owned(), tensor.detach()));
    let optimizer = stepper.optimizer.state(&stepper.parameters);
    Snapshot { state, model: on_cpu(model), optimizer: on_cpu(optimizer) }
}

/// Copies that the next step does not change.
pub(super) fn on_cpu(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Vec<(String, Tensor)> {
    let copy = |(name, tensor): (String, Tensor)| match tensor.device() {
        Device::Cpu => (name, tensor.copy()),
        // what comes from a GPU is a copy
        _ => (name, tensor.to_device(Device::Cpu)),
    };
    tensors.into_iter().map(copy).collect()
}

pub(super) fn signature(parameters: &Parameters) -> String {
    format!("{:016x}", parameters.signature())
}

/// The member of the present generation, for a writer that outlives generations.
#[derive(Clone, Default)]
pub(super) struct Speaker(Arc<(Mutex<Option<Member>>, Condvar)>);

impl Speaker {
    /// Another generation has begun.
    pub(super) fn set(&self, member: Member) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(member);
        self.0.1.notify_all();
    }

    /// Says something as the present member, and if its generation had ended before, or the coordinator had lost it, once
    /// more in the next; `patience` is how long that may take to come.
    fn say(&self, patience: Duration, what: impl Fn(&Member) -> Result<(), ControlError>) -> Result<(), ControlError> {
        let mut member = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let Some(present) = member.clone() else { return Err(ControlError::Silent) };
            drop(member);
            let error = match what(&present) {
                Err(error @ (ControlError::Ended { .. } | ControlError::Unknown { .. })) => error,
                said => return said,
            };
            let same = |known: &mut Option<Member>| {
                known.as_ref().is_some_and(|known| known.place.generation == present.place.generation)
            };
            let known = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (known, waited) =
                self.0.1.wait_timeout_while(known, patience, same).unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return Err(error);
            }
            member = known;
        }
    }
}

pub(super) fn start_writer(session: &Session, speaker: Speaker) -> Writer {
    let (metrics, config) = (session.metrics.clone(), &session.admission.config);
    let patience = config.cluster.stop_within();
    Writer::start(
        session.run_dir(),
        config.checkpoint.keep_last,
        Pace::beside(session.device),
        || (),
        move |written| match written {
            Written::Committed { step, path, duration, .. } => {
                metrics.checkpoint_seconds.observe(duration.as_secs_f64());
                let path = path.display().to_string();
                match speaker.say(patience, |member| member.commit_checkpoint(step, path.clone())) {
                    Ok(()) => true,
                    Err(error) => {
                        tracing::warn!(%error, %step, "the coordinator was not told of a checkpoint");
                        // away, it has not said that others have gone on
                        matches!(error, ControlError::Away { .. })
                    }
                }
            }
            Written::Failed { step, error } => {
                let reason = error.to_string();
                tracing::error!(%step, reason, "a checkpoint could not be written; training goes on");
                let happening = Happening::CheckpointFailed { step, reason };
                if let Err(error) = speaker.say(patience, |member| member.report_event(&happening)) {
                    tracing::warn!(%error, %step, "the coordinator was not told of a failed checkpoint");
                }
                false
            }
        },
    )
}

#[cfg(test)]
mod tests;
