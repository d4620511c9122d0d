//! The client of the data service against services that go away, come back, or stay away.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, UNIX_EPOCH};

use arrow_array::builder::{Float16Builder, ListBuilder, UInt32Builder};
use arrow_array::cast::AsArray;
use arrow_array::types::UInt32Type;
use arrow_array::{ArrayRef, FixedSizeListArray, Float32Array, Int8Array, RecordBatch, UInt32Array};
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightEndpoint, FlightInfo, HandshakeRequest,
    HandshakeResponse, PollInfo, PutResult, SchemaResult, Ticket as RawTicket,
};
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use half::f16;
use learn_collective::TheirRows;
use learn_dataset::embeddings::int8;
use learn_dataset::{Dataset, Embeddings};
use learn_domain::config::{ObjectiveConfig, RowFormat};
use learn_proto::auth::Secret;
use learn_proto::flight::{
    BatchMeta, Exchange, Extras, RowFile, RowFiles, RowsMeta, Ticket, batches_schema, directory_location, element,
    rows_schema,
};
use learn_telemetry::WorkerMetrics;
use learn_worker::feed::assemble::Layout;
use learn_worker::feed::bench::{FlightBenchSettings, bench_flight};
use learn_worker::feed::cache::CachePlace;
use learn_worker::feed::flight::{DataClient, FlightClientError, Share};
use learn_worker::feed::neighbours::Neighbours;
use learn_worker::feed::{Feed, FeedError, FeedSettings, RowSettings, RowSource, UniformNegatives};
use learn_worker::retry::Patience;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

const DIM: i32 = 2;

/// Serves step after step, and rows; goes away within the answer that `break_at` names.
#[derive(Clone, Default)]
struct Fake {
    tickets: Arc<Mutex<Vec<u64>>>,
    /// Who has opened an exchange.
    callers: Arc<Mutex<HashSet<SocketAddr>>>,
    break_at: Option<u64>,
    /// Offers this dataset's files.
    files: Option<PathBuf>,
    /// Sends its rows, too.
    honest: bool,
    /// Items in front of each history.
    earlier: usize,
    /// Makes something else of what a message says of itself.
    lie: Option<fn(&mut BatchMeta)>,
}

fn batch(step: u64, earlier: usize) -> RecordBatch {
    let list = |values: &[u32]| {
        let element = element(arrow_schema::DataType::UInt32);
        let mut lists = ListBuilder::new(UInt32Builder::new()).with_field(element);
        lists.append_value(values.iter().copied().map(Some));
        Arc::new(lists.finish())
    };
    let history = [vec![4; earlier], vec![1, 2]].concat();
    let number = |value: u32| Arc::new(UInt32Array::from(vec![value]));
    let columns: Vec<arrow_array::ArrayRef> =
        vec![number(step as u32), number(0), list(&history), list(&[3]), list(&[1]), list(&[0])];
    RecordBatch::try_new(Arc::new(batches_schema(Extras::default())), columns).unwrap()
}

/// The rows of a service without a dataset.
fn row(item: u32) -> [f16; DIM as usize] {
    [f16::from_f32(item as f32); DIM as usize]
}

/// A row of a dataset.
fn stored(embeddings: &Embeddings, item: u32) -> [f16; DIM as usize] {
    embeddings.row(item as usize).try_into().unwrap()
}

