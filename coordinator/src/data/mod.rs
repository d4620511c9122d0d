//! The data service: Arrow Flight over a [`Source`], without any state of its own.
//!
//! Input: descriptors, tickets and commands of `learn_proto::flight`. Output: what the job's data looks like, a rank's
//! batches (item indices), held-out rows, the catalogue, content embeddings by index. Work happens on blocking threads,
//! a client that does not read stops it: at most [`READ_AHEAD`] messages of 2 MiB are made ahead of each stream.

mod batches;
mod directory;
mod encode;
mod frame;
mod held_out;
mod opening;
#[doc(hidden)]
pub mod rows;
mod server;
mod source;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use arrow_flight::flight_service_server::FlightService;
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightEndpoint, FlightInfo, HandshakeRequest,
    HandshakeResponse, IpcMessage, PollInfo, PutResult, SchemaAsIpc, SchemaResult, Ticket as RawTicket,
};
use arrow_ipc::writer::IpcWriteOptions;
use arrow_schema::Schema;
pub use batches::Place;
pub use directory::{Directory, Offer};
use futures::stream::{self, BoxStream, Stream, StreamExt, TryStreamExt};
use learn_domain::config::RowFormat;
use learn_domain::report::Split;
use learn_proto::flight::{
    Exchange, Extras, POPULARITY, ROWS, RowFiles, Ticket, TicketError, batches_schema, directory_location,
    evaluation_schema, flight_location, items_schema, popularity_schema, rows_schema,
};
use learn_telemetry::DataMetrics;
pub(crate) use opening::{opened, verify};
pub use server::DataServer;
pub use source::{Source, SourceError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status, Streaming};

use crate::connections::Peer;

/// Messages of a stream that are made before the client asks for them.
const READ_AHEAD: usize = 2;

/// Largest world that a ticket may name.
const MAX_WORLD_SIZE: u32 = 1 << 16;

/// Streams of the catalogue at once, over all connections: each holds all texts in memory.
const MAX_CATALOGUES: usize = 4;

/// The Flight service.
pub struct DataService {
    pub source: Arc<Source>,
    pub metrics: DataMetrics,
    /// The job's world size: how many endpoints a flight has.
    pub world_size: u32,
    /// The servers with this dataset.
    pub directory: Directory,
    /// Places for streams of the catalogue.
    pub catalogues: Arc<Semaphore>,
}

/// Places for streams of the catalogue, as many as a service has.
#[must_use]
pub fn catalogues() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MAX_CATALOGUES))
}

/// Runs `work` on a blocking thread.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T, Status> + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Status::internal(format!("the data service failed: {error}"))))
}

fn bad_ticket(error: TicketError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// What a descriptor's path may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flight {
    Train,
    HeldOut(Split),
    Items,
    Popularity,
    Rows,
}

impl Flight {
    /// The flights that `ListFlights` shows; rows are exchanged, not got.
    const LISTED: [Self; 5] =
        [Self::Train, Self::HeldOut(Split::Valid), Self::HeldOut(Split::Test), Self::Items, Self::Popularity];

    fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::HeldOut(Split::Valid) => "valid",
            Self::HeldOut(Split::Test) => "test",
            Self::Items => "items",
            Self::Popularity => POPULARITY,
            Self::Rows => ROWS,
        }
    }

    fn find(descriptor: &FlightDescriptor) -> Result<Self, Status> {
        let [path] = &descriptor.path[..] else {
            return Err(Status::invalid_argument("a descriptor here has a path of one name, like [\"train\"]"));
        };
        let all = Self::LISTED.into_iter().chain([Self::Rows]);
        all.clone().find(|flight| flight.name() == path).ok_or_else(|| {
            let names: Vec<&str> = all.map(Self::name).collect();
            Status::not_found(format!("there is no flight `{path}`; there are {}", names.join(", ")))
        })
    }
}

type Messages = BoxStream<'static, Result<FlightData, Status>>;

/// The same messages; `held` is let go with their stream.
fn holding<M: 'static, T: Send + 'static>(
    messages: BoxStream<'static, Result<M, Status>>,
    held: T,
) -> BoxStream<'static, Result<M, Status>> {
    messages.inspect(move |_| _ = &held).boxed()
}

/// A place for one more stream on the connection of a call.
fn stream_of<T>(request: &Request<T>) -> Result<Option<OwnedSemaphorePermit>, Status> {
    Peer::of(request.extensions()).map(Peer::stream).transpose()
}

impl DataService {
    /// The columns of a stream that are not always there.
    fn extras(&self, times: bool) -> Extras {
        Extras { times, labels: self.source.dataset.has_labels() }
    }

    /// The schema of a flight as its endpoints' tickets stream it.
    fn schema(&self, flight: Flight) -> Arc<Schema> {
        self.schema_with(flight, self.extras(false))
    }

