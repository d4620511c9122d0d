//! Reads the answers of a row exchange from the bytes of its stream, as they come.
//!
//! Input: pieces of a gRPC response, cut anywhere. Output: the values of rows, each copied once, from the piece to its place,
//! and the metadata of each message that has ended. Why by hand: the usual road collects a message, decodes it to an Arrow
//! array and copies the rows out of that. Invariants: a message is used only if its Arrow header was checked against the
//! agreed schema and the size of its body; no length that came from the network is allocated before its bytes are there.

use arrow_ipc::{MessageHeader, convert, root_as_message};
use arrow_schema::{DataType, Schema};
use half::f16;
use learn_dataset::MessageCheck;

use super::answers::{FlightClientError, unexpected};

/// gRPC's prefix: whether the message is compressed, and its length.
const PREFIX_BYTES: usize = 5;
/// Largest message, gRPC's default.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Largest part of a message besides its body.
const MAX_SMALL_BYTES: usize = 64 << 10;

/// Fields of `FlightData`.
const DATA_HEADER: u64 = 2;
const APP_METADATA: u64 = 3;
const DATA_BODY: u64 = 1000;
/// Protobuf's wire type of bytes.
const LENGTH_DELIMITED: u64 = 2;

/// A message that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its `app_metadata`.
    pub metadata: Vec<u8>,
    /// It held a batch of rows, maybe of none.
    pub is_batch: bool,
}

/// Where the values of rows go.
#[derive(Debug)]
pub struct Destination<'a> {
    bytes: &'a mut [u8],
    written: usize,
}

impl<'a> Destination<'a> {
    #[must_use]
    pub fn new(values: &'a mut [f16]) -> Self {
        Self { bytes: bytemuck::cast_slice_mut(values), written: 0 }
    }

    #[must_use]
    pub fn is_full(&self) -> bool {
        self.written == self.bytes.len()
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.written
    }

    fn write(&mut self, piece: &[u8]) {
        self.bytes[self.written..][..piece.len()].copy_from_slice(piece);
        self.written += piece.len();
    }
}

/// What comes next.
#[derive(Debug)]
enum Next {
    /// The rest of a prefix, of which so much is in `small`.
    Prefix,
    /// A field's key.
    Key(Varint),
    /// A field's length.
    Length(u64, Varint),
    /// So many bytes of a field that is collected, or passed over.
    Small(u64, usize),
    /// The body, so many bytes of it: those before the values, the values, those after them.
    Body([usize; 3]),
}

/// A number of Protobuf, as far as it has come.
#[derive(Clone, Copy, Debug, Default)]
struct Varint {
    value: u64,
    bits: u32,
}

impl Varint {
    fn push(&mut self, byte: u8) -> Result<Option<u64>, FlightClientError> {
        if self.bits >= 35 {
            return Err(unexpected("a number of a message is too large"));
        }
        self.value |= u64::from(byte & 0x7f) << self.bits;
        self.bits += 7;
        Ok((byte & 0x80 == 0).then_some(self.value))
    }
}

/// The state between two pieces.
#[derive(Debug)]
pub struct RowsReader {
    dim: usize,
    check: MessageCheck,
    next: Next,
    /// Bytes of the message that are still to come.
    left: usize,
    /// What is being collected.
    small: Vec<u8>,
    header: Vec<u8>,
    metadata: Vec<u8>,
    body_seen: bool,
}

/// Where the values lie in a body: (offset, length). `None` for a message that holds no batch.
type Values = Option<(usize, usize)>;

