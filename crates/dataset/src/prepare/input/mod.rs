//! Reading the files people have, whatever their format, as chunks of a few columns.
//!
//! Input: a file, and the columns wanted of it. Output: [`Chunk`]s in the file's order, each small, so that memory does
//! not grow with the file. A row that is not of the format is listed in the chunk, not returned as an error: whether
//! it stops the work is for the caller to say. A file that breaks off, or cannot be decoded, is an error.

mod delimited;
mod json;
mod layout;
mod parquet;
mod source;

use std::path::Path;
use std::sync::mpsc::sync_channel;

pub use self::parquet::id_texts;
use arrow_array::{Array, Float64Array, Int64Array, StringArray};
pub(crate) use layout::Role;
use learn_domain::config::FileFormat;

use super::error::{Defect, PrepareError, Row};
use super::time::{Stamp, Tick};

/// What the values of a column are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Id,
    Time,
    Label,
    Text,
}

/// A column that is wanted of a file.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    pub(crate) kind: Kind,
    /// The key of the configuration that names the column.
    pub(crate) key: &'static str,
    /// Names it may have; the first that is there counts.
    pub(crate) names: Vec<String>,
    pub(crate) required: bool,
}

/// The values of a column; empty cells are null.
#[derive(Clone, Debug)]
pub(crate) enum Cells {
    Int(Int64Array),
    Real(Float64Array),
    /// Dates and timestamps.
    Since1970(Int64Array, Tick),
    Text(StringArray),
}

impl Cells {
    /// A cell as a person would write it; `None` if it is empty.
    pub(crate) fn text(&self, row: usize) -> Option<String> {
        match self {
            Self::Int(cells) => cells.is_valid(row).then(|| cells.value(row).to_string()),
            Self::Real(cells) => cells.is_valid(row).then(|| cells.value(row).to_string()),
            Self::Since1970(cells, tick) => {
                cells.is_valid(row).then(|| format!("{} {tick} since 1970", cells.value(row)))
            }
            Self::Text(cells) => cells.is_valid(row).then(|| cells.value(row).to_owned()),
        }
    }
}

/// Consecutive rows of a file.
#[derive(Debug)]
pub(crate) struct Chunk {
    /// One per [`Want`]; `None` where the file lacks an optional column.
    pub(crate) columns: Vec<Option<Cells>>,
    pub(crate) len: usize,
    pub(crate) rows: Rows,
    /// Rows that are not of the format, and so not in the columns.
    pub(crate) defects: Vec<Defect>,
    /// Bytes of the file that were read for this chunk, about.
    pub(crate) bytes: u64,
}

/// Where the rows of a chunk are in their file.
#[derive(Debug)]
pub(crate) enum Rows {
    /// Consecutive rows from this one on.
    From(u64),
    Lines(Vec<u64>),
}

impl Rows {
    pub(crate) fn at(&self, position: usize) -> Row {
        match self {
            Self::From(first) => Row::Row(first + position as u64),
            Self::Lines(lines) => Row::Line(lines[position]),
        }
    }
}

/// A file that is read chunk by chunk.
pub(crate) trait Table: Send {
    /// The next rows; `None` at the end of the file.
    fn next_chunk(&mut self) -> Result<Option<Chunk>, PrepareError>;
}

/// Rows of a chunk of a text file.
const TEXT_ROWS: usize = 8192;
/// Chunks that wait between the thread that decodes and the one that uses them.
const CHUNKS_AHEAD: usize = 4;

/// Decodes a file on a thread of its own and hands its chunks to `each`, in order.
///
/// # Errors
/// The first error of `each`, or that of the file.
pub(crate) fn stream(
    path: &Path,
    role: Role,
    each: impl FnMut(Chunk) -> Result<(), PrepareError>,
) -> Result<(), PrepareError> {
    std::thread::scope(|scope| {
        let (send, chunks) = sync_channel(CHUNKS_AHEAD);
        let decoder = scope.spawn(move || {
            let mut table = open(path, role)?;
            while let Some(chunk) = table.next_chunk()? {
                // The other side has failed, and its error is the one to report.
                if send.send(chunk).is_err() {
                    break;
                }
            }
            Ok(())
        });
        let used = chunks.into_iter().try_for_each(each);
        // The Parquet decoder panics on some damaged files; that is the file's error, not the program's.
        let broken = |_| Err(PrepareError::unreadable(path, "it cannot be decoded; get the file again"));
        used.and(decoder.join().unwrap_or_else(broken))
    })
}

fn open(path: &Path, role: Role) -> Result<Box<dyn Table>, PrepareError> {
    let format = layout::resolve(path, role)?;
    let wants = role.columns(format);
    Ok(match format {
        FileFormat::Parquet => Box::new(parquet::ParquetTable::open(path, &wants)?),
        FileFormat::Csv | FileFormat::Recbole => Box::new(delimited::DelimitedTable::open(path, format, wants)?),
        FileFormat::JsonLines | FileFormat::Amazon2018 | FileFormat::Amazon2023 | FileFormat::Auto => {
            Box::new(json::JsonTable::open(path, wants)?)
        }
    })
}

/// Reads a file of either role to its end, on this thread.
pub(crate) fn drain(path: &Path, config: &learn_domain::config::PrepareConfig) {
    for role in [Role::Interactions(&config.interactions), Role::Items(&config.items)] {
        let Ok(mut table) = open(path, role) else { continue };
        while let Ok(Some(chunk)) = table.next_chunk() {
            for position in 0..chunk.len {
                chunk.rows.at(position);
                for cells in chunk.columns.iter().flatten() {
                    cells.text(position).as_deref().and_then(Stamp::parse);
                }
            }
        }
    }
}

/// The column of each want among those of a file.
fn resolve_columns(path: &Path, wants: &[Want], columns: &[String]) -> Result<Vec<Option<usize>>, PrepareError> {
    let find = |want: &Want| {
        let found = want.names.iter().find_map(|name| columns.iter().position(|column| column == name));
        if found.is_none() && want.required {
            return Err(missing_column(path, want, columns.to_vec()));
        }
        Ok(found)
    };
    wants.iter().map(find).collect()
}

fn missing_column(path: &Path, want: &Want, columns: Vec<String>) -> PrepareError {
    PrepareError::MissingColumn { path: path.to_path_buf(), wanted: want.names.join(" or "), key: want.key, columns }
}
