//! The data path of a worker: stream -> assembly -> rows from files, caches or the data service; ahead of the training
//! thread.
//!
//! Input: a rank's ticket. Output: [`PreparedStep`]s in step order, as plain arrays. One thread works ahead
//! (`fetch`); the permits that the training thread gives it are the prefetch depth, which [`depth`] chooses.

pub mod answers;
pub mod assemble;
pub mod bench;
pub mod cache;
pub mod depth;
pub mod exchange;
mod fetch;
pub mod flight;
pub mod local;
pub mod neighbours;
pub mod reader;
pub mod residents;
pub mod source;
mod streams;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use assemble::{Layout, MicroBatch};
use cache::CachePlace;
use depth::{Depth, Taken};
use flight::{DataClient, FlightClientError};
use learn_domain::plan::contiguous_part;
use learn_domain::sampling::uniform_items;
use learn_proto::flight::BatchMeta;
use learn_telemetry::WorkerMetrics;
use neighbours::Neighbours;
pub use source::{OnDevice, PassRows, RowSettings, RowSource};
use tch::Device;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};

/// How soon a wait for data notices an abort.
const ABORT_LOOK: Duration = Duration::from_millis(50);

/// The feed could not deliver.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error(transparent)]
    Flight(#[from] FlightClientError),
    #[error(transparent)]
    Torch(#[from] learn_torch::TorchError),
    #[error("the data stream ended before the job did")]
    Ended,
    #[error("the generation was aborted while its data was waited for")]
    Aborted,
}

/// Everything one step of this rank needs.
#[derive(Debug)]
pub struct PreparedStep {
    pub meta: BatchMeta,
    /// Rows of the training sequences in this rank's share.
    pub users: Vec<u32>,
    /// Their places in the global batch.
    pub places: Vec<u32>,
    /// The forward passes, each with the rows it needs.
    pub micro_batches: Vec<(MicroBatch, PassRows)>,
}

impl PreparedStep {
    /// Begins to copy its rows to a GPU, which does it beside its other work.
    pub fn begin_copies(&self, device: Device) {
        self.micro_batches.iter().for_each(|(_, rows)| rows.sent.begin(device));
    }
}

/// Where a feed starts and how it works.
#[derive(Clone, Debug)]
pub struct FeedSettings {
    pub rank: u32,
    pub world_size: u32,
    pub from_step: u64,
    pub layout: Layout,
    pub uniform: UniformNegatives,
    /// Most steps that may be ready, or on their way.
    pub prefetch_steps: u32,
    pub rows: RowSettings,
    /// Of the host's rows, from one feed to the next.
    pub cache: CachePlace,
    /// Whose caches are read before rows are asked for.
    pub neighbours: Neighbours,
    /// The model reads when interactions were.
    pub times: bool,
}

/// Items drawn from the whole catalogue that join the negatives of each step.
#[derive(Clone, Copy, Debug, Default)]
pub struct UniformNegatives {
    /// [`learn_domain::plan::Plan::draw_seed`].
    pub seed: u64,
    /// Items of the catalogue.
    pub items: u32,
    /// Draws of a step over all ranks.
    pub count: u32,
}

impl UniformNegatives {
    /// This rank's part of the draws of the step after `finished` ones.
    #[must_use]
    pub fn part(&self, finished: u64, rank: u32, world_size: u32) -> Vec<u32> {
        let drawn = uniform_items(self.seed, finished, self.items, self.count);
        drawn[contiguous_part(drawn.len(), rank as usize, world_size as usize)].to_vec()
    }
}

/// The running feed; dropping it stops its thread after the step it is at.
pub struct Feed {
    steps: Option<Receiver<Result<PreparedStep, FeedError>>>,
    /// What has come behind the step that was taken last.
    next: Option<Result<PreparedStep, FeedError>>,
    /// Where rows are wanted.
    device: Device,
    thread: Option<JoinHandle<()>>,
    /// Dropping it cancels a fetch that waits for the network.
    cancel: Option<oneshot::Sender<()>>,
    /// One for each step that may be prepared and is not.
    permits: Arc<Semaphore>,
    depth: Depth,
    /// When the last step was taken.
    taken: Option<Instant>,
    metrics: WorkerMetrics,
}

impl Feed {
    /// Starts to fetch from `settings.from_step` on.
    #[must_use]
    pub fn start(handle: Handle, client: DataClient, settings: FeedSettings, metrics: WorkerMetrics) -> Self {
        let (sender, steps) = channel();
        let depth = Depth::new(settings.prefetch_steps);
        let permits = Arc::new(Semaphore::new(depth.steps() as usize));
        let (cancel, cancelled) = oneshot::channel::<()>();
        metrics.prefetched_steps.set(0);
        metrics.prefetch_depth.set(depth.steps().into());
        let (fetching, allowed) = (metrics.clone(), Arc::clone(&permits));
        let device = settings.rows.device;
        let thread = std::thread::spawn(move || {
            let fetched = handle.block_on(async {
                tokio::select! {
                    fetched = fetch::fetch_steps(client, settings, fetching, (&sender, &allowed)) => fetched,
                    _ = cancelled => Ok(()),
                }
            });
            if let Err(error) = fetched {
                // the training thread may be gone already; then nobody needs to know
                let _ = sender.send(Err(error));
            }
        });
        let (steps, thread, cancel) = (Some(steps), Some(thread), Some(cancel));
        Self { steps, next: None, device, thread, cancel, permits, depth, taken: None, metrics }
    }

    /// Waits for the next step, or until `aborted`. The rows of the one behind it are on their way to a GPU then, if they
    /// are there.
    ///
    /// # Errors
    /// If the stream broke, ended early or is out of step.
    pub fn next_step(&mut self, aborted: impl Fn() -> bool) -> Result<PreparedStep, FeedError> {
        let steps = self.steps.as_ref().ok_or(FeedError::Ended)?;
        let (asked, full) = (Instant::now(), self.permits.available_permits() == 0);
        let step = loop {
            if let Some(next) = self.next.take() {
                break next?;
            }
            match steps.recv_timeout(ABORT_LOOK) {
                Ok(step) => break step?,
                Err(RecvTimeoutError::Disconnected) => return Err(FeedError::Ended),
                Err(RecvTimeoutError::Timeout) if aborted() => return Err(FeedError::Aborted),
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        self.next = steps.try_recv().ok();
        if let Some(Ok(next)) = &self.next {
            next.begin_copies(self.device);
        }
        self.metrics.prefetched_steps.dec();
        self.give_permits(asked, full);
        Ok(step)
    }

    /// Lets as many steps be prepared as the depth says now that one was taken.
    fn give_permits(&mut self, asked: Instant, full: bool) {
        let now = Instant::now();
        let before = self.depth.steps();
        // the first step is always waited for
        if let Some(taken) = self.taken.replace(now) {
            self.depth.after(Taken { waited: now - asked, worked: asked - taken, full });
        }
        let after = self.depth.steps();
        // the one that was taken makes room for another
        self.permits.add_permits((1 + after).saturating_sub(before) as usize);
        self.metrics.prefetch_depth.set(after.into());
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        // the thread waits either for a permit or for the network: close both
        self.permits.close();
        self.steps = None;
        self.cancel = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the feed thread panicked");
        }
    }
}
