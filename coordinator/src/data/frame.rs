//! Rows as the bytes of a gRPC message, written once.
//!
//! Input: rows of the mapped table. Output: what goes to the socket as it is: gRPC's prefix, the fields of a `FlightData`, and
//! in its body the Arrow buffers of a batch without nulls: a column of fixed-size lists of f16, or one of signed bytes and one
//! of scales. Why by hand: the usual road copies each row three times on its way (into an array, into an Arrow body, into a
//! Protobuf message). Invariant: any Flight client reads it as what arrow and prost would have written; the tests compare them.

use std::sync::{Arc, Mutex, PoisonError};

use arrow_flight::FlightData;
use arrow_ipc::{Buffer, FieldNode, MessageBuilder, MessageHeader, MetadataVersion, RecordBatchBuilder};
use bytes::{BufMut, Bytes};
use flatbuffers::FlatBufferBuilder;
use half::f16;
use learn_dataset::embeddings::int8::{self, NotFinite};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

/// Fields of `FlightData`.
const DATA_HEADER: u32 = 2;
const APP_METADATA: u32 = 3;
const DATA_BODY: u32 = 1000;

/// gRPC's prefix: one byte (not compressed), and the length of the message.
const PREFIX_BYTES: usize = 5;
/// Arrow bodies are padded to this.
const ALIGNMENT: usize = 8;
/// Buffers that an exchange keeps for its next messages.
const KEPT: usize = 4;

/// The rows of a message.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Their values, a slice a row.
    pub rows: &'a [&'a [f16]],
    pub dim: usize,
    /// `app_metadata`.
    pub metadata: &'a [u8],
}

/// What Arrow's header says of a batch: columns, and where their buffers lie in the body.
struct Layout<'a> {
    rows: usize,
    nodes: &'a [FieldNode],
    buffers: &'a [Buffer],
    /// Bytes of the body.
    body: usize,
}

fn batch_header(layout: &Layout<'_>) -> Vec<u8> {
    let Layout { rows, nodes, buffers, body } = *layout;
    let mut builder = FlatBufferBuilder::with_capacity(256);
    let nodes = builder.create_vector(nodes);
    let buffers = builder.create_vector(buffers);
    let mut batch = RecordBatchBuilder::new(&mut builder);
    // a message holds 2 MiB, so nothing here comes near i64
    batch.add_length(rows as i64);
    batch.add_nodes(nodes);
    batch.add_buffers(buffers);
    let batch = batch.finish().as_union_value();
    let mut message = MessageBuilder::new(&mut builder);
    message.add_version(MetadataVersion::V5);
    message.add_header_type(MessageHeader::RecordBatch);
    message.add_bodyLength(body as i64);
    message.add_header(batch);
    let message = message.finish();
    builder.finish(message, None);
    builder.finished_data().to_vec()
}

fn field_bytes(field: u32, length: usize) -> usize {
    key_len(field) + encoded_len_varint(length as u64) + length
}

fn begin_field(field: u32, length: usize, into: &mut Vec<u8>) {
    encode_key(field, WireType::LengthDelimited, into);
    encode_varint(length as u64, into);
}

fn begin_message(length: usize, into: &mut Vec<u8>) {
    into.put_u8(0);
    // a message holds 2 MiB
    into.put_u32(length as u32);
}

/// Writes all of a message that comes before its body to `buffer`, whose bytes go; how long the whole will be.
fn begin(layout: &Layout<'_>, metadata: &[u8], buffer: &mut Vec<u8>) -> usize {
    let header = batch_header(layout);
    let body_field = if layout.body > 0 { field_bytes(DATA_BODY, layout.body) } else { 0 };
    let length = field_bytes(DATA_HEADER, header.len()) + field_bytes(APP_METADATA, metadata.len()) + body_field;
    buffer.clear();
    buffer.reserve(PREFIX_BYTES + length);
    begin_message(length, buffer);
    begin_field(DATA_HEADER, header.len(), buffer);
    buffer.extend_from_slice(&header);
    begin_field(APP_METADATA, metadata.len(), buffer);
    buffer.extend_from_slice(metadata);
    if layout.body > 0 {
        begin_field(DATA_BODY, layout.body, buffer);
    }
    PREFIX_BYTES + length
}

