//! The beginning of a generation: all ranks come to the same state.
//!
//! Input: what each rank holds. Output: trainers that go on from the same finished step with the same bits, and a
//! coordinator that knows it. Invariants: `learn_domain::recovery` decides; no state is read from disk, but for a job that starts,
//! and then by rank 0; a rank whose generation breaks here still holds what it held, or the whole of what it was given.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use learn_collective::{CollectiveError, Rendezvous};
use learn_domain::Step;
use learn_domain::config::ObjectiveKind;
use learn_domain::random;
use learn_domain::recovery::{Agreement, Holding, agree};
use learn_domain::report::StepRecord;
use learn_proto::convert::cut;
use serde::{Deserialize, Serialize};

use super::meet::{FOREVER, one_says};
use super::objective::{FullSoftmax, InBatch, Objective};
use super::save::{settle, signature, start_writer};
use super::{Exchange, Stepper, Trainer};
use crate::checkpoint::{self, Best, Snapshot, Superseding, Writer};
use crate::error::WorkerError;
use crate::init::{Origin, Weights};
use crate::session::{Signals, Turn};

/// Most items of the catalogue that a fresh start measures.
const INIT_SAMPLE: usize = 16_384;

/// What a trainer holds besides parameters and moments, as one rank gives it to the others.
#[derive(Debug, Serialize, Deserialize)]
struct Counters {
    finished: Step,
    optimizer_steps: u64,
    last: VecDeque<StepRecord>,
    best: Option<Best>,
    init: Option<Origin>,
    saved: Option<Step>,
    non_finite: u32,
    superseding: Superseding,
}

/// By this key rank 0 says that it has what the job starts with, with an empty text, or why not.
const BEGUN: &str = "begun";

/// Numbers by which a rank says what it holds.
const SAID: usize = 5;