    /// The schema of rows in a format.
    fn rows_schema(&self, format: RowFormat) -> Arc<Schema> {
        self.source.describe(rows_schema(self.source.dim(), format))
    }

    fn schema_with(&self, flight: Flight, extras: Extras) -> Arc<Schema> {
        self.source.describe(match flight {
            Flight::Train => batches_schema(extras),
            Flight::HeldOut(_) => evaluation_schema(extras),
            Flight::Items => items_schema(),
            Flight::Popularity => popularity_schema(),
            Flight::Rows => rows_schema(self.source.dim(), self.source.row_format),
        })
    }

    /// Of `files`, where there are any, as [`Source::row_files`] gives them.
    fn info(&self, flight: Flight, files: Option<&(PathBuf, RowFiles)>) -> Result<FlightInfo, Status> {
        let world_size = self.world_size;
        let ticket = |rank| match flight {
            Flight::Train => Some(Ticket::Batches { rank, world_size, from_step: 0, steps: 0, times: false }.encode()),
            Flight::HeldOut(split) => Some(Ticket::Evaluation { split, rank, world_size, times: false }.encode()),
            Flight::Items => (rank == 0).then(|| Ticket::Items { first: 0, count: 0 }.encode()),
            Flight::Popularity => (rank == 0).then(|| Ticket::Popularity {}.encode()),
            Flight::Rows => (rank == 0).then(|| Exchange::Rows { format: self.source.row_format }.encode()),
        };
        let now = Instant::now();
        let endpoint = |(number, ticket): (usize, Vec<u8>)| {
            let endpoint = FlightEndpoint::new().with_ticket(RawTicket::new(ticket));
            let servers = self.directory.locations(number, now).into_iter().map(|location| flight_location(&location));
            let files = files.map(|(dir, _)| directory_location(dir));
            servers.chain(files).fold(endpoint, |endpoint, location| endpoint.with_location(location))
        };
        let records = match flight {
            Flight::Train => self.records(),
            Flight::HeldOut(split) => self.source.dataset.held_out(split).len() as u64,
            Flight::Items | Flight::Popularity | Flight::Rows => u64::from(self.source.facts.items),
        };
        let about = files.map(|(_, files)| serde_json::to_vec(files)).transpose();
        let about = about.map_err(|error| Status::internal(format!("the files of rows: {error}")))?.unwrap_or_default();
        FlightInfo::new()
            .try_with_schema(&self.schema(flight))
            .map(|info| {
                info.with_descriptor(FlightDescriptor::new_path(vec![flight.name().to_owned()]))
                    .with_endpoints((0..world_size).filter_map(ticket).enumerate().map(endpoint).collect())
                    .with_total_records(i64::try_from(records).unwrap_or(-1))
                    .with_total_bytes(-1)
                    .with_app_metadata(about)
            })
            .map_err(|error| Status::internal(format!("the schema of `{}`: {error}", flight.name())))
    }

    /// Users of all steps of the job.
    fn records(&self) -> u64 {
        let key = self.source.plan.key();
        let (epochs, rest) = (
            self.source.total_steps / self.source.plan.steps_per_epoch(),
            self.source.total_steps % self.source.plan.steps_per_epoch(),
        );
        epochs * u64::from(key.users) + rest * u64::from(key.global_batch)
    }