/// No validity: a column without nulls has none.
fn no_validity() -> Buffer {
    Buffer::new(0, 0)
}

impl Rows<'_> {
    /// The whole message, in `buffer`, whose bytes go.
    #[must_use]
    pub fn frame(&self, mut buffer: Vec<u8>) -> Vec<u8> {
        let (rows, values) = (self.rows.len(), self.rows.len() * self.dim);
        let layout = Layout {
            rows,
            nodes: &[FieldNode::new(rows as i64, 0), FieldNode::new(values as i64, 0)],
            // of the lists, of their values, the values
            buffers: &[no_validity(), no_validity(), Buffer::new(0, 2 * values as i64)],
            body: (2 * values).next_multiple_of(ALIGNMENT),
        };
        let length = begin(&layout, self.metadata, &mut buffer);
        for row in self.rows {
            buffer.extend_from_slice(bytemuck::cast_slice::<f16, u8>(row));
        }
        buffer.resize(length, 0);
        buffer
    }

    /// The same with a signed byte a value, and a second column of scales.
    ///
    /// # Errors
    /// The first row that holds a value that is not finite, by its place.
    pub fn frame_int8(&self, mut buffer: Vec<u8>) -> Result<Vec<u8>, (usize, NotFinite)> {
        let (rows, values) = (self.rows.len(), self.rows.len() * self.dim);
        let scales = values.next_multiple_of(ALIGNMENT);
        let scale_bytes = size_of::<f32>() * rows;
        let layout = Layout {
            rows,
            nodes: &[FieldNode::new(rows as i64, 0), FieldNode::new(values as i64, 0), FieldNode::new(rows as i64, 0)],
            buffers: &[
                no_validity(),
                no_validity(),
                Buffer::new(0, values as i64),
                no_validity(),
                Buffer::new(scales as i64, scale_bytes as i64),
            ],
            body: scales + scale_bytes.next_multiple_of(ALIGNMENT),
        };
        let length = begin(&layout, self.metadata, &mut buffer);
        let before = buffer.len();
        buffer.resize(length, 0);
        let (bytes, scales) = buffer[before..].split_at_mut(scales);
        let places = bytes.chunks_exact_mut(self.dim.max(1)).zip(scales.chunks_exact_mut(size_of::<f32>()));
        for (number, (row, (bytes, scale))) in self.rows.iter().zip(places).enumerate() {
            let quantized = int8::quantize(row, bytemuck::cast_slice_mut(bytes));
            scale.copy_from_slice(&quantized.map_err(|source| (number, source))?.to_le_bytes());
        }
        Ok(buffer)
    }
}

/// A message that is not made of rows: the schema.
#[must_use]
pub fn frame(message: &FlightData) -> Bytes {
    let length = message.encoded_len();
    let mut buffer = Vec::with_capacity(PREFIX_BYTES + length);
    begin_message(length, &mut buffer);
    buffer.extend_from_slice(&message.encode_to_vec());
    buffer.into()
}

/// Buffers that come back when their bytes are on the wire: fresh memory costs more than the copy into it.
#[derive(Clone, Debug, Default)]
pub struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

struct Lent {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Buffers {
    /// One to write a message into.
    #[must_use]
    pub fn take(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// A written one, as what goes out.
    #[must_use]
    pub fn lend(&self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { bytes, home: self.clone() })
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow_array::RecordBatch;
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Float16Type, Float32Type, Int8Type};
    use arrow_flight::decode::FlightRecordBatchStream;
    use futures::{FutureExt, TryStreamExt};
    use learn_dataset::MessageCheck;
    use learn_domain::config::RowFormat;
    use learn_proto::flight::rows_schema;
    use proptest::prelude::*;

    use super::super::encode::schema_message;
    use super::*;

