//! Parquet files: only the wanted columns are decoded.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow_array::builder::StringBuilder;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{Array, ArrayRef, Int64Array, StringArray};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::{ArrowError, DataType, TimeUnit};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;

use super::{Cells, Chunk, Kind, Rows, Table, Want, resolve_columns};
use crate::prepare::error::PrepareError;
use crate::prepare::time::Tick;

const CHUNK_ROWS: usize = 1 << 16;

pub(super) struct ParquetTable {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    /// Per want the column's name and what its values are for.
    columns: Vec<Option<(String, Kind)>>,
    /// The row, from 1, that comes next.
    row: u64,
    bytes: u64,
    rows: u64,
}

impl ParquetTable {
    pub(super) fn open(path: &Path, wants: &[Want]) -> Result<Self, PrepareError> {
        let file = File::open(path).map_err(PrepareError::io(path))?;
        let bytes = file.metadata().map_err(PrepareError::io(path))?.len();
        let unreadable = |error| PrepareError::unreadable(path, format!("{error}; get the file again"));
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(unreadable)?;
        let names: Vec<String> = builder.schema().fields().iter().map(|field| field.name().clone()).collect();
        let found = resolve_columns(path, wants, &names)?;
        for (want, column) in wants.iter().zip(&found) {
            if let Some(column) = *column {
                check_type(path, want, builder.schema().field(column))?;
            }
        }
        let mask = ProjectionMask::roots(builder.parquet_schema(), found.iter().flatten().copied());
        if let Some(codec) = unread_codec(builder.metadata(), &mask) {
            let problem =
                format!("its columns are compressed with {codec}, which is not read; write it with zstd or snappy");
            return Err(PrepareError::unreadable(path, problem));
        }
        let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        let reader = builder.with_projection(mask).with_batch_size(CHUNK_ROWS).build().map_err(unreadable)?;
        let columns =
            found.into_iter().zip(wants).map(|(column, want)| column.map(|column| (names[column].clone(), want.kind)));
        Ok(Self { path: path.to_path_buf(), reader, columns: columns.collect(), row: 1, bytes, rows })
    }
}

impl Table for ParquetTable {
    fn next_chunk(&mut self) -> Result<Option<Chunk>, PrepareError> {
        let Some(batch) = self.reader.next() else { return Ok(None) };
        let broken = |error| PrepareError::unreadable(&self.path, format!("{error}; get the file again"));
        let batch = batch.map_err(broken)?;
        let convert = |column: &Option<(String, Kind)>| {
            let found = column.as_ref().and_then(|(name, kind)| Some((batch.column_by_name(name)?, *kind)));
            found.map(|(values, kind)| cells(values, kind)).transpose()
        };
        let columns = self.columns.iter().map(convert).collect::<Result<_, _>>().map_err(broken)?;
        let rows = Rows::From(self.row);
        self.row += batch.num_rows() as u64;
        let share = batch.num_rows() as f64 / self.rows.max(1) as f64;
        let bytes = (share * self.bytes as f64) as u64;
        Ok(Some(Chunk { columns, len: batch.num_rows(), rows, defects: Vec::new(), bytes }))
    }
}

/// A compression of the wanted columns that this program is built without.
fn unread_codec(metadata: &ParquetMetaData, wanted: &ProjectionMask) -> Option<&'static str> {
    let columns = metadata.row_groups().iter().flat_map(|group| group.columns().iter().enumerate());
    columns.filter(|(leaf, _)| wanted.leaf_included(*leaf)).find_map(|(_, column)| match column.compression() {
        Compression::BROTLI(_) => Some("brotli"),
        Compression::LZO => Some("lzo"),
        _ => None,
    })
}

fn check_type(path: &Path, want: &Want, field: &arrow_schema::Field) -> Result<(), PrepareError> {
    let values = match field.data_type() {
        DataType::Dictionary(_, values) => values,
        other => other,
    };
    let text = is_text(values);
    let (fits, remedy) = match want.kind {
        Kind::Id => (text || values.is_integer(), ID_IS),
        Kind::Time => {
            let number = values.is_integer() || values.is_floating();
            (text || number || tick(values).is_some(), "a time is a number, a date or a timestamp")
        }
        Kind::Label => {
            let truth = *values == DataType::Boolean;
            (text || truth || values.is_integer() || values.is_floating(), "a label is a truth value or a number")
        }
        Kind::Text => (true, ""),
    };
    if fits {
        return Ok(());
    }
    Err(PrepareError::ColumnType {
        path: path.to_path_buf(),
        column: field.name().clone(),
        found: field.data_type().to_string(),
        remedy,
    })
}

