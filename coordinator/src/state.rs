//! What a coordinator must not forget, in an embedded database in the run directory (`coordinator.redb`).
//!
//! Input: the changes of one turn of the job's owner. Output: after a kill, everything that was acted on. Invariants: a
//! turn is one transaction, whole or not there; it is written before anything of it is answered; a file of another
//! program, version or job is refused.
//!
//! Durability: a transaction is in the system's page cache when [`StateFile::write`] comes back, so it survives the death
//! of this process however it dies. It is not synced: with the machine the workers' connections go too, and a run is
//! then resumed from its last checkpoint, whose ledger [`crate::journal`] syncs.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, StorageBackend, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of the tables and what is in them.
const FORMAT: u32 = 2;

/// Values that are replaced as a whole, JSON by name.
const VALUES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("values");
/// Values of many that are replaced one by one, JSON by number.
const ROWS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("rows");
/// What was entered into the books since their value was written, JSON in order.
const ENTRIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("entries");
/// Lines for the run's files, JSON in order, until they are surely in them.
const LINES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("lines");
/// The rendezvous store of the generation.
const KEYS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("keys");

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error(
        "{0} is not there: no coordinator of this run was killed; start the job with `learn-launch train` or `resume`"
    )]
    Nothing(PathBuf),
    #[error(
        "{path} is damaged, or not the state of a coordinator ({source}); `learn-launch resume` continues the run from its \
         last checkpoint"
    )]
    Damaged { path: PathBuf, source: Box<redb::Error> },
    #[error(
        "{path}: {what} cannot be read ({source}); `learn-launch resume` continues the run from its last checkpoint"
    )]
    Content { path: PathBuf, what: String, source: serde_json::Error },
    #[error(
        "{path} has format {found} and this build reads format {FORMAT}; take the job over with the build that wrote it"
    )]
    Format { path: PathBuf, found: u32 },
    #[error("cannot write {path}: {source}; is the disk full, or the directory not writable?")]
    Write { path: PathBuf, source: Box<redb::Error> },
    #[error("cannot {action} {path}: {source}; is the directory writable?")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{what} is no JSON: {source}")]
    Encode { what: String, source: serde_json::Error },
}

/// A file that is never synced: see the module.
#[derive(Debug)]
struct PageCache(FileBackend);

impl StorageBackend for PageCache {
    fn len(&self) -> Result<u64, io::Error> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.0.write(offset, data)
    }
}

/// The database of one run.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    database: Database,
    next_entry: u64,
    next_line: u64,
}

/// The changes of one turn.
#[derive(Debug, Default)]
pub struct Turn {
    values: Vec<(&'static str, Vec<u8>)>,
    rows: Vec<(u64, Vec<u8>)>,
    forgotten_rows: Vec<u64>,
    entries: Vec<Vec<u8>>,
    /// The entries of earlier turns are in a value of this one.
    forget_entries: bool,
    lines: Vec<Vec<u8>>,
    /// Lines below this number are in the files.
    written_lines: u64,
    keys: Vec<(String, Vec<u8>)>,
    clear_keys: bool,
}

impl Turn {
    /// Replaces a value.
    ///
    /// # Errors
    /// If it is not JSON.
    pub fn value<T: Serialize>(&mut self, name: &'static str, value: &T) -> Result<(), StateError> {
        self.values.push((name, json(name, value)?));
        Ok(())
    }

    /// Replaces a row.
    ///
    /// # Errors
    /// If it is not JSON.
    pub fn row<T: Serialize>(&mut self, number: u64, row: &T) -> Result<(), StateError> {
        self.rows.push((number, json("a row", row)?));
        Ok(())
    }

    /// Forgets a row, also one of this turn; one that is not there already is.
    pub fn forget_row(&mut self, number: u64) {
        self.forgotten_rows.push(number);
    }

    /// Appends to the entries.
    ///
    /// # Errors
    /// If it is not JSON.
    pub fn entry<T: Serialize>(&mut self, entry: &T) -> Result<(), StateError> {
        self.entries.push(json("an entry", entry)?);
        Ok(())
    }

