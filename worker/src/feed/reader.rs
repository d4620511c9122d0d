//! Reads the answers of a row exchange from the bytes of its stream, as they come.
//!
//! Input: pieces of a gRPC response, cut anywhere. Output: the values of rows, each copied once, from the piece to its place,
//! and the metadata of each message that has ended. int8 rows are collected, a message at a time, and become f16 when it ends,
//! because their scales come behind them. Why by hand: the usual road collects a message, decodes it to an Arrow
//! array and copies the rows out of that. Invariants: a message is used only if its Arrow header was checked against the
//! agreed schema and the size of its body; no length that came from the network is allocated before its bytes are there.

use arrow_ipc::{MessageHeader, RecordBatch, convert, root_as_message};
use arrow_schema::{DataType, Schema};
use half::f16;
use learn_dataset::MessageCheck;
use learn_dataset::embeddings::int8;
use learn_domain::config::RowFormat;

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
    values: &'a mut [f16],
    /// Bytes.
    written: usize,
}

impl<'a> Destination<'a> {
    #[must_use]
    pub fn new(values: &'a mut [f16]) -> Self {
        Self { values, written: 0 }
    }

    #[must_use]
    pub fn is_full(&self) -> bool {
        self.left() == 0
    }

    fn left(&self) -> usize {
        size_of_val(self.values) - self.written
    }

    fn write(&mut self, piece: &[u8]) {
        bytemuck::cast_slice_mut(self.values)[self.written..][..piece.len()].copy_from_slice(piece);
        self.written += piece.len();
    }

