//! A tiny dataset, a coordinator on free ports, and clients of it.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use arrow_flight::flight_service_client::FlightServiceClient;
use half::f16;
use learn_coordinator::{Coordinator, CoordinatorError, Outcome, Settings};
use learn_dataset::Dataset;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore};
use learn_domain::config::{Config, Precision, Span};
use learn_domain::membership::Departure;
use learn_domain::progress::Work;
use learn_domain::report::{CoordinatorAddress, StepRecord, Task};
use learn_domain::run_dir::RunDir;
use learn_domain::{Generation, Incarnation, Step, UserIndex, WorkerId};
use learn_proto::auth::{BearerInterceptor, Secret};
use learn_proto::convert::{Admission, Applicant, Beginning, Order, StepReport};
use learn_proto::v1::control_client::ControlClient;
use learn_proto::v1::operator_client::OperatorClient;
use learn_proto::v1::{
    BeginGenerationRequest, HeartbeatRequest, HeartbeatResponse, JoinRequest, LeaveRequest, ReadyRequest,
    ReportStepRequest,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

pub const USERS: u32 = 100;
pub const ITEMS: u32 = 37;
pub const DIM: usize = 8;
pub const SECRET: &str = "0123456789abcdef";
pub const TOKEN: &str = "fedcba9876543210";

pub type Authorized = InterceptedService<Channel, BearerInterceptor>;
pub type Control = ControlClient<Authorized>;
pub type Operator = OperatorClient<Authorized>;
pub type Flight = FlightServiceClient<Authorized>;

/// A dataset with content embeddings and a run directory.
pub struct Ground {
    pub folder: TempDir,
    pub config: Config,
}

pub fn train() -> Task {
    Task::Train { resume_from: None }
}

fn write_dataset(folder: &Path, label: Option<&str>) -> PathBuf {
    let mut csv = String::from("user_id,item_id,timestamp,label\n");
    for user in 0..USERS {
        for step in 0..4 + user % 13 {
            let item = (user * 7 + step * step * 3 + step) % ITEMS;
            csv += &format!("u{user},i{item},{},{}\n", 1000 + step, u32::from((user + step) % 3 == 0));
        }
    }
    let input = folder.join("interactions.csv");
    std::fs::write(&input, csv).unwrap();
    let mut config = Config::default().prepare;
    config.interactions.files = vec![input];
    config.interactions.label = label.map(str::to_owned);
    let out = folder.join("dataset");
    learn_dataset::prepare(&config, "tiny", &out, &()).unwrap();
    out
}

/// The vector that [`Ground`] gives an item.
pub fn vector(item: u32) -> Vec<f16> {
    (0..DIM as u32).map(|column| f16::from_f32((1 + item * 3 + column) as f32 / 64.0)).collect()
}

impl Ground {
    pub fn bare(workers: u32) -> Self {
        Self::without_embeddings(workers, None)
    }

    fn without_embeddings(workers: u32, label: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.data.dataset = write_dataset(folder.path(), label);
        config.job.name = "test".into();
        config.cluster.workers = workers;
        config.training.global_batch = 16;
        config.training.epochs = 2;
        config.sampling.history = 6;
        config.sampling.targets = 4;
        config.sampling.user_positions = 3;
        config.sampling.item_positions = 2;
        Self { folder, config }
    }

    pub fn new(workers: u32) -> Self {
        Self::bare(workers).embedded()
    }

    /// With conversion labels.
    pub fn labelled(workers: u32) -> Self {
        Self::without_embeddings(workers, Some("label")).embedded()
    }

    fn embedded(self) -> Self {
        self.embed("test", vector);
        self
    }

    /// Gives the dataset the content embeddings of an encoder, in the place of those that it has.
    pub fn embed(&self, encoder: &str, vector: impl Fn(u32) -> Vec<f16>) {
        let dataset = self.dataset();
        let items = dataset.manifest().counts.items;
        let spec =
            EmbeddingSpec { dim: DIM, model_fingerprint: encoder.into(), precision: Precision::F32, shard_items: 10 };
        let store = EmbeddingStore::new(&dataset, spec, &vec![String::new(); items as usize]).unwrap();
        for shard in store.shards() {
            let rows: Vec<f16> = shard.items.clone().flat_map(|item| vector(item as u32)).collect();
            store.write_shard(shard.index, &rows).unwrap();
        }
        store.commit(encoder).unwrap();
    }

    pub fn dataset(&self) -> Dataset {
        Dataset::open(&self.config.data.dataset).unwrap()
    }

    pub fn run_dir(&self) -> RunDir {
        RunDir::new(self.folder.path().join("run"))
    }

    pub fn settings(&self, task: Task) -> Settings {
        let run_dir = self.run_dir();
        std::fs::create_dir_all(run_dir.root()).unwrap();
        std::fs::write(run_dir.config(), serde_json::to_string(&self.config).unwrap()).unwrap();
        std::fs::write(run_dir.secret(), format!("{SECRET}\n")).unwrap();
        std::fs::write(run_dir.token(), format!("{TOKEN}\n")).unwrap();
        Settings::load(run_dir.root(), None, task).unwrap()
    }

    pub async fn start(&self, task: Task) -> Running {
        Running::start(Coordinator::bind(self.settings(task)).await.unwrap())
    }

    pub async fn refusal(&self, task: Task) -> CoordinatorError {
        match Coordinator::bind(self.settings(task)).await {
            Ok(_) => panic!("the coordinator should have refused"),
            Err(error) => error,
        }
    }
}

/// A coordinator at work.
pub struct Running {
    pub address: CoordinatorAddress,
    pub stop: oneshot::Sender<()>,
    job: JoinHandle<Result<Outcome, CoordinatorError>>,
}

impl Running {
    pub fn start(coordinator: Coordinator) -> Self {
        let address = coordinator.address().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async {
            if stopped.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        Self { address, stop, job: tokio::spawn(coordinator.run(shutdown)) }
    }

    pub async fn end(self) -> Outcome {
        let _not_stopped = self.stop;
        self.job.await.unwrap().unwrap()
    }

    /// Ends it without a word to anybody; its journal, a thread of this process, ends by itself.
    pub async fn kill(self, ground: &Ground) {
        self.job.abort();
        assert!(self.job.await.unwrap_err().is_cancelled());
        let locked = std::fs::File::open(ground.run_dir().secret()).unwrap();
        tokio::task::spawn_blocking(move || locked.lock()).await.unwrap().unwrap();
    }

    pub async fn stop(self) -> Outcome {
        self.stop.send(()).unwrap();
        self.job.await.unwrap().unwrap()
    }

    pub fn channel(&self) -> Channel {
        Endpoint::from_shared(self.address.grpc.clone()).unwrap().connect_lazy()
    }

    pub fn control(&self) -> Control {
        ControlClient::with_interceptor(self.channel(), bearer())
    }

    pub fn operator(&self) -> Operator {
        OperatorClient::with_interceptor(self.channel(), bearer())
    }

    pub fn flight(&self) -> Flight {
        FlightServiceClient::with_interceptor(self.channel(), bearer())
    }

    /// `METHOD path` over HTTP: status code and body.
    pub async fn http(&self, request: &str, headers: &str) -> (u16, String) {
        self.http_with(request, headers, "").await
    }

    /// Asks for what may be some moments old until the answer is the one that is `wanted`.
    pub async fn until(&self, request: &str, wanted: impl Fn(u16, &str) -> bool) {
        let asked = tokio::time::Instant::now();
        loop {
            let (code, body) = self.http(request, "").await;
            if wanted(code, &body) {
                return;
            }
            assert!(asked.elapsed() < Duration::from_secs(10), "{request}: {code} {body}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The JSON of something that the run's token opens.
    pub async fn api(&self, path: &str) -> serde_json::Value {
        let token = format!("Authorization: Bearer {TOKEN}\r\n");
        let (code, body) = self.http(&format!("GET /api/v1/{path}"), &token).await;
        assert_eq!(code, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// [`Running::http`] with JSON.
    pub async fn http_with(&self, request: &str, headers: &str, body: &str) -> (u16, String) {
        let (head, body) = self.whole(request, headers, body).await;
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body)
    }

    /// Head and body of an answer.
    pub async fn whole(&self, request: &str, headers: &str, body: &str) -> (String, String) {
        let host = self.address.http.strip_prefix("http://").unwrap();
        let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
        let json = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        let text = format!("{request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{json}{headers}\r\n{body}");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // a server that refuses to read on resets the connection behind its answer
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }
}

pub fn bearer() -> BearerInterceptor {
    BearerInterceptor::try_from(&Secret::new(SECRET).unwrap()).unwrap()
}

pub fn join_request(name: &str) -> JoinRequest {
    let applicant = Applicant {
        incarnation: Incarnation(name.into()),
        host: "here".into(),
        pid: 7,
        device: "cpu".into(),
        metrics_url: "http://here:1/metrics".into(),
    };
    applicant.into()
}

pub async fn join(control: &mut Control, name: &str) -> Admission {
    control.join(join_request(name)).await.unwrap().into_inner().try_into().unwrap()
}

/// Says that `worker` is out of `generation` (0 = it was in none).
pub async fn ready(control: &mut Control, worker: WorkerId, generation: u64, broken: Option<&str>) {
    let request = ReadyRequest { worker_id: worker.0, generation, broken: broken.map(str::to_owned) };
    control.ready(request).await.unwrap();
}

/// Joins, and is ready for a first generation.
pub async fn enter(control: &mut Control, name: &str) -> WorkerId {
    let worker = join(control, name).await.worker;
    ready(control, worker, 0, None).await;
    worker
}

/// Where `generation` goes on from, with the records of all steps so far.
pub fn beginning(worker: WorkerId, generation: u64, step: u64) -> BeginGenerationRequest {
    let record = |step| StepRecord {
        step: Step(step),
        generation: Generation(generation - 1),
        loss: 2.0,
        users: 16,
        ..StepRecord::default()
    };
    let last = (1..=step).map(record).collect();
    Beginning { worker, generation: Generation(generation), step: Step(step), last }.into()
}

/// A worker's part of a step of the first generation; that of worker 0 has the numbers of the whole step.
pub fn report(worker: u32, record: StepRecord, users: &[UserIndex]) -> ReportStepRequest {
    let report = StepReport {
        worker: WorkerId(worker),
        generation: Generation(1),
        step: record.step,
        epoch: 0,
        users: users.to_vec(),
        work: Work::default(),
        record: (worker == 0).then_some(record),
    };
    report.into()
}

/// A worker's open call.
pub struct Orders {
    orders: Streaming<HeartbeatResponse>,
    beats: mpsc::Sender<HeartbeatRequest>,
}

pub async fn attend(control: &mut Control, worker: WorkerId) -> Orders {
    let first = HeartbeatRequest { worker_id: worker.0, ..HeartbeatRequest::default() };
    let (beats, said) = mpsc::channel(1);
    beats.try_send(first).unwrap();
    Orders { orders: control.attend(ReceiverStream::new(said)).await.unwrap().into_inner(), beats }
}

impl Orders {
    /// The next order.
    pub async fn next(&mut self) -> Result<Order, Status> {
        Ok(self.orders.message().await?.expect("the call is open").try_into().unwrap())
    }

    /// Waits for an order; one that was overtaken may never be seen.
    pub async fn until(&mut self, wanted: &Order) {
        while self.next().await.unwrap() != *wanted {}
    }

    /// Says a heartbeat by the open call.
    pub async fn beat(&self, worker: WorkerId, step: u64) {
        let request = HeartbeatRequest { worker_id: worker.0, generation: 1, step, ..HeartbeatRequest::default() };
        self.beats.send(request).await.unwrap();
    }
}

pub async fn heartbeat(control: &mut Control, worker: WorkerId) -> Order {
    let request =
        HeartbeatRequest { worker_id: worker.0, generation: 1, phase: "test".into(), ..HeartbeatRequest::default() };
    control.heartbeat(request).await.unwrap().into_inner().try_into().unwrap()
}

pub async fn leave(control: &mut Control, worker: WorkerId, departure: Departure) {
    let request = LeaveRequest { worker_id: worker.0, generation: 1, departure: Some(departure.into()) };
    control.leave(request).await.unwrap();
}

pub fn millis(millis: u64) -> Span {
    Span(Duration::from_millis(millis))
}
