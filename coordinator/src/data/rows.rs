//! Content embeddings by item index, in answer to a stream of requests.
//!
//! Input: Arrow batches with a column `item`. Output: for each, in order, its rows in framed messages of about 1 MiB; several
//! are gathered at once from the mapped files. Invariant: a request is checked whole before any of it is answered.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::types::UInt32Type;
use arrow_array::{Array, PrimitiveArray, RecordBatch};
use arrow_flight::FlightData;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::error::FlightError;
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use half::f16;
use learn_dataset::{Embeddings, MessageCheck, RowError};
use learn_domain::config::RowFormat;
use learn_proto::flight::{MAX_MESSAGE_BYTES, RowsMeta};
use tonic::Status;

use super::encode::HEADROOM_BYTES;
use super::frame::{Buffers, Rows};
use super::{READ_AHEAD, off_thread};

/// Rows of a message, in bytes: what is gathered is still in the processor's cache when it is sent.
const PART_BYTES: usize = 1 << 20;
const _: () = assert!(PART_BYTES + HEADROOM_BYTES <= MAX_MESSAGE_BYTES);

/// One message of an answer.
#[derive(Clone, Debug)]
struct Part {
    items: Arc<PrimitiveArray<UInt32Type>>,
    range: Range<usize>,
    meta: RowsMeta,
}

/// The wanted items of a request, all of which exist.
fn wanted(request: u64, batch: &RecordBatch, rows: usize) -> Result<PrimitiveArray<UInt32Type>, Status> {
    let invalid = |problem: String| Status::invalid_argument(format!("request batch {request}: {problem}"));
    let column = batch.column_by_name("item").ok_or_else(|| invalid("it has no column `item`".into()))?;
    let items = column
        .as_any()
        .downcast_ref::<PrimitiveArray<UInt32Type>>()
        .ok_or_else(|| invalid(format!("column `item` is {}, not uint32", column.data_type())))?;
    if items.null_count() > 0 {
        return Err(invalid("column `item` has nulls".into()));
    }
    match items.values().iter().position(|&item| item as usize >= rows) {
        Some(row) => {
            Err(invalid(format!("item {} (row {row}) does not exist; there are {rows} items", items.value(row))))
        }
        None => Ok(items.clone()),
    }
}

/// Cuts a request into parts of rows of so many bytes; an empty one gets one empty answer.
fn parts(request: u64, items: PrimitiveArray<UInt32Type>, row_bytes: usize) -> Vec<Part> {
    let per_part = (PART_BYTES / row_bytes.max(1)).max(1);
    let count = items.len().div_ceil(per_part).max(1);
    let items = Arc::new(items);
    let part = |part: usize| Part {
        range: part * per_part..items.len().min((part + 1) * per_part),
        meta: RowsMeta { request, part: part as u32, parts: count as u32 },
        items: Arc::clone(&items),
    };
    (0..count).map(part).collect()
}

/// The mapped table and how its rows are sent.
struct Table {
    embeddings: Arc<Embeddings>,
    format: RowFormat,
    buffers: Buffers,
}

fn gather(table: &Table, part: &Part) -> Result<Bytes, Status> {
    let Table { embeddings, format, buffers } = table;
    let items = &part.items.values()[part.range.clone()];
    let rows: Vec<&[f16]> = items.iter().map(|&item| embeddings.row(item as usize)).collect();
    let internal = |error| Status::internal(format!("the metadata of rows could not be written: {error}"));
    let metadata = serde_json::to_vec(&part.meta).map_err(internal)?;
    let rows = Rows { rows: &rows, dim: embeddings.dim(), metadata: &metadata };
    let message = match format {
        RowFormat::F16 => rows.frame(buffers.take()),
        RowFormat::Int8 => rows.frame_int8(buffers.take()).map_err(|(place, source)| {
            // asked again, it would be the same
            Status::data_loss(RowError::NotFinite { item: items[place], source }.to_string())
        })?,
    };
    Ok(buffers.lend(message))
}

fn refused(error: FlightError) -> Status {
    match error {
        FlightError::Tonic(status) => *status,
        other => Status::invalid_argument(format!("the request is not an Arrow stream: {other}")),
    }
}

/// The items that each request asks for, all below `rows`.
pub fn requests(
    rows: usize,
    messages: impl Stream<Item = Result<FlightData, FlightError>> + Send + 'static,
) -> impl Stream<Item = Result<PrimitiveArray<UInt32Type>, Status>> {
    let mut check = MessageCheck::default();
    let messages = messages.map(move |message| -> Result<FlightData, FlightError> {
        let message = message?;
        check.check(&message.data_header, message.data_body.len()).map_err(FlightError::DecodeError)?;
        Ok(message)
    });
    FlightRecordBatchStream::new_from_flight_data(messages)
        .map_err(refused)
        .enumerate()
        .map(move |(request, batch)| wanted(request as u64, &batch?, rows))
}

/// Answers a stream of requests, whose first message with content is their schema: framed messages, each with the number of
/// its rows.
pub fn stream(
    embeddings: Arc<Embeddings>,
    format: RowFormat,
    messages: impl Stream<Item = Result<FlightData, FlightError>> + Send + 'static,
) -> impl Stream<Item = Result<(Bytes, usize), Status>> {
    let (rows, row_bytes) = (embeddings.rows(), format.row_bytes(embeddings.dim()));
    let table = Arc::new(Table { embeddings, format, buffers: Buffers::default() });
    let answers = requests(rows, messages)
        .enumerate()
        .map(move |(request, items)| {
            let parts = parts(request as u64, items?, row_bytes).into_iter().map(Ok::<_, Status>);
            Ok::<_, Status>(stream::iter(parts))
        })
        .try_flatten();
    answers
        .map_ok(move |part: Part| {
            let table = Arc::clone(&table);
            off_thread(move || Ok((gather(&table, &part)?, part.range.len())))
        })
        .try_buffered(READ_AHEAD)
        .boxed()
}