fn rows(items: &[u32], format: RowFormat, row: impl Fn(u32) -> [f16; DIM as usize]) -> RecordBatch {
    let (mut values, mut bytes, mut scales) = (Float16Builder::new(), Vec::new(), Vec::new());
    for &item in items {
        let (row, mut quantized) = (row(item), [0; DIM as usize]);
        values.append_slice(&row);
        scales.push(int8::quantize(&row, &mut quantized).unwrap());
        bytes.extend(quantized);
    }
    let schema = Arc::new(rows_schema(DIM as u32, format));
    let arrow_schema::DataType::FixedSizeList(field, _) = schema.field_with_name("embedding").unwrap().data_type()
    else {
        panic!("rows are fixed-size lists")
    };
    let list = |values: ArrayRef| Arc::new(FixedSizeListArray::new(field.clone(), DIM, values, None));
    let columns: Vec<ArrayRef> = match format {
        RowFormat::F16 => vec![list(Arc::new(values.finish()))],
        RowFormat::Int8 => vec![list(Arc::new(Int8Array::from(bytes))), Arc::new(Float32Array::from(scales))],
    };
    RecordBatch::try_new(schema, columns).unwrap()
}

/// What a server says of its files.
fn row_files(dir: &Path) -> RowFiles {
    let dataset = Dataset::open(dir).unwrap();
    let info = dataset.manifest().embeddings.as_ref().unwrap();
    let file = |path: &String| {
        let metadata = std::fs::metadata(dir.join(path)).unwrap();
        let modified = metadata.modified().unwrap().duration_since(UNIX_EPOCH).unwrap();
        RowFile { path: path.clone(), bytes: metadata.len(), modified_nanos: modified.as_nanos().try_into().unwrap() }
    };
    RowFiles {
        fingerprint: dataset.facts().fingerprint,
        embeddings_fingerprint: info.fingerprint.clone(),
        files: info.files.iter().map(|entry| file(&entry.path)).collect(),
    }
}

/// The messages of one batch, the schema first if it is the first.
async fn messages(batch: RecordBatch, metadata: Vec<u8>, first: bool) -> Vec<FlightData> {
    let encoder = FlightDataEncoderBuilder::new().with_schema(batch.schema()).build(stream::iter([Ok(batch)]));
    let mut messages: Vec<FlightData> = encoder.try_collect().await.unwrap();
    messages.last_mut().unwrap().app_metadata = metadata.into();
    if first { messages } else { messages.split_off(1) }
}

type Messages = BoxStream<'static, Result<FlightData, Status>>;

fn away() -> Vec<Result<FlightData, Status>> {
    vec![Err(Status::unavailable("going away"))]
}

fn none<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not here"))
}

#[tonic::async_trait]
impl FlightService for Fake {
    type HandshakeStream = BoxStream<'static, Result<HandshakeResponse, Status>>;
    type ListFlightsStream = BoxStream<'static, Result<FlightInfo, Status>>;
    type DoGetStream = Messages;
    type DoPutStream = BoxStream<'static, Result<PutResult, Status>>;
    type DoActionStream = BoxStream<'static, Result<arrow_flight::Result, Status>>;
    type ListActionsStream = BoxStream<'static, Result<ActionType, Status>>;
    type DoExchangeStream = Messages;

    async fn do_get(&self, request: Request<RawTicket>) -> Result<Response<Messages>, Status> {
        let ticket = Ticket::decode(&request.get_ref().ticket).unwrap();
        let Ticket::Batches { from_step, .. } = ticket else {
            return Err(Status::invalid_argument("only batches"));
        };
        self.tickets.lock().unwrap().push(from_step);
        let (break_at, earlier, lie) = (self.break_at, self.earlier, self.lie);
        let steps = stream::iter(from_step..).then(move |step| async move {
            // a step has two parts, and a break comes between them
            let mut all = Vec::new();
            for part in 0..2 {
                let mut meta = BatchMeta { step, epoch: 0, global_users: 2, global_pairs: 2, part, parts: 2 };
                if let Some(lie) = lie {
                    lie(&mut meta);
                }
                let first = step == from_step && part == 0;
                let messages = messages(batch(step, earlier), serde_json::to_vec(&meta).unwrap(), first).await;
                all.extend(messages.into_iter().map(Ok));
                if break_at == Some(step) {
                    all.extend(away());
                    break;
                }
            }
            stream::iter(all)
        });
        Ok(Response::new(steps.flatten().boxed()))
    }

