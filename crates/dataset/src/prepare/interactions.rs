//! The interactions files: ids to numbers, labels to yes or no, and every interaction to its partition on disk.
//!
//! One thread decodes the next chunks while users and items of this one get their numbers side by side.

use std::path::Path;

use learn_domain::config::InteractionsConfig;

use super::error::{BadRows, Defect, DefectKind, PrepareError, Row, shown};
use super::input::{self, Cells, Chunk, Role};
use super::interner::{Interner, NONE};
use super::items::Catalogue;
use super::label::LabelRule;
use super::span::Spans;
use super::spill::{SpillWriter, Spilled, unsorted};
use super::time::{Clock, SCALE, Stamp};
use crate::progress::{Progress, Unit};

/// What was read.
#[derive(Debug)]
pub(crate) struct Gathered {
    pub(crate) users: Interner,
    /// The usable interactions.
    pub(crate) spilled: Vec<Spilled>,
    pub(crate) time_scale: i64,
    /// The times of each file.
    pub(crate) spans: Spans,
    /// Rows of the files, usable or not.
    pub(crate) rows: u64,
}

/// Reads all interactions files in order into partitions under `spill`.
pub(crate) fn read(
    config: &InteractionsConfig,
    catalogue: &mut Catalogue,
    spill: &Path,
    bad: &mut BadRows,
    progress: &dyn Progress,
) -> Result<Gathered, PrepareError> {
    progress.stage("read interactions", Some(super::check::total_bytes(&config.files)?), Unit::Bytes);
    let mut sink = Sink {
        users: Interner::new("users"),
        catalogue,
        writer: SpillWriter::create(spill)?,
        fractions: false,
        clock: None,
        agrees: false,
        spans: Spans::default(),
        rows: 0,
        labels: LabelRule { at_least: config.label_at_least },
    };
    for path in &config.files {
        sink.agrees = false;
        sink.spans.begin(path);
        input::stream(path, Role::Interactions(config), |chunk| {
            super::refuse_stop(progress)?;
            let bytes = chunk.bytes;
            let defects = sink.take(chunk, path)?;
            bad.take(path, defects)?;
            progress.advance(bytes);
            Ok(())
        })?;
    }
    let time_scale = if sink.fractions { SCALE } else { 1 };
    let Sink { users, writer, rows, spans, .. } = sink;
    Ok(Gathered { users, spilled: writer.finish()?, time_scale, rows, spans })
}

struct Sink<'a> {
    users: Interner,
    catalogue: &'a mut Catalogue,
    writer: SpillWriter,
    /// Some time has a fraction.
    fractions: bool,
    /// What the first usable row counts time in, and where it is.
    clock: Option<(Clock, String)>,
    /// A row of the file that is read counts time in this too.
    agrees: bool,
    spans: Spans,
    /// Rows so far, usable or not.
    rows: u64,
    labels: LabelRule,
}

