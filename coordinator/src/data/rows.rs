//! Content embeddings by item index, in answer to a stream of requests.
//!
//! Input: Arrow batches with a column `item`. Output: for each, in order, its rows in messages of at most 2 MiB; several
//! are gathered at once from the mapped files. Invariant: a request is checked whole before any of it is answered.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::types::UInt32Type;
use arrow_array::{Array, FixedSizeListArray, Float16Array, PrimitiveArray, RecordBatch};
use arrow_flight::FlightData;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::error::FlightError;
use arrow_schema::{DataType, Schema};
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use learn_dataset::{Embeddings, MessageCheck};
use learn_proto::flight::{MAX_MESSAGE_BYTES, RowsMeta};
use tonic::Status;

use super::encode::{HEADROOM_BYTES, batch_message};
use super::{READ_AHEAD, off_thread};

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

/// Cuts a request into parts; an empty one gets one empty answer.
fn parts(request: u64, items: PrimitiveArray<UInt32Type>, dim: usize) -> Vec<Part> {
    let per_part = ((MAX_MESSAGE_BYTES - HEADROOM_BYTES) / (2 * dim.max(1))).max(1);
    let count = items.len().div_ceil(per_part).max(1);
    let items = Arc::new(items);
    let part = |part: usize| Part {
        range: part * per_part..items.len().min((part + 1) * per_part),
        meta: RowsMeta { request, part: part as u32, parts: count as u32 },
        items: Arc::clone(&items),
    };
    (0..count).map(part).collect()
}

fn gather(embeddings: &Embeddings, schema: &Arc<Schema>, part: &Part) -> Result<FlightData, Status> {
    let items = &part.items.values()[part.range.clone()];
    let mut values = Vec::with_capacity(items.len() * embeddings.dim());
    for &item in items {
        values.extend_from_slice(embeddings.row(item as usize));
    }
    let internal = |error| Status::internal(format!("the rows could not be encoded: {error}"));
    let DataType::FixedSizeList(element, dim) = schema.field(0).data_type() else {
        return Err(Status::internal("the rows' schema is not a fixed-size list"));
    };
    let values = Arc::new(Float16Array::from(values));
    let column = FixedSizeListArray::try_new(Arc::clone(element), *dim, values, None).map_err(internal)?;
    let batch = RecordBatch::try_new(Arc::clone(schema), vec![Arc::new(column)]).map_err(internal)?;
    batch_message(&batch, &part.meta)
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

/// Answers a stream of requests, whose first message with content is their schema.
pub fn stream(
    embeddings: Arc<Embeddings>,
    schema: Arc<Schema>,
    messages: impl Stream<Item = Result<FlightData, FlightError>> + Send + 'static,
) -> impl Stream<Item = Result<(FlightData, usize), Status>> {
    let (rows, dim) = (embeddings.rows(), embeddings.dim());
    let answers = requests(rows, messages)
        .enumerate()
        .map(move |(request, items)| {
            let parts = parts(request as u64, items?, dim).into_iter().map(Ok::<_, Status>);
            Ok::<_, Status>(stream::iter(parts))
        })
        .try_flatten();
    answers
        .map_ok(move |part: Part| {
            let (embeddings, schema) = (Arc::clone(&embeddings), Arc::clone(&schema));
            off_thread(move || Ok((gather(&embeddings, &schema, &part)?, part.range.len())))
        })
        .try_buffered(READ_AHEAD)
        .boxed()
}
