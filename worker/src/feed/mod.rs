//! The data path of a worker: stream -> row cache -> assembly, ahead of the training thread.
//!
//! Input: a rank's ticket. Output: [`PreparedStep`]s in step order, as plain arrays. One thread works ahead; the
//! capacity of the channel between it and the training thread is the prefetch depth.

pub mod answers;
pub mod assemble;
pub mod bench;
pub mod cache;
pub mod exchange;
pub mod flight;
pub mod local;
pub mod reader;

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use assemble::{Layout, MicroBatch, assemble};
use cache::RowCache;
use exchange::RowExchange;
use flight::{DataClient, FlightClientError};
use half::f16;
use learn_domain::plan::contiguous_part;
use learn_domain::sampling::uniform_items;
use learn_proto::flight::{BatchMeta, Ticket};
use learn_telemetry::WorkerMetrics;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// How soon a wait for data notices an abort.
const ABORT_LOOK: Duration = Duration::from_millis(50);

/// The feed could not deliver.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error(transparent)]
    Flight(#[from] FlightClientError),
    #[error("the data stream ended before the job did")]
    Ended,
    #[error("the generation was aborted while its data was waited for")]
    Aborted,
    #[error("the data stream is at step {got}, but step {wanted} is due")]
    OutOfStep { wanted: u64, got: u64 },
}

/// Everything one step of this rank needs.
#[derive(Debug)]
pub struct PreparedStep {
    pub meta: BatchMeta,
    /// Rows of the training sequences in this rank's share.
    pub users: Vec<u32>,
    /// Their places in the global batch.
    pub places: Vec<u32>,
    /// The forward passes, each with the rows `[unique items, dim]` it needs.
    pub micro_batches: Vec<(MicroBatch, Vec<f16>)>,
}

/// Where a feed starts and how it works.
#[derive(Clone, Debug)]
pub struct FeedSettings {
    pub rank: u32,
    pub world_size: u32,
    pub from_step: u64,
    pub layout: Layout,
    pub uniform: UniformNegatives,
    pub prefetch_steps: u32,
    pub dim: usize,
    pub cache_bytes: u64,
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

/// Rows by item index: from the dataset's own files if this process can open them, else from the cache, else from the data
/// service.
pub struct RowSource {
    client: DataClient,
    settings: RowSettings,
    /// None until the first rows are asked for.
    cache: Option<RowCache>,
    exchange: RowExchange,
    /// Rows on their way into the cache; memory that is used again.
    fetched: Vec<f16>,
    metrics: WorkerMetrics,
}

impl RowSource {
    #[must_use]
    pub fn new(client: &DataClient, settings: &RowSettings, metrics: WorkerMetrics) -> Self {
        Self {
            client: client.clone(),
            settings: *settings,
            cache: None,
            exchange: client.rows(settings.dim),
            fetched: Vec::new(),
            metrics,
        }
    }

    /// The rows `[items, dim]` of distinct items; those that occur most stay in the cache.
    ///
    /// # Errors
    /// If they cannot be fetched.
    pub async fn rows(&mut self, items: &[u32]) -> Result<Vec<f16>, FeedError> {
        let RowSettings { dim, cache_bytes, .. } = self.settings;
        if dim == 0 {
            return Ok(Vec::new());
        }
        if let Some(rows) = mapped(&self.client, &self.metrics, items).await? {
            return Ok(rows);
        }
        if self.cache.is_none() {
            let popularity = if self.settings.must_choose() { self.client.popularity().await? } else { Vec::new() };
            self.cache = Some(RowCache::new(dim, cache_bytes, popularity.into()));
        }
        let Some(cache) = &mut self.cache else { return Ok(Vec::new()) };
        let missing = cache.missing(items);
        self.metrics.cache_hits_total.inc_by((items.len() - missing.len()) as u64);
        self.metrics.cache_misses_total.inc_by(missing.len() as u64);
        self.fetched.resize(missing.len() * dim, f16::ZERO);
        if !missing.is_empty() {
            self.exchange.fetch_into(&missing, &mut self.fetched).await?;
            count_rows(&self.client, &self.metrics, (missing.len(), dim));
        }
        let block = cache.gather(items, &self.fetched);
        cache.keep(&missing, &self.fetched);
        Ok(block)
    }