    fn unframed(bytes: &[u8]) -> FlightData {
        assert_eq!(bytes[0], 0, "not compressed");
        let length = u32::from_be_bytes(bytes[1..PREFIX_BYTES].try_into().unwrap()) as usize;
        assert_eq!(bytes.len(), PREFIX_BYTES + length);
        FlightData::decode(&bytes[PREFIX_BYTES..]).unwrap()
    }

    /// What arrow and prost read in a message, behind its schema.
    fn read(framed: &[u8], dim: usize, format: RowFormat) -> (FlightData, RecordBatch) {
        let message = unframed(framed);
        let schema = unframed(&frame(&schema_message(&rows_schema(dim as u32, format))));
        let mut check = MessageCheck::default();
        check.check(&schema.data_header, 0).unwrap();
        check.check(&message.data_header, message.data_body.len()).unwrap();
        let stream = futures::stream::iter([Ok(schema), Ok(message.clone())]);
        let stream = FlightRecordBatchStream::new_from_flight_data(stream);
        let batches: Vec<_> = stream.try_collect().now_or_never().unwrap().unwrap();
        (message, batches[0].clone())
    }

    #[test]
    fn a_row_that_is_not_finite_is_named_by_its_place() {
        let rows = [[f16::ONE, f16::ZERO], [f16::ONE, f16::NAN], [f16::INFINITY, f16::ONE]];
        let slices: Vec<&[f16]> = rows.iter().map(|row| &row[..]).collect();
        let (place, _) = Rows { rows: &slices, dim: 2, metadata: b"" }.frame_int8(Vec::new()).unwrap_err();
        assert_eq!(place, 1);
    }

    proptest! {
        #[test]
        fn arrow_and_prost_read_the_bytes_and_scales_of_rows(
            values in prop::collection::vec(-2.0_f32..2.0, 0..400), dim in 1_usize..70, metadata: Vec<u8>,
        ) {
            let values: Vec<f16> = values.into_iter().map(f16::from_f32).collect();
            let slices: Vec<&[f16]> = values.chunks_exact(dim).collect();
            let framed = Rows { rows: &slices, dim, metadata: &metadata }.frame_int8(vec![7; 3 * dim]).unwrap();
            let (message, batch) = read(&framed, dim, RowFormat::Int8);
            prop_assert_eq!((&message.app_metadata[..], batch.num_rows()), (&metadata[..], slices.len()));
            let bytes = batch.column(0).as_fixed_size_list().values().as_primitive::<Int8Type>().values().clone();
            let scales = batch.column(1).as_primitive::<Float32Type>().values().clone();
            for (row, (bytes, scale)) in slices.iter().zip(bytes.chunks_exact(dim).zip(&scales)) {
                let mut expected = vec![0; dim];
                prop_assert_eq!((int8::quantize(row, &mut expected), bytes), (Ok(*scale), &expected[..]));
            }
        }

        #[test]
        fn arrow_and_prost_read_what_was_put_in(count in 0_usize..20, dim in 1_usize..70, bits: u16, metadata: Vec<u8>) {
            let rows: Vec<Vec<f16>> = (0..count)
                .map(|row| (0..dim).map(|column| f16::from_bits(bits ^ (row * dim + column) as u16)).collect())
                .collect();
            let slices: Vec<&[f16]> = rows.iter().map(Vec::as_slice).collect();
            let rest = vec![7; 3 * dim];
            let framed = Rows { rows: &slices, dim, metadata: &metadata }.frame(rest);
            let (message, batch) = read(&framed, dim, RowFormat::F16);
            prop_assert_eq!(&message.app_metadata[..], &metadata[..]);
            let list = batch.column(0).as_fixed_size_list();
            prop_assert_eq!(batch.num_rows(), count);
            let bits = |values: &[f16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(list.values().as_primitive::<Float16Type>().values()), bits(&rows.concat()));
        }
    }

    #[test]
    fn a_buffer_comes_back_when_its_message_has_gone() {
        let buffers = Buffers::default();
        let message = buffers.lend(vec![1, 2, 3]);
        let part = message.slice(1..);
        drop(message);
        assert!(buffers.take().is_empty(), "a part of it is still to be sent");
        drop(part);
        assert_eq!(buffers.take(), [1, 2, 3]);
    }
}
