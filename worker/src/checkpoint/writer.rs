//! The background thread that makes checkpoints durable while training goes on.
//!
//! Input: snapshots. Output: directories on disk, the `best` file, and a call of `committed` for each. One snapshot
//! may wait while another is written; a third holds the training thread back.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use learn_domain::Step;
use learn_domain::run_dir::RunDir;

use super::{CheckpointError, Snapshot, io, keep, steps, write, write_best};

/// What is told when a checkpoint is durable.
#[derive(Clone, Debug)]
pub struct Committed {
    pub step: Step,
    pub path: PathBuf,
    /// Time the write took.
    pub duration: Duration,
}

/// The writing thread.
pub struct Writer {
    snapshots: Option<SyncSender<Snapshot>>,
    thread: Option<JoinHandle<Result<(), CheckpointError>>>,
}

impl Writer {
    /// Starts the thread; `committed` is called on it.
    ///
    /// # Errors
    /// If the checkpoint directory cannot be made.
    pub fn start(
        run: RunDir,
        keep_last: u32,
        committed: impl Fn(Committed) + Send + 'static,
    ) -> Result<Self, CheckpointError> {
        let folder = run.checkpoints();
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        let (snapshots, queue) = sync_channel::<Snapshot>(1);
        let thread = std::thread::spawn(move || {
            for snapshot in queue {
                let started = Instant::now();
                let step = snapshot.state.step;
                let best = snapshot.state.best.clone();
                let path = write(&folder, snapshot)?;
                if best.as_ref().is_some_and(|best| best.step == step) {
                    write_best(&run, best.as_ref())?;
                }
                committed(Committed { step, path, duration: started.elapsed() });
                for step in keep::surplus(&steps(&folder)?, keep_last, best.map(|best| best.step)) {
                    let old = run.checkpoint(step);
                    fs::remove_dir_all(&old).map_err(io(&old))?;
                }
            }
            Ok(())
        });
        Ok(Self { snapshots: Some(snapshots), thread: Some(thread) })
    }

    /// Hands a snapshot over.
    ///
    /// # Errors
    /// If an earlier write has failed.
    pub fn save(&mut self, snapshot: Snapshot) -> Result<(), CheckpointError> {
        let sent = self.snapshots.as_ref().is_some_and(|queue| queue.send(snapshot).is_ok());
        if sent { Ok(()) } else { self.finish().and(Err(CheckpointError::WriterGone)) }
    }

    /// Waits until everything handed over is durable.
    ///
    /// # Errors
    /// The first write that failed.
    pub fn finish(&mut self) -> Result<(), CheckpointError> {
        self.snapshots = None;
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(CheckpointError::WriterGone),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::error!(%error, "a checkpoint was not written");
        }
    }
}
