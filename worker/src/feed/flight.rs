//! The worker's side of Arrow Flight: a rank's batches and held-out users; [`super::exchange`] has the rows.
//!
//! Input: tickets. Output: plain shares. Everything received is checked against its schema before it is used; a server that
//! answers something else is an error that names it. A service that went away is waited for, or another location asked:
//! streams are opened again where they were, because a ticket says all there is to say.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use arrow_flight::FlightDescriptor;
use arrow_flight::decode::{DecodedFlightData, DecodedPayload, FlightDataDecoder};
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use futures::TryStreamExt;
use learn_dataset::Embeddings;
use learn_domain::config::RowFormat;
use learn_domain::report::DatasetFacts;
use learn_proto::auth::BearerInterceptor;
use learn_proto::connect::Pass;
use learn_proto::convert::Admission;
use learn_proto::flight::{
    BatchMeta, MAX_ROW_BYTES, POPULARITY, ROWS, RowFiles, Ticket, grpc_url, in_turn, location_directory,
};
use prost::Message;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use super::answers::unexpected;
pub use super::answers::{FlightClientError, HeldOutUser};
use super::answers::{StepParts, check_places, decoder, numbers, read_held_out, read_share};
use super::assemble::UserShare;
use super::exchange::RowExchange;
use super::local::LocalRows;
use crate::control::told;
use crate::retry::{Passing, Patience};

/// How often the coordinator is asked for the job's data servers: some may have come.
const LOOK_AROUND: Duration = Duration::from_secs(15);
/// A coordinator that does not answer that sooner is asked the next time.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Largest HTTP/2 frame that is taken, how much of a stream may be under way, and how much of a connection: rows come in
/// messages of 1 MiB, and a sender writes a frame with one system call.
const FRAME_BYTES: u32 = (1 << 20) + (16 << 10);
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// The data services of a job, the one that answered last first.
#[derive(Clone)]
pub struct DataClient {
    known: Arc<Known>,
    patience: Patience,
    /// The dataset's own files; `None` if they are not to be looked for.
    local: Option<Arc<LocalRows>>,
    row_format: RowFormat,
}

/// What clones share.
struct Known {
    pass: Pass,
    bearer: BearerInterceptor,
    /// Which of the clients this is: each starts with another server.
    number: usize,
    links: Mutex<Links>,
}

/// The locations, in the order of preference.
struct Links {
    /// The last one is the coordinator's, who knows the others.
    all: Vec<Link>,
    /// Number of the one in use.
    current: usize,
    /// When the coordinator was asked for them.
    asked: Instant,
}

/// One location; the channel connects when it is used.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) location: Arc<str>,
    pub(super) channel: InterceptedService<Channel, BearerInterceptor>,
    client: Client,
}

type Client = FlightServiceClient<InterceptedService<Channel, BearerInterceptor>>;

/// The shares of a rank, step after step.
pub struct ShareStream {
    client: DataClient,
    ticket: Ticket,
    /// `None` before the first step and after a break.
    open: Option<Opened>,
    times: bool,
}

/// A rank's users of a step.
#[derive(Debug)]
pub struct Share {
    pub meta: BatchMeta,
    pub users: Vec<UserShare>,
    /// That have come for it.
    pub bytes: u64,
}

/// A running answer.
struct Opened {
    decoder: FlightDataDecoder,
    location: Arc<str>,
    /// That have come.
    bytes: u64,
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, Links> {
        // nothing in here leaves it half done
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self, location: &str) -> Result<Link, FlightClientError> {
        let endpoint = self
            .pass
            .endpoint(location)
            .map_err(|error| unexpected(error.to_string()))?
            .max_frame_size(FRAME_BYTES)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        let channel = InterceptedService::new(endpoint.connect_lazy(), self.bearer.clone());
        let client = FlightServiceClient::new(channel.clone()).max_decoding_message_size(MAX_ROW_BYTES);
        Ok(Link { location: location.into(), client, channel })
    }

