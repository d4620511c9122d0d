//! Content embedding rows over one long exchange.
//!
//! Input: item indices. Output: their rows, in order, written once to where they belong ([`super::reader`]). The call is
//! made on the channel itself, because tonic's generated client collects every message before it gives it out. Invariant: an
//! exchange that broke is opened again, at another location if need be, and a request is asked again from its beginning.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;

use arrow_array::{RecordBatch, UInt32Array};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::{FlightData, FlightDescriptor};
use arrow_schema::SchemaRef;
use futures::channel::mpsc;
use futures::{SinkExt, StreamExt};
use half::f16;
use learn_proto::auth::BearerInterceptor;
use learn_proto::flight::{Exchange, RowsMeta, rows_request_schema};
use tonic::Status;
use tonic::body::Body;
use tonic::codec::EncodeBody;
use tonic::codegen::{Body as _, Bytes, Service, http};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic_prost::ProstEncoder;

use super::answers::{FlightClientError, unexpected};
use super::flight::{DataClient, Link};
use super::reader::{Destination, RowsReader};

/// Items of a request: their indices fit into one message.
const MOST_ITEMS: usize = 1 << 18;

const DO_EXCHANGE: &str = "/arrow.flight.protocol.FlightService/DoExchange";

/// Rows by item index from the services of a job.
pub struct RowExchange {
    client: DataClient,
    /// `None` before the first request and after a break.
    open: Option<OpenedRows>,
    schema: SchemaRef,
    dim: usize,
}

struct OpenedRows {
    requests: mpsc::Sender<RecordBatch>,
    sent: u64,
    location: Arc<str>,
    body: Body,
    /// What has come and was not read yet.
    piece: Bytes,
    reader: RowsReader,
}

type Caller = InterceptedService<Channel, BearerInterceptor>;

/// An open call: the body of its response.
async fn call(
    channel: &mut Caller,
    requests: impl futures::Stream<Item = FlightData> + Send + 'static,
) -> Result<Body, Status> {
    let broken = |error: tonic::transport::Error| Status::from_error(error.into());
    let encoder = ProstEncoder::new(tonic::codec::BufferSettings::default());
    let body = Body::new(EncodeBody::new_client(encoder, requests.map(Ok), None, None));
    let mut request = http::Request::new(body);
    *request.method_mut() = http::Method::POST;
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = http::Uri::from_static(DO_EXCHANGE);
    let headers = request.headers_mut();
    headers.insert(http::header::TE, http::HeaderValue::from_static("trailers"));
    headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    poll_fn(|context| <Caller as Service<http::Request<Body>>>::poll_ready(channel, context)).await.map_err(broken)?;
    let response = channel.call(request).await.map_err(broken)?;
    if let Some(status) = Status::from_header_map(response.headers()) {
        return Err(status);
    }
    if response.status() != http::StatusCode::OK {
        return Err(Status::unavailable(format!("the server answered with HTTP status {}", response.status())));
    }
    Ok(Body::new(response.into_body()))
}

/// The next bytes of a response; its end is an error that says how it has ended.
async fn next_piece(body: &mut Body) -> Result<Bytes, Status> {
    loop {
        let ended = || Status::unavailable("the row exchange ended before its answer");
        let frame = poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await.ok_or_else(ended)??;
        match frame.into_data() {
            Ok(data) if data.is_empty() => {}
            Ok(data) => return Ok(data),
            Err(frame) => {
                let status = frame.trailers_ref().and_then(Status::from_header_map);
                return Err(status.filter(|status| status.code() != tonic::Code::Ok).unwrap_or_else(ended));
            }
        }
    }
}

impl RowExchange {
    #[must_use]
    pub(super) fn new(client: &DataClient, dim: usize) -> Self {
        Self { client: client.clone(), open: None, schema: Arc::new(rows_request_schema()), dim }
    }

