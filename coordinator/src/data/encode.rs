//! Arrow columns and Flight messages.

use std::sync::Arc;

use arrow_array::types::{ArrowPrimitiveType, Int64Type, UInt8Type, UInt32Type};
use arrow_array::{ArrayRef, ListArray, PrimitiveArray, RecordBatch, UInt32Array};
use arrow_buffer::OffsetBuffer;
use arrow_flight::{FlightData, SchemaAsIpc};
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_schema::{ArrowError, Schema};
use learn_proto::flight::element;
use serde::Serialize;
use tonic::Status;

/// Room that a message leaves below its limit for headers, padding and metadata.
pub const HEADROOM_BYTES: usize = 16 << 10;

/// A column of lists that grows value by value.
#[derive(Debug)]
pub struct Lists<T: ArrowPrimitiveType> {
    offsets: Vec<i32>,
    values: Vec<T::Native>,
}

impl<T: ArrowPrimitiveType> Default for Lists<T> {
    fn default() -> Self {
        Self { offsets: vec![0], values: Vec::new() }
    }
}

impl<T: ArrowPrimitiveType> Lists<T> {
    pub fn push(&mut self, values: impl IntoIterator<Item = T::Native>) {
        self.values.extend(values);
        // cannot wrap: a message holds 2 MiB, or the items of a single user
        self.offsets.push(self.values.len() as i32);
    }

    fn finish(self) -> Result<ArrayRef, ArrowError> {
        let values = Arc::new(PrimitiveArray::<T>::new(self.values.into(), None));
        let element = element(T::DATA_TYPE);
        Ok(Arc::new(ListArray::try_new(element, OffsetBuffer::new(self.offsets.into()), values, None)?))
    }
}

/// The columns of a message.
#[derive(Debug)]
pub enum Column {
    Numbers(Vec<u32>),
    Lists(Lists<UInt32Type>),
    Times(Lists<Int64Type>),
    Labels(Lists<UInt8Type>),
}

/// # Errors
/// If the columns do not fit the schema.
pub fn batch(schema: &Arc<Schema>, columns: Vec<Column>) -> Result<RecordBatch, Status> {
    let arrays = columns.into_iter().map(|column| match column {
        Column::Numbers(values) => Ok(Arc::new(UInt32Array::from(values)) as ArrayRef),
        Column::Lists(lists) => lists.finish(),
        Column::Times(lists) => lists.finish(),
        Column::Labels(lists) => lists.finish(),
    });
    arrays
        .collect::<Result<Vec<_>, _>>()
        .and_then(|arrays| RecordBatch::try_new(Arc::clone(schema), arrays))
        .map_err(|error| internal(&error))
}

/// The first message of every stream.
#[must_use]
pub fn schema_message(schema: &Schema) -> FlightData {
    SchemaAsIpc::new(schema, &IpcWriteOptions::default()).into()
}

/// # Errors
/// If the batch cannot be written, which no schema of this service causes.
pub fn batch_message<M: Serialize>(batch: &RecordBatch, metadata: &M) -> Result<FlightData, Status> {
    let (mut dictionaries, mut context) = (DictionaryTracker::new(false), IpcWriteContext::default());
    let (_, data) = IpcDataGenerator::default()
        .encode(batch, &mut dictionaries, &IpcWriteOptions::default(), &mut context)
        .map_err(|error| internal(&error))?;
    let metadata = serde_json::to_vec(metadata).map_err(|error| internal(&error))?;
    Ok(FlightData::from(data).with_app_metadata(metadata))
}

fn internal(error: &dyn std::error::Error) -> Status {
    Status::internal(format!("a message could not be encoded: {error}"))
}