impl Sink<'_> {
    /// Spills the usable rows of a chunk and returns the others.
    fn take(&mut self, chunk: Chunk, path: &Path) -> Result<Vec<Defect>, PrepareError> {
        let Chunk { columns, len, rows, mut defects, .. } = chunk;
        self.rows += (len + defects.len()) as u64;
        let column = |index: usize| columns.get(index).and_then(Option::as_ref);
        let (Some(users), Some(items), Some(times)) = (column(0), column(1), column(2)) else { return Ok(defects) };
        let labels = column(3);
        // Columns of ids are read as text, whatever they are in the file.
        let (Cells::Text(user_ids), Cells::Text(item_ids)) = (users, items) else { return Ok(defects) };
        let Self { users: user_table, catalogue, labels: rule, .. } = self;
        let add = !catalogue.closed;
        let (user_numbers, (item_numbers, stamps, conversions)) = rayon::join(
            || {
                let mut numbers = Vec::with_capacity(len);
                user_table.numbers(user_ids, true, |number, top| numbers.push((number, top))).map(|()| numbers)
            },
            || {
                let mut numbers = Vec::with_capacity(len);
                let numbered = catalogue.ids.numbers(item_ids, add, |number, _| numbers.push(number));
                // without a column of labels nothing is a conversion
                let conversions = labels.map_or_else(|| vec![Some(false); len], |labels| rule.all(labels));
                (numbered.map(|()| numbers), stamps(times), conversions)
            },
        );
        let (user_numbers, item_numbers) = (user_numbers?, item_numbers?);
        for position in 0..len {
            let ((user, top), item, time) = (user_numbers[position], item_numbers[position], stamps[position]);
            match (time, conversions[position]) {
                (Some(Stamp { time, clock }), Some(converted)) if user != NONE && item != NONE => {
                    if let Some(other) = self.keep_to(clock, || place(path, rows.at(position)))? {
                        let time = times.text(position).unwrap_or_default();
                        let problem = format!("its time is {}, and {other}", shown(&time));
                        defects.push(Defect { row: rows.at(position), kind: DefectKind::BadTime, problem });
                        continue;
                    }
                    self.fractions |= time.scaled;
                    self.spans.add(time);
                    self.writer.push_to(top.into(), unsorted((user, item), time, converted))?;
                }
                _ => {
                    let label = labels.filter(|_| conversions[position].is_none()).map(|cells| cells.text(position));
                    let (user, item) = (users.text(position), items.text(position));
                    let bad_time = time.is_none().then(|| times.text(position));
                    let (kind, problem) = describe((user, item), bad_time, label);
                    defects.push(Defect { row: rows.at(position), kind, problem });
                }
            }
        }
        Ok(defects)
    }

    /// Numbers and dates have no common unit: the whole input has those of its first row. A row that has the others is a bad
    /// one, and what the first has is said, if its file has rows that agree; a file without any ends the preparation.
    fn keep_to(&mut self, clock: Clock, place: impl Fn() -> String) -> Result<Option<String>, PrepareError> {
        let (first, at) = self.clock.get_or_insert_with(|| (clock, place()));
        if *first == clock {
            self.agrees = true;
            return Ok(None);
        }
        if self.agrees {
            return Ok(Some(match first {
                Clock::Numbers => format!("{at} has a plain number"),
                Clock::Calendar => format!("{at} has a date or a timestamp"),
            }));
        }
        let (dates, numbers) = match clock {
            Clock::Numbers => (at.clone(), place()),
            Clock::Calendar => (place(), at.clone()),
        };
        Err(PrepareError::TwoClocks { dates, numbers })
    }
}

fn place(path: &Path, row: Row) -> String {
    format!("{}, {row}", path.display())
}

/// Why an interaction cannot be used, given its ids, and the cells of time and label if they are bad ones; the item is
/// unknown where nothing else is wrong.
fn describe(
    (user, item): (Option<String>, Option<String>),
    bad_time: Option<Option<String>>,
    bad_label: Option<Option<String>>,
) -> (DefectKind, String) {
    match (user, item, bad_time, bad_label) {
        (None, ..) => (DefectKind::MissingId, "it has no user id".into()),
        (_, None, ..) => (DefectKind::MissingId, "it has no item id".into()),
        (_, _, Some(None), _) => (DefectKind::BadTime, "it has no time".into()),
        (_, _, Some(Some(time)), _) => (DefectKind::BadTime, format!("its time is {}", shown(&time))),
        (.., Some(None)) => (DefectKind::BadLabel, "it has no label".into()),
        (.., Some(Some(label))) => (DefectKind::BadLabel, format!("its label is {}", shown(&label))),
        (_, Some(item), ..) => (DefectKind::UnknownItem, format!("no items file has the item \"{}\"", shown(&item))),
    }
}

fn stamps(times: &Cells) -> Vec<Option<Stamp>> {
    match times {
        Cells::Int(cells) => cells.iter().map(|cell| cell.map(Stamp::whole)).collect(),
        Cells::Real(cells) => cells.iter().map(|cell| cell.and_then(Stamp::real)).collect(),
        Cells::Since1970(cells, tick) => {
            cells.iter().map(|cell| cell.and_then(|count| Stamp::since_1970(count, *tick))).collect()
        }
        Cells::Text(cells) => cells.iter().map(|cell| cell.and_then(Stamp::parse)).collect(),
    }
}