    async fn do_exchange(&self, request: Request<Streaming<FlightData>>) -> Result<Response<Messages>, Status> {
        self.callers.lock().unwrap().extend(request.remote_addr());
        let mut requests = request.into_inner();
        let first = requests.message().await?.unwrap();
        let Exchange::Rows { format } = Exchange::decode(&first.flight_descriptor.as_ref().unwrap().cmd).unwrap();
        let requests = stream::iter([Ok(first)]).chain(requests);
        let requests = requests.map_err(|status| FlightError::Tonic(Box::new(status)));
        let requests = FlightRecordBatchStream::new_from_flight_data(requests);
        let break_at = self.break_at;
        let embeddings = self.files.as_ref().filter(|_| self.honest).map(|dir| Dataset::open(dir).unwrap());
        let embeddings = embeddings.map(|dataset| Arc::new(dataset.embeddings().unwrap()));
        let answers = requests.enumerate().then(move |(number, request)| {
            let embeddings = embeddings.clone();
            async move {
                let number = number as u64;
                let row = |item| embeddings.as_ref().map_or_else(|| row(item), |all| stored(all, item));
                if break_at == Some(number) {
                    return stream::iter(away());
                }
                let request = request.unwrap();
                let items = request.column(0).as_primitive::<UInt32Type>().values().to_vec();
                let meta = RowsMeta { request: number, part: 0, parts: 1 };
                let messages =
                    messages(rows(&items, format, row), serde_json::to_vec(&meta).unwrap(), number == 0).await;
                stream::iter(messages.into_iter().map(Ok).collect::<Vec<_>>())
            }
        });
        Ok(Response::new(answers.flatten().boxed()))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        none()
    }
    async fn list_flights(&self, _: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        none()
    }
    async fn get_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        let Some(dir) = &self.files else { return none() };
        let info = FlightInfo::new().with_app_metadata(serde_json::to_vec(&row_files(dir)).unwrap());
        Ok(Response::new(info.with_endpoint(FlightEndpoint::new().with_location(directory_location(dir)))))
    }
    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        none()
    }
    async fn get_schema(&self, _: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        none()
    }
    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        none()
    }
    async fn do_action(&self, _: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        none()
    }
    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        none()
    }
}

/// A service with a runtime of its own, so that it dies with all its connections.
struct Service {
    runtime: Runtime,
    address: SocketAddr,
}

impl Service {
    fn start(fake: Fake, address: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap();
        let serve = Server::builder().add_service(FlightServiceServer::new(fake));
        runtime.spawn(serve.serve_with_incoming(TcpIncoming::from(listener)));
        Self { runtime, address }
    }

    fn location(&self) -> String {
        format!("http://{}", self.address)
    }

    fn kill(self) -> SocketAddr {
        self.runtime.shutdown_timeout(Duration::from_secs(10));
        self.address
    }
}

