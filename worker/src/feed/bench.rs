//! `learn-worker bench-flight` and `bench-wire`: how fast rows come, and how many bytes a user takes, as in training.
//!
//! Input: a data service and its secret. Output: bytes a second that so many clients take in at once, each over as many
//! connections as a worker may have; or bytes received per user by a feed with its cache. `learn-coordinator bench` starts them,
//! and the service.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::f16;
use learn_domain::Config;
use learn_domain::config::RowFormat;
use learn_domain::random::Draws;
use learn_proto::connect::Pass;
use learn_telemetry::WorkerMetrics;
use serde::Serialize;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::answers::{FlightClientError, unexpected};
use super::assemble::Layout;
use super::cache::CachePlace;
use super::flight::DataClient;
use super::neighbours::Neighbours;
use super::streams::RowStreams;
use super::{Feed, FeedError, FeedSettings, RowSettings, UniformNegatives};
use crate::error::WorkerError;
use crate::retry::Patience;

/// Requests of each client before the clock starts.
const WARM_UP: u32 = 2;
/// A service beside this process that stays away for that long is not coming.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is measured.
#[derive(Clone, Debug)]
pub struct FlightBenchSettings {
    /// `http://HOST:PORT` of the data service.
    pub location: String,
    pub secret_file: PathBuf,
    /// Items of the catalogue; requests draw from them uniformly.
    pub items: u32,
    pub dim: usize,
    /// As many as workers on one host.
    pub clients: usize,
    /// Connections of each client, as `cluster.row_streams`.
    pub streams: u32,
    /// Rows of a request.
    pub rows: usize,
    pub span: Duration,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct FlightBenchResult {
    pub clients: usize,
    pub streams: u32,
    pub rows: usize,
    pub dim: usize,
    pub bytes: u64,
    pub seconds: f64,
    pub gigabytes_per_second: f64,
}

/// Fetches rows for a while.
///
/// # Errors
/// If the service cannot be reached or refuses.
pub fn bench_flight(settings: &FlightBenchSettings) -> Result<FlightBenchResult, WorkerError> {
    let FlightBenchSettings { items, dim, clients, streams, rows, span, .. } = *settings;
    if items == 0 || dim == 0 || clients == 0 || streams == 0 || rows == 0 || span.is_zero() {
        return Err(WorkerError::Usage(
            "items, values of a row, clients, streams, rows and seconds must be above 0".into(),
        ));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(WorkerError::Runtime)?;
    let pass = Pass::read(&settings.secret_file).map_err(|error| WorkerError::Usage(error.to_string()))?;
    Ok(runtime.block_on(measure(settings, &pass)).map_err(FeedError::from)?)
}

/// Fetches rows with all clients at once.
async fn measure(settings: &FlightBenchSettings, pass: &Pass) -> Result<FlightBenchResult, FlightClientError> {
    let barrier = Arc::new(Barrier::new(settings.clients));
    let mut fetching = JoinSet::new();
    for number in 0..settings.clients {
        let locations = std::slice::from_ref(&settings.location);
        let client = DataClient::new(locations, number, pass, &Patience::new(PATIENCE)).await?;
        fetching.spawn(fetch(client, settings.clone(), number as u64, Arc::clone(&barrier)));
    }
    let (mut bytes, mut seconds) = (0, 0_f64);
    while let Some(ended) = fetching.join_next().await {
        let (more, took) = ended.map_err(|error| unexpected(error.to_string()))??;
        bytes += more;
        seconds = seconds.max(took.as_secs_f64());
    }
    let FlightBenchSettings { clients, streams, rows, dim, .. } = *settings;
    let gigabytes_per_second = bytes as f64 / seconds / 1e9;
    Ok(FlightBenchResult { clients, streams, rows, dim, bytes, seconds, gigabytes_per_second })
}

async fn fetch(
    client: DataClient,
    settings: FlightBenchSettings,
    number: u64,
    start: Arc<Barrier>,
) -> Result<(u64, Duration), FlightClientError> {
    let mut streams = RowStreams::new(&client, settings.streams, settings.dim);
    let mut rows = vec![f16::ZERO; settings.rows * settings.dim];
    let mut draws = Draws::new(&[number]);
    let mut request =
        || -> Vec<u32> { (0..settings.rows).map(|_| draws.below(u64::from(settings.items)) as u32).collect() };
    for _ in 0..WARM_UP {
        streams.fetch_into(&request(), &mut rows).await?;
    }
    start.wait().await;
    let (started, mut bytes) = (Instant::now(), 0);
    while started.elapsed() < settings.span {
        streams.fetch_into(&request(), &mut rows).await?;
        bytes += 2 * rows.len() as u64;
    }
    Ok((bytes, started.elapsed()))
}

/// What is measured by [`bench_wire`].
#[derive(Clone, Debug)]
pub struct WireBenchSettings {
    pub location: String,
    pub secret_file: PathBuf,
    /// The job that this is the only worker of.
    pub config: Config,
    pub items: u32,
    pub dim: usize,
    /// Steps before those that count.
    pub warm: u64,
    pub steps: u64,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct WireBenchResult {
    pub row_format: RowFormat,
    /// Items of the catalogue.
    pub items: u32,
    pub dim: usize,
    /// Rows that the cache holds.
    pub cache_rows: u64,
    pub steps: u64,
    pub users: u64,
    /// Items of histories and targets.
    pub positions: u64,
    /// Of batches: item indices and the like.
    pub batch_bytes: u64,
    /// Rows that the cache did not hold.
    pub row_bytes: u64,
    /// Rows over requested rows.
    pub hit_share: f64,
    pub bytes_per_user: f64,
    /// Bytes over positions x dim x 4.
    pub over_positions: f64,
    /// The same with every history and target padded to the longest, as the published layout does.
    pub over_padded: f64,
}

/// Bytes of a feed.
#[derive(Clone, Copy)]
struct Received {
    batches: u64,
    rows: u64,
    hits: u64,
    misses: u64,
}

impl Received {
    fn now(metrics: &WorkerMetrics) -> Self {
        let source = |name| metrics.received_bytes_total.with_label_values(&[name]).get();
        let (hits, misses) = (metrics.cache_hits_total.get(), metrics.cache_misses_total.get());
        Self { batches: source("batches"), rows: source("rows"), hits, misses }
    }
}

/// Takes the steps of a job from a service.
///
/// # Errors
/// If the service cannot be reached or refuses, or the job ends too soon.
pub fn bench_wire(settings: &WireBenchSettings) -> Result<WireBenchResult, WorkerError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(WorkerError::Runtime)?;
    let pass = Pass::read(&settings.secret_file).map_err(|error| WorkerError::Usage(error.to_string()))?;
    let WireBenchSettings { config, items, dim, .. } = settings;
    let locations = std::slice::from_ref(&settings.location);
    let client = runtime.block_on(DataClient::new(locations, 0, &pass, &Patience::new(PATIENCE)));
    let client = client.map_err(FeedError::from)?.with_row_format(config.data.row_format);
    let cache_bytes = config.cluster.row_cache.0;
    let feed_settings = FeedSettings {
        rank: 0,
        world_size: 1,
        from_step: 0,
        layout: Layout::new(&config.objective, 0),
        uniform: UniformNegatives { items: *items, ..UniformNegatives::default() },
        prefetch_steps: 1,
        rows: RowSettings {
            dim: *dim,
            cache_bytes,
            items: *items,
            streams: config.cluster.row_streams,
            ..RowSettings::default()
        },
        cache: CachePlace::default(),
        neighbours: Neighbours::default(),
        times: false,
    };
    let metrics = WorkerMetrics::new();
    let mut feed = Feed::start(runtime.handle().clone(), client, feed_settings, metrics.clone());
    for _ in 0..settings.warm {
        feed.next_step(|| false)?;
    }
    let before = Received::now(&metrics);
    let (mut users, mut positions) = (0, 0);
    for _ in 0..settings.steps {
        let step = feed.next_step(|| false)?;
        users += step.users.len() as u64;
        positions += step.micro_batches.iter().map(|(batch, _)| batch.tokens).sum::<u64>();
    }
    let after = Received::now(&metrics);
    let (batch_bytes, row_bytes) = (after.batches - before.batches, after.rows - before.rows);
    let (hits, misses) = (after.hits - before.hits, after.misses - before.misses);
    let bytes = (batch_bytes + row_bytes) as f64;
    let longest = u64::from(config.sampling.history + config.sampling.targets);
    let published = |positions: u64| (positions * *dim as u64 * 4) as f64;
    Ok(WireBenchResult {
        row_format: config.data.row_format,
        items: *items,
        dim: *dim,
        cache_rows: cache_bytes / (2 * *dim as u64),
        steps: settings.steps,
        users,
        positions,
        batch_bytes,
        row_bytes,
        hit_share: hits as f64 / (hits + misses) as f64,
        bytes_per_user: bytes / users as f64,
        over_positions: bytes / published(positions),
        over_padded: bytes / published(users * longest),
    })
}
