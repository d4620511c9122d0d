//! Arrow IPC files: memory-mapped reading that trusts nothing, and hashed writing.
//!
//! arrow-ipc slices by the offsets that a file states and panics where they leave it, so every offset and length is
//! compared with the file's size first; list offsets are validated by arrow's array builder.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::reader::{FileDecoder, read_footer_length};
use arrow_ipc::{Block, Footer, convert, root_as_footer, root_as_message};
use arrow_schema::{Fields, Schema};

use crate::error::{DatasetError, MadeBy};
use crate::mapped;
use crate::message::check_record_batch;

/// Key of the schema version in the metadata of each file.
pub(crate) const VERSION_KEY: &str = "learn.version";

/// Bytes after the footer: its length and the magic.
const TRAILER: usize = 10;
/// Bytes before the first block: magic and padding.
const HEADER: usize = 8;
const OUTSIDE: &str = "an offset points outside of what there is";

/// A file's batches, as slices of the mapped file, and the metadata of its schema.
pub(crate) struct MappedBatches {
    pub(crate) batches: Vec<RecordBatch>,
    pub(crate) metadata: HashMap<String, String>,
}

/// The schema of a new file of this version.
pub(crate) fn schema(fields: &Fields, metadata: impl IntoIterator<Item = (String, String)>) -> Schema {
    let version = (VERSION_KEY.to_owned(), crate::manifest::VERSION.to_string());
    let metadata: HashMap<String, String> = std::iter::once(version).chain(metadata).collect();
    Schema::new_with_metadata(fields.clone(), metadata)
}

/// Maps a file whose fields must be exactly `fields`, without nulls.
///
/// # Errors
/// When the file cannot be mapped, or is anything else than what this crate writes.
pub(crate) fn open(made_by: MadeBy, path: &Path, fields: &Fields) -> Result<MappedBatches, DatasetError> {
    let buffer = mapped::map(path).map_err(DatasetError::io(path))?;
    decode(&buffer, fields).map_err(|problem| DatasetError::damaged(made_by, path, problem))
}

/// The schema of a file of any columns.
///
/// # Errors
/// When the file cannot be mapped or has no schema of this crate.
pub(crate) fn stored_schema(made_by: MadeBy, path: &Path) -> Result<Schema, DatasetError> {
    let buffer = mapped::map(path).map_err(DatasetError::io(path))?;
    let (_, schema, _) = footer(&buffer).map_err(|problem| DatasetError::damaged(made_by, path, problem))?;
    Ok(schema)
}

/// The footer of a file, its schema, and where it begins.
fn footer(buffer: &Buffer) -> Result<(Footer<'_>, Schema, usize), String> {
    let text = |error: &dyn ToString| error.to_string();
    let trailer = buffer.len().checked_sub(TRAILER).filter(|&at| at >= HEADER).ok_or("it is cut short")?;
    let mut tail = [0; TRAILER];
    tail.copy_from_slice(&buffer[trailer..]);
    let footer_length = read_footer_length(tail).map_err(|error| text(&error))?;
    let footer_start =
        trailer.checked_sub(footer_length).filter(|&at| at >= HEADER).ok_or("its footer is cut short")?;
    let footer = root_as_footer(&buffer[footer_start..trailer]).map_err(|error| text(&error))?;
    let schema = convert::try_fb_to_schema(footer.schema().ok_or("it has no schema")?).map_err(|error| text(&error))?;
    let version = schema.metadata().get(VERSION_KEY);
    let known =
        |version: &String| version.parse().is_ok_and(|version| (1..=crate::manifest::VERSION).contains(&version));
    if !version.is_some_and(known) {
        return Err(format!("its schema version is {}", version.map_or("missing", String::as_str)));
    }
    Ok((footer, schema, footer_start))
}

fn decode(buffer: &Buffer, fields: &Fields) -> Result<MappedBatches, String> {
    let (footer, schema, footer_start) = footer(buffer)?;
    if schema.fields() != fields {
        return Err(format!("its columns are {:?} instead of {fields:?}", schema.fields()));
    }
    if footer.dictionaries().is_some_and(|blocks| !blocks.is_empty()) {
        return Err("it has dictionaries".into());
    }
    let metadata = schema.metadata().clone().into();
    let decoder = FileDecoder::new(Arc::new(schema), footer.version()).with_require_alignment(true);
    let mut batches = Vec::new();
    for (number, block) in footer.recordBatches().ok_or("it has no batches")?.iter().enumerate() {
        let data = checked_block(buffer, block, footer_start, fields)
            .map_err(|problem| format!("batch {number}: {problem}"))?;
        let batch = decoder.read_record_batch(block, &data).map_err(|error| format!("batch {number}: {error}"))?;
        let batch = batch.ok_or_else(|| format!("batch {number} is empty"))?;
        if batch.columns().iter().any(|column| column.null_count() > 0) {
            return Err(format!("batch {number} has missing values"));
        }
        batches.push(batch);
    }
    Ok(MappedBatches { batches, metadata })
}

/// The bytes of a block whose every stated offset lies inside of it.
fn checked_block(file: &Buffer, block: &Block, end: usize, fields: &Fields) -> Result<Buffer, String> {
    let size = |value: i64| usize::try_from(value).map_err(|_| OUTSIDE.to_owned());
    let (offset, body) = (size(block.offset())?, size(block.bodyLength())?);
    let metadata = size(i64::from(block.metaDataLength()))?;
    let length = metadata.checked_add(body).ok_or(OUTSIDE)?;
    if metadata < HEADER || offset < HEADER || offset.checked_add(length).is_none_or(|stop| stop > end) {
        return Err(OUTSIDE.into());
    }
    let data = file.slice_with_length(offset, length);
    if data[..4] != [0xff; 4] {
        return Err("it does not begin with a message".into());
    }
    let message = root_as_message(&data[HEADER..metadata]).map_err(|error| error.to_string())?;
    let batch = message.header_as_record_batch().ok_or("it is no record batch")?;
    check_record_batch(&batch, fields, body)?;
    if batch.nodes().is_some_and(|nodes| nodes.iter().any(|node| node.null_count() != 0)) {
        return Err("it has missing values".into());
    }
    Ok(data)
}
