//! The data service as its clients see it: descriptors, tickets, schemas and the metadata of messages.
//!
//! Input: JSON of a client. Output: checked requests; Arrow schemas that explain themselves. Invariants: every ticket
//! and command names the version, an unknown key or a larger text is refused, and a ticket says everything that its
//! stream depends on besides the served dataset and configuration, so that any replica can answer it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use arrow_schema::{DataType, Field, Schema};
use learn_domain::config::RowFormat;
use learn_domain::report::Split;
use serde::{Deserialize, Serialize};

/// Version of tickets, commands, schemas and message metadata.
pub const VERSION: u32 = 1;

/// Largest ticket or command in bytes.
pub const MAX_TICKET_BYTES: usize = 4 << 10;

/// Messages are split so that their Arrow buffers stay below this; gRPC clients refuse 4 MiB by default.
pub const MAX_MESSAGE_BYTES: usize = 2 << 20;

/// A row that is larger goes alone, in a message of at most so much: that of a user with millions of interactions.
pub const MAX_ROW_BYTES: usize = 64 << 20;

/// A ticket or command that cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    #[error("the {what} has {bytes} bytes; at most {MAX_TICKET_BYTES} are allowed")]
    TooLarge { what: &'static str, bytes: usize },
    #[error("the {what} is not valid: {source}; see docs/flight.md")]
    Json { what: &'static str, source: serde_json::Error },
    #[error("the {what} has version {found}; this server speaks version {VERSION}")]
    Version { what: &'static str, found: String },
    #[error("rank {rank} does not exist in a world of {world_size}")]
    Rank { rank: u32, world_size: u32 },
}

/// Name of the flight of the items' training interactions, which has one endpoint whatever the number of ranks.
pub const POPULARITY: &str = "popularity";

/// Name of the flight of the content embeddings.
pub const ROWS: &str = "rows";

/// Scheme of the location of a dataset directory.
const FILE_SCHEME: &str = "file://";

/// `app_metadata` of the flight [`ROWS`]: what the files of the content embeddings are, for clients that can open them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowFiles {
    /// Of the dataset.
    pub fingerprint: String,
    /// Of the content embeddings: all rows, in order.
    pub embeddings_fingerprint: String,
    pub files: Vec<RowFile>,
}

/// One file, as the server has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowFile {
    /// Inside of the dataset directory, with `/`.
    pub path: String,
    pub bytes: u64,
    /// When it was written, in nanoseconds since 1970.
    pub modified_nanos: u64,
}

/// The location of a dataset directory, an absolute path.
#[must_use]
pub fn directory_location(dir: &Path) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    let mut location = FILE_SCHEME.to_owned();
    for &byte in dir.as_os_str().as_bytes() {
        if plain(byte) {
            location.push(byte.into());
        } else {
            location.push_str(&format!("%{byte:02X}"));
        }
    }
    location
}

/// The dataset directory at a location; `None` if it is none.
#[must_use]
pub fn location_directory(location: &str) -> Option<PathBuf> {
    let mut rest = location.strip_prefix(FILE_SCHEME)?.bytes();
    let mut path = Vec::new();
    while let Some(byte) = rest.next() {
        path.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            plain => plain,
        });
    }
    let path = PathBuf::from(OsString::from_vec(path));
    path.is_absolute().then_some(path)
}

/// Scheme of Flight's locations of servers without TLS, and that of their gRPC URLs.
const SCHEMES: [(&str, &str); 2] = [("grpc+tcp://", "http://"), ("grpc+tls://", "https://")];

/// A Flight location for the gRPC URL of a server.
#[must_use]
pub fn flight_location(url: &str) -> String {
    let mut found = SCHEMES.iter().filter_map(|(flight, grpc)| Some(format!("{flight}{}", url.strip_prefix(grpc)?)));
    found.next().unwrap_or_else(|| url.to_owned())
}

/// The gRPC URL of the server at a Flight location; `None` if it needs something else than plain gRPC.
#[must_use]
pub fn grpc_url(location: &str) -> Option<String> {
    SCHEMES.iter().find_map(|(flight, grpc)| Some(format!("{grpc}{}", location.strip_prefix(flight)?)))
}

/// The order in which the `number`-th client asks the servers of a job: each starts with another one, and the last of them,
/// the coordinator, comes last.
#[must_use]
pub fn in_turn(mut locations: Vec<String>, number: usize) -> Vec<String> {
    if let Some((_, servers)) = locations.split_last_mut()
        && !servers.is_empty()
    {
        let first = number % servers.len();
        servers.rotate_left(first);
    }
    locations
}

