//! From when to when the interactions of each file are, and what of it looks wrong.
//!
//! Plain numbers bring no unit: files that count seconds and milliseconds are each in order, and together are not.

use std::path::{Path, PathBuf};

use super::time::{SCALE, Time};

/// Files whose times differ by this factor count in different units; neighbouring units are 1000 apart, and what lies between
/// the two files in years makes less of it.
const APART: i128 = 500;

/// The times of a file, in millionths.
#[derive(Debug)]
struct Span {
    path: PathBuf,
    first: i128,
    last: i128,
    count: u64,
}

/// The times of all files.
#[derive(Debug, Default)]
pub(crate) struct Spans(Vec<Span>);

impl Spans {
    /// The next times are those of this file.
    pub(crate) fn begin(&mut self, path: &Path) {
        self.0.push(Span { path: path.to_path_buf(), first: i128::MAX, last: i128::MIN, count: 0 });
    }

    pub(crate) fn add(&mut self, time: Time) {
        let Some(span) = self.0.last_mut() else { return };
        let value = i128::from(time.value) * if time.scaled { 1 } else { i128::from(SCALE) };
        span.first = span.first.min(value);
        span.last = span.last.max(value);
        span.count += 1;
    }

    /// What a person should look at.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.units().into_iter().chain(self.one_time()).collect()
    }

    /// Two files that seem to count in different units.
    fn units(&self) -> Option<String> {
        let filled = || self.0.iter().filter(|span| span.last > 0);
        let (low, high) = (filled().min_by_key(|span| span.last)?, filled().max_by_key(|span| span.last)?);
        let apart = |low: i128, high: i128| high / low >= APART;
        // a time of 0 or less is a missing one more often than an early one
        if !apart(low.last, high.last) || (low.first > 0 && high.first > 0 && !apart(low.first, high.first)) {
            return None;
        }
        Some(format!(
            "times up to {} in {}, and up to {} in {}: do they count in different units, as seconds and milliseconds? Then \
             convert those of one file, since the order of interactions is wrong",
            number(low.last),
            low.path.display(),
            number(high.last),
            high.path.display()
        ))
    }

    /// All times are the same.
    fn one_time(&self) -> Option<String> {
        let count: u64 = self.0.iter().map(|span| span.count).sum();
        let first = self.0.iter().map(|span| span.first).min()?;
        let last = self.0.iter().map(|span| span.last).max()?;
        (count > 1 && first == last).then(|| {
            format!(
                "all {count} interactions have the same time, {}: they are in the order of the input; is \
                 prepare.interactions.timestamp the right column?",
                number(first)
            )
        })
    }
}

/// A time as its file has it.
fn number(millionths: i128) -> String {
    let scale = i128::from(SCALE);
    match millionths % scale {
        0 => (millionths / scale).to_string(),
        _ => (millionths as f64 / scale as f64).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::time::Stamp;
    use super::*;

    fn warnings(files: &[&[f64]]) -> Vec<String> {
        let mut spans = Spans::default();
        for (number, times) in files.iter().enumerate() {
            spans.begin(Path::new(&format!("{number}.csv")));
            times.iter().for_each(|&time| spans.add(Stamp::real(time).unwrap().time));
        }
        spans.warnings()
    }

    #[test]
    fn files_of_different_units_are_named() {
        let (old, new) = (8.7e8, 1.7e9);
        for unit in [1e3, 1e6] {
            let files: [&[f64]; 3] = [&[new, old], &[old * unit, new * unit], &[]];
            let found = warnings(&files);
            assert_eq!(found.len(), 1, "{found:?}");
            for part in ["up to 1700000000 in 0.csv", "in 1.csv", "seconds and milliseconds"] {
                assert!(found[0].contains(part), "{found:?}");
            }
        }
        // years lie between the two, and one has times that are missing
        assert_eq!(warnings(&[&[0.0, 1.6e9, 1.7e9], &[8.7e11, 9e11]]).len(), 1);
        assert_eq!(warnings(&[&[1.6e9, 1.7e9], &[0.0, 1.7e12]]).len(), 1);
    }

    #[test]
    fn times_of_one_unit_are_no_reason_to_warn() {
        let files: [&[&[f64]]; 6] = [
            &[],
            &[&[]],
            &[&[5.0]],
            &[&[0.0, 1.0], &[0.0, 2.0], &[-3.0]],
            &[&[8.7e8, 9e8], &[1.6e9, 1.7e9]],
            &[&[1.0, 9.0], &[10.0, 9000.0]],
        ];
        for files in files {
            assert_eq!(warnings(files), Vec::<String>::new(), "{files:?}");
        }
    }

    #[test]
    fn equal_times_of_all_files_are_said() {
        let cases: [(&[&[f64]], &str); 2] = [(&[&[7.0, 7.0]], "time, 7:"), (&[&[1.5], &[], &[1.5]], "time, 1.5:")];
        for (files, time) in cases {
            let found = warnings(files);
            assert!(
                found.len() == 1 && found[0].contains("all 2 interactions") && found[0].contains(time),
                "{found:?}"
            );
        }
    }
}
