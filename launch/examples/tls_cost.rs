//! What `cluster.tls` costs on the way of the data: content embeddings over one exchange, with and without it, on loopback.
//!
//! `cargo build --release -p learn-coordinator --bins && cargo run --release -p learn-launch --example tls_cost -- [MiB]`

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arrow_array::{RecordBatch, UInt32Array};
use arrow_flight::FlightDescriptor;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::utils::batches_to_flight_data;
use futures::{StreamExt, stream};
use half::f16;
use learn_dataset::Dataset;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore};
use learn_domain::Config;
use learn_domain::config::{Precision, RowFormat, TlsMode};
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;
use learn_launch::runs;
use learn_proto::connect::Pass;
use learn_proto::flight::{Exchange, rows_request_schema};

const DIM: usize = 1024;
/// As many as one request asks for: 8 MiB of rows.
const ITEMS: u32 = 4000;

fn main() -> Result<()> {
    let mib: usize = std::env::args().nth(1).map_or(Ok(4096), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let mut config = prepare(folder.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..3 {
        for (place, mode) in [TlsMode::Off, TlsMode::Auto].into_iter().enumerate() {
            config.cluster.tls.mode = mode;
            let run = runs::create(&folder.path().join(format!("run-{round}-{place}")), &config)?;
            let coordinator = Coordinator::start(&run)?;
            let rate = runtime.block_on(fetch(&Pass::read(&run.secret())?, &coordinator.address.grpc, mib))?;
            println!("{mode:?}: {rate:.0} MiB/s");
            rates[place].push(rate);
        }
    }
    let [plain, encrypted] = rates.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    println!(
        "median: {plain:.0} MiB/s without, {encrypted:.0} MiB/s with certificates, ratio {:.2}",
        encrypted / plain
    );
    Ok(())
}

/// A dataset with vectors, and the configuration of a job over it.
fn prepare(folder: &Path) -> Result<Config> {
    let mut rows = String::from("user_id,item_id,timestamp\n");
    for item in 0..ITEMS {
        for turn in 0..4 {
            rows += &format!("u{},i{item},{}\n", (item + turn * 7) % 1000, item * 4 + turn);
        }
    }
    let file = folder.join("interactions.csv");
    fs::write(&file, rows)?;
    let mut config = Config::default();
    config.prepare.interactions.files = vec![file];
    config.data.dataset = folder.join("dataset");
    config.job.name = "tls-cost".into();
    learn_dataset::prepare(&config.prepare, "tls-cost", &config.data.dataset, &())?;
    let dataset = Dataset::open(&config.data.dataset)?;
    let items = dataset.manifest().counts.items as usize;
    ensure!(items == ITEMS as usize, "the dataset has {items} items");
    let spec =
        EmbeddingSpec { dim: DIM, model_fingerprint: "none".into(), precision: Precision::F32, shard_items: items };
    let store = EmbeddingStore::new(&dataset, spec, &vec![String::new(); items])?;
    store.write_shard(0, &vec![f16::from_f32(0.03); items * DIM])?;
    store.commit("none")?;
    Ok(config)
}

struct Coordinator {
    child: Child,
    address: CoordinatorAddress,
}

impl Coordinator {
    fn start(run: &RunDir) -> Result<Self> {
        let own = std::env::current_exe()?;
        let binary = own.parent().and_then(Path::parent).context("an example has a folder")?.join("learn-coordinator");
        let mut child = Command::new(&binary)
            .arg("--run-dir")
            .arg(run.root())
            .args(["--task-json", r#"{"kind":"train","resume_from":null}"#])
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}; build it first", binary.display()))?;
        loop {
            if let Some(address) = runs::live(run) {
                return Ok(Self { child, address });
            }
            ensure!(child.try_wait()?.is_none(), "the coordinator has ended");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // nothing is lost with it
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// MiB a second.
async fn fetch(pass: &Pass, url: &str, mib: usize) -> Result<f64> {
    let channel = pass.endpoint(url)?.connect().await?;
    let mut client = FlightServiceClient::with_interceptor(channel, pass.bearer()?);
    let schema = rows_request_schema();
    let items = UInt32Array::from_iter_values(0..ITEMS);
    let batch = RecordBatch::try_new(Arc::new(schema.clone()), vec![Arc::new(items)])?;
    let mut messages = batches_to_flight_data(&schema, &[batch])?;
    messages[0].flight_descriptor = Some(FlightDescriptor::new_cmd(Exchange::Rows { format: RowFormat::F16 }.encode()));
    let request = messages.pop().context("a request has a message")?;
    let repeats = (mib << 20).div_ceil(ITEMS as usize * DIM * 2);
    let started = Instant::now();
    let requests = stream::iter(messages).chain(stream::iter(std::iter::repeat_n(request, repeats)));
    let mut answers = client.do_exchange(requests).await?.into_inner();
    let mut bytes = 0;
    while let Some(message) = answers.next().await {
        bytes += message?.data_body.len();
    }
    ensure!(bytes >= mib << 20, "only {bytes} bytes came");
    Ok(bytes as f64 / (1 << 20) as f64 / started.elapsed().as_secs_f64())
}