    /// Counts what goes out: messages of `kind`, each with the number of its rows.
    fn counted<M>(
        &self,
        kind: &'static str,
        messages: impl Stream<Item = Result<(M, usize), Status>> + Send + 'static,
        size: impl Fn(&M) -> usize + Send + 'static,
    ) -> impl Stream<Item = Result<M, Status>> + Send + 'static {
        let (rows, bytes) =
            (self.metrics.flight_rows_total.clone(), self.metrics.flight_bytes_total.with_label_values(&[kind]));
        messages.map_ok(move |(message, count)| {
            rows.inc_by(count as u64);
            bytes.inc_by(size(&message) as u64);
            message
        })
    }

    /// Puts the schema first and counts what goes out.
    fn respond(
        &self,
        kind: &'static str,
        schema: &Schema,
        messages: impl Stream<Item = Result<(FlightData, usize), Status>> + Send + 'static,
    ) -> Response<Messages> {
        let size =
            |message: &FlightData| message.data_header.len() + message.data_body.len() + message.app_metadata.len();
        let counted = self.counted(kind, messages, size);
        Response::new(stream::once(std::future::ready(Ok(encode::schema_message(schema)))).chain(counted).boxed())
    }

    async fn get(&self, ticket: Ticket) -> Result<Response<Messages>, Status> {
        let source = Arc::clone(&self.source);
        match ticket {
            Ticket::Batches { rank, world_size, from_step, steps, times } => {
                let total = source.total_steps;
                if from_step > total {
                    let text = format!("from_step {from_step} is beyond the job, which has {total} steps");
                    return Err(Status::invalid_argument(text));
                }
                let end = if steps == 0 { total } else { total.min(from_step.saturating_add(steps)) };
                let (extras, place) = (self.extras(times), place(rank, world_size)?);
                let schema = self.schema_with(Flight::Train, extras);
                Ok(self.respond(
                    "batches",
                    &schema,
                    batches::stream(source, (Arc::clone(&schema), extras), place, from_step..end),
                ))
            }
            Ticket::Evaluation { split, rank, world_size, times } => {
                if times && !source.dataset.has_held_out_times() {
                    let text = "the dataset is of version 1, whose held-out rows have no times; prepare it again with \
                                `--replace`, then embed it";
                    return Err(Status::failed_precondition(text));
                }
                let (extras, place) = (self.extras(times), place(rank, world_size)?);
                let schema = self.schema_with(Flight::HeldOut(split), extras);
                let messages = held_out::split_stream(source, (Arc::clone(&schema), extras), split, place);
                Ok(self.respond("evaluation", &schema, messages))
            }
            Ticket::Items { first, count } => {
                let place = Arc::clone(&self.catalogues).try_acquire_owned().map_err(|_| {
                    let text = format!("the catalogue is being read {MAX_CATALOGUES} times already; ask again later");
                    Status::resource_exhausted(text)
                })?;
                let items = off_thread(move || {
                    source.dataset.items().map_err(|error| Status::internal(format!("the catalogue: {error}")))
                })
                .await?;
                let first = first as usize;
                if first > items.len() {
                    let text = format!("item {first} does not exist; there are {} items", items.len());
                    return Err(Status::invalid_argument(text));
                }
                let end = if count == 0 { items.len() } else { items.len().min(first + count as usize) };
                let schema = self.schema(Flight::Items);
                let messages = held_out::items_stream(items, Arc::clone(&schema), first, end);
                Ok(self.respond("items", &schema, messages).map(|messages| holding(messages, place)))
            }
            Ticket::Popularity {} => {
                let counts = off_thread(move || Ok(source.dataset.popularity())).await?;
                let schema = self.schema(Flight::Popularity);
                Ok(self.respond("popularity", &schema, held_out::popularity_stream(counts, Arc::clone(&schema))))
            }
        }
    }
}

fn place(rank: u32, world_size: u32) -> Result<Place, Status> {
    if world_size > MAX_WORLD_SIZE {
        let text = format!("world_size {world_size} is larger than {MAX_WORLD_SIZE}");
        return Err(Status::invalid_argument(text));
    }
    Ok(Place { rank, world_size })
}

fn not_served<T>(call: &str) -> Result<Response<T>, Status> {
    let text = format!("{call} is not served here; use ListFlights, GetFlightInfo, GetSchema, DoGet or DoExchange");
    Err(Status::unimplemented(text))
}

#[tonic::async_trait]
impl FlightService for DataService {
    type HandshakeStream = BoxStream<'static, Result<HandshakeResponse, Status>>;
    type ListFlightsStream = BoxStream<'static, Result<FlightInfo, Status>>;
    type DoGetStream = Messages;
    type DoPutStream = BoxStream<'static, Result<PutResult, Status>>;
    type DoActionStream = BoxStream<'static, Result<arrow_flight::Result, Status>>;
    type ListActionsStream = BoxStream<'static, Result<ActionType, Status>>;
    type DoExchangeStream = Messages;

    async fn list_flights(&self, _: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        let flights: Vec<_> = Flight::LISTED.into_iter().map(|flight| self.info(flight, None)).collect();
        Ok(Response::new(stream::iter(flights).boxed()))
    }

    async fn get_flight_info(&self, request: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        let flight = Flight::find(request.get_ref())?;
        let source = Arc::clone(&self.source);
        let files = if flight == Flight::Rows { off_thread(move || Ok(source.row_files())).await? } else { None };
        Ok(Response::new(self.info(flight, files.as_ref())?))
    }

    async fn get_schema(&self, request: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        let schema = self.schema(Flight::find(request.get_ref())?);
        IpcMessage::try_from(SchemaAsIpc::new(&schema, &IpcWriteOptions::default()))
            .map(|message| Response::new(SchemaResult { schema: message.0 }))
            .map_err(|error| Status::internal(error.to_string()))
    }

    async fn do_get(&self, request: Request<RawTicket>) -> Result<Response<Self::DoGetStream>, Status> {
        let place = stream_of(&request)?;
        let ticket = Ticket::decode(&request.get_ref().ticket).map_err(bad_ticket)?;
        Ok(self.get(ticket).await?.map(|messages| holding(messages, place)))
    }

    async fn do_exchange(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoExchangeStream>, Status> {
        // it writes its messages itself and never comes here
        Err(Status::internal("DoExchange is answered by the server, not by its generated code"))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        not_served("Handshake")
    }

    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        not_served("PollFlightInfo")
    }

    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        not_served("DoPut")
    }

    async fn do_action(&self, _: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        not_served("DoAction")
    }

    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        not_served("ListActions")
    }
}
