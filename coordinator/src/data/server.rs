//! The data service as a server: generated code for all calls but one.
//!
//! Input: HTTP requests. Output: HTTP responses. `DoExchange` is by far the most that a job moves, and its messages are
//! written as they go to the socket ([`super::frame`]); tonic's generated code would encode, that is copy, them once more.
//! Everything else about that call is as the generated code does it: limits, statuses, trailers.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow_flight::FlightData;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_server::FlightServiceServer;
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use http_body::Frame;
use http_body_util::StreamBody;
use learn_proto::flight::Exchange;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;
use tonic::{Status, Streaming};
use tonic_prost::ProstDecoder;

use super::{DataService, bad_ticket, encode, frame, holding, rows};
use crate::connections::{MAX_REQUEST_BYTES, Peer};

const DO_EXCHANGE: &str = "/arrow.flight.protocol.FlightService/DoExchange";

type HttpRequest = http::Request<Body>;
type HttpResponse = http::Response<Body>;

/// Serves a [`DataService`].
#[derive(Clone)]
pub struct DataServer {
    service: Arc<DataService>,
    generated: FlightServiceServer<DataService>,
}

impl DataServer {
    #[must_use]
    pub fn new(service: DataService) -> Self {
        let service = Arc::new(service);
        let generated =
            FlightServiceServer::from_arc(Arc::clone(&service)).max_decoding_message_size(MAX_REQUEST_BYTES);
        Self { service, generated }
    }
}

impl NamedService for DataServer {
    const NAME: &'static str = <FlightServiceServer<DataService> as NamedService>::NAME;
}

impl Service<HttpRequest> for DataServer {
    type Response = HttpResponse;
    type Error = Infallible;
    type Future = BoxFuture<HttpResponse, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest) -> Self::Future {
        if request.uri().path() != DO_EXCHANGE {
            return self.generated.call(request);
        }
        let service = Arc::clone(&self.service);
        Box::pin(async move { Ok(exchange(&service, request).await.unwrap_or_else(Status::into_http)) })
    }
}

async fn exchange(service: &DataService, request: HttpRequest) -> Result<HttpResponse, Status> {
    let place = Peer::of(request.extensions()).map(Peer::stream).transpose()?;
    let decoder = ProstDecoder::<FlightData>::new(tonic::codec::BufferSettings::default());
    let mut requests = Streaming::new_request(decoder, request.into_body(), None, Some(MAX_REQUEST_BYTES));
    let first = requests.message().await?.ok_or_else(|| Status::invalid_argument("the exchange has no message"))?;
    let descriptor = first.flight_descriptor.as_ref();
    let command = descriptor.map(|descriptor| &descriptor.cmd[..]).unwrap_or_default();
    let Exchange::Rows { format } = Exchange::decode(command).map_err(bad_ticket)?;
    let embeddings = service.source.embeddings.clone().ok_or_else(|| {
        Status::failed_precondition("this job's model reads no content embeddings (model.item_input = \"id\")")
    })?;
    let schema = frame::frame(&encode::schema_message(&service.rows_schema(format)));
    // a client may send the descriptor alone, before the schema of its requests
    let first = stream::iter((!first.data_header.is_empty()).then_some(Ok(first)));
    let requests = first.chain(requests.map_err(|status| FlightError::Tonic(Box::new(status))));
    let counted = service.counted("rows", rows::stream(embeddings, format, requests), Bytes::len);
    let messages = holding(stream::once(std::future::ready(Ok(schema))).chain(counted).boxed(), place);
    let mut response = http::Response::new(Body::new(StreamBody::new(frames(messages))));
    let content_type = http::HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(http::header::CONTENT_TYPE, content_type);
    Ok(response)
}

/// The body of a response: messages until the first error, then how the call has ended.
fn frames(
    messages: impl Stream<Item = Result<Bytes, Status>> + Send + 'static,
) -> impl Stream<Item = Result<Frame<Bytes>, Status>> + Send + 'static {
    let with_end = messages.map(Some).chain(stream::once(std::future::ready(None)));
    with_end.scan(false, |ended, message| {
        if *ended {
            return std::future::ready(None);
        }
        let status = match message {
            Some(Ok(bytes)) => return std::future::ready(Some(Ok(Frame::data(bytes)))),
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        *ended = true;
        let mut trailers = http::HeaderMap::new();
        std::future::ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
    })
}