impl Trainer<'_> {
    /// Brings this rank to where the generation goes on from.
    pub(super) fn begin(&mut self, turn: &mut Turn) -> Result<(), WorkerError> {
        // of a step that was not brought to its end
        turn.exchange.share_gradient_memory(&mut self.stepper.parameters)?;
        drop(self.stepper.parameters.row_gradient());
        let (holdings, writing) = self.tell_holdings(&mut turn.exchange)?;
        let agreement = agree(&holdings);
        let goes_on = agreement != Agreement::Start;
        let follow_up = match agreement {
            Agreement::Start => {
                let started = match self.resume_from {
                    // what is read and measured here comes to the others
                    _ if !turn.is_first() => Ok(()),
                    Some(path) => self.restore(path),
                    None => self.initialize(),
                };
                // nothing of it is made a second time, should this generation break before all have it
                self.has_state = turn.is_first() && started.is_ok();
                as_rank_0(&turn.member, turn.is_first(), started, FOREVER)?;
                self.take_over(&mut turn.exchange, 0)?;
                self.has_state = true;
                false
            }
            Agreement::GoOn { finished, source, follow_up } => {
                if let Some(source) = source {
                    tracing::info!(step = %finished, source, "taking over the state of the most advanced rank");
                    self.take_over(&mut turn.exchange, source)?;
                    self.has_state = true;
                }
                // known to all from here on, should this generation break before it is done
                self.followed_up = !follow_up;
                follow_up
            }
        };
        self.session.progress.finished(self.finished);
        self.replace_objective(&turn.exchange)?;
        let mine = turn.is_first();
        if mine {
            turn.member.begin(self.finished, self.last.iter().cloned().collect())?;
            // all ranks have what was read, and the coordinator agrees that the job goes on from it
            self.superseding.carry_out(&self.session.run_dir())?;
        }
        self.speaker.set(turn.member.clone());
        if !mine {
            retire(&mut self.writer, &self.session.signals)?;
        }
        await_retired(&turn.member, turn.exchange.rank(), &writing, FOREVER)?;
        if mine && self.writer.is_none() {
            self.writer = Some(start_writer(self.session, self.speaker.clone()));
        }
        self.hold();
        // the rank that was to write the checkpoint of this step, or to tell of it, may be gone
        let due = goes_on && self.saved == Some(self.finished) && self.writer.as_mut().is_some_and(Writer::is_idle);
        let path = self.session.run_dir().checkpoint(self.finished);
        let unwritten = due && !path.exists();
        if due && !unwritten {
            turn.member.commit_checkpoint(self.finished, path.display().to_string())?;
        }
        let mut again = [i64::from(unwritten || follow_up)];
        turn.exchange.sum_i64(&mut again)?;
        // the first rank has come here, too; before, it may be lost, and another be the first
        self.superseding = Superseding::default();
        if goes_on {
            self.mend_best(turn)?;
        }
        if again[0] > 0 {
            self.followed_up = false;
            self.saved = None;
            self.after_step(turn)?;
        }
        Ok(())
    }

    /// What every rank holds, in rank order; and the ranks that were the first before, and still write checkpoints.
    ///
    /// # Errors
    /// [`WorkerError::Signature`] if a rank has other parameters, or would sum their gradient in other parts.
    fn tell_holdings(&mut self, exchange: &mut Exchange) -> Result<(Vec<Holding>, Vec<usize>), WorkerError> {
        let writes = exchange.rank() > 0 && self.writer.as_mut().is_some_and(|writer| !writer.is_idle());
        let parameters = &self.stepper.parameters;
        let signature = random::key(&[parameters.signature(), parameters.bucket_signature()]) as i64;
        let (state, followed_up) = (i64::from(self.has_state), i64::from(self.followed_up));
        let mut mine: [i64; SAID] = [signature, state, self.finished.0 as i64, followed_up, i64::from(writes)];
        let all = exchange.gather_i64(&mut mine, &vec![SAID; exchange.world_size()])?;
        if all.chunks_exact(SAID).any(|said| said[0] != signature) {
            return Err(WorkerError::Signature);
        }
        let holding = |said: &[i64]| Holding {
            state: said[1] != 0,
            finished: Step(said[2].max(0) as u64),
            followed_up: said[3] != 0,
        };
        let writing = all.chunks_exact(SAID).enumerate().filter(|(_, said)| said[4] != 0).map(|(rank, _)| rank);
        Ok((all.chunks_exact(SAID).map(holding).collect(), writing.collect()))
    }

    /// Gives all ranks the state of `source`. Values come into copies first, so that a rank whose generation breaks
    /// meanwhile keeps its own.
    fn take_over(&mut self, exchange: &mut Exchange, source: usize) -> Result<(), WorkerError> {
        let counters = Counters {
            finished: self.finished,
            optimizer_steps: self.stepper.optimizer.steps(),
            last: self.last.clone(),
            best: self.best.clone(),
            init: self.init.clone(),
            saved: self.saved,
            non_finite: self.non_finite,
            superseding: self.superseding.clone(),
        };
        let counters = exchange.broadcast_json(source, &counters)?;
        let parameters = &self.stepper.parameters;
        let mut held = vec![parameters.flat().shallow_clone()];
        held.extend(parameters.item_vectors().map(tch::Tensor::shallow_clone));
        held.extend(self.stepper.optimizer.buffers());
        let mut given = Vec::new();
        for tensor in &held {
            let mut copy = tensor.detach().copy();
            exchange.broadcast(source, &mut copy)?;
            given.push(copy);
        }
        tch::no_grad(|| held.iter_mut().zip(&given).for_each(|(held, given)| held.copy_(given)));
        self.stepper.optimizer.continue_after(counters.optimizer_steps);
        self.finished = counters.finished;
        self.followed_up = true;
        self.last = counters.last;
        self.best = counters.best;
        self.init = counters.init;
        self.saved = counters.saved;
        self.non_finite = counters.non_finite;
        self.superseding = counters.superseding;
        Ok(())
    }

    /// Makes the objective for this generation's division of the catalogue, in the place of the last one's.
    fn replace_objective(&mut self, exchange: &Exchange) -> Result<(), WorkerError> {
        let Self { config, session, evaluator, popularity, stepper, .. } = self;
        stepper.objective.replace(|| {
            Ok(match config.objective.kind {
                _ if config.training.freeze_towers => Objective::Frozen,
                ObjectiveKind::DenseAllAction | ObjectiveKind::NextItem => {
                    Objective::InBatch(InBatch::new(&config.objective, popularity.as_deref(), session.device))
                }
                ObjectiveKind::FullSoftmax => {
                    Objective::FullSoftmax(FullSoftmax::new(&config.objective, evaluator.own_items(exchange)?))
                }
            })
        })
    }

    /// What a fresh start does beyond random weights: takes those of `training.init`, measures what is not among them.
    fn initialize(&mut self) -> Result<(), WorkerError> {
        let Stepper { model, parameters, .. } = &mut self.stepper;
        let mut measured = model.measured();
        if let Some(path) = &self.config.training.init {
            let weights = Weights::open(path)?;
            self.init = Some(weights.origin.clone());
            let dataset = &self.session.admission.dataset.fingerprint;
            let used = weights.apply(parameters, (model.shape(), dataset), self.config.training.init_partial)?;
            tracing::info!(path = %path.display(), "{used}");
            measured.retain(|name| used.fresh.iter().any(|fresh| fresh == name));
        }
        if !measured.is_empty() {
            let sample = self.evaluator.sample_items(INIT_SAMPLE)?;
            model.measure(parameters, &sample, &measured);
        }
        Ok(())
    }

    /// Takes over parameters, moments and counters of a checkpoint.
    fn restore(&mut self, path: &Path) -> Result<(), WorkerError> {
        let signature = signature(&self.stepper.parameters);
        let dataset = &self.session.admission.dataset;
        let expected = checkpoint::Expected { dataset, signature: Some(&signature) };
        let Snapshot { state, model, optimizer } = checkpoint::read(path, Some(&expected))?;
        self.superseding = Superseding::by(&state);
        self.stepper.parameters.assign(model)?;
        self.stepper.optimizer.load_state(&self.stepper.parameters, optimizer, state.optimizer_step)?;
        self.finished = state.step;
        self.saved = Some(state.step);
        self.best = state.best_there(&self.session.run_dir());
        if self.best != state.best {
            tracing::warn!(then = ?state.best, now = ?self.best, "the best checkpoint of then is not there any more");
        }
        self.init = state.init;
        self.non_finite = state.non_finite;
        self.session.progress.finished(self.finished);
        tracing::info!(step = %self.finished, checkpoint = %path.display(), "resumed");
        Ok(())
    }
}