fn is_text(values: &DataType) -> bool {
    matches!(values, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
}

const ID_IS: &str = "an id is an integer or text";

/// A column of ids as `prepare` reads it: text, integers, or a dictionary of those; an empty text is no id.
///
/// # Errors
/// The column is of another type.
pub fn id_texts(ids: &ArrayRef) -> Result<StringArray, String> {
    let found = ids.data_type();
    let values = if let DataType::Dictionary(_, values) = found { values } else { found };
    let fits = is_text(values) || values.is_integer();
    match fits.then(|| cells(ids, Kind::Id)) {
        Some(Ok(Cells::Text(texts))) => Ok(texts),
        Some(Err(error)) => Err(format!("cannot be read: {error}")),
        Some(Ok(_)) | None => Err(format!("has type {found}; {ID_IS}")),
    }
}

/// What a column of dates or timestamps counts; a timestamp's zone says how it is shown, not what it counts.
fn tick(values: &DataType) -> Option<Tick> {
    match values {
        DataType::Date32 => Some(Tick::Days),
        DataType::Date64 => Some(Tick::Milliseconds),
        DataType::Timestamp(unit, _) => Some(match unit {
            TimeUnit::Second => Tick::Seconds,
            TimeUnit::Millisecond => Tick::Milliseconds,
            TimeUnit::Microsecond => Tick::Microseconds,
            TimeUnit::Nanosecond => Tick::Nanoseconds,
        }),
        _ => None,
    }
}

fn cells(values: &ArrayRef, kind: Kind) -> Result<Cells, ArrowError> {
    let options = CastOptions { safe: false, format_options: FormatOptions::default() };
    let plain = match values.data_type() {
        DataType::Dictionary(_, inner) => cast_with_options(values, inner, &options)?,
        _ => values.clone(),
    };
    let to = |data_type| cast_with_options(&plain, &data_type, &options);
    if let (Kind::Time, Some(tick)) = (kind, tick(plain.data_type())) {
        return Ok(Cells::Since1970(to(DataType::Int64)?.as_primitive::<Int64Type>().clone(), tick));
    }
    let cells = match (kind, plain.data_type()) {
        (Kind::Id | Kind::Time | Kind::Label, DataType::UInt64) => Cells::Text(to(DataType::Utf8)?.as_string().clone()),
        (Kind::Id, kind) if kind.is_integer() => Cells::Text(decimals(to(DataType::Int64)?.as_primitive())),
        (Kind::Time | Kind::Label, kind) if kind.is_floating() => {
            Cells::Real(to(DataType::Float64)?.as_primitive::<Float64Type>().clone())
        }
        (_, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) => {
            Cells::Text(trimmed(to(DataType::Utf8)?.as_string(), kind))
        }
        (Kind::Id | Kind::Time | Kind::Label, _) => {
            Cells::Int(to(DataType::Int64)?.as_primitive::<Int64Type>().clone())
        }
        (Kind::Text, _) => Cells::Text(texts(&plain)?),
    };
    Ok(cells)
}

/// Integer ids as texts.
fn decimals(ids: &Int64Array) -> StringArray {
    let mut texts = StringBuilder::with_capacity(ids.len(), ids.len() * 8);
    let mut digits = [0; DIGITS];
    for row in 0..ids.len() {
        texts.append_option(ids.is_valid(row).then(|| decimal(ids.value(row), &mut digits)));
    }
    texts.finish()
}

/// Room for the longest `i64`.
const DIGITS: usize = 20;

/// Writes a number without the formatting machinery, which would cost more than the rest of a row.
fn decimal(value: i64, digits: &mut [u8; DIGITS]) -> &str {
    let mut rest = value.unsigned_abs();
    let mut start = DIGITS;
    loop {
        start -= 1;
        digits[start] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if value < 0 {
        start -= 1;
        digits[start] = b'-';
    }
    // Digits and a sign are ASCII, so this cannot fail.
    std::str::from_utf8(&digits[start..]).unwrap_or_default()
}

/// Empty text is an empty cell; spaces around a text are not part of it, those around an id are.
fn trimmed(values: &StringArray, kind: Kind) -> StringArray {
    let keep =
        |text: &str| if kind == Kind::Id { text.is_empty() } else { text.is_empty() || text.trim().len() < text.len() };
    if !values.iter().flatten().any(keep) {
        return values.clone();
    }
    let trim = |text| if kind == Kind::Id { text } else { str::trim(text) };
    values.iter().map(|text| text.map(trim).filter(|text| !text.is_empty())).collect()
}

/// Values of any type as texts: lists as `a, b`.
fn texts(values: &ArrayRef) -> Result<StringArray, ArrowError> {
    let options = FormatOptions::default();
    let lists: Option<Vec<Option<ArrayRef>>> = match values.data_type() {
        DataType::List(_) => Some(values.as_list::<i32>().iter().collect()),
        DataType::LargeList(_) => Some(values.as_list::<i64>().iter().collect()),
        _ => None,
    };
    if let Some(lists) = lists {
        let join = |list: ArrayRef| -> Result<Option<String>, ArrowError> {
            let parts = match list.data_type() {
                DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
                    let text = cast_with_options(&list, &DataType::Utf8, &CastOptions::default())?;
                    trimmed(text.as_string(), Kind::Text)
                }
                _ => texts(&list)?,
            };
            Ok(Some(parts.iter().flatten().collect::<Vec<_>>().join(", ")).filter(|text| !text.is_empty()))
        };
        return lists.into_iter().map(|list| list.map_or(Ok(None), join)).collect();
    }
    let formatter = ArrayFormatter::try_new(values, &options)?;
    (0..values.len())
        .map(|row| values.is_valid(row).then(|| formatter.value(row).try_to_string()).transpose())
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decimals_are_what_format_writes(value: i64) {
            let mut digits = [0; DIGITS];
            prop_assert_eq!(decimal(value, &mut digits), value.to_string());
        }
    }

    #[test]
    fn the_longest_decimals_fit() {
        for value in [i64::MIN, i64::MAX, 0, -1] {
            assert_eq!(decimal(value, &mut [0; DIGITS]), value.to_string());
        }
    }
}
