//! JSON Lines, the Amazon layouts included: one object a line, of which only the wanted keys are kept.

use std::fmt;
use std::path::{Path, PathBuf};

use arrow_array::builder::StringBuilder;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::source::Source;
use super::{Cells, Chunk, Kind, Rows, TEXT_ROWS, Table, Want, layout, missing_column};
use crate::prepare::error::{Defect, DefectKind, PrepareError, Row, shown};

pub(super) struct JsonTable {
    path: PathBuf,
    source: Source,
    wants: Vec<Want>,
    line: u64,
    /// Wants that some line had.
    seen: Vec<bool>,
    /// Keys of the first line, to name them where a wanted one is missing.
    keys: Vec<String>,
}

impl JsonTable {
    pub(super) fn open(path: &Path, wants: Vec<Want>) -> Result<Self, PrepareError> {
        let keys: Vec<String> =
            layout::first_object(path)?.unwrap_or_default().into_iter().map(|(key, _)| key).collect();
        let lacks = |want: &&Want| want.kind != Kind::Text && !want.names.iter().any(|name| keys.contains(name));
        // A first line that is no object is reported as that line.
        if let Some(want) = wants.iter().find(lacks).filter(|_| !keys.is_empty()) {
            return Err(missing_column(path, want, keys));
        }
        let seen = vec![false; wants.len()];
        Ok(Self { path: path.to_path_buf(), source: Source::open(path)?, wants, line: 0, seen, keys })
    }

    /// The wanted cells of a line, or what is wrong with it.
    fn cells(&mut self, line: &[u8]) -> Result<Vec<Option<String>>, String> {
        let mut deserializer = serde_json::Deserializer::from_slice(line);
        let values = Wanted(&self.wants).deserialize(&mut deserializer).map_err(|error| problem(&error))?;
        deserializer.end().map_err(|error| problem(&error))?;
        for (seen, value) in self.seen.iter_mut().zip(&values) {
            *seen |= value.is_some();
        }
        values
            .into_iter()
            .zip(&self.wants)
            .map(|(value, want)| value.map_or(Ok(None), |value| cell(value, want)))
            .collect()
    }
}

impl Table for JsonTable {
    fn next_chunk(&mut self) -> Result<Option<Chunk>, PrepareError> {
        let mut builders: Vec<StringBuilder> = self.wants.iter().map(|_| StringBuilder::new()).collect();
        let (mut lines, mut defects) = (Vec::new(), Vec::new());
        let mut line = Vec::new();
        while lines.len() + defects.len() < TEXT_ROWS && self.source.line(&self.path, &mut line)? {
            self.line += 1;
            if line.trim_ascii().is_empty() {
                continue;
            }
            match self.cells(&line) {
                Ok(cells) => {
                    builders.iter_mut().zip(cells).for_each(|(builder, cell)| builder.append_option(cell));
                    lines.push(self.line);
                }
                Err(problem) => {
                    defects.push(Defect { row: Row::Line(self.line), kind: DefectKind::Unparsable, problem });
                }
            }
        }
        if lines.is_empty() && defects.is_empty() {
            let absent = self.wants.iter().zip(&self.seen).find(|(want, seen)| want.required && !**seen);
            return match absent {
                Some((want, _)) if !self.keys.is_empty() => {
                    Err(missing_column(&self.path, want, std::mem::take(&mut self.keys)))
                }
                _ => Ok(None),
            };
        }
        let columns = builders.iter_mut().map(|builder| Some(Cells::Text(builder.finish()))).collect();
        let bytes = self.source.consumed();
        Ok(Some(Chunk { columns, len: lines.len(), rows: Rows::Lines(lines), defects, bytes }))
    }
}

/// What is wrong with a line, whose own number is not the one that the parser counts.
fn problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place)
        .map_or_else(|| shown(&text).into_owned(), |problem| format!("{} in column {}", shown(problem), error.column()))
}

/// A value as the text of a cell; `None` where it says nothing.
fn cell(value: Value, want: &Want) -> Result<Option<String>, String> {
    let text = match (want.kind, value) {
        (_, Value::Null) => return Ok(None),
        (Kind::Id, Value::String(text)) => text,
        (Kind::Id, Value::Number(number)) if number.is_i64() || number.is_u64() => number.to_string(),
        (Kind::Id, other) => {
            return Err(format!("{} is {}, not a string or an integer", want.names[0], shown(&other.to_string())));
        }
        (Kind::Time | Kind::Label, value @ (Value::Array(_) | Value::Object(_))) => {
            return Err(format!("{} is {}, not a number", want.names[0], shown(&value.to_string())));
        }
        (_, value) => flat(&value).trim().to_owned(),
    };
    Ok(Some(text).filter(|text| !text.is_empty()))
}

/// Lists as `a, b`, objects as `key: value, …`.
fn flat(value: &Value) -> String {
    let join = |parts: Vec<String>| parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ");
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.trim().to_owned(),
        Value::Array(values) => join(values.iter().map(flat).collect()),
        Value::Object(map) => join(map.iter().map(|(key, value)| format!("{key}: {}", flat(value))).collect()),
        other => other.to_string(),
    }
}

/// Reads an object, keeping the wanted keys; of several names of a want, the earliest one that is not empty counts.
struct Wanted<'a>(&'a [Want]);

impl<'de> DeserializeSeed<'de> for Wanted<'_> {
    type Value = Vec<Option<Value>>;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Wanted<'_> {
    type Value = Vec<Option<Value>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one JSON object a line")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut best: Vec<(usize, Option<Value>)> = vec![(usize::MAX, None); self.0.len()];
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            let place = |want: &Want| want.names.iter().position(|name| *name == key);
            let places: Vec<(usize, usize)> =
                self.0.iter().enumerate().filter_map(|(want, spec)| Some((want, place(spec)?))).collect();
            if places.is_empty() {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value: Value = map.next_value()?;
            let says_nothing = flat(&value).trim().is_empty();
            for (want, place) in places {
                if place <= best[want].0 && !says_nothing {
                    best[want] = (place, Some(value.clone()));
                }
            }
        }
        Ok(best.into_iter().map(|(_, value)| value).collect())
    }
}