    /// Replaces the locations if they have changed, and starts with the first again.
    fn replace(&self, locations: &[String]) -> Result<(), FlightClientError> {
        let mut links = self.lock();
        if links.all.iter().map(|link| &*link.location).eq(locations.iter().map(String::as_str)) {
            return Ok(());
        }
        let kept = |location: &String| links.all.iter().find(|link| *link.location == **location).cloned();
        let all: Vec<Link> = locations
            .iter()
            .map(|location| kept(location).map_or_else(|| self.link(location), Ok))
            .collect::<Result<_, _>>()?;
        tracing::info!(?locations, "data servers of the job");
        links.all = all;
        links.current = 0;
        Ok(())
    }
}

impl DataClient {
    /// The `number`-th client of the services at `locations`, of which the last one knows all. Asynchronous because
    /// channels are made in a runtime; they connect when they are used.
    ///
    /// # Errors
    /// If there is no location, or one is none.
    pub async fn new(
        locations: &[String],
        number: usize,
        pass: &Pass,
        patience: &Patience,
    ) -> Result<Self, FlightClientError> {
        let bearer = pass.bearer().map_err(|error| unexpected(error.to_string()))?;
        if locations.is_empty() {
            return Err(unexpected("the coordinator named no data location"));
        }
        let links = Links { all: Vec::new(), current: 0, asked: Instant::now() };
        let known = Known { pass: pass.clone(), bearer, number, links: Mutex::new(links) };
        known.replace(locations)?;
        Ok(Self { known: Arc::new(known), patience: patience.clone(), local: None, row_format: RowFormat::F16 })
    }

    /// As the configuration of a job says.
    ///
    /// # Errors
    /// As [`DataClient::new`].
    pub async fn of(admission: &Admission, pass: &Pass, patience: &Patience) -> Result<Self, FlightClientError> {
        let number = admission.worker.0 as usize;
        let data = &admission.config.data;
        let client = Self::new(&admission.data_locations, number, pass, patience).await?;
        let client = client.with_row_format(data.row_format);
        Ok(if data.map_rows { client.with_files_of(&admission.dataset) } else { client })
    }

    /// With rows that travel in this format; mapped ones have the same values.
    #[must_use]
    pub fn with_row_format(mut self, format: RowFormat) -> Self {
        self.row_format = format;
        self
    }

    pub(super) fn row_format(&self) -> RowFormat {
        self.row_format
    }

    /// With the files of `dataset`, if this process can open them.
    #[must_use]
    pub fn with_files_of(mut self, dataset: &DatasetFacts) -> Self {
        self.local = Some(Arc::new(LocalRows::of(dataset)));
        self
    }

    /// The mapped content embeddings, looked for once; `None` if their rows have to be sent.
    ///
    /// # Errors
    /// If the service stays away.
    pub(super) async fn mapped(&self) -> Result<Option<Arc<Embeddings>>, FlightClientError> {
        match &self.local {
            Some(local) => local.get(self).await,
            None => Ok(None),
        }
    }

    /// Where the content embeddings lie, and what their files are.
    pub(super) async fn row_files(&self) -> Result<Option<(Vec<PathBuf>, RowFiles)>, FlightClientError> {
        let ask = || async {
            let Link { location, mut client, .. } = self.link();
            let descriptor = FlightDescriptor::new_path(vec![ROWS.to_owned()]);
            client.get_flight_info(descriptor).await.map_err(|status| self.failed(&location, &status))
        };
        let info = self.patience.answer("the files of rows", ask).await?.into_inner();
        let locations = info.endpoint.iter().flat_map(|endpoint| &endpoint.location);
        let dirs: Vec<PathBuf> = locations.filter_map(|location| location_directory(&location.uri)).collect();
        if dirs.is_empty() {
            return Ok(None);
        }
        let files = serde_json::from_slice(&info.app_metadata);
        Ok(Some((dirs, files.map_err(|error| unexpected(format!("the files of rows: {error}")))?)))
    }