    /// Rows that pass by the cache: the catalogue, read once from end to end.
    ///
    /// # Errors
    /// If they cannot be fetched.
    pub async fn fetch(&mut self, items: &[u32]) -> Result<Vec<f16>, FeedError> {
        if self.settings.dim == 0 {
            return Ok(Vec::new());
        }
        if let Some(rows) = mapped(&self.client, &self.metrics, items).await? {
            return Ok(rows);
        }
        let rows = self.exchange.fetch(items).await?;
        count_rows(&self.client, &self.metrics, (items.len(), self.settings.dim));
        Ok(rows)
    }
}

/// The rows from the dataset's own files, if this process has them.
async fn mapped(client: &DataClient, metrics: &WorkerMetrics, items: &[u32]) -> Result<Option<Vec<f16>>, FeedError> {
    let Some(embeddings) = client.mapped().await? else { return Ok(None) };
    let rows = embeddings.gather(items, client.row_format()).map_err(FlightClientError::from)?;
    metrics.received_bytes_total.with_label_values(&["mapped"]).inc_by(2 * rows.len() as u64);
    Ok(Some(rows))
}

/// Counts rows that were sent.
fn count_rows(client: &DataClient, metrics: &WorkerMetrics, (rows, dim): (usize, usize)) {
    let bytes = rows * client.row_format().row_bytes(dim);
    metrics.received_bytes_total.with_label_values(&["rows"]).inc_by(bytes as u64);
}

/// Shape and budget of a [`RowSource`].
#[derive(Clone, Copy, Debug)]
pub struct RowSettings {
    /// Values of a row; 0 = there are none.
    pub dim: usize,
    pub cache_bytes: u64,
    /// Items of the catalogue.
    pub items: u32,
}

impl RowSettings {
    /// The cache holds some rows, but not all.
    fn must_choose(&self) -> bool {
        self.cache_bytes > 0 && self.cache_bytes < u64::from(self.items) * 2 * self.dim as u64
    }
}

/// The running feed; dropping it stops its thread after the step it is at.
pub struct Feed {
    steps: Option<Receiver<Result<PreparedStep, FeedError>>>,
    thread: Option<JoinHandle<()>>,
    /// Dropping it cancels a fetch that waits for the network.
    cancel: Option<oneshot::Sender<()>>,
    next_step: u64,
    metrics: WorkerMetrics,
}

impl Feed {
    /// Starts to fetch from `settings.from_step` on.
    #[must_use]
    pub fn start(handle: Handle, client: DataClient, settings: FeedSettings, metrics: WorkerMetrics) -> Self {
        let (sender, steps) = sync_channel(settings.prefetch_steps as usize);
        let next_step = settings.from_step;
        let (cancel, cancelled) = oneshot::channel::<()>();
        metrics.prefetched_steps.set(0);
        let fetching = metrics.clone();
        let thread = std::thread::spawn(move || {
            let fetched = handle.block_on(async {
                tokio::select! {
                    fetched = fetch_steps(client, settings, fetching, &sender) => fetched,
                    _ = cancelled => Ok(()),
                }
            });
            if let Err(error) = fetched {
                // the training thread may be gone already; then nobody needs to know
                let _ = sender.send(Err(error));
            }
        });
        Self { steps: Some(steps), thread: Some(thread), cancel: Some(cancel), next_step, metrics }
    }

    /// Waits for the next step, or until `aborted`.
    ///
    /// # Errors
    /// If the stream broke, ended early or is out of step.
    pub fn next_step(&mut self, aborted: impl Fn() -> bool) -> Result<PreparedStep, FeedError> {
        let steps = self.steps.as_ref().ok_or(FeedError::Ended)?;
        let step = loop {
            match steps.recv_timeout(ABORT_LOOK) {
                Ok(step) => break step?,
                Err(RecvTimeoutError::Disconnected) => return Err(FeedError::Ended),
                Err(RecvTimeoutError::Timeout) if aborted() => return Err(FeedError::Aborted),
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        if step.meta.step != self.next_step {
            return Err(FeedError::OutOfStep { wanted: self.next_step, got: step.meta.step });
        }
        self.next_step += 1;
        self.metrics.prefetched_steps.dec();
        Ok(step)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        // the thread waits either for a place in the channel or for the network: close both
        self.steps = None;
        self.cancel = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the feed thread panicked");
        }
    }
}

/// Bytes of an item index on the wire, with its time or without.
#[must_use]
pub fn item_bytes(times: bool) -> usize {
    if times { 4 + 8 } else { 4 }
}

async fn fetch_steps(
    client: DataClient,
    settings: FeedSettings,
    metrics: WorkerMetrics,
    sender: &SyncSender<Result<PreparedStep, FeedError>>,
) -> Result<(), FeedError> {
    let row_settings =
        RowSettings { dim: settings.dim, cache_bytes: settings.cache_bytes, items: settings.uniform.items };
    let mut source = RowSource::new(&client, &row_settings, metrics.clone());
    let FeedSettings { rank, world_size, from_step, times, .. } = settings;
    let ticket = Ticket::Batches { rank, world_size, from_step, steps: 0, times };
    let mut shares = client.shares(ticket);
    while let Some((meta, share)) = shares.next().await? {
        let started = Instant::now();
        let items: usize = share.iter().map(|user| user.history.len() + user.targets.len()).sum();
        metrics.received_bytes_total.with_label_values(&["batches"]).inc_by((item_bytes(times) * items) as u64);
        let mut micro_batches = Vec::new();
        let further = settings.uniform.part(meta.step, settings.rank, settings.world_size);
        for batch in assemble(&share, &further, settings.layout) {
            let rows = source.rows(&batch.unique_items).await?;
            micro_batches.push((batch, rows));
        }
        metrics.phase_seconds.with_label_values(&["assemble"]).observe(started.elapsed().as_secs_f64());
        let users = share.iter().map(|user| user.user).collect();
        let places = share.iter().map(|user| user.place).collect();
        if sender.send(Ok(PreparedStep { meta, users, places, micro_batches })).is_err() {
            return Ok(());
        }
        metrics.prefetched_steps.inc();
    }
    Ok(())
}