/// What `DoGet` streams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Ticket {
    /// A rank's share of `steps` steps after `from_step` finished ones; 0 steps = to the end of the job. With `times`
    /// the rows say when each interaction was.
    Batches {
        rank: u32,
        world_size: u32,
        from_step: u64,
        steps: u64,
        #[serde(default, skip_serializing_if = "is_false")]
        times: bool,
    },
    /// Rows `rank`, `rank + world_size`, … of a held-out split; `times` as above.
    Evaluation {
        split: Split,
        rank: u32,
        world_size: u32,
        #[serde(default, skip_serializing_if = "is_false")]
        times: bool,
    },
    /// The catalogue's texts from item `first` on; 0 `count` = to the end.
    Items { first: u32, count: u32 },
    /// Training interactions of each item, by item index.
    Popularity {},
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What `DoExchange` does, as the JSON command of the first message's descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Exchange {
    /// Content embeddings of the items in the request's `item` column, in this format; f16 where it is not said.
    Rows {
        #[serde(default, skip_serializing_if = "is_default")]
        format: RowFormat,
    },
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut json = serde_json::to_value(value).unwrap_or_default();
    json["version"] = VERSION.into();
    json.to_string().into_bytes()
}

fn decode<T: serde::de::DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, TicketError> {
    if bytes.len() > MAX_TICKET_BYTES {
        return Err(TicketError::TooLarge { what, bytes: bytes.len() });
    }
    let invalid = |source| TicketError::Json { what, source };
    let mut json: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(bytes).map_err(invalid)?;
    let version = json.remove("version").unwrap_or_default();
    if version != VERSION {
        return Err(TicketError::Version { what, found: version.to_string() });
    }
    serde_json::from_value(json.into()).map_err(invalid)
}

impl Ticket {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// # Errors
    /// If it is too large, of another version, not a ticket, or names a rank that its world does not have.
    pub fn decode(bytes: &[u8]) -> Result<Self, TicketError> {
        let ticket: Self = decode("ticket", bytes)?;
        match ticket {
            Self::Batches { rank, world_size, .. } | Self::Evaluation { rank, world_size, .. }
                if rank >= world_size =>
            {
                Err(TicketError::Rank { rank, world_size })
            }
            _ => Ok(ticket),
        }
    }
}

impl Exchange {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// # Errors
    /// If it is too large, of another version or not a command.
    pub fn decode(bytes: &[u8]) -> Result<Self, TicketError> {
        decode("command", bytes)
    }
}

/// `app_metadata` of a message of [`Ticket::Batches`]; a step's parts follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchMeta {
    /// Finished steps before this one.
    pub step: u64,
    pub epoch: u32,
    /// Users of the step over all ranks.
    pub global_users: u32,
    /// (position, target) pairs that the step trains on, over all ranks: the sum over its users of `Nh_i * Nt_i`, or of the
    /// positions if each has one target (`objective.kind = "next_item"`).
    pub global_pairs: u64,
    /// Number of this message among the step's, from 0.
    pub part: u32,
    pub parts: u32,
}

/// `app_metadata` of a message of every ticket but [`Ticket::Batches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartMeta {
    /// Number of this message in the stream, from 0.
    pub part: u64,
}

/// `app_metadata` of an answer of [`Exchange::Rows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsMeta {
    /// Number of the request batch that this answers, from 0.
    pub request: u64,
    pub part: u32,
    pub parts: u32,
}

/// What a stream was made from; part of its schema's metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Provenance {
    pub dataset: String,
    pub fingerprint: String,
    pub seed: u64,
    pub users: u32,
    pub global_batch: u32,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
    pub items: u32,
    pub dim: u32,
}

impl Provenance {
    /// Adds `learn.*` keys to a schema.
    #[must_use]
    pub fn describe(&self, schema: Schema) -> Schema {
        let mut metadata = schema.metadata.clone();
        let facts = [
            ("learn.dataset", self.dataset.clone()),
            ("learn.fingerprint", self.fingerprint.clone()),
            ("learn.seed", self.seed.to_string()),
            ("learn.users", self.users.to_string()),
            ("learn.global_batch", self.global_batch.to_string()),
            ("learn.steps_per_epoch", self.steps_per_epoch.to_string()),
            ("learn.total_steps", self.total_steps.to_string()),
            ("learn.items", self.items.to_string()),
            ("learn.dim", self.dim.to_string()),
        ];
        metadata.extend(facts.map(|(key, value)| (key.to_owned(), value)));
        schema.with_metadata(metadata)
    }
}

fn field(name: &str, data_type: DataType, nullable: bool, doc: &str) -> Field {
    Field::new(name, data_type, nullable).with_metadata(HashMap::from([("doc".to_owned(), doc.to_owned())]))
}

fn number(name: &str, doc: &str) -> Field {
    field(name, DataType::UInt32, false, doc)
}

