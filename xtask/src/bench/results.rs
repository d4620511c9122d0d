//! What a part came to, as a file.
//!
//! Input: measured numbers. Output: rows with minimum, median and maximum, and JSON. Invariant: a ratio is of two numbers
//! of the same round; nothing here measures.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::machine::Machine;
use crate::files;

/// Version of the files.
pub const VERSION: u32 = 1;

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// How many times as much.
    Ratio,
    /// A share of 1.
    Share,
    UsersPerSecond,
    GigabytesPerSecond,
    Seconds,
    Mebibytes,
    /// Whatever the row says.
    Number,
}

/// One line of a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub what: String,
    pub unit: Unit,
    pub min: f64,
    pub median: f64,
    pub max: f64,
    /// What is wanted, if anything is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<Wanted>,
}

/// What is wanted of a number.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

impl Row {
    /// The spread of values that were measured one after the other; at least one.
    #[must_use]
    pub fn of(what: impl Into<String>, unit: Unit, values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |place: usize| sorted.get(place).copied().unwrap_or(f64::NAN);
        let (last, middle) = (sorted.len().saturating_sub(1), sorted.len() / 2);
        let median = if sorted.len() % 2 == 1 { at(middle) } else { 0.5 * (at(middle.saturating_sub(1)) + at(middle)) };
        Self { what: what.into(), unit, min: at(0), median, max: at(last), wanted: None }
    }

    #[must_use]
    pub fn wanted(mut self, wanted: Wanted) -> Self {
        self.wanted = Some(wanted);
        self
    }
}

/// `ours / theirs`, round by round.
#[must_use]
pub fn ratios(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect()
}

/// A file of `bench/results`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    pub version: u32,
    /// The file's name without its ending.
    pub name: String,
    pub title: String,
    /// What measures it again.
    pub command: String,
    pub machine: Machine,
    pub rows: Vec<Row>,
    /// Whatever else belongs to it: every repetition, figures under the names that others look for.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Results {
    /// Writes `FOLDER/NAME.json`.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        files::make(folder)?;
        let path = folder.join(format!("{}.json", self.name));
        let text = serde_json::to_string_pretty(self).context("results are JSON")?;
        files::write(&path, &(text + "\n"))?;
        Ok(path)
    }
}

/// All results of a folder, by name.
///
/// # Errors
/// If one of the files is none.
pub fn read_all(folder: &Path) -> Result<Vec<Results>> {
    // before the first measurement there is no folder
    let mut paths = if folder.exists() { files::entries(folder)? } else { Vec::new() };
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).with_context(|| format!("{}: cannot read it", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{}: these are no results", path.display()))
    };
    paths.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_spread_of_its_values() {
        let row = Row::of("x", Unit::Ratio, &[3.0, 1.0, 2.0, 6.0]);
        assert_eq!((row.min, row.median, row.max), (1.0, 2.5, 6.0));
        let row = Row::of("x", Unit::Ratio, &[5.0]);
        assert_eq!((row.min, row.median, row.max), (5.0, 5.0, 5.0));
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        // the machine was half as fast in the second round, for both
        assert_eq!(ratios(&[100.0, 50.0], &[20.0, 10.0]), [5.0, 5.0]);
    }

    #[test]
    fn files_are_read_back_in_the_order_of_their_names() {
        let folder = std::env::temp_dir().join(format!("learn-xtask-results-{}", std::process::id()));
        let made = |name: &str| Results {
            version: VERSION,
            name: name.into(),
            title: "T".into(),
            command: "c".into(),
            machine: Machine::default(),
            rows: vec![Row::of("x", Unit::Share, &[0.25]).wanted(Wanted::AtMost(0.5))],
            more: Map::from_iter([("bf16".into(), serde_json::json!({ "over_padded": 6.5 }))]),
        };
        for name in ["b", "a"] {
            made(name).write(&folder).unwrap();
        }
        assert_eq!(read_all(&folder).unwrap(), [made("a"), made("b")]);
        fs::write(folder.join("c.json"), "{}").unwrap();
        assert!(read_all(&folder).unwrap_err().to_string().contains("c.json"));
        fs::remove_dir_all(folder).unwrap();
    }
}
