//! The background thread that makes checkpoints durable while training goes on.
//!
//! Input: snapshots. Output: directories on disk, the `best` file, and a call of `tell` for each. One snapshot may wait
//! while another is written; a third holds the training thread back, so one that may be left out is not handed over when
//! the place stays taken. The thread gives way to those that train, which on a CPU need every core, and rests between pieces
//! as its [`Pace`] says. A snapshot that cannot be written (disk full, read-only) ends nothing: the earlier checkpoints stay,
//! and the next one is tried.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use learn_domain::Step;
use learn_domain::run_dir::RunDir;

use super::pace::{Demand, Pace};
use super::{
    Best, CheckpointError, Snapshot, aside_of, best_there, checkpoint_step, io, is_own_record, keep, read_best, steps,
    sync, write, write_best,
};

/// What became of a snapshot.
#[derive(Debug)]
pub enum Written<'a> {
    /// It is durable.
    Committed {
        step: Step,
        path: PathBuf,
        /// Time the write took.
        duration: Duration,
        /// Processor time among it.
        processor: Duration,
    },
    /// It is not there; those before it are.
    Failed { step: Step, error: &'a CheckpointError },
}

/// The writing thread.
pub struct Writer {
    snapshots: Option<SyncSender<Snapshot>>,
    results: Receiver<Result<(), CheckpointError>>,
    demand: Arc<Demand>,
    thread: Option<JoinHandle<()>>,
    /// Steps whose result is not known yet, in their order.
    open: VecDeque<Step>,
    /// Of the newest snapshot whose result is known.
    newest: Result<(), CheckpointError>,
}

impl Writer {
    /// Starts the thread. `before_piece` is called on it before each piece of a file. `tell` is called on it too, and says
    /// whether the checkpoint counts: one of a rank that the job has gone on without is not the best of anything, and
    /// takes no other's place.
    #[must_use]
    pub fn start(
        run: RunDir,
        keep_last: u32,
        pace: Pace,
        before_piece: impl Fn() + Send + 'static,
        tell: impl Fn(Written<'_>) -> bool + Send + 'static,
    ) -> Self {
        let (snapshots, queue) = sync_channel::<Snapshot>(1);
        let (answers, results) = channel();
        let demand = Arc::new(Demand::default());
        let work = Work { run, keep_last, pace, demand: demand.clone(), before_piece, tell, answers };
        let thread = std::thread::spawn(move || {
            if !learn_torch::give_way() {
                tracing::debug!("the checkpoint writer runs at the priority of the training");
            }
            work.write_all(&queue);
        });
        Self {
            snapshots: Some(snapshots),
            results,
            demand,
            thread: Some(thread),
            open: VecDeque::new(),
            newest: Ok(()),
        }
    }

    /// Waits up to `limit` for the place where a snapshot may wait; whether it is free, so that [`Writer::save`] does not
    /// wait. It is once the thread has ended, which `save` says.
    pub fn ready(&mut self, limit: Duration) -> bool {
        let started = Instant::now();
        while !self.open.is_empty() {
            // what is known already is taken in any case
            let wait = if self.open.len() > 1 { limit.saturating_sub(started.elapsed()) } else { Duration::ZERO };
            match self.results.recv_timeout(wait) {
                Ok(result) => self.take(result),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return true,
            }
        }
        self.open.len() <= 1
    }

    /// Whether everything handed over is durable or has failed.
    pub fn is_idle(&mut self) -> bool {
        self.take_known();
        self.open.is_empty()
    }

    /// Whether the best checkpoint is not there, nor on its way: it could not be written, or its writer was lost. One that is
    /// there is recorded as the best, should its writer have been lost before it did so.
    pub fn misses(&mut self, run: &RunDir, best: &Best) -> bool {
        self.take_known();
        if self.open.contains(&best.step) {
            return false;
        }
        if !best.is_there(run) {
            return true;
        }
        // a later one is of a rank that was ahead
        let recorded = best_there(run).is_some_and(|recorded| recorded.step >= best.step);
        if !recorded && let Err(error) = write_best(run, Some(best)) {
            tracing::warn!(%error, step = %best.step, "the best checkpoint could not be recorded as such");
        }
        false
    }

    /// Hands a snapshot over; waits as long as another one waits to be written, and nothing ends that wait
    /// ([`Writer::ready`] may be waited for before).
    ///
    /// # Errors
    /// If the thread has ended.
    pub fn save(&mut self, snapshot: Snapshot) -> Result<(), CheckpointError> {
        self.demand.training_waits(false);
        self.demand.snapshot_waits();
        let step = snapshot.state.step;
        let sent = self.snapshots.as_ref().is_some_and(|queue| queue.send(snapshot).is_ok());
        if !sent {
            return Err(CheckpointError::WriterGone);
        }
        self.open.push_back(step);
        Ok(())
    }

    /// Waits until everything handed over is durable or has failed.
    ///
    /// # Errors
    /// Why the newest snapshot could not be written, said once.
    pub fn settle(&mut self) -> Result<(), CheckpointError> {
        self.demand.training_waits(true);
        while !self.open.is_empty() {
            let result = self.results.recv().map_err(|_| CheckpointError::WriterGone)?;
            self.take(result);
        }
        self.demand.training_waits(false);
        std::mem::replace(&mut self.newest, Ok(()))
    }

    /// As [`Writer::settle`]; `None` if `limit` was not enough, and then it is still waited for.
    pub fn settle_within(&mut self, limit: Duration) -> Option<Result<(), CheckpointError>> {
        let started = Instant::now();
        self.demand.training_waits(true);
        while !self.open.is_empty() {
            match self.results.recv_timeout(limit.saturating_sub(started.elapsed())) {
                Ok(result) => self.take(result),
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => return Some(Err(CheckpointError::WriterGone)),
            }
        }
        Some(self.settle())
    }

    fn take_known(&mut self) {
        while let Ok(result) = self.results.try_recv() {
            self.take(result);
        }
    }

    fn take(&mut self, result: Result<(), CheckpointError>) {
        self.open.pop_front();
        self.newest = result;
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.settle() {
            tracing::error!(%error, "a checkpoint was not written");
        }
        self.snapshots = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the checkpoint writer panicked");
        }
    }
}

