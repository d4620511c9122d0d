//! What stops `prepare`, and what it skips and counts instead when it may.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::DatasetError;

/// Why there is no dataset.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{key}: {problem}")]
    Setting { key: &'static str, problem: String },
    #[error("{}: {problem}", .path.display())]
    Unreadable { path: PathBuf, problem: String },
    /// A file or folder that the configuration names.
    #[error("{}: {problem}", .path.display())]
    Input { path: PathBuf, problem: String },
    #[error("{} has no column {wanted}; it has: {}. Name the right one with {key}", .path.display(), Names(.columns))]
    MissingColumn { path: PathBuf, wanted: String, key: &'static str, columns: Vec<String> },
    #[error("{}: column {column} is {found}; {remedy}", .path.display())]
    ColumnType { path: PathBuf, column: String, found: String, remedy: &'static str },
    #[error(
        "{}, {row}: {problem}; {}, or pass --skip-bad-rows to leave such rows out and count them",
        .path.display(), .kind.remedy()
    )]
    BadRow { path: PathBuf, row: Row, kind: DefectKind, problem: String },
    #[error("nothing to train on: {problem}. {rows} rows of interactions were read{}. {}", LeftOut(.skipped), Steps(.steps))]
    Empty {
        problem: String,
        /// Rows of the interactions files.
        rows: u64,
        skipped: Vec<Skipped>,
        steps: Vec<FilterStep>,
    },
    #[error(
        "time {time} of user {user} is too large to be kept with the fractions that other times have; use one unit"
    )]
    TimeRange { user: String, time: i64 },
    #[error(
        "{dates} has a date or a timestamp as its time, {numbers} a plain number; the times of one dataset are all of \
         the one kind or all of the other: convert those of one file"
    )]
    TwoClocks { dates: String, numbers: String },
    #[error("there are more than {limit} {what}, which this version of the dataset cannot number")]
    TooMany { what: &'static str, limit: u64 },
    #[error(
        "{} exists and is not a dataset; name another directory with data.dataset, or remove it", .path.display()
    )]
    NotOurs { path: PathBuf },
    #[error(
        "{} holds another dataset ({difference}); pass --replace to put the new one in its place, whose content embeddings \
         go with it, or name another directory with data.dataset", .path.display()
    )]
    Taken { path: PathBuf, difference: String },
    #[error("writing {}: {problem}", .path.display())]
    Write { path: PathBuf, problem: String },
    #[error("{error}. Killed runs left {}, which can be removed", Paths(.leftovers))]
    WriteBeside { error: Box<PrepareError>, leftovers: Vec<PathBuf> },
    /// Who keeps the dataset from being replaced.
    #[error("{0}")]
    InUse(String),
    /// The dataset that was to be replaced is neither in its place nor lost.
    #[error("{source}; {lost}")]
    NotReplaced { lost: DatasetError, source: io::Error },
    #[error("prepare was stopped; what it had written is removed, and the next one begins anew")]
    Stopped,
    #[error(transparent)]
    Dataset(#[from] DatasetError),
}

impl PrepareError {
    /// Another configuration would do.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Setting { .. } | Self::Input { .. } | Self::MissingColumn { .. })
    }

    /// Names what could be removed where writing has failed.
    pub(crate) fn beside(self, leftovers: &[PathBuf]) -> Self {
        let full = |source: &io::Error| matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
        let writing = match &self {
            Self::Io { source, .. } => full(source),
            Self::Write { .. } => true,
            _ => false,
        };
        match writing && !leftovers.is_empty() {
            true => Self::WriteBeside { error: Box::new(self), leftovers: leftovers.to_vec() },
            false => self,
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn unreadable(path: &Path, problem: impl ToString) -> Self {
        Self::Unreadable { path: path.to_path_buf(), problem: problem.to_string() }
    }

    pub(crate) fn input(path: &Path, problem: String) -> Self {
        Self::Input { path: path.to_path_buf(), problem }
    }

    pub(crate) fn write<E: ToString>(path: &Path) -> impl FnOnce(E) -> Self + '_ {
        move |problem| Self::Write { path: path.to_path_buf(), problem: problem.to_string() }
    }
}

/// Most characters of a cell that a message shows.
const SHOWN: usize = 80;

/// A cell, or what says one, as a message shows it: of a long one the middle is left out.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    const START: usize = 48;
    let mut places = text.char_indices().map(|(place, _)| place);
    let Some(start) = places.nth(START) else { return text.into() };
    let end = text.char_indices().rev().nth(SHOWN - START - 1).map_or(0, |(place, _)| place);
    if end <= start { text.into() } else { format!("{}…{}", &text[..start], &text[end..]).into() }
}

/// Names of columns, quoted.
struct Names<'a>(&'a [String]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(|name| format!("{:?}", shown(name))).collect();
        f.write_str(&names.join(", "))
    }
}

struct Paths<'a>(&'a [PathBuf]);