    /// Asks the coordinator for the locations, if that is due. Without an answer the known ones stay.
    async fn look_around(&self) {
        let coordinator = {
            let mut links = self.known.lock();
            if links.asked.elapsed() < LOOK_AROUND {
                return;
            }
            links.asked = Instant::now();
            links.all.last().cloned()
        };
        let Some(mut coordinator) = coordinator else { return };
        let descriptor = FlightDescriptor::new_path(vec![POPULARITY.to_owned()]);
        let answer = tokio::time::timeout(ANSWER_WITHIN, coordinator.client.get_flight_info(descriptor)).await;
        let info = match answer {
            Ok(Ok(info)) => info.into_inner(),
            Ok(Err(status)) => return tracing::debug!(%status, "the coordinator did not say where data servers are"),
            Err(_) => return tracing::debug!("the coordinator did not say in time where data servers are"),
        };
        let endpoints = info.endpoint.into_iter().take(1).flat_map(|endpoint| endpoint.location);
        let locations: Vec<String> = endpoints.filter_map(|location| grpc_url(&location.uri)).collect();
        if locations.is_empty() {
            return;
        }
        if let Err(error) = self.known.replace(&in_turn(locations, self.known.number)) {
            tracing::warn!(%error, "the coordinator named a data server that is none");
        }
    }

    /// What a status means, and, if the service at `location` is away, the next one's turn.
    pub(super) fn failed(&self, location: &Arc<str>, status: &tonic::Status) -> FlightClientError {
        let reason = told(status);
        if !status.may_pass() {
            return FlightClientError::Refused(reason);
        }
        let mut links = self.known.lock();
        // somebody else may have moved on already
        if links.all[links.current].location == *location {
            links.current = (links.current + 1) % links.all.len();
        }
        FlightClientError::Away { location: location.to_string(), reason }
    }

    pub(super) fn patience(&self) -> &Patience {
        &self.patience
    }

    pub(super) fn link(&self) -> Link {
        let links = self.known.lock();
        links.all[links.current].clone()
    }

    /// Closes a stream to another location than the one in use, between two answers.
    pub(super) async fn settle<T>(&self, open: &mut Option<T>, location: impl Fn(&T) -> &Arc<str>) {
        self.look_around().await;
        if open.as_ref().is_some_and(|open| *location(open) != self.link().location) {
            *open = None;
        }
    }

    async fn do_get(&self, ticket: &Ticket) -> Result<Opened, FlightClientError> {
        let Link { location, mut client, .. } = self.link();
        let response = client.do_get(arrow_flight::Ticket { ticket: ticket.encode().into() }).await;
        let response = response.map_err(|status| self.failed(&location, &status))?;
        Ok(Opened { decoder: decoder(response.into_inner()), location, bytes: 0 })
    }

    /// The next message of an answer.
    async fn next_batch(&self, open: &mut Opened) -> Result<Option<(RecordBatch, bytes::Bytes)>, FlightClientError> {
        loop {
            match open.decoder.try_next().await {
                Ok(Some(DecodedFlightData { inner, payload })) => {
                    open.bytes += inner.encoded_len() as u64;
                    if let DecodedPayload::RecordBatch(batch) = payload {
                        return Ok(Some((batch, inner.app_metadata)));
                    }
                }
                Ok(None) => return Ok(None),
                Err(FlightError::Tonic(status)) => return Err(self.failed(&open.location, &status)),
                Err(error) => return Err(unexpected(error.to_string())),
            }
        }
    }

    /// The shares of a rank, by its ticket for batches.
    #[must_use]
    pub fn shares(&self, ticket: Ticket) -> ShareStream {
        ShareStream { client: self.clone(), times: asks_for_times(&ticket), ticket, open: None }
    }

    /// All held-out users of a ticket, and the bytes that have come for them.
    ///
    /// # Errors
    /// If the service refuses the ticket or stays away.
    pub async fn held_out(&self, ticket: &Ticket) -> Result<(Vec<HeldOutUser>, u64), FlightClientError> {
        self.patience.answer("held-out users", || self.try_held_out(ticket)).await
    }