fn client(runtime: &Runtime, locations: &[String], patience: Duration) -> DataClient {
    let secret = Secret::new("0123456789abcdef").unwrap();
    runtime.block_on(DataClient::new(locations, 0, &secret.into(), &Patience::new(patience))).unwrap()
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

const PATIENT: Duration = Duration::from_secs(30);

fn batches(from_step: u64) -> Ticket {
    Ticket::Batches { rank: 0, world_size: 1, from_step, steps: 0, times: false }
}

#[test]
fn a_history_that_is_larger_than_a_message_is_taken() {
    let runtime = runtime();
    let service = Service::start(Fake { earlier: 2 << 20, ..Fake::default() }, "127.0.0.1:0");
    let mut shares = client(&runtime, &[service.location()], PATIENT).shares(batches(0));
    let share = runtime.block_on(shares.next()).unwrap().unwrap();
    assert_eq!(share.users.iter().map(|user| user.history.len()).collect::<Vec<_>>(), [(2 << 20) + 2; 2]);
}

#[test]
fn parts_that_are_not_those_of_the_step_are_refused_with_their_servers_name() {
    let runtime = runtime();
    type Lie = fn(&mut BatchMeta);
    let lies: [(Lie, &str); 6] = [
        (|meta| meta.step += 1, "part 0 of 2 of step 6 instead of part 0 of step 5"),
        (|meta| meta.step += u64::from(meta.part), "part 1 of 2 of step 6 instead of part 1 of step 5"),
        (|meta| meta.part = 1, "part 1 of 2 of step 5 instead of part 0 of step 5"),
        (|meta| meta.parts = meta.part, "part 0 of 0 of step 5 instead of part 0 of step 5"),
        (|meta| meta.global_pairs += u64::from(meta.part), "part 1 of step 5 says"),
        (|meta| meta.global_users = 1, "2 users of step 5, which has 1"),
    ];
    for (lie, said) in lies {
        let service = Service::start(Fake { lie: Some(lie), ..Fake::default() }, "127.0.0.1:0");
        let mut shares = client(&runtime, &[service.location()], PATIENT).shares(batches(5));
        let error = runtime.block_on(shares.next()).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains(&service.location()), "{error}");
    }
}

#[test]
fn steps_follow_each_other_through_breaks_and_the_death_of_the_service() {
    let runtime = runtime();
    let first = Fake { break_at: Some(6), ..Fake::default() };
    let service = Service::start(first.clone(), "127.0.0.1:0");
    let mut shares = client(&runtime, &[service.location()], PATIENT).shares(batches(5));
    let mut next = |expected: u64| {
        let Share { meta, users, bytes } = runtime.block_on(shares.next()).unwrap().unwrap();
        assert_eq!((meta.step, users.len(), users[0].user), (expected, 2, expected as u32));
        // two users of seven numbers each, and what carries them
        assert!((2 * 7 * 4 + 1..10_000).contains(&bytes), "{bytes}");
    };
    next(5);
    let address = service.kill();
    // what was on its way may still arrive; then the service is asked again for the step that is due
    let second = Fake::default();
    let _service = Service::start(second.clone(), &address.to_string());
    (6..40).for_each(&mut next);
    assert_eq!(*first.tickets.lock().unwrap(), [5]);
    assert_eq!(*second.tickets.lock().unwrap(), [6], "the half of step 6 that had come was asked for again");
}

#[test]
fn another_location_takes_over_from_one_that_is_dead_or_breaks() {
    let runtime = runtime();
    let dead = Service::start(Fake::default(), "127.0.0.1:0");
    let nobody = dead.location();
    dead.kill();
    let breaking = Service::start(Fake { break_at: Some(2), ..Fake::default() }, "127.0.0.1:0");
    let whole = Service::start(Fake::default(), "127.0.0.1:0");
    let client = client(&runtime, &[nobody, breaking.location(), whole.location()], PATIENT);
    let mut rows = client.rows(DIM as usize);
    for number in 0..6 {
        let items = [number, 7 + number];
        let got = runtime.block_on(rows.fetch(&items)).unwrap();
        let expected: Vec<f16> = items.iter().flat_map(|&item| [f16::from_f32(item as f32); DIM as usize]).collect();
        assert_eq!(got, expected);
    }
}

#[test]
fn a_large_request_is_divided_between_connections_and_messages() {
    let (runtime, metrics) = (runtime(), WorkerMetrics::new());
    let callers = Arc::default();
    let service = Service::start(Fake { callers: Arc::clone(&callers), ..Fake::default() }, "127.0.0.1:0");
    let client = client(&runtime, &[service.location()], PATIENT);
    let settings = RowSettings { dim: DIM as usize, items: 2000, streams: 2, ..RowSettings::default() };
    let mut source = RowSource::new(&client, &settings, metrics.clone());
    // more for each connection than one message of indices holds
    let items: Vec<u32> = (0..600_000).map(|number| number * 7 % 2000).collect();
    let got = runtime.block_on(source.fetch(&items)).unwrap();
    assert!(got.iter().eq(items.iter().flat_map(|&item| row(item)).collect::<Vec<_>>().iter()));
    assert_eq!(callers.lock().unwrap().len(), 2);
    let (bytes, least) = (metrics.received_bytes_total.with_label_values(&["rows"]).get(), 4 * 600_000);
    assert!((least..least + 10_000).contains(&bytes), "{bytes}");
    // a small one takes no further connection
    assert_eq!(runtime.block_on(source.fetch(&[5])).unwrap(), row(5));
    assert_eq!(callers.lock().unwrap().len(), 2);
}