impl fmt::Display for Paths<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<String> = self.0.iter().map(|path| path.display().to_string()).collect();
        f.write_str(&paths.join(", "))
    }
}

/// Where in a file: the line of a text file, the row of a table; both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Row {
    Line(u64),
    Row(u64),
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Row(row) => write!(f, "row {row}"),
        }
    }
}

/// A kind of row that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DefectKind {
    /// Not a row of the file's format.
    Unparsable,
    /// No user or no item.
    MissingId,
    /// No time, or one that is neither a finite number nor a date.
    BadTime,
    /// No label, or one that says neither yes nor no.
    BadLabel,
    /// An interaction with an item that no items file has.
    UnknownItem,
    /// A second item with the same id.
    DuplicateItem,
}

impl DefectKind {
    fn remedy(self) -> &'static str {
        match self {
            Self::Unparsable => "correct the row, or set the right format",
            Self::MissingId => "fill it in",
            Self::BadTime => {
                "a time is a finite number, or a date or time of ISO 8601 such as 2020-11-10 or 2020-11-10T06:53:17Z"
            }
            Self::BadLabel => {
                "a label is true, false, 1 or 0, or any finite number with prepare.interactions.label_at_least"
            }
            Self::UnknownItem => "add the item to an items file",
            Self::DuplicateItem => "keep one of them",
        }
    }
}

/// Rows of one kind that were left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    pub kind: DefectKind,
    pub count: u64,
    /// The first of them: file, row and what was wrong.
    pub first: String,
}

/// How much was left after a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterStep {
    pub name: String,
    pub interactions: u64,
    pub users: u64,
    pub items: u64,
}

/// Continues "… rows of interactions were read".
struct LeftOut<'a>(&'a [Skipped]);

impl fmt::Display for LeftOut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|Skipped { count, first, .. }| write!(f, "; {count} rows were left out, the first {first}"))
    }
}

struct Steps<'a>(&'a [FilterStep]);

impl fmt::Display for Steps<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Left after each step:")?;
        for (number, step) in self.0.iter().enumerate() {
            let comma = if number > 0 { ";" } else { "" };
            let FilterStep { name, interactions, users, items } = step;
            write!(f, "{comma} {name}: {interactions} interactions of {users} users with {items} items")?;
        }
        Ok(())
    }
}

/// A row that cannot be used.
#[derive(Debug)]
pub(crate) struct Defect {
    pub(crate) row: Row,
    pub(crate) kind: DefectKind,
    pub(crate) problem: String,
}

/// Stops at bad rows, or counts them.
#[derive(Debug)]
pub(crate) struct BadRows {
    skip: bool,
    kinds: BTreeMap<DefectKind, (u64, String)>,
}

impl BadRows {
    pub(crate) fn new(skip: bool) -> Self {
        Self { skip, kinds: BTreeMap::new() }
    }

    /// Takes the defects of one chunk of a file, in any order.
    pub(crate) fn take(&mut self, path: &Path, mut defects: Vec<Defect>) -> Result<(), PrepareError> {
        defects.sort_by_key(|defect| defect.row);
        for Defect { row, kind, problem } in defects {
            if !self.skip {
                return Err(PrepareError::BadRow { path: path.to_path_buf(), row, kind, problem });
            }
            let first = || (0, format!("{}, {row}: {problem}", path.display()));
            self.kinds.entry(kind).or_insert_with(first).0 += 1;
        }
        Ok(())
    }

    pub(crate) fn report(self) -> Vec<Skipped> {
        self.kinds.into_iter().map(|(kind, (count, first))| Skipped { kind, count, first }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_cell_is_shown_by_its_ends() {
        for whole in [String::new(), "ä".repeat(SHOWN)] {
            assert_eq!(shown(&whole), whole);
        }
        let long = format!("{}{}z", "ä".repeat(48), "b".repeat(5000));
        let cut = shown(&long);
        assert_eq!(cut.chars().count(), SHOWN + 1, "{cut}");
        assert!(cut.starts_with(&"ä".repeat(48)) && cut.ends_with("bz") && cut.contains('…'), "{cut}");
    }

    #[test]
    fn leftovers_are_named_where_writing_fails() {
        let full = || PrepareError::io(Path::new("out"))(ErrorKind::StorageFull.into());
        let leftovers = [PathBuf::from("out.tmp-7"), "out.tmp-8".into()];
        for error in [full(), PrepareError::write(Path::new("out"))("no space left on device")] {
            let message = error.beside(&leftovers).to_string();
            assert!(message.contains("Killed runs left out.tmp-7, out.tmp-8"), "{message}");
        }
        assert!(matches!(full().beside(&[]), PrepareError::Io { .. }));
        let unreadable = PrepareError::io(Path::new("a.csv"))(ErrorKind::PermissionDenied.into());
        assert!(matches!(unreadable.beside(&leftovers), PrepareError::Io { .. }));
    }
}