    /// A value holds all entries so far, those of this turn included.
    pub fn forget_entries(&mut self) {
        self.entries.clear();
        self.forget_entries = true;
    }

    /// Appends to the lines.
    ///
    /// # Errors
    /// If it is not JSON.
    pub fn line<T: Serialize>(&mut self, line: &T) -> Result<(), StateError> {
        self.lines.push(json("a line", line)?);
        Ok(())
    }

    /// Lines below `number` need not be kept any more.
    pub fn lines_are_written(&mut self, number: u64) {
        self.written_lines = self.written_lines.max(number);
    }

    /// Sets a key of the rendezvous store.
    pub fn key(&mut self, key: String, value: Vec<u8>) {
        self.keys.push((key, value));
    }

    /// Forgets all keys, those of this turn included.
    pub fn clear_keys(&mut self) {
        self.keys.clear();
        self.clear_keys = true;
    }

    /// Nothing has changed. Lines that need not be kept any more can wait for something that has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
            && self.rows.is_empty()
            && self.forgotten_rows.is_empty()
            && self.entries.is_empty()
            && !self.forget_entries
            && self.lines.is_empty()
            && self.keys.is_empty()
            && !self.clear_keys
    }
}

fn json<T: Serialize>(what: &str, value: &T) -> Result<Vec<u8>, StateError> {
    serde_json::to_vec(value).map_err(|source| StateError::Encode { what: what.into(), source })
}