#[test]
fn each_client_of_a_measurement_has_as_many_connections_as_it_is_told() {
    let callers = Arc::default();
    let service = Service::start(Fake { callers: Arc::clone(&callers), ..Fake::default() }, "127.0.0.1:0");
    let folder = tempfile::tempdir().unwrap();
    let secret_file = folder.path().join("secret");
    std::fs::write(&secret_file, "0123456789abcdef").unwrap();
    let settings = FlightBenchSettings {
        location: service.location(),
        secret_file,
        items: 2000,
        dim: DIM as usize,
        clients: 2,
        streams: 3,
        // 3 MiB of rows, one for each connection
        rows: (3 << 20) / (2 * DIM as usize),
        span: Duration::from_millis(20),
    };
    let result = bench_flight(&settings).unwrap();
    assert_eq!(callers.lock().unwrap().len(), 2 * 3);
    let request = 3 << 20;
    assert!(result.bytes >= 2 * request && result.bytes.is_multiple_of(request), "{result:?}");
}

/// The feed of a job whose caches hold every row.
fn feed(runtime: &Runtime, location: &str, metrics: &WorkerMetrics) -> Feed {
    feed_with(runtime, location, metrics, (1 << 10, CachePlace::default()))
}

fn feed_with(
    runtime: &Runtime,
    location: &str,
    metrics: &WorkerMetrics,
    (device_bytes, cache): (u64, CachePlace),
) -> Feed {
    let settings = FeedSettings {
        rank: 0,
        world_size: 1,
        from_step: 0,
        layout: Layout::new(&ObjectiveConfig::default(), 0),
        uniform: UniformNegatives::default(),
        prefetch_steps: 3,
        rows: RowSettings { dim: DIM as usize, cache_bytes: 1 << 10, device_bytes, items: 5, ..RowSettings::default() },
        cache,
        neighbours: Neighbours::default(),
        times: false,
    };
    let client = client(runtime, &[location.to_owned()], PATIENT);
    Feed::start(runtime.handle().clone(), client, settings, metrics.clone())
}

#[test]
fn steps_come_with_their_rows_through_the_death_of_the_service() {
    let (runtime, metrics) = (runtime(), WorkerMetrics::new());
    let mut service = Service::start(Fake::default(), "127.0.0.1:0");
    let mut feed = feed(&runtime, &service.location(), &metrics);
    // what a device does with it
    let mut table: BTreeMap<usize, Vec<f16>> = BTreeMap::new();
    for step in 0..40 {
        if step == 15 {
            let address = service.kill();
            service = Service::start(Fake::default(), &address.to_string());
        }
        let prepared = feed.next_step(|| false).unwrap();
        assert_eq!(prepared.meta.step, step);
        assert!(metrics.prefetched_steps.get() <= metrics.prefetch_depth.get(), "a step for each permit");
        let [(batch, rows)] = &prepared.micro_batches[..] else { panic!("a step is one pass") };
        assert_eq!(batch.unique_items, [1, 2, 3]);
        let on_device = rows.on_device.as_ref().unwrap();
        let mut sent = rows.sent.chunks_exact(DIM as usize);
        for (item, slot) in batch.unique_items.iter().zip(&on_device.held) {
            let found: &[f16] = slot.as_ref().map_or_else(|| sent.next().unwrap(), |slot| &table[slot]);
            assert_eq!(found, row(*item));
        }
        assert_eq!(sent.len(), 0);
        for &(number, slot) in &on_device.kept {
            table.insert(slot, rows.sent[number * DIM as usize..][..DIM as usize].to_vec());
        }
    }
    assert_eq!(metrics.cache_misses_total.get(), 3, "each row was fetched once");
    assert!(metrics.device_cache_hits_total.get() >= 39 * 3);
}