/// What rank 0 has come to, on every rank: what keeps it from going on is nothing that another one could do better. The
/// others wait for it outside of any collective, so long at most, or until their generation ends.
fn as_rank_0(
    rendezvous: &dyn Rendezvous,
    is_first: bool,
    mine: Result<(), WorkerError>,
    wait: Duration,
) -> Result<(), WorkerError> {
    let reason = mine.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let said = one_says(rendezvous, BEGUN, is_first.then(|| cut(reason).into_bytes()), wait);
    mine?;
    match said?.as_slice() {
        [] => Ok(()),
        reason => Err(WorkerError::NotBegun(String::from_utf8_lossy(reason).into_owned())),
    }
}

/// Lets the writer of a rank that is not the first any more come to its end: what it was given may be the best checkpoint.
///
/// # Errors
/// If the generation was ended meanwhile; the writer is kept.
fn retire(writer: &mut Option<Writer>, signals: &Signals) -> Result<(), CollectiveError> {
    let Some(old) = writer.as_mut() else { return Ok(()) };
    if let Err(error) = settle(old, signals)? {
        tracing::error!(%error, "a checkpoint was not written");
    }
    *writer = None;
    Ok(())
}

/// Waits for the ranks that were `writing`, outside of any collective, until their writers are retired; so what is decided
/// after it finds on disk what can be there. Each wait lasts so long at most.
fn await_retired(
    rendezvous: &dyn Rendezvous,
    rank: usize,
    writing: &[usize],
    wait: Duration,
) -> Result<(), CollectiveError> {
    writing.iter().try_for_each(|&old| {
        let mine = (old == rank).then(Vec::new);
        one_says(rendezvous, &format!("retired/{old}"), mine, wait).map(drop)
    })
}

#[cfg(test)]
mod tests;