/// What the thread works with.
struct Work<B, T> {
    run: RunDir,
    keep_last: u32,
    pace: Pace,
    demand: Arc<Demand>,
    /// Called before each piece of a file.
    before_piece: B,
    /// Told what became of each snapshot; says whether its checkpoint counts.
    tell: T,
    answers: Sender<Result<(), CheckpointError>>,
}

impl<B: Fn(), T: Fn(Written<'_>) -> bool> Work<B, T> {
    /// Writes one snapshot after another, as long as more may come.
    fn write_all(&self, queue: &Receiver<Snapshot>) {
        let folder = self.run.checkpoints();
        for snapshot in queue {
            self.demand.snapshot_is_taken();
            let written = self.write_one(&folder, snapshot);
            // nobody waits for it any more when the training thread has failed
            let _ = self.answers.send(written);
        }
    }

    /// Writes a snapshot and tells what became of it.
    fn write_one(&self, folder: &Path, snapshot: Snapshot) -> Result<(), CheckpointError> {
        let now = || (Instant::now(), learn_torch::processor_time());
        let (started, processor) = now();
        let step = snapshot.state.step;
        let best = snapshot.state.best.clone().filter(|best| best.step == step);
        // a run whose best is lost ends with another one; other steps are trained again
        let rests = match self.pace {
            Pace::Sparing(rests) if best.is_none() => Some(rests),
            _ => None,
        };
        let (since, lasted) = (Cell::new((started, processor)), Cell::new(Duration::ZERO));
        let before_piece = || {
            if let Some(rests) = rests {
                let (began, processor) = since.get();
                let taken = learn_torch::processor_time().saturating_sub(processor);
                self.demand.rest(rests.after(taken, began.elapsed(), lasted.get()));
                lasted.set(lasted.get() + began.elapsed());
            }
            (self.before_piece)();
            since.set(now());
        };
        let mut written = write(folder, snapshot, self.pace, &before_piece);
        if let Ok(path) = &written {
            let (duration, processor) = (started.elapsed(), learn_torch::processor_time().saturating_sub(processor));
            let counts = (self.tell)(Written::Committed { step, path: path.clone(), duration, processor });
            if counts {
                if let Err(error) = best.map_or(Ok(()), |best| write_best(&self.run, Some(&best))) {
                    written = Err(error);
                } else if let Err(error) = prune(&self.run, folder, self.keep_last, &|path| fs::remove_dir_all(path)) {
                    tracing::warn!(%error, "old checkpoints could not be removed");
                }
            }
        }
        if let Err(error) = &written {
            (self.tell)(Written::Failed { step, error });
        }
        written.map(drop)
    }
}

/// Removes all but the latest and the best that is there, which need not be the best that was evaluated. What goes loses its
/// name first, so that nobody takes it for a checkpoint if the removal is cut short. What was left so, and what writers that
/// were killed have left unfinished, goes too, once it is older than all the latest: nobody is still at it then, but for this
/// process' other thread at the record of the best. `remove` takes a directory away.
pub(super) fn prune(
    run: &RunDir,
    folder: &Path,
    keep_last: u32,
    remove: &dyn Fn(&Path) -> std::io::Result<()>,
) -> Result<(), CheckpointError> {
    let mut latest = steps(folder)?;
    latest.sort_unstable_by(|a, b| b.cmp(a));
    let oldest = latest.iter().take(keep_last.max(1) as usize).next_back().copied();
    let surplus = keep::surplus(&latest, keep_last, read_best(run).map(|best| best.step));
    for step in &surplus {
        let old = run.checkpoint(*step);
        fs::rename(&old, aside_of(&old, "-removed")).map_err(io(&old))?;
    }
    if !surplus.is_empty() {
        sync(folder)?;
    }
    let mut removed = Ok(());
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        let unfinished = path.extension().is_some_and(|kind| kind.to_string_lossy().starts_with("tmp-"));
        let step = path.file_stem().and_then(|name| name.to_str()).and_then(checkpoint_step);
        if unfinished && step.is_some() && step < oldest && !is_own_record(&path) {
            // a checkpoint, or the record of which one is the best; one that stays keeps none of the others
            let gone = if path.is_dir() { remove(&path) } else { fs::remove_file(&path) };
            removed = removed.and(gone.map_err(io(&path)));
        }
    }
    removed
}