    async fn try_held_out(&self, ticket: &Ticket) -> Result<(Vec<HeldOutUser>, u64), FlightClientError> {
        let mut open = self.do_get(ticket).await?;
        let mut users = Vec::new();
        while let Some((batch, _)) = self.next_batch(&mut open).await? {
            read_held_out(&batch, asks_for_times(ticket), &mut users)?;
        }
        Ok((users, open.bytes))
    }

    /// Training interactions of each item, by item index.
    ///
    /// # Errors
    /// If the service refuses or stays away.
    pub async fn popularity(&self) -> Result<Vec<u32>, FlightClientError> {
        self.patience.answer("popularity", || self.try_popularity()).await
    }

    async fn try_popularity(&self) -> Result<Vec<u32>, FlightClientError> {
        let mut open = self.do_get(&Ticket::Popularity {}).await?;
        let mut counts = Vec::new();
        while let Some((batch, _)) = self.next_batch(&mut open).await? {
            counts.extend_from_slice(numbers(&batch, "interactions")?.values());
        }
        Ok(counts)
    }

    /// The `further`-th client beside this one, which is the 0th: with connections of its own, it starts with the server
    /// after that of the one before it.
    pub(super) fn beside(&self, further: usize) -> Result<Self, FlightClientError> {
        if further == 0 {
            return Ok(self.clone());
        }
        let Known { pass, bearer, number, .. } = &*self.known;
        let locations: Vec<String> = self.known.lock().all.iter().map(|link| link.location.to_string()).collect();
        let links = Links { all: Vec::new(), current: 0, asked: Instant::now() };
        let number = number + further;
        let known = Known { pass: pass.clone(), bearer: bearer.clone(), number, links: Mutex::new(links) };
        // those of this client are in its own turn
        known.replace(&in_turn(locations, further))?;
        Ok(Self { known: Arc::new(known), ..self.clone() })
    }

    /// An exchange for rows of `dim` values.
    #[must_use]
    pub fn rows(&self, dim: usize) -> RowExchange {
        RowExchange::new(self, dim)
    }
}

impl ShareStream {
    /// The next step's share; `None` after the last step of the job.
    ///
    /// # Errors
    /// If the service refuses, stays away, or sends something else.
    pub async fn next(&mut self) -> Result<Option<Share>, FlightClientError> {
        let mut trying = self.client.patience.trying("batches");
        loop {
            match self.try_next().await {
                Ok(share) => {
                    trying.answered();
                    if let (Some(share), Ticket::Batches { from_step, .. }) = (&share, &mut self.ticket) {
                        *from_step = share.meta.step + 1;
                    }
                    return Ok(share);
                }
                Err(error) => {
                    self.open = None;
                    trying.again(error).await?;
                }
            }
        }
    }

    async fn try_next(&mut self) -> Result<Option<Share>, FlightClientError> {
        self.client.settle(&mut self.open, |open| &open.location).await;
        // no other ticket has steps
        let step = if let Ticket::Batches { from_step, .. } = self.ticket { from_step } else { 0 };
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(self.client.do_get(&self.ticket).await?),
        };
        let (mut users, mut parts) = (Vec::new(), StepParts::of(step));
        loop {
            let Some((batch, metadata)) = self.client.next_batch(open).await? else {
                return if parts.begun() { Err(unexpected("the stream ended within a step")) } else { Ok(None) };
            };
            let meta: BatchMeta =
                serde_json::from_slice(&metadata).map_err(|error| unexpected(format!("batch metadata: {error}")))?;
            let wrong = |what: String| unexpected(format!("{what} (by {})", open.location));
            let is_last = parts.take(meta).map_err(wrong)?;
            read_share(&batch, self.times, &mut users)?;
            if is_last {
                check_places(&users, &meta).map_err(wrong)?;
                return Ok(Some(Share { meta, users, bytes: std::mem::take(&mut open.bytes) }));
            }
        }
    }
}

fn asks_for_times(ticket: &Ticket) -> bool {
    matches!(ticket, Ticket::Batches { times: true, .. } | Ticket::Evaluation { times: true, .. })
}