#[test]
fn a_feed_ends_while_it_waits() {
    let (runtime, metrics) = (runtime(), WorkerMetrics::new());
    let service = Service::start(Fake::default(), "127.0.0.1:0");
    // for a permit
    let mut ahead = feed(&runtime, &service.location(), &metrics);
    ahead.next_step(|| false).unwrap();
    drop(ahead);
    // for a service that is away
    let location = service.location();
    service.kill();
    let started = Instant::now();
    let mut waiting = feed(&runtime, &location, &metrics);
    assert!(matches!(waiting.next_step(|| true), Err(FeedError::Aborted)));
    drop(waiting);
    assert!(started.elapsed() < PATIENT / 2);
}

#[test]
fn patience_ends_and_a_refusal_is_final() {
    let runtime = runtime();
    let service = Service::start(Fake::default(), "127.0.0.1:0");
    let location = service.location();
    let refused = runtime.block_on(client(&runtime, std::slice::from_ref(&location), PATIENT).popularity());
    assert!(matches!(refused, Err(FlightClientError::Refused(_))), "{refused:?}");
    service.kill();
    let started = Instant::now();
    let client = client(&runtime, std::slice::from_ref(&location), Duration::from_millis(300));
    let away = runtime.block_on(client.popularity()).unwrap_err();
    assert!(matches!(&away, FlightClientError::Away { location: named, .. } if *named == location), "{away}");
    assert!(started.elapsed() >= Duration::from_millis(300) && started.elapsed() < PATIENT);
}

#[test]
fn rows_are_mapped_if_the_files_are_the_services_and_sent_if_they_are_not() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/dataset/tests/data/v1").canonicalize().unwrap();
    let dataset = Dataset::open(&dir).unwrap();
    let (facts, embeddings) = (dataset.facts(), dataset.embeddings().unwrap());
    let runtime = runtime();
    let take = |fake: Fake| {
        let service = Service::start(fake, "127.0.0.1:0");
        let client = client(&runtime, &[service.location()], PATIENT).with_files_of(&facts);
        let metrics = WorkerMetrics::new();
        let settings = RowSettings { dim: DIM as usize, cache_bytes: 1 << 10, items: 5, ..RowSettings::default() };
        let mut source = RowSource::new(&client, &settings, metrics.clone());
        let rows = runtime.block_on(source.rows(&[1, 4])).unwrap();
        let bytes = |of| metrics.received_bytes_total.with_label_values(&[of]).get();
        (rows, bytes("mapped"), bytes("rows") > 0)
    };
    let files = Some(dir);
    let here = [embeddings.row(1), embeddings.row(4)].concat();
    assert_eq!(take(Fake { files: files.clone(), honest: true, ..Fake::default() }), (here.clone(), 8, false));
    // a file that says that it is the same and is not
    let other = [row(1), row(4)].concat();
    assert_ne!(other, here);
    assert_eq!(take(Fake { files, honest: false, ..Fake::default() }), (other, 0, true));
}

#[test]
fn the_next_generation_goes_on_with_the_rows_of_the_one_before() {
    let (runtime, metrics) = (runtime(), WorkerMetrics::new());
    let service = Service::start(Fake::default(), "127.0.0.1:0");
    let place = CachePlace::default();
    let mut misses = Vec::new();
    for place in [place.clone(), place, CachePlace::default()] {
        let mut feed = feed_with(&runtime, &service.location(), &metrics, (0, place));
        for _ in 0..3 {
            feed.next_step(|| false).unwrap();
        }
        drop(feed);
        misses.push(metrics.cache_misses_total.get());
    }
    assert_eq!(misses, [3, 3, 6], "three items are all that steps need");
}

