//! `learn-worker bench-flight` and `bench-wire`: how fast rows come, and how many bytes a user takes, as in training.
//!
//! Input: a data service and its secret. Output: bytes a second that so many clients take in at once, each over as many
//! connections as a worker may have; or bytes received per user by a feed with its cache. `learn-coordinator bench` starts them,
//! and the service.

use std::fmt;
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

impl fmt::Display for FlightBenchResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { clients, streams, rows, dim, bytes, seconds, gigabytes_per_second } = self;
        let megabytes = *bytes as f64 / 1e6;
        write!(
            f,
            "{gigabytes_per_second:.3} GB/s: {megabytes:.1} MB in {seconds:.2} s\n\
             {rows} rows of {dim} values a request; clients: {clients}, connections of each: {streams}"
        )
    }
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

impl fmt::Display for WireBenchResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { items, dim, cache_rows, steps, users, positions, batch_bytes, row_bytes, bytes_per_user, .. } = self;
        let format = match self.row_format {
            RowFormat::F16 => "f16",
            RowFormat::Int8 => "int8",
        };
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        write!(
            f,
            "{bytes_per_user:.0} bytes a user: {:.2} MB of batches and {:.2} MB of rows for {users} users \
             with {positions} positions in {steps} steps\n\
             {:.1} % of what every position takes as f32, {:.1} % of the same padded to the longest\n\
             {:.1} % of the rows came from a cache of {cache_rows}; {items} items of {dim} values as {format}",
            megabytes(*batch_bytes),
            megabytes(*row_bytes),
            100.0 * self.over_positions,
            100.0 * self.over_padded,
            100.0 * self.hit_share,
        )
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_in_units() {
        let flight = FlightBenchResult {
            clients: 2,
            streams: 4,
            rows: 1024,
            dim: 4096,
            bytes: 12_345_000_000,
            seconds: 5.0,
            gigabytes_per_second: 2.469,
        };
        assert_eq!(
            flight.to_string(),
            "2.469 GB/s: 12345.0 MB in 5.00 s\n1024 rows of 4096 values a request; clients: 2, connections of each: 4"
        );
        let wire = WireBenchResult {
            row_format: RowFormat::Int8,
            items: 1000,
            dim: 256,
            cache_rows: 100,
            steps: 40,
            users: 640,
            positions: 5000,
            batch_bytes: 200_000,
            row_bytes: 1_000_000,
            hit_share: 0.625,
            bytes_per_user: 1875.0,
            over_positions: 0.234,
            over_padded: 0.03,
        };
        assert_eq!(
            wire.to_string(),
            "1875 bytes a user: 0.20 MB of batches and 1.00 MB of rows for 640 users with 5000 positions in 40 steps\n\
             23.4 % of what every position takes as f32, 3.0 % of the same padded to the longest\n\
             62.5 % of the rows came from a cache of 100; 1000 items of 256 values as int8"
        );
    }
}
