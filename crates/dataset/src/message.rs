//! Whether the header of an Arrow message tells the truth about its body, before arrow's decoder relies on it.
//!
//! Input: the bytes of headers, from a file or from the network. Output: nothing, or what does not fit. Invariant: a record batch
//! that passes has, column by column, the nodes and buffers that its schema needs, each inside of the body, as long as its
//! rows need and made of whole values; nothing else may reach arrow, which slices, allocates and asserts by these numbers.

use std::slice;

use arrow_ipc::{FieldNode, MessageHeader, RecordBatch, convert, root_as_message};
use arrow_schema::{DataType, Field, Fields};

const OUTSIDE: &str = "an offset points outside of what there is";

/// Follows the messages of one stream: a schema, then record batches.
#[derive(Debug, Default)]
pub struct MessageCheck {
    fields: Option<Fields>,
}

impl MessageCheck {
    /// Looks at the next message, whose body has so many bytes. One without header passes; it has no rows.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&mut self, header: &[u8], body: usize) -> Result<(), String> {
        if header.is_empty() {
            return Ok(());
        }
        let message = root_as_message(header).map_err(|error| error.to_string())?;
        match message.header_type() {
            MessageHeader::Schema => {
                let schema = message.header_as_schema().ok_or("a schema message without a schema")?;
                let schema = convert::try_fb_to_schema(schema).map_err(|error| error.to_string())?;
                self.fields = Some(schema.fields);
                Ok(())
            }
            MessageHeader::RecordBatch => {
                let batch = message.header_as_record_batch().ok_or("a batch message without a batch")?;
                let fields = self.fields.as_ref().ok_or("a record batch before its schema")?;
                check_record_batch(&batch, fields, body)
            }
            _ => Err("a message is neither a schema nor a record batch".into()),
        }
    }
}

/// Compares a record batch with its schema and the size of its body. A compressed one, whose sizes say nothing, is refused.
///
/// # Errors
/// What does not fit.
pub(crate) fn check_record_batch(batch: &RecordBatch<'_>, fields: &Fields, body: usize) -> Result<(), String> {
    if batch.compression().is_some() {
        return Err("it is compressed".into());
    }
    let nodes = batch.nodes().ok_or("it has no columns")?;
    let nodes: Vec<&FieldNode> = nodes.iter().collect();
    let buffers = batch.buffers().ok_or("it has no buffers")?;
    let buffers: Vec<(i64, i64)> = buffers.iter().map(|buffer| (buffer.offset(), buffer.length())).collect();
    let mut walk = Walk { nodes: nodes.iter(), buffers: buffers.iter(), body };
    for field in fields {
        if walk.column(field)? as i64 != batch.length() {
            return Err(format!("column {} has another number of rows than the batch", field.name()));
        }
    }
    if walk.nodes.len() > 0 || walk.buffers.len() > 0 {
        return Err("it has more columns or buffers than its schema".into());
    }
    match fields.is_empty() && batch.length() != 0 {
        true => Err("it has rows without columns".into()),
        false => Ok(()),
    }
}

/// The nodes and buffers that are still to come.
struct Walk<'a> {
    nodes: slice::Iter<'a, &'a FieldNode>,
    /// (offset, length)
    buffers: slice::Iter<'a, (i64, i64)>,
    body: usize,
}

impl Walk<'_> {
    /// Goes over a column and those inside of it; gives its rows.
    fn column(&mut self, field: &Field) -> Result<usize, String> {
        let node = self.nodes.next().ok_or("it has fewer columns than its schema")?;
        // A row of any column of ours takes at least one byte of the body, so a length past the body is a lie.
        let rows = usize::try_from(node.length()).ok().filter(|&rows| rows <= self.body);
        let rows = rows.ok_or("its row counts do not fit its size")?;
        if !(0..=node.length()).contains(&node.null_count()) {
            return Err("it has more missing values than rows".into());
        }
        self.buffer(1, if node.null_count() > 0 { rows.div_ceil(8) } else { 0 })?;
        let offsets = if rows == 0 { 0 } else { 4 * (rows + 1) };
        match field.data_type() {
            DataType::Boolean => self.buffer(1, rows.div_ceil(8))?,
            DataType::Utf8 | DataType::Binary => {
                self.buffer(4, offsets)?;
                self.buffer(1, 0)?;
            }
            DataType::List(inner) => {
                self.buffer(4, offsets)?;
                self.column(inner)?;
            }
            DataType::FixedSizeList(inner, size) => {
                let inside = self.column(inner)?;
                if usize::try_from(*size).ok().and_then(|size| size.checked_mul(rows)) != Some(inside) {
                    return Err(format!("column {} has lists of another length than its schema says", field.name()));
                }
            }
            other => {
                let width = other.primitive_width();
                let width = width.ok_or_else(|| format!("column {} is {other}, which is not read", field.name()))?;
                // cannot overflow: rows are below the size of the body
                self.buffer(width, width.saturating_mul(rows))?;
            }
        }
        Ok(rows)
    }

    /// The next buffer: inside of the body, of whole values of `unit` bytes, and at least so long.
    fn buffer(&mut self, unit: usize, least: usize) -> Result<(), String> {
        let &(offset, length) = self.buffers.next().ok_or("it has fewer buffers than its schema")?;
        let size = |value: i64| usize::try_from(value).map_err(|_| OUTSIDE.to_owned());
        let (offset, length) = (size(offset)?, size(length)?);
        if offset.checked_add(length).is_none_or(|stop| stop > self.body) {
            return Err(OUTSIDE.into());
        }
        if !length.is_multiple_of(unit) || length < least {
            return Err("a buffer is cut short".into());
        }
        Ok(())
    }
}
