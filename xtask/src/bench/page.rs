//! The tables of docs/benchmarks.md, from results alone.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::results::{Results, Row, Unit, Wanted, read_all};

const BEGIN: &str = "<!-- results: begin -->\n";
const END: &str = "<!-- results: end -->";

/// Puts the tables of all results of `folder` into the page.
///
/// # Errors
/// If a file cannot be read or written, or the page has no place for them.
pub fn update(page: &Path, folder: &Path) -> Result<()> {
    let found = fs::read_to_string(page).with_context(|| format!("{}: cannot read it", page.display()))?;
    let wanted = replaced(&found, &tables(&read_all(folder)?))
        .with_context(|| format!("{}: the lines {BEGIN}{END} are not there", page.display()))?;
    fs::write(page, wanted).with_context(|| format!("{}: cannot write it", page.display()))
}

/// The page with other tables; none if it has no place for them.
fn replaced(page: &str, tables: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{tables}{END}{after}"))
}

/// A section for each result.
#[must_use]
pub fn tables(all: &[Results]) -> String {
    let mut text = String::new();
    for results in all {
        let Results { title, command, machine, rows, .. } = results;
        // writing to a string does not fail
        let _ = write!(
            text,
            "\n### {title}\n`{command}` on {machine}\n\n| what | minimum | median | maximum | wanted |\n|---|---|---|---|---|\n"
        );
        for row in rows {
            let shown = |value: f64| number(value, row.unit);
            // what comes out alike each time has no spread
            let end = |value: f64| if row.min == row.max { String::new() } else { shown(value) };
            let (min, median, max) = (end(row.min), shown(row.median), end(row.max));
            let _ = writeln!(text, "| {} | {min} | **{median}** | {max} | {} |", row.what, wanted(row));
        }
    }
    text.push('\n');
    text
}

fn wanted(row: &Row) -> String {
    match row.wanted {
        Some(Wanted::AtLeast(value)) => format!("{} or more", number(value, row.unit)),
        Some(Wanted::AtMost(value)) => format!("{} or less", number(value, row.unit)),
        None => String::new(),
    }
}

/// Three digits, and the unit.
fn number(value: f64, unit: Unit) -> String {
    let digits = |value: f64| match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    match unit {
        Unit::Ratio => format!("{} x", digits(value)),
        Unit::Share => format!("{} %", digits(100.0 * value)),
        Unit::UsersPerSecond => format!("{} users/s", digits(value)),
        Unit::GigabytesPerSecond => format!("{} GB/s", digits(value)),
        Unit::Seconds if value < 1.0 => format!("{} ms", digits(1e3 * value)),
        Unit::Seconds => format!("{} s", digits(value)),
        Unit::Mebibytes => format!("{} MiB", digits(value)),
        Unit::Number => digits(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::machine::Machine;
    use crate::bench::results::VERSION;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        for (value, unit, text) in [
            (6.254, Unit::Ratio, "6.25 x"),
            (0.7512, Unit::Share, "75.1 %"),
            (195.4, Unit::UsersPerSecond, "195 users/s"),
            (0.0421, Unit::Seconds, "42.1 ms"),
            (1.5, Unit::Seconds, "1.50 s"),
            (-0.003, Unit::Share, "-0.30 %"),
        ] {
            assert_eq!(number(value, unit), text);
        }
    }

    #[test]
    fn a_section_has_command_machine_and_rows() {
        let results = Results {
            version: VERSION,
            name: "loss".into(),
            title: "The loss".into(),
            command: "cargo xtask bench loss".into(),
            machine: Machine { processor: "A CPU".into(), cores: 2, ..Machine::default() },
            rows: vec![Row::of("memory", Unit::Share, &[0.006, 0.005, 0.007]).wanted(Wanted::AtMost(0.01))],
            more: serde_json::Map::new(),
        };
        let text = tables(&[results]);
        assert!(text.contains("### The loss\n`cargo xtask bench loss` on A CPU, 2 cores"), "{text}");
        assert!(text.contains("| memory | 0.50 % | **0.60 %** | 0.70 % | 1.00 % or less |\n"), "{text}");
    }

    #[test]
    fn only_the_tables_of_a_page_change() {
        let page = format!("# Title\n{BEGIN}old\n{END}\nafter\n");
        assert_eq!(replaced(&page, "new\n").unwrap(), format!("# Title\n{BEGIN}new\n{END}\nafter\n"));
        assert_eq!(replaced("# Title\n", "new"), None);
    }

    #[test]
    fn the_page_is_made_from_the_results() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let page = fs::read_to_string(root.join("docs/benchmarks.md")).unwrap();
        let made = replaced(&page, &tables(&read_all(&root.join("bench/results")).unwrap())).unwrap();
        assert!(page == made, "docs/benchmarks.md is stale: run `cargo xtask bench --tables`");
    }
}