#[test]
#[cfg(target_os = "linux")]
fn what_a_neighbour_holds_is_neither_sent_nor_kept() {
    let runtime = runtime();
    let service = Service::start(Fake::default(), "127.0.0.1:0");
    let settings = RowSettings { dim: DIM as usize, cache_bytes: 1 << 10, items: 5, ..RowSettings::default() };
    let places = [(); 2].map(|()| CachePlace::shared(settings.shape().unwrap()));
    let metrics = [(); 2].map(|()| WorkerMetrics::new());
    let source = |worker: usize| {
        let table = TheirRows::open(places[1 - worker].offer().unwrap()).unwrap();
        let client = client(&runtime, &[service.location()], PATIENT);
        RowSource::new(&client, &settings, metrics[worker].clone())
            .with_cache_at(places[worker].clone())
            .with_neighbours(vec![table].into())
    };
    let mut sources = [source(0), source(1)];
    // of this and all earlier requests: own rows, the neighbour's, and those that were sent
    let mut after = |worker: usize, items: &[u32]| {
        let got = runtime.block_on(sources[worker].rows(items)).unwrap();
        assert!(got.iter().eq(items.iter().flat_map(|&item| row(item)).collect::<Vec<_>>().iter()));
        let WorkerMetrics { cache_hits_total, cache_neighbour_rows_total, cache_misses_total, .. } = &metrics[worker];
        (cache_hits_total.get(), cache_neighbour_rows_total.get(), cache_misses_total.get())
    };
    assert_eq!(after(0, &[1, 2]), (0, 0, 2));
    assert_eq!(after(1, &[3, 2, 4, 1]), (0, 2, 2));
    assert_eq!(after(1, &[1, 2, 3, 4]), (2, 4, 2), "what was found is looked for again");
    assert_eq!(after(0, &[0, 1, 2, 3, 4]), (2, 2, 3));
    // the next generation has the same tables
    drop(sources);
    let received = runtime.block_on(source(1).rows(&[4, 0, 2])).unwrap();
    assert_eq!(received, [row(4), row(0), row(2)].concat());
    assert_eq!(metrics[1].cache_misses_total.get(), 2);
}

#[test]
fn int8_rows_have_the_same_values_mapped_and_sent() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/dataset/tests/data/v1").canonicalize().unwrap();
    let dataset = Dataset::open(&dir).unwrap();
    let runtime = runtime();
    let service = Service::start(Fake { files: Some(dir), honest: true, ..Fake::default() }, "127.0.0.1:0");
    let items = [4, 0, 1, 3, 2];
    let expected = dataset.embeddings().unwrap().gather(&items, RowFormat::Int8).unwrap();
    for (mapped, bytes) in [(true, 5 * 2 * 2), (false, 0)] {
        let client = client(&runtime, &[service.location()], PATIENT).with_row_format(RowFormat::Int8);
        let client = if mapped { client.with_files_of(&dataset.facts()) } else { client };
        let metrics = WorkerMetrics::new();
        let settings = RowSettings { dim: DIM as usize, cache_bytes: 1 << 10, items: 5, ..RowSettings::default() };
        let mut source = RowSource::new(&client, &settings, metrics.clone());
        let received = |of| metrics.received_bytes_total.with_label_values(&[of]).get();
        assert_eq!(runtime.block_on(source.rows(&items)).unwrap(), expected);
        let sent = received("rows");
        assert_eq!((received("mapped"), sent > 0), (bytes, !mapped));
        // the second time from the cache, or the files again
        assert_eq!(runtime.block_on(source.rows(&items)).unwrap(), expected);
        assert_eq!(received("rows"), sent);
        assert_eq!(runtime.block_on(source.fetch(&items)).unwrap(), expected);
    }
}