fn list(name: &str, data_type: DataType, doc: &str) -> Field {
    field(name, DataType::List(element(data_type)), false, doc)
}

/// The element of a list column.
#[must_use]
pub fn element(data_type: DataType) -> std::sync::Arc<Field> {
    Field::new("item", data_type, false).into()
}

/// Columns of interactions that are there or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// The ticket asks for times.
    pub times: bool,
    /// The dataset has labels.
    pub labels: bool,
}

impl Extras {
    fn fields(self) -> Vec<Field> {
        let mut fields = Vec::new();
        if self.times {
            let doc = "times of the items in `history`, in the input's unit times the dataset's time scale";
            fields.push(list("history_times", DataType::Int64, doc));
            fields.push(list("target_times", DataType::Int64, "times of the items in `targets`"));
        }
        if self.labels {
            let doc = "labels of the items in `targets`: 1 = converted, 0 = shown without conversion";
            fields.push(list("target_labels", DataType::UInt8, doc));
        }
        fields
    }
}

fn schema(doc: &str, fields: Vec<Field>) -> Schema {
    let metadata = [("learn.version", VERSION.to_string()), ("doc", doc.to_owned())];
    Schema::new_with_metadata(fields, metadata.map(|(key, value)| (key.to_owned(), value)))
}

/// Columns of [`Ticket::Batches`].
#[must_use]
pub fn batches_schema(extras: Extras) -> Schema {
    let numbers = |name, doc| list(name, DataType::UInt32, doc);
    let mut fields = vec![
        number("user", "row of the training sequences"),
        number("place", "place of the user in the step's global batch, from 0"),
        numbers("history", "item indices that the user tower sees, oldest first"),
        numbers("targets", "later item indices that the item tower sees, oldest first"),
        numbers("user_positions", "sampled positions in `history`, ascending"),
        numbers("item_positions", "sampled positions in `targets`, ascending"),
    ];
    fields.extend(extras.fields());
    schema("one row per user of a rank's share of a training step; app_metadata is JSON and names the step", fields)
}

/// Columns of [`Ticket::Evaluation`].
#[must_use]
pub fn evaluation_schema(extras: Extras) -> Schema {
    let numbers = |name, doc| list(name, DataType::UInt32, doc);
    let mut fields = vec![
        number("row", "row of the split"),
        number("user", "number of the user over all splits"),
        numbers("history", "item indices before the targets, oldest first"),
        numbers("targets", "item indices to be ranked, oldest first"),
    ];
    fields.extend(extras.fields());
    schema("one row per user of a rank's share of a held-out split", fields)
}

/// Columns of [`Ticket::Items`].
#[must_use]
pub fn items_schema() -> Schema {
    let text = |name: &str, doc: &str| field(name, DataType::Utf8, true, doc);
    let fields = vec![
        number("item", "item index, as in every other stream"),
        field("id", DataType::Utf8, false, "the item's name in the original data"),
        text("title", "title"),
        text("category", "category"),
        text("brand", "brand"),
        text("price", "price"),
        text("keywords", "key words"),
        text("attributes", "further attributes"),
    ];
    schema("the catalogue", fields)
}

/// Columns of [`Ticket::Popularity`].
#[must_use]
pub fn popularity_schema() -> Schema {
    let fields = vec![number("item", "item index"), number("interactions", "training interactions of the item")];
    schema("how often each item occurs in the training sequences", fields)
}

/// The column of a request of [`Exchange::Rows`].
#[must_use]
pub fn rows_request_schema() -> Schema {
    schema("items whose content embeddings are wanted; repeats are allowed", vec![number("item", "item index")])
}