    /// Writes the rows of `items`, in their order, to `into`, `[items, dim]`, and tells the bytes that have come for them.
    ///
    /// # Errors
    /// If the service refuses, stays away, or answers something else. Then `into` is not whole.
    pub async fn fetch_into(&mut self, items: &[u32], into: &mut [f16]) -> Result<u64, FlightClientError> {
        let mut bytes = 0;
        for (items, into) in items.chunks(MOST_ITEMS).zip(into.chunks_mut(MOST_ITEMS * self.dim.max(1))) {
            bytes += self.request(items, into).await?;
        }
        Ok(bytes)
    }

    async fn request(&mut self, items: &[u32], into: &mut [f16]) -> Result<u64, FlightClientError> {
        let mut trying = self.client.patience().trying("rows");
        loop {
            match self.try_fetch(items, into).await {
                Ok(bytes) => {
                    trying.answered();
                    return Ok(bytes);
                }
                Err(error) => {
                    self.open = None;
                    trying.again(error).await?;
                }
            }
        }
    }

    /// The rows of `items`, `[items, dim]`, in their order.
    ///
    /// # Errors
    /// As [`RowExchange::fetch_into`].
    pub async fn fetch(&mut self, items: &[u32]) -> Result<Vec<f16>, FlightClientError> {
        let mut rows = vec![f16::ZERO; items.len() * self.dim];
        self.fetch_into(items, &mut rows).await?;
        Ok(rows)
    }

    /// Opens the call. Without `self`: a body cannot be shared between threads, but what sends the call may change threads.
    async fn open(client: &DataClient, schema: SchemaRef, dim: usize) -> Result<OpenedRows, FlightClientError> {
        let format = client.row_format();
        let (requests, received) = mpsc::channel::<RecordBatch>(1);
        let stream = FlightDataEncoderBuilder::new()
            .with_schema(schema)
            .with_flight_descriptor(Some(FlightDescriptor::new_cmd(Exchange::Rows { format }.encode())))
            .build(received.map(Ok))
            // encoding one u32 column cannot fail; if it did, the exchange would end and the reader says so
            .filter_map(|message: Result<FlightData, FlightError>| futures::future::ready(message.ok()));
        let Link { location, mut channel, .. } = client.link();
        let body = call(&mut channel, stream).await.map_err(|status| client.failed(&location, &status))?;
        let reader = RowsReader::new(dim, format);
        Ok(OpenedRows { requests, sent: 0, location, body, piece: Bytes::new(), reader })
    }

    async fn try_fetch(&mut self, items: &[u32], into: &mut [f16]) -> Result<u64, FlightClientError> {
        let column = UInt32Array::from(items.to_vec());
        let request = RecordBatch::try_new(self.schema.clone(), vec![Arc::new(column)])
            .map_err(|error| unexpected(error.to_string()))?;
        self.client.settle(&mut self.open, |open| &open.location).await;
        let mut open = match self.open.take() {
            Some(open) => open,
            None => Self::open(&self.client, self.schema.clone(), self.dim).await?,
        };
        if open.requests.send(request).await.is_err() {
            let ended = Status::unavailable("the row exchange has ended");
            return Err(self.client.failed(&open.location, &ended));
        }
        let number = open.sent;
        open.sent += 1;
        let mut to = Destination::new(into);
        let (mut part, mut bytes) = (0, 0);
        loop {
            if open.piece.is_empty() {
                let piece = next_piece(&mut open.body).await;
                open.piece = piece.map_err(|status| self.client.failed(&open.location, &status))?;
            }
            let (taken, ended) = open.reader.read(&open.piece, &mut to)?;
            let _ = open.piece.split_to(taken);
            bytes += taken as u64;
            let Some(ended) = ended.filter(|ended| ended.is_batch) else { continue };
            let meta: RowsMeta = serde_json::from_slice(&ended.metadata)
                .map_err(|error| unexpected(format!("rows metadata: {error}")))?;
            if (meta.request, meta.part) != (number, part) {
                let RowsMeta { request, part: got, .. } = meta;
                return Err(unexpected(format!("part {got} of request {request} instead of part {part} of {number}")));
            }
            part += 1;
            if part >= meta.parts {
                break;
            }
        }
        if !to.is_full() {
            return Err(unexpected(format!("fewer rows than the {} that were asked for", items.len())));
        }
        self.open = Some(open);
        Ok(bytes)
    }
}
