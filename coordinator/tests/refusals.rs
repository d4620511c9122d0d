//! What strangers, liars and broken programs send to a coordinator process: refused with a proper status, without a panic
//! and without memory that stays.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::flight_service_server::FlightService as _;
use arrow_flight::{Criteria, FlightData, FlightDescriptor, Ticket as RawTicket};
use bytes::{Buf, BufMut, Bytes};
use futures::{StreamExt, stream};
use learn_coordinator::data::{DataService, Directory, Source};
use learn_domain::config::RowFormat;
use learn_domain::report::CoordinatorAddress;
use learn_proto::auth::{BearerInterceptor, Secret};
use learn_proto::flight::{Exchange, Ticket};
use learn_proto::v1::control_client::ControlClient;
use learn_proto::v1::{GetRequest, HeartbeatRequest, PutRequest};
use learn_telemetry::DataMetrics;
use support::{Ground, SECRET, train};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

const STOP: &str = "/learn.v1.Operator/Stop";
/// Every method of the port.
const METHODS: [&str; 26] = [
    STOP,
    "/learn.v1.Operator/Scale",
    "/learn.v1.Control/Join",
    "/learn.v1.Control/Heartbeat",
    "/learn.v1.Control/Attend",
    "/learn.v1.Control/Ready",
    "/learn.v1.Control/BeginGeneration",
    "/learn.v1.Control/Put",
    "/learn.v1.Control/Get",
    "/learn.v1.Control/ReportStep",
    "/learn.v1.Control/CommitCheckpoint",
    "/learn.v1.Control/ReportEvaluation",
    "/learn.v1.Control/ReportEvent",
    "/learn.v1.Control/Leave",
    "/learn.v1.Control/OfferData",
    "/arrow.flight.protocol.FlightService/Handshake",
    "/arrow.flight.protocol.FlightService/ListFlights",
    "/arrow.flight.protocol.FlightService/GetFlightInfo",
    "/arrow.flight.protocol.FlightService/PollFlightInfo",
    "/arrow.flight.protocol.FlightService/GetSchema",
    "/arrow.flight.protocol.FlightService/DoGet",
    "/arrow.flight.protocol.FlightService/DoPut",
    "/arrow.flight.protocol.FlightService/DoExchange",
    "/arrow.flight.protocol.FlightService/DoAction",
    "/arrow.flight.protocol.FlightService/ListActions",
    "/arrow.flight.protocol.FlightService/None",
];

/// A coordinator process of its own, so that its memory can be told.
struct Process {
    child: Child,
    address: CoordinatorAddress,
    _ground: Ground,
}

impl Process {
    fn start() -> Self {
        let ground = Ground::new(1);
        let run_dir = ground.settings(train()).run_dir;
        let log = std::fs::File::create(run_dir.root().join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_learn-coordinator"))
            .arg("--run-dir")
            .arg(run_dir.root())
            .args(["--task-json", &serde_json::to_string(&train()).unwrap(), "--log-json"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = child.unwrap();
        // it says that it serves; what it says afterwards is kept
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("serving") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "the coordinator has ended");
        }
        std::thread::spawn(move || std::io::copy(&mut said, &mut &log));
        let address = serde_json::from_slice(&std::fs::read(run_dir.coordinator()).unwrap()).unwrap();
        Self { child, address, _ground: ground }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self._ground.run_dir().root().join("log")).unwrap()
    }

    fn rss_mib(&self) -> u64 {
        let status = Path::new("/proc").join(self.child.id().to_string()).join("status");
        let text = std::fs::read_to_string(status).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
    }

    fn channel(&self) -> Channel {
        Endpoint::from_shared(self.address.grpc.clone()).unwrap().connect_lazy()
    }

    fn host(&self) -> &str {
        self.address.grpc.strip_prefix("http://").unwrap()
    }