    /// Writes what bytes and scales of rows say; there is room for it.
    fn write_int8(&mut self, bytes: &[i8], scales: &[[u8; 4]]) -> Result<(), FlightClientError> {
        let dim = bytes.len() / scales.len().max(1);
        let rows = self.values[self.written / 2..][..bytes.len()].chunks_exact_mut(dim.max(1));
        for (row, (bytes, scale)) in rows.zip(bytes.chunks_exact(dim.max(1)).zip(scales)) {
            let scale = f32::from_le_bytes(*scale);
            if !(scale.is_finite() && scale >= 0.0) {
                return Err(unexpected(format!("a row with the scale {scale}")));
            }
            int8::dequantize(bytes, scale, row);
        }
        self.written += 2 * bytes.len();
        Ok(())
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
    format: RowFormat,
    check: MessageCheck,
    next: Next,
    /// Bytes of the message that are still to come.
    left: usize,
    /// What is being collected.
    small: Vec<u8>,
    header: Vec<u8>,
    metadata: Vec<u8>,
    body_seen: bool,
    /// The body of int8 rows, as far as it has come.
    collected: Vec<u8>,
}

/// Where something lies in a body: (offset, length).
type Place = (usize, usize);

/// Where the rows of a batch lie in its body.
#[derive(Clone, Copy, Debug)]
struct Rows {
    values: Place,
    /// Of int8 rows alone.
    scales: Place,
}

impl RowsReader {
    /// Of rows of `dim` values that come in this format.
    #[must_use]
    pub fn new(dim: usize, format: RowFormat) -> Self {
        Self {
            dim,
            format,
            check: MessageCheck::default(),
            next: Next::Prefix,
            left: 0,
            small: Vec::new(),
            header: Vec::new(),
            metadata: Vec::new(),
            body_seen: false,
            collected: Vec::new(),
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
                return Ok((piece.len() - rest.len(), Some(self.end(to)?)));
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
                    match self.format {
                        RowFormat::F16 => to.write(&piece[..taken]),
                        RowFormat::Int8 => self.collected.extend_from_slice(&piece[..taken]),
                    }
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
            self.collected.clear();
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
        let (offset, values) = self.rows(length)?.ok_or_else(|| unexpected("a body without rows"))?.values;
        let room = match self.format {
            RowFormat::F16 => to.left(),
            RowFormat::Int8 => to.left() / 2,
        };
        if values > room {
            return Err(unexpected("more rows than were asked for"));
        }
        if length == 0 {
            return Ok(Next::Key(Varint::default()));
        }
        Ok(Next::Body(match self.format {
            RowFormat::F16 => [offset, values, length - offset - values],
            RowFormat::Int8 => [0, length, 0],
        }))
    }

    fn end(&mut self, to: &mut Destination<'_>) -> Result<Ended, FlightClientError> {
        if !matches!(self.next, Next::Key(Varint { bits: 0, .. })) {
            return Err(unexpected("a message ends within a field"));
        }
        let is_batch = match (self.format, self.body_seen) {
            (RowFormat::F16, true) => true,
            (RowFormat::Int8, true) => {
                self.expand(to)?;
                true
            }
            (_, false) => self.rows(0)?.is_some(),
        };
        self.next = Next::Prefix;
        Ok(Ended { metadata: std::mem::take(&mut self.metadata), is_batch })
    }

    /// Writes the int8 rows that have been collected.
    fn expand(&mut self, to: &mut Destination<'_>) -> Result<(), FlightClientError> {
        let collected = std::mem::take(&mut self.collected);
        // a header that comes behind the body is another one than the body was begun with
        let rows = self.rows(collected.len())?.ok_or_else(|| unexpected("a body without rows"))?;
        let of = |(offset, length): Place| &collected[offset..][..length];
        let bytes: &[i8] = bytemuck::cast_slice(of(rows.values));
        if 2 * bytes.len() > to.left() {
            return Err(unexpected("more rows than were asked for"));
        }
        let (scales, _) = of(rows.scales).as_chunks();
        to.write_int8(bytes, scales)?;
        self.collected = collected;
        Ok(())
    }

    /// Where the header says that the rows of a body of so many bytes lie; `None` for a message that holds no batch.
    fn rows(&mut self, body: usize) -> Result<Option<Rows>, FlightClientError> {
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
        if batch.nodes().ok_or_else(wrong)?.iter().any(|node| node.null_count() != 0) {
            return Err(missing());
        }
        let rows = usize::try_from(batch.length()).map_err(|_| wrong())?;
        let values = rows.checked_mul(self.dim).ok_or_else(wrong)?;
        // the check has found the lists' validity, that of their values, and the values; then that of scales, and the scales
        let (buffers, values, scales) = match self.format {
            RowFormat::F16 => (3, values.checked_mul(2).ok_or_else(wrong)?, None),
            RowFormat::Int8 => (5, values, Some(rows.checked_mul(size_of::<f32>()).ok_or_else(wrong)?)),
        };
        if batch.buffers().map(|buffers| buffers.len()) != Some(buffers) {
            return Err(wrong());
        }
        let scales = scales.map(|bytes| place(&batch, 4, bytes, body)).transpose()?.unwrap_or_default();
        Ok(Some(Rows { values: place(&batch, 2, values, body)?, scales }))
    }

    /// The columns of rows of the right length in the right format.
    fn agreed(&self, schema: &Schema) -> Result<(), FlightClientError> {
        let (value, scales) = match self.format {
            RowFormat::F16 => (DataType::Float16, false),
            RowFormat::Int8 => (DataType::Int8, true),
        };
        let (field, scale) = match &schema.fields()[..] {
            [field] if !scales => (field, None),
            [field, scale] if scales => (field, Some(scale)),
            other => return Err(unexpected(format!("rows of {} columns", other.len()))),
        };
        if let Some(scale) = scale.filter(|scale| scale.name() != "scale" || *scale.data_type() != DataType::Float32) {
            let (name, found) = (scale.name(), scale.data_type());
            return Err(unexpected(format!("a column `{name}` of {found} instead of `scale` of Float32")));
        }
        match field.data_type() {
            DataType::FixedSizeList(element, dim) if field.name() == "embedding" && *element.data_type() == value => {
                if usize::try_from(*dim) == Ok(self.dim) {
                    return Ok(());
                }
                Err(unexpected(format!("rows of {dim} values instead of {}", self.dim)))
            }
            other => {
                let wanted = format!("`embedding` of lists of {value}");
                Err(unexpected(format!("a column `{}` of {other} instead of {wanted}", field.name())))
            }
        }
    }
}

fn missing() -> FlightClientError {
    unexpected("rows with missing values")
}

/// Where the batch's buffer of that number lies, of which so many bytes are needed, in a body of so many.
fn place(batch: &RecordBatch<'_>, number: usize, needed: usize, body: usize) -> Result<Place, FlightClientError> {
    let buffer = batch.buffers().filter(|buffers| number < buffers.len()).map(|buffers| *buffers.get(number));
    let buffer = buffer.ok_or_else(missing)?;
    let number = |value: i64| usize::try_from(value).map_err(|_| missing());
    let (offset, length) = (number(buffer.offset())?, number(buffer.length())?);
    let inside = offset.checked_add(needed).is_some_and(|stop| stop <= body);
    if length < needed || !inside { Err(missing()) } else { Ok((offset, needed)) }
}

#[cfg(test)]
mod tests;
