//! `learn-coordinator bench`: the data path measured alone, with the parts that a job uses.
//!
//! Input: a shape. Output: what a worker's client took in, as its `learn-worker` beside this program says. The service is the
//! real one with its limits and its secret, in this process; the client is another process, over loopback.

mod dataset;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

pub use dataset::{Lengths, MakingError, Shape};
use learn_dataset::{Dataset, DatasetError};
use learn_domain::Config;
use learn_domain::config::{ByteSize, ClusterConfig, RowFormat};
use learn_proto::auth::Secret;
use learn_telemetry::DataMetrics;
use tokio::process::Command;
use tokio::sync::watch;
use tonic::service::interceptor::InterceptedService;

use crate::connections::{self, Gate};
use crate::data::{DataServer, DataService, Directory, Source, SourceError, catalogues};
use crate::serve::{Ports, ServeError, on_stop};

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Making(#[from] MakingError),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("cannot start {path}: {source}; `learn-worker` must lie beside this program")]
    Worker { path: PathBuf, source: std::io::Error },
    #[error("the measuring client ended with {0}; what went wrong stands above")]
    Client(std::process::ExitStatus),
    #[error("{0}")]
    Usage(String),
}

/// Where the dataset is, or what it shall be.
#[derive(Clone, Debug)]
pub struct BenchDataset {
    /// None: in a temporary folder that goes with the measurement. One that does not exist is made and stays.
    pub dir: Option<PathBuf>,
    pub shape: Shape,
}

fn open(wanted: &BenchDataset, scratch: &Path) -> Result<Dataset, BenchError> {
    let dir = wanted.dir.clone().unwrap_or_else(|| scratch.join("dataset"));
    if dir.join("dataset.json").exists() {
        return Ok(Dataset::open(&dir)?);
    }
    tracing::info!(dataset = %dir.display(), shape = ?wanted.shape, "making a dataset");
    Ok(dataset::make(&wanted.shape, &dir, scratch)?)
}

fn write_secret(path: &Path) -> Result<Secret, BenchError> {
    let wrong = |path: &Path, source| BenchError::Io { path: path.to_owned(), source };
    let random = Path::new("/dev/urandom");
    let mut bytes = [0_u8; 16];
    std::fs::File::open(random).and_then(|mut file| file.read_exact(&mut bytes)).map_err(|e| wrong(random, e))?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(path, &text).map_err(|e| wrong(path, e))?;
    Secret::new(&text).map_err(|error| BenchError::Usage(error.to_string()))
}

/// Of a cache that holds this share of the rows, 2 bytes a value; all there can be of a share beyond that.
fn cache_size(items: u32, dim: u32, share: f64) -> ByteSize {
    let rows = (f64::from(items) * share) as u64;
    ByteSize(rows.saturating_mul(2).saturating_mul(u64::from(dim)))
}

/// What the client of a measurement does.
#[derive(Clone, Copy, Debug)]
pub enum Client {
    /// Takes rows drawn from the whole catalogue.
    Flight { clients: u32, streams: u32, rows: u32, seconds: f64 },
    /// Takes the batches of a job, and the rows that they need through the worker's cache.
    Wire {
        users: u32,
        /// Share of the catalogue that the cache holds.
        cache: f64,
        /// Steps before those that count.
        warm: u64,
        steps: u64,
        row_format: RowFormat,
    },
}

impl Client {
    /// The job that it is a worker of.
    fn config(&self, dataset: &Dataset) -> Config {
        let mut config = Config::default();
        config.data.dataset = dataset.dir().to_owned();
        config.data.map_rows = false;
        if let Self::Wire { users, cache, row_format, .. } = *self {
            config.data.row_format = row_format;
            config.training.global_batch = users;
            config.training.epochs = 1000;
            let facts = dataset.facts();
            config.cluster.row_cache = cache_size(facts.items, facts.embedding_dim, cache);
        }
        config
    }

    fn arguments(&self, config: &Config, source: &Source) -> Result<Vec<String>, BenchError> {
        let named = |pairs: &[(&str, String)]| -> Vec<String> {
            pairs.iter().flat_map(|(name, value)| [(*name).to_owned(), value.clone()]).collect()
        };
        let (items, dim) = (source.facts.items.to_string(), source.dim().to_string());
        let mut all = named(&[("--items", items), ("--dim", dim)]);
        match *self {
            Self::Flight { clients, streams, rows, seconds } => {
                all.insert(0, "bench-flight".into());
                let counts = [("--clients", clients), ("--streams", streams), ("--rows", rows)];
                all.extend(named(&counts.map(|(name, count)| (name, count.to_string()))));
                all.extend(named(&[("--seconds", seconds.to_string())]));
            }
            Self::Wire { warm, steps, .. } => {
                all.insert(0, "bench-wire".into());
                let json = serde_json::to_string(config).map_err(|error| BenchError::Usage(error.to_string()))?;
                let (warm, steps) = (warm.to_string(), steps.to_string());
                all.extend(named(&[("--config-json", json), ("--warm", warm), ("--steps", steps)]));
            }
        }
        Ok(all)
    }
}

/// Serves a dataset, lets a client take from it, and gives what it printed.
///
/// # Errors
/// If the dataset cannot be made or served, or the client fails.
pub async fn measure(wanted: &BenchDataset, client: &Client, json: bool) -> Result<String, BenchError> {
    // of this user alone
    let scratch = tempfile::Builder::new().prefix("learn-bench-").tempdir();
    let scratch = scratch.map_err(|source| BenchError::Io { path: std::env::temp_dir(), source })?;
    let secret_file = scratch.path().join("secret");
    let secret = write_secret(&secret_file)?;
    let dataset = tokio::task::block_in_place(|| open(wanted, scratch.path()))?;
    let config = client.config(&dataset);
    let source = Arc::new(Source::new(dataset, &config)?);
    let arguments = client.arguments(&config, &source)?;

    let ports = Ports::bind(&ClusterConfig { bind: "127.0.0.1".into(), ..ClusterConfig::default() }, None).await?;
    let location = ports.address.grpc.clone();
    let service = DataService {
        source,
        metrics: DataMetrics::new(),
        world_size: 1,
        directory: Directory::new(&location, Duration::from_secs(60)),
        catalogues: catalogues(),
    };
    let (stop, stopped) = watch::channel(false);
    let serving = connections::server()
        .add_service(InterceptedService::new(DataServer::new(service), Gate(secret)))
        .serve_with_incoming_shutdown(
            connections::connections(ports.grpc, connections::Limits::default(), None),
            on_stop(stopped),
        );
    let serving = tokio::spawn(serving);

    let here = std::env::current_exe().map_err(|source| BenchError::Io { path: "this program".into(), source })?;
    let worker = here.with_file_name("learn-worker");
    let mut command = Command::new(&worker);
    command.args(arguments).args(["--location", &location, "--secret-file"]).arg(&secret_file);
    command.args(json.then_some("--json")).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let child = command.spawn().map_err(|source| BenchError::Worker { path: worker.clone(), source })?;
    let output = child.wait_with_output().await;
    let output = output.map_err(|source| BenchError::Io { path: worker, source })?;
    stop.send_replace(true);
    serving.abort();
    if !output.status.success() {
        return Err(BenchError::Client(output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_any_size_is_a_cache() {
        for (share, bytes) in
            [(0.1, 10 * 2 * 256), (-1.0, 0), (f64::NAN, 0), (1e30, u64::MAX), (f64::INFINITY, u64::MAX)]
        {
            assert_eq!(cache_size(100, 256, share), ByteSize(bytes), "{share}");
        }
    }
}
