//! CSV, TSV and RecBole atomic files.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arrow_array::builder::StringBuilder;
use csv::{ByteRecord, ErrorKind, Reader, ReaderBuilder};
use learn_domain::config::FileFormat;

use super::source::{Rowwise, Source, broken, progress};
use super::{Cells, Chunk, Kind, Rows, TEXT_ROWS, Table, Want, layout, resolve_columns};
use crate::prepare::error::{Defect, DefectKind, PrepareError, Row};

pub(super) struct DelimitedTable {
    path: PathBuf,
    reader: Reader<Rowwise>,
    consumed: Arc<AtomicU64>,
    reported: u64,
    wants: Vec<Want>,
    /// The column of each want.
    columns: Vec<Option<usize>>,
}

impl DelimitedTable {
    pub(super) fn open(path: &Path, format: FileFormat, wants: Vec<Want>) -> Result<Self, PrepareError> {
        let recbole = format == FileFormat::Recbole;
        let tabs = recbole || layout::extension(path) == "tsv";
        let (source, consumed) = Source::open(path)?.split();
        let delimiter = if tabs { b'\t' } else { b',' };
        let mut reader = ReaderBuilder::new().delimiter(delimiter).quoting(!recbole).from_reader(source);
        let header = reader.headers().map_err(|error| PrepareError::unreadable(path, error))?.clone();
        if header.is_empty() {
            let problem = "it is empty, without even a header line; leave it out of the configuration, or get it again";
            return Err(PrepareError::unreadable(path, problem));
        }
        if reader.get_ref().ended() {
            let (line, problem) = never_closed(&reader, header.as_byte_record());
            return Err(PrepareError::unreadable(path, format!("in the header, line {line}, {problem}")));
        }
        // A RecBole header cell is `name:type`.
        let name = |cell: &str| cell.rsplit_once(':').map_or(cell, |(name, _)| name).to_owned();
        let names: Vec<String> = header.iter().map(|cell| if recbole { name(cell) } else { cell.into() }).collect();
        let columns = resolve_columns(path, &wants, &names).map_err(|missing| {
            let other = if header.len() == 1 { other_delimiter(&header[0], delimiter) } else { None };
            other.map_or(missing, |other| wrong_delimiter(path, (delimiter, other), recbole))
        })?;
        Ok(Self { path: path.to_path_buf(), reader, consumed, reported: 0, wants, columns })
    }
}

impl Table for DelimitedTable {
    fn next_chunk(&mut self) -> Result<Option<Chunk>, PrepareError> {
        let mut builders: Vec<StringBuilder> = self.wants.iter().map(|_| StringBuilder::new()).collect();
        let (mut lines, mut defects) = (Vec::new(), Vec::new());
        let mut record = ByteRecord::new();
        let mut cells: Vec<Option<&str>> = Vec::with_capacity(self.wants.len());
        while lines.len() + defects.len() < TEXT_ROWS {
            let unparsable = |line, problem| Defect { row: Row::Line(line), kind: DefectKind::Unparsable, problem };
            self.reader.get_mut().begin_row();
            let read = self.reader.read_byte_record(&mut record);
            // csv's own count is of the line where the row before ended, which is another one after \r\n and empty lines
            let within = record.as_slice().iter().filter(|&&byte| byte == b'\n').count();
            let line = self.reader.get_ref().line() - within as u64;
            let open = self.reader.get_ref().ended();
            match read {
                Ok(false) => break,
                _ if open && !record.is_empty() => {
                    let (line, problem) = never_closed(&self.reader, &record);
                    defects.push(unparsable(line, problem));
                    continue;
                }
                Ok(true) => {}
                Err(error) => match error.kind() {
                    ErrorKind::UnequalLengths { expected_len, len, .. } => {
                        defects.push(unparsable(line, format!("it has {len} cells, the header has {expected_len}")));
                        continue;
                    }
                    _ => return Err(csv_error(&self.path, error)),
                },
            }
            cells.clear();
            for (want, column) in self.wants.iter().zip(&self.columns) {
                let Some(cell) = column.and_then(|column| record.get(column)) else {
                    cells.push(None);
                    continue;
                };
                let Ok(cell) = std::str::from_utf8(cell) else { break };
                let cell = if want.kind == Kind::Id { cell } else { cell.trim() };
                cells.push(Some(cell).filter(|cell| !cell.is_empty()));
            }
            if cells.len() < self.wants.len() {
                defects.push(unparsable(line, "it is not UTF-8".into()));
            } else {
                builders.iter_mut().zip(&cells).for_each(|(builder, cell)| builder.append_option(*cell));
                lines.push(line);
            }
            cells = cells.into_iter().map(|_| None).collect();
        }
        if lines.is_empty() && defects.is_empty() {
            return Ok(None);
        }
        let built = builders.iter_mut().map(|builder| Cells::Text(builder.finish()));
        let columns = built.zip(&self.columns).map(|(cells, column)| column.map(|_| cells)).collect();
        let bytes = progress(&self.consumed, &mut self.reported);
        Ok(Some(Chunk { columns, len: lines.len(), rows: Rows::Lines(lines), defects, bytes }))
    }
}

/// Where the last row, in whose midst the file has ended, opens a quote, and what is wrong with that.
fn never_closed(reader: &Reader<Rowwise>, record: &ByteRecord) -> (u64, String) {
    let last = record.iter().next_back().unwrap_or_default();
    let within = last.iter().filter(|&&byte| byte == b'\n').count() as u64;
    let problem = format!("a quote is opened that is never closed: it takes all {within} lines to the end of the file");
    (reader.get_ref().line() - within, problem)
}

const DELIMITERS: [(u8, &str); 4] = [(b',', "commas"), (b'\t', "tabs"), (b';', "semicolons"), (b'|', "vertical bars")];

/// What divides a header line that `delimiter` does not divide, if it is one of the usual.
fn other_delimiter(header: &str, delimiter: u8) -> Option<u8> {
    let count = |delimiter: u8| header.bytes().filter(|&byte| byte == delimiter).count();
    let others = DELIMITERS.iter().map(|&(other, _)| other).filter(|&other| other != delimiter && count(other) > 0);
    others.max_by_key(|&other| count(other))
}

fn wrong_delimiter(path: &Path, (read, found): (u8, u8), recbole: bool) -> PrepareError {
    let name = |delimiter| DELIMITERS.iter().find(|known| known.0 == delimiter).map_or("", |known| known.1);
    let remedy = match found {
        b'\t' => "give it a name that ends in .tsv or .tsv.gz",
        b',' if recbole => "set its format to csv",
        b',' => "give it a name that ends in .csv or .csv.gz",
        _ => "write it with commas, as .csv, or with tabs, as .tsv",
    };
    let problem =
        format!("its header line is divided by {}, and it is read with {}; {remedy}", name(found), name(read));
    PrepareError::unreadable(path, problem)
}

fn csv_error(path: &Path, error: csv::Error) -> PrepareError {
    match error.into_kind() {
        ErrorKind::Io(error) => broken(path)(error),
        other => PrepareError::unreadable(path, format!("{other:?}")),
    }
}