impl StateFile {
    /// Begins anew; a state of an earlier coordinator is gone.
    ///
    /// # Errors
    /// If the run directory is not writable.
    pub fn create(path: &Path) -> Result<Self, StateError> {
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StateError::File { action: "remove", path: path.to_owned(), source });
            }
            _ => {}
        }
        let options = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = options.map_err(|source| StateError::File { action: "make", path: path.to_owned(), source })?;
        let mut state = Self::database(path, file)?;
        let mut first = Turn::default();
        first.value("format", &FORMAT)?;
        state.write(first)?;
        Ok(state)
    }

    /// Opens what a coordinator has left.
    ///
    /// # Errors
    /// If there is none, or it is damaged or of another program or version.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StateError::Nothing(path.to_owned()),
            _ => StateError::File { action: "open", path: path.to_owned(), source },
        })?;
        if file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            return Err(StateError::Nothing(path.to_owned()));
        }
        let mut state = Self::database(path, file)?;
        let found: u32 = state.value("format")?.ok_or_else(|| StateError::Nothing(path.to_owned()))?;
        if found != FORMAT {
            return Err(StateError::Format { path: path.to_owned(), found });
        }
        state.next_entry = state.numbered(ENTRIES)?.last().map_or(0, |(number, _)| number + 1);
        state.next_line = state.numbered(LINES)?.last().map_or(0, |(number, _)| number + 1);
        Ok(state)
    }

    fn database(path: &Path, file: File) -> Result<Self, StateError> {
        let open = || Database::builder().create_with_backend(PageCache(FileBackend::new(file)?));
        let database = open().map_err(|error| damaged(path)(error.into()))?;
        Ok(Self { path: path.to_owned(), database, next_entry: 0, next_line: 0 })
    }

    /// Writes a turn as a whole.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, turn: Turn) -> Result<(), StateError> {
        let (entry, line) = (self.next_entry, self.next_line);
        let (entries, lines) = (turn.entries.len() as u64, turn.lines.len() as u64);
        self.try_write(turn)
            .map_err(|source| StateError::Write { path: self.path.clone(), source: Box::new(source) })?;
        self.next_entry = entry + entries;
        self.next_line = line + lines;
        Ok(())
    }

    fn try_write(&self, turn: Turn) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut values = transaction.open_table(VALUES)?;
            for (name, value) in &turn.values {
                values.insert(*name, value.as_slice())?;
            }
            let mut rows = transaction.open_table(ROWS)?;
            for (number, row) in &turn.rows {
                rows.insert(number, row.as_slice())?;
            }
            for number in &turn.forgotten_rows {
                rows.remove(number)?;
            }
            let mut entries = transaction.open_table(ENTRIES)?;
            if turn.forget_entries {
                entries.retain(|_, _| false)?;
            }
            for (number, entry) in (self.next_entry..).zip(&turn.entries) {
                entries.insert(number, entry.as_slice())?;
            }
            let mut lines = transaction.open_table(LINES)?;
            if turn.written_lines > 0 {
                lines.retain_in(..turn.written_lines, |_, _| false)?;
            }
            for (number, line) in (self.next_line..).zip(&turn.lines) {
                lines.insert(number, line.as_slice())?;
            }
            let mut keys = transaction.open_table(KEYS)?;
            if turn.clear_keys {
                keys.retain(|_, _| false)?;
            }
            for (key, value) in &turn.keys {
                keys.insert(key.as_str(), value.as_slice())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// The number that the next line gets.
    #[must_use]
    pub fn next_line(&self) -> u64 {
        self.next_line
    }

    /// A value as it was written last.
    ///
    /// # Errors
    /// If it cannot be read as a `T`.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            let values = self.database.begin_read()?.open_table(VALUES)?;
            Ok(values.get(name)?.map(|value| value.value().to_vec()))
        };
        let bytes = read().map_err(damaged(&self.path))?;
        bytes.map(|bytes| self.parse(name, &bytes)).transpose()
    }

    /// The rows, in the order of their numbers.
    ///
    /// # Errors
    /// If one cannot be read as a `T`.
    pub fn rows<T: DeserializeOwned>(&self) -> Result<Vec<(u64, T)>, StateError> {
        self.parsed(ROWS, "row")
    }

    /// The entries since their value was written, in order.
    ///
    /// # Errors
    /// If one cannot be read as a `T`.
    pub fn entries<T: DeserializeOwned>(&self) -> Result<Vec<T>, StateError> {
        Ok(self.parsed(ENTRIES, "entry")?.into_iter().map(|(_, entry)| entry).collect())
    }

    /// The lines that may not be in the files yet, with their numbers.
    ///
    /// # Errors
    /// If one cannot be read as a `T`.
    pub fn lines<T: DeserializeOwned>(&self) -> Result<Vec<(u64, T)>, StateError> {
        self.parsed(LINES, "line")
    }

    /// The rendezvous store.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn keys(&self) -> Result<Vec<(String, Vec<u8>)>, StateError> {
        let read = || -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
            let keys = self.database.begin_read()?.open_table(KEYS)?;
            let pairs = keys.iter()?.map(|pair| pair.map(|(key, value)| (key.value().into(), value.value().to_vec())));
            Ok(pairs.collect::<Result<_, _>>()?)
        };
        read().map_err(damaged(&self.path))
    }

    fn parsed<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'_, u64, &[u8]>,
        what: &str,
    ) -> Result<Vec<(u64, T)>, StateError> {
        let rows = self.numbered(table)?;
        rows.iter().map(|(number, row)| Ok((*number, self.parse(&format!("{what} {number}"), row)?))).collect()
    }

    fn numbered(&self, table: TableDefinition<'_, u64, &[u8]>) -> Result<Vec<(u64, Vec<u8>)>, StateError> {
        let read = || -> Result<Vec<(u64, Vec<u8>)>, redb::Error> {
            let rows = self.database.begin_read()?.open_table(table)?;
            let rows = rows.iter()?.map(|row| row.map(|(number, value)| (number.value(), value.value().to_vec())));
            Ok(rows.collect::<Result<_, _>>()?)
        };
        read().map_err(damaged(&self.path))
    }

    fn parse<T: DeserializeOwned>(&self, what: &str, bytes: &[u8]) -> Result<T, StateError> {
        serde_json::from_slice(bytes).map_err(|source| StateError::Content {
            path: self.path.clone(),
            what: what.into(),
            source,
        })
    }
}

fn damaged(path: &Path) -> impl FnOnce(redb::Error) -> StateError {
    move |source| StateError::Damaged { path: path.to_owned(), source: Box::new(source) }
}

#[cfg(test)]
mod tests;