    /// Whether it still answers those who belong to the job.
    async fn answers(&self) -> bool {
        let mut flight = FlightServiceClient::with_interceptor(self.channel(), bearer(SECRET));
        flight.list_flights(Criteria::default()).await.is_ok()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // it may have ended already, which a test says
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn bearer(secret: &str) -> BearerInterceptor {
    BearerInterceptor::try_from(&Secret::new(secret).unwrap()).unwrap()
}

/// Bytes as a message.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Calls a method with any messages and reads the answer to its end.
async fn call<I>(
    channel: InterceptedService<Channel, I>,
    method: &'static str,
    messages: Vec<Bytes>,
) -> Result<(), Status>
where
    I: Interceptor + Clone + Send + 'static,
{
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(method);
    let mut answers = client.streaming(Request::new(stream::iter(messages)), path, Raw).await?.into_inner();
    while answers.message().await?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn every_method_refuses_calls_without_the_secret() {
    let process = Process::start();
    let nobody = |request: Request<()>| Ok(request);
    for method in METHODS {
        // a connection of its own: one that is refused again and again ends
        let refused = call(InterceptedService::new(process.channel(), nobody), method, vec![Bytes::new()]).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{method}: {refused}");
        assert!(refused.message().contains("authorization: Bearer SECRET"), "{refused}");
        let other = InterceptedService::new(process.channel(), bearer("fedcba9876543210"));
        let refused = call(other, method, vec![Bytes::new()]).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{method}: {refused}");
        assert!(refused.message().contains("secret of this run"), "{refused}");
    }
    assert!(process.answers().await);
    let log = process.log();
    assert!(log.contains("refused a call without the job's secret"), "{log}");
    assert!(!log.contains(SECRET) && !log.contains("fedcba9876543210"), "a secret is in the log");
}

#[tokio::test]
async fn a_flood_of_silent_connections_locks_nobody_out() {
    let process = Process::start();
    let mut silent = Vec::new();
    for number in 0..600 {
        let mut stream = TcpStream::connect(process.host()).await.unwrap();
        if number % 2 == 0 {
            stream.write_all(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..number % 24]).await.unwrap();
        }
        silent.push(stream);
        if number % 100 == 99 {
            assert!(process.answers().await, "after {number} silent connections");
        }
    }
    // the oldest have made room: their connections end, whatever the way
    let mut all = Vec::new();
    for stream in &mut silent[..300] {
        let _ = stream.read_to_end(&mut all).await;
    }
    assert!(process.answers().await);
    assert!(process.log().contains("the oldest is closed"));
}

#[tokio::test]
async fn oversized_and_senseless_requests_are_refused_with_a_proper_status() {
    let process = Process::start();
    let mut control = ControlClient::with_interceptor(process.channel(), bearer(SECRET));
    let mut flight = FlightServiceClient::with_interceptor(process.channel(), bearer(SECRET));

    let phase = "x".repeat(5 << 20);
    let refused = control.heartbeat(HeartbeatRequest { phase, ..HeartbeatRequest::default() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let phase = "x".repeat(2000);
    let refused = control.heartbeat(HeartbeatRequest { phase, ..HeartbeatRequest::default() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let value = vec![0; 70_000];
    let put = PutRequest { worker_id: 0, generation: 1, key: "k".into(), value };
    assert_eq!(control.put(put).await.unwrap_err().code(), Code::InvalidArgument);
    let get = GetRequest { worker_id: 0, generation: 1, key: "k".repeat(300), wait_millis: u32::MAX };
    assert_eq!(control.get(get).await.unwrap_err().code(), Code::InvalidArgument);

    let batches = |rank, world_size, from_step| Ticket::Batches { rank, world_size, from_step, steps: 0, times: false };
    let tickets = [
        vec![b' '; 5000],
        b"[1]".to_vec(),
        b"{\"version\":9,\"kind\":\"popularity\"}".to_vec(),
        b"{\"version\":1,\"kind\":\"popularity\",\"more\":1}".to_vec(),
        batches(0, 0, 0).encode(),
        batches(7, 7, 0).encode(),
        batches(0, u32::MAX, 0).encode(),
        batches(0, 1, u64::MAX).encode(),
        Ticket::Items { first: u32::MAX, count: u32::MAX }.encode(),
    ];
    for ticket in tickets {
        let text = ticket.escape_ascii().to_string();
        let refused = flight.do_get(RawTicket::new(ticket)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{text}: {refused}");
    }

    // more streams than one connection may read: exchanges that wait for requests
    let mut open = Vec::new();
    let refused = loop {
        let descriptor = FlightDescriptor::new_cmd(Exchange::Rows { format: RowFormat::F16 }.encode());
        let first = FlightData { flight_descriptor: Some(descriptor), ..FlightData::default() };
        let requests = stream::iter([first]).chain(stream::pending());
        match flight.do_exchange(requests).await {
            Ok(stream) => open.push(stream),
            Err(refused) => break refused,
        }
    };
    assert_eq!((refused.code(), open.len()), (Code::ResourceExhausted, 32), "{refused}");
    drop(open);
    assert!(process.answers().await);
}

#[tokio::test]
async fn the_catalogue_is_not_read_more_often_at_once_than_there_are_places() {
    let ground = Ground::new(1);
    let source = Arc::new(Source::new(ground.dataset(), &ground.config).unwrap());
    let catalogues = Arc::new(Semaphore::new(1));
    let directory = Directory::new("http://127.0.0.1:1", Duration::from_secs(1));
    let service = DataService { source, metrics: DataMetrics::new(), world_size: 1, directory, catalogues };
    let ticket = || Request::new(RawTicket::new(Ticket::Items { first: 0, count: 0 }.encode()));
    let first = service.do_get(ticket()).await.unwrap();
    let Err(refused) = service.do_get(ticket()).await else { panic!("there was one place only") };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    drop(first);
    assert!(service.do_get(ticket()).await.is_ok());
}

/// A row of numbers, the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self) -> Bytes {
        let length = (self.next() % 300) as usize;
        (0..length).map(|_| self.next() as u8).collect()
    }
}

#[tokio::test]
async fn malformed_messages_leave_neither_panics_nor_memory() {
    let process = Process::start();
    let channel = process.channel();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let round = async |numbers: &mut Numbers, calls: usize| {
        let mut refused = 0;
        for number in 0..calls {
            // the one that any bytes are good for
            let methods = || METHODS.iter().filter(|method| **method != STOP);
            let method = methods().nth(number % methods().count()).unwrap();
            let mut messages = vec![numbers.bytes()];
            if method.ends_with("DoExchange") {
                messages = exchange(numbers);
            }
            let authorized = InterceptedService::new(channel.clone(), bearer(SECRET));
            refused += usize::from(call(authorized, method, messages).await.is_err());
        }
        refused
    };
    // what is allocated once
    round(&mut numbers, 2000).await;
    let before = process.rss_mib();
    let refused = round(&mut numbers, 20_000).await;
    let grown = process.rss_mib().saturating_sub(before);
    assert!(refused > 15_000, "{refused} of 20000 malformed calls were refused");
    assert!(grown <= 16, "the coordinator grew from {before} MiB by {grown} MiB in 20000 malformed calls");
    assert!(process.answers().await);
    assert!(!process.log().contains("panic"), "{}", process.log());
}

/// An exchange that begins well and goes on with rubbish.
fn exchange(numbers: &mut Numbers) -> Vec<Bytes> {
    use prost::Message as _;
    let descriptor = FlightDescriptor::new_cmd(Exchange::Rows { format: RowFormat::F16 }.encode());
    let rubbish = |numbers: &mut Numbers| FlightData {
        data_header: numbers.bytes(),
        data_body: numbers.bytes(),
        ..FlightData::default()
    };
    let first = FlightData { flight_descriptor: Some(descriptor), ..FlightData::default() };
    [first, rubbish(numbers), rubbish(numbers)].map(|message| message.encode_to_vec().into()).to_vec()
}
