//! The feed's thread: batches of indices are read and laid out well ahead of the rows, so that the caches know what is
//! coming; then each step gets its rows.
//!
//! Input: the stream of a rank's shares. Output: [`PreparedStep`]s in step order, one for each permit. Steps that have been
//! read are prepared even if the stream is broken behind them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use learn_domain::Phase;
use learn_proto::flight::{BatchMeta, Ticket};
use learn_telemetry::WorkerMetrics;
use tokio::sync::Semaphore;
use tokio::sync::mpsc as queue;

use super::assemble::{MicroBatch, assemble};
use super::flight::{DataClient, Share, ShareStream};
use super::source::RowSource;
use super::{FeedError, FeedSettings, PreparedStep};

/// Most steps that are read ahead for each that is prepared, so that the first is soon there.
const AT_ONCE: usize = 16;

/// A step without its rows.
struct LaidOut {
    meta: BatchMeta,
    users: Vec<u32>,
    places: Vec<u32>,
    micro_batches: Vec<MicroBatch>,
    /// That laying it out took.
    took: Duration,
}

impl LaidOut {
    /// Rows that its passes ask for; at least one, so that nobody reads empty steps without end.
    fn requests(&self) -> usize {
        self.micro_batches.iter().map(|batch| batch.unique_items.len()).sum::<usize>().max(1)
    }
}

type Prepared = mpsc::Sender<Result<PreparedStep, FeedError>>;

/// Prepares steps until the job's end, an error, or until nobody takes them.
pub(super) async fn fetch_steps(
    client: DataClient,
    settings: FeedSettings,
    metrics: WorkerMetrics,
    (prepared, permits): (&Prepared, &Arc<Semaphore>),
) -> Result<(), FeedError> {
    let FeedSettings { rank, world_size, from_step, times, .. } = settings;
    let ticket = Ticket::Batches { rank, world_size, from_step, steps: 0, times };
    let (found, read) = queue::channel(1);
    let shares = client.shares(ticket);
    let reading = async {
        lay_out(shares, &settings, &metrics, found).await;
        std::future::pending::<Infallible>().await
    };
    let steps_ahead = settings.prefetch_steps as usize;
    let source = RowSource::new(&client, &settings.rows, metrics.clone())
        .with_cache_at(settings.cache.clone())
        .with_neighbours(settings.neighbours.clone());
    tokio::select! {
        // in this order, so that what has come is there when the rows' turn comes
        biased;
        never = reading => match never {},
        fetched = fetch_rows(source, (read, steps_ahead), &metrics, (prepared, permits)) => fetched,
    }
}

/// Reads shares and lays them out, until the stream's end or first error.
async fn lay_out(
    mut shares: ShareStream,
    settings: &FeedSettings,
    metrics: &WorkerMetrics,
    found: queue::Sender<Result<LaidOut, FeedError>>,
) {
    loop {
        let Share { meta, users: share, bytes } = match shares.next().await {
            Ok(Some(share)) => share,
            Ok(None) => return,
            Err(error) => {
                // who reads is there as long as this runs
                let _ = found.send(Err(error.into())).await;
                return;
            }
        };
        let started = Instant::now();
        metrics.received_bytes_total.with_label_values(&["batches"]).inc_by(bytes);
        let further = settings.uniform.part(meta.step, settings.rank, settings.world_size);
        let micro_batches = assemble(&share, &further, settings.layout);
        let users = share.iter().map(|user| user.user).collect();
        let places = share.iter().map(|user| user.place).collect();
        let laid_out = LaidOut { meta, users, places, micro_batches, took: started.elapsed() };
        if found.send(Ok(laid_out)).await.is_err() {
            return;
        }
    }
}

/// Gives steps their rows, a step for each permit. So many steps at least are read ahead: indices are small, and while the
/// coordinator is away they go on where rows are at hand.
async fn fetch_rows(
    mut source: RowSource,
    (mut read, steps_ahead): (queue::Receiver<Result<LaidOut, FeedError>>, usize),
    metrics: &WorkerMetrics,
    (prepared, permits): (&Prepared, &Arc<Semaphore>),
) -> Result<(), FeedError> {
    let items_ahead = source.items_ahead().await?;
    let (mut ahead, mut requests) = (VecDeque::new(), 0);
    // how the stream ended
    let mut end = None;
    loop {
        for _ in 0..AT_ONCE {
            if end.is_some() || ahead.len() >= steps_ahead && requests >= items_ahead {
                break;
            }
            let next = if ahead.is_empty() {
                read.recv().await
            } else {
                // the reader gets its turn; what has not come yet is not waited for
                tokio::task::yield_now().await;
                match read.try_recv() {
                    Err(queue::error::TryRecvError::Empty) => break,
                    next => next.ok(),
                }
            };
            match next {
                None => end = Some(Ok(())),
                Some(Err(error)) => end = Some(Err(error)),
                Some(Ok(step)) => {
                    requests += step.requests();
                    // what was read before it is prepared in any case
                    end = source.announce_all(&step.micro_batches).await.err().map(Err);
                    if end.is_none() {
                        ahead.push_back(step);
                    }
                }
            }
        }
        let Some(step) = ahead.pop_front() else { return end.unwrap_or(Ok(())) };
        requests -= step.requests();
        match permits.acquire().await {
            Ok(permit) => permit.forget(),
            Err(_) => return Ok(()),
        }
        let started = Instant::now();
        let LaidOut { meta, users, places, micro_batches: laid_out, took } = step;
        let mut micro_batches = Vec::with_capacity(laid_out.len());
        for batch in laid_out {
            let rows = source.pass(&batch.unique_items).await?;
            micro_batches.push((batch, rows));
        }
        metrics.observe(Phase::Assemble, took + started.elapsed());
        metrics.prefetched_steps.inc();
        if prepared.send(Ok(PreparedStep { meta, users, places, micro_batches })).is_err() {
            return Ok(());
        }
    }
}