/// The columns of an answer of [`Exchange::Rows`].
#[must_use]
pub fn rows_schema(dim: u32, format: RowFormat) -> Schema {
    let lists = |value| DataType::FixedSizeList(element(value), i32::try_from(dim).unwrap_or(i32::MAX));
    let fields = match format {
        RowFormat::F16 => {
            let doc = "the frozen language model's L2-normalised vector";
            vec![field("embedding", lists(DataType::Float16), false, doc)]
        }
        RowFormat::Int8 => {
            let doc = "the frozen language model's L2-normalised vector, each value over `scale`, rounded";
            let scale = "what the bytes of `embedding` are multiplied with; 1/127 of the largest magnitude in the row";
            vec![field("embedding", lists(DataType::Int8), false, doc), field("scale", DataType::Float32, false, scale)]
        }
    };
    schema("content embeddings in the order of the request", fields)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_ticket_is_plain_versioned_json() {
        let ticket = Ticket::Batches { rank: 1, world_size: 2, from_step: 3, steps: 0, times: false };
        let json: serde_json::Value = serde_json::from_slice(&ticket.encode()).unwrap();
        let plain = r#"{"version":1,"kind":"batches","rank":1,"world_size":2,"from_step":3,"steps":0}"#;
        assert_eq!(json, serde_json::from_str::<serde_json::Value>(plain).unwrap());
        let evaluation = r#"{"version":1,"kind":"evaluation","split":"test","rank":0,"world_size":1}"#;
        let wanted = Ticket::Evaluation { split: Split::Test, rank: 0, world_size: 1, times: false };
        assert_eq!(Ticket::decode(evaluation.as_bytes()).unwrap(), wanted);
        let timed = Ticket::Evaluation { split: Split::Test, rank: 0, world_size: 1, times: true };
        assert_eq!(Ticket::decode(evaluation.replace('}', ",\"times\":true}").as_bytes()).unwrap(), timed);
        let rows = |format| Exchange::Rows { format };
        let as_before = br#"{"version":1,"kind":"rows"}"#;
        assert_eq!(Exchange::decode(as_before).unwrap(), rows(RowFormat::F16));
        let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
        assert_eq!(json(&rows(RowFormat::F16).encode()), json(as_before), "servers of before know no format");
        let int8 = br#"{"version":1,"kind":"rows","format":"int8"}"#;
        assert_eq!(Exchange::decode(int8).unwrap(), rows(RowFormat::Int8));
        assert_eq!(json(&rows(RowFormat::Int8).encode()), json(int8));
        let unknown = Exchange::decode(br#"{"version":1,"kind":"rows","format":"int4"}"#).unwrap_err().to_string();
        assert!(unknown.contains("int4") && unknown.contains("int8"), "{unknown}");
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let refused = |text: &str| Ticket::decode(text.as_bytes()).unwrap_err().to_string();
        assert!(refused("{").contains("ticket is not valid"));
        assert!(refused("[]").contains("ticket is not valid"));
        assert!(refused(r#"{"kind":"items","first":0,"count":0}"#).contains("version null"));
        assert!(refused(r#"{"version":2,"kind":"items","first":0,"count":0}"#).contains("version 2"));
        assert!(refused(r#"{"version":1,"kind":"items","first":0,"count":0,"x":1}"#).contains("unknown field `x`"));
        assert!(refused(r#"{"version":1,"kind":"all"}"#).contains("unknown variant `all`"));
        assert!(refused(r#"{"version":1,"kind":"items","first":-1,"count":0}"#).contains("invalid value"));
        let world = r#"{"version":1,"kind":"evaluation","split":"valid","rank":2,"world_size":2}"#;
        assert_eq!(refused(world), "rank 2 does not exist in a world of 2");
        assert!(refused(&" ".repeat(MAX_TICKET_BYTES + 1)).contains("4097 bytes"));
        let extra = Exchange::decode(br#"{"version":1,"kind":"rows","x":1}"#).unwrap_err().to_string();
        assert!(extra.contains('x'), "{extra}");
    }

    #[test]
    fn every_field_explains_itself() {
        let facts = Provenance { fingerprint: "f".into(), users: 3, ..Provenance::default() };
        for schema in [
            batches_schema(Extras { times: true, labels: true }),
            evaluation_schema(Extras { times: true, labels: true }),
            items_schema(),
            popularity_schema(),
            rows_request_schema(),
            rows_schema(8, RowFormat::F16),
            rows_schema(8, RowFormat::Int8),
        ] {
            let described = facts.describe(schema);
            assert!(described.fields().iter().all(|field| !field.metadata()["doc"].is_empty()));
            assert_eq!(described.metadata()["learn.version"], "1");
            assert_eq!(described.metadata()["learn.fingerprint"], "f");
            assert_eq!(described.metadata()["learn.users"], "3");
        }
    }

    proptest! {
        #[test]
        fn a_directory_survives_its_location(name: Vec<u8>) {
            let dir = Path::new("/").join(OsString::from_vec(name.into_iter().filter(|&byte| byte != 0).collect()));
            let location = directory_location(&dir);
            prop_assert!(location.is_ascii() && !location.contains(' '));
            prop_assert_eq!(location_directory(&location), Some(dir));
        }

        #[test]
        fn any_location_is_answered(text: String) {
            let location = format!("file://{text}");
            let _ = location_directory(&location);
            prop_assert!(grpc_url(&location).is_none());
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Ticket::decode(&bytes);
            let _ = Exchange::decode(&bytes);
        }

        #[test]
        fn tickets_survive(rank: u32, more in 1_u32..9, from_step: u64, steps: u64, times: bool) {
            let world_size = rank.saturating_add(more);
            prop_assume!(rank < world_size);
            let ticket = Ticket::Batches { rank, world_size, from_step, steps, times };
            prop_assert_eq!(Ticket::decode(&ticket.encode()).unwrap(), ticket);
        }
    }
}