impl RowsReader {
    /// Of rows of `dim` values.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        Self {
            dim,
            check: MessageCheck::default(),
            next: Next::Prefix,
            left: 0,
            small: Vec::new(),
            header: Vec::new(),
            metadata: Vec::new(),
            body_seen: false,
        }
    }

    /// Takes the next piece of the stream, up to the end of a message: that message, if it has ended, and how much was taken.
    ///
    /// # Errors
    /// If the stream is not what was agreed, or has more values than `to` has room. Then nothing more can be read of it.
    pub fn read(
        &mut self,
        piece: &[u8],
        to: &mut Destination<'_>,
    ) -> Result<(usize, Option<Ended>), FlightClientError> {
        if self.left == 0 && !matches!(self.next, Next::Prefix) {
            return Err(unexpected("bytes after an error"));
        }
        let mut rest = piece;
        while !rest.is_empty() {
            let taken = self.step(rest, to)?;
            rest = &rest[taken..];
            if self.left == 0 && !matches!(self.next, Next::Prefix) {
                return Ok((piece.len() - rest.len(), Some(self.end()?)));
            }
        }
        Ok((piece.len(), None))
    }

    /// Takes some bytes, at least one.
    fn step(&mut self, piece: &[u8], to: &mut Destination<'_>) -> Result<usize, FlightClientError> {
        let taken = match &mut self.next {
            Next::Prefix => return self.prefix(piece),
            Next::Key(number) => {
                if let Some(key) = number.push(piece[0])? {
                    if key & 7 != LENGTH_DELIMITED {
                        return Err(unexpected(format!("a message has a field of wire type {}", key & 7)));
                    }
                    self.next = Next::Length(key >> 3, Varint::default());
                }
                1
            }
            Next::Length(field, number) => {
                let field = *field;
                if let Some(length) = number.push(piece[0])? {
                    let length = usize::try_from(length).ok().filter(|&length| length < self.left);
                    let length = length.ok_or_else(|| unexpected("a field is longer than its message"))?;
                    self.next = self.begin(field, length, to)?;
                }
                1
            }
            Next::Small(field, left) => {
                let taken = piece.len().min(*left);
                if matches!(*field, DATA_HEADER | APP_METADATA) {
                    self.small.extend_from_slice(&piece[..taken]);
                }
                *left -= taken;
                taken
            }
            Next::Body(parts) => {
                // one part at a time; the first that is not empty
                let part = parts.iter().position(|&left| left > 0).unwrap_or(2);
                let taken = piece.len().min(parts[part]);
                if part == 1 {
                    to.write(&piece[..taken]);
                }
                parts[part] -= taken;
                taken
            }
        };
        self.left -= taken;
        match self.next {
            Next::Small(field, 0) => {
                let small = std::mem::take(&mut self.small);
                match field {
                    DATA_HEADER => self.header = small,
                    APP_METADATA => self.metadata = small,
                    _ => {}
                }
                self.next = Next::Key(Varint::default());
            }
            Next::Body([0, 0, 0]) => self.next = Next::Key(Varint::default()),
            _ => {}
        }
        Ok(taken)
    }

    fn prefix(&mut self, piece: &[u8]) -> Result<usize, FlightClientError> {
        let taken = piece.len().min(PREFIX_BYTES - self.small.len());
        self.small.extend_from_slice(&piece[..taken]);
        if let [compressed, length @ ..] = &self.small[..]
            && let Ok(length) = <[u8; 4]>::try_from(length)
        {
            let length = u32::from_be_bytes(length) as usize;
            if *compressed != 0 {
                return Err(unexpected("a compressed message"));
            }
            if length > MAX_MESSAGE_BYTES {
                return Err(unexpected(format!("a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are read")));
            }
            self.small.clear();
            self.left = length;
            self.body_seen = false;
            self.header.clear();
            self.metadata.clear();
            self.next = Next::Key(Varint::default());
        }
        Ok(taken)
    }

    /// What follows the length of a field.
    fn begin(&mut self, field: u64, length: usize, to: &Destination<'_>) -> Result<Next, FlightClientError> {
        if field != DATA_BODY {
            if length > MAX_SMALL_BYTES {
                return Err(unexpected(format!("a message with {length} bytes beside its rows")));
            }
            if length == 0 {
                return Ok(Next::Key(Varint::default()));
            }
            return Ok(Next::Small(field, length));
        }
        if std::mem::replace(&mut self.body_seen, true) {
            return Err(unexpected("a message with two bodies"));
        }
        let (offset, values) = self.values(length)?.ok_or_else(|| unexpected("a body without rows"))?;
        if values > to.left() {
            return Err(unexpected("more rows than were asked for"));
        }
        if length == 0 {
            return Ok(Next::Key(Varint::default()));
        }
        Ok(Next::Body([offset, values, length - offset - values]))
    }

    fn end(&mut self) -> Result<Ended, FlightClientError> {
        if !matches!(self.next, Next::Key(Varint { bits: 0, .. })) {
            return Err(unexpected("a message ends within a field"));
        }
        let is_batch = self.body_seen || self.values(0)?.is_some();
        self.next = Next::Prefix;
        Ok(Ended { metadata: std::mem::take(&mut self.metadata), is_batch })
    }

    /// Where the header says that the values of a body of so many bytes lie.
    fn values(&mut self, body: usize) -> Result<Values, FlightClientError> {
        if self.header.is_empty() {
            return Ok(None);
        }
        self.check.check(&self.header, body).map_err(unexpected)?;
        let wrong = || unexpected("a message that is neither a schema nor rows");
        let message = root_as_message(&self.header).map_err(|error| unexpected(error.to_string()))?;
        if message.header_type() == MessageHeader::Schema {
            let schema = message.header_as_schema().ok_or_else(wrong)?;
            let schema = convert::try_fb_to_schema(schema).map_err(|error| unexpected(error.to_string()))?;
            return self.agreed(&schema).map(|()| None);
        }
        let batch = message.header_as_record_batch().ok_or_else(wrong)?;
        let nulls = batch.nodes().ok_or_else(wrong)?.iter().any(|node| node.null_count() != 0);
        // the check has found the lists' validity, that of their values, and the values
        let buffers = batch.buffers().filter(|buffers| buffers.len() == 3).ok_or_else(wrong)?;
        let rows = usize::try_from(batch.length()).map_err(|_| wrong())?;
        let bytes = rows.checked_mul(2 * self.dim).ok_or_else(wrong)?;
        let offset = usize::try_from(buffers.get(2).offset()).map_err(|_| wrong())?;
        let inside = offset.checked_add(bytes).is_some_and(|stop| stop <= body);
        let length = usize::try_from(buffers.get(2).length()).map_err(|_| wrong())?;
        if nulls || length < bytes || !inside {
            return Err(unexpected("rows with missing values"));
        }
        Ok(Some((offset, bytes)))
    }

    /// One column of rows of the right length.
    fn agreed(&self, schema: &Schema) -> Result<(), FlightClientError> {
        let [field] = &schema.fields()[..] else {
            return Err(unexpected(format!("rows of {} columns", schema.fields().len())));
        };
        match field.data_type() {
            DataType::FixedSizeList(element, dim)
                if field.name() == "embedding" && *element.data_type() == DataType::Float16 =>
            {
                if usize::try_from(*dim) == Ok(self.dim) {
                    return Ok(());
                }
                Err(unexpected(format!("rows of {dim} values instead of {}", self.dim)))
            }
            other => Err(unexpected(format!("a column `{}` of {other} instead of `embedding`", field.name()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{FixedSizeListArray, Float16Array, RecordBatch};
    use arrow_flight::utils::batches_to_flight_data;
    use learn_proto::flight::rows_schema;
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    /// What arrow and prost make of batches of rows, each with its metadata.
    fn stream(batches: &[Vec<f16>], dim: usize) -> Vec<u8> {
        let schema = Arc::new(rows_schema(dim as u32));
        let batch = |values: &Vec<f16>| -> RecordBatch {
            let DataType::FixedSizeList(element, _) = schema.field(0).data_type() else { panic!("not a list") };
            let values = Arc::new(Float16Array::from(values.clone()));
            let list = FixedSizeListArray::new(Arc::clone(element), dim as i32, values, None);
            RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(list)]).unwrap()
        };
        let messages = batches_to_flight_data(&schema, &batches.iter().map(batch).collect::<Vec<_>>()).unwrap();
        let framed = messages.into_iter().enumerate().flat_map(|(number, message)| {
            let message = if number == 0 { message } else { message.with_app_metadata(vec![number as u8]) };
            let mut bytes = vec![0];
            bytes.extend((message.encoded_len() as u32).to_be_bytes());
            bytes.extend(message.encode_to_vec());
            bytes
        });
        framed.collect()
    }

    fn read_all(bytes: &[u8], cuts: &[usize], dim: usize, into: &mut [f16]) -> Result<Vec<Ended>, FlightClientError> {
        let mut reader = RowsReader::new(dim);
        let mut to = Destination::new(into);
        let mut ended = Vec::new();
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([0, bytes.len()]).collect();
        places.sort_unstable();
        for pair in places.windows(2) {
            let mut piece = &bytes[pair[0]..pair[1]];
            while !piece.is_empty() {
                let (taken, end) = reader.read(piece, &mut to)?;
                piece = &piece[taken..];
                ended.extend(end);
            }
        }
        Ok(ended)
    }

    proptest! {
        #[test]
        fn what_arrow_wrote_comes_out_however_it_is_cut(
            sizes in prop::collection::vec(0_usize..9, 0..5), dim in 1_usize..40, bits: u16,
            cuts in prop::collection::vec(any::<usize>(), 0..40),
        ) {
            let batches: Vec<Vec<f16>> = sizes.iter().enumerate()
                .map(|(batch, rows)| (0..rows * dim).map(|at| f16::from_bits(bits ^ (batch * 77 + at) as u16)).collect())
                .collect();
            let expected = batches.concat();
            let mut values = vec![f16::ZERO; expected.len()];
            let ended = read_all(&stream(&batches, dim), &cuts, dim, &mut values).unwrap();
            let bits = |values: &[f16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&values), bits(&expected));
            prop_assert!(ended[1..].iter().enumerate().all(|(at, end)| end.metadata == [at as u8 + 1] && end.is_batch));
            prop_assert!(!ended[0].is_batch && ended.len() == batches.len() + 1);
        }

        #[test]
        fn damage_is_an_error_or_other_values_and_never_a_panic(
            at: usize, byte: u8, cuts in prop::collection::vec(any::<usize>(), 0..4),
        ) {
            let batches = vec![vec![f16::ONE; 6], vec![f16::ZERO; 3]];
            let mut bytes = stream(&batches, 3);
            let place = at % bytes.len();
            bytes[place] = byte;
            let _ = read_all(&bytes, &cuts, 3, &mut [f16::ZERO; 9]);
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_all(&bytes, &[], 3, &mut [f16::ZERO; 9]);
        }
    }

    #[test]
    fn what_was_not_agreed_is_refused_with_what_it_is() {
        let bytes = stream(&[vec![f16::ONE; 6]], 3);
        let refused =
            |bytes: &[u8], dim, room| read_all(bytes, &[], dim, &mut vec![f16::ZERO; room]).unwrap_err().to_string();
        assert!(refused(&bytes, 2, 6).contains("3 values instead of 2"));
        assert!(refused(&bytes, 3, 5).contains("more rows"));
        let mut compressed = bytes.clone();
        compressed[0] = 1;
        assert!(refused(&compressed, 3, 6).contains("compressed"));
        assert!(refused(&[0, 255, 0, 0, 0], 3, 6).contains("at most"));
    }
}
