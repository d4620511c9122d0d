//! The tables of a study as Markdown for people and as CSV for programs, as pure functions.

use std::fmt::Write as _;

use anyhow::Result;

use super::file::TableSpec;
use super::results::{Cell, Part, Row, VariantResult};

/// A whole table: its parts, then where each number comes from. `plots` are file names of pictures, beside it.
#[must_use]
pub fn markdown(spec: &TableSpec, parts: &[Part], variants: &[&VariantResult], plots: &[String]) -> String {
    let mut out = format!(
        "# {}\n\nTest split, full ranking. With several seeds: mean ± standard deviation over them; with one: its value \
         and, in brackets, the 95 % bootstrap interval over users (`-`: it has none). Rows in italics need no training.\n",
        spec.title
    );
    for part in parts {
        let size = part.size.map(|(users, targets)| format!(": {users} users, {targets} targets")).unwrap_or_default();
        let _infallible = write!(out, "\n## {}{size}\n\n| |", part.segment);
        for metric in &spec.metrics {
            let _infallible = write!(out, " {metric} |");
        }
        out.push_str(" seeds |\n|---|");
        out.push_str(&"---:|".repeat(spec.metrics.len() + 1));
        out.push('\n');
        for row in &part.rows {
            out.push_str(&line(row));
        }
    }
    for plot in plots {
        let _infallible = write!(out, "\n![{plot}]({plot})\n");
    }
    out.push_str("\n## Runs\n\n| variant | seed | run directory | command | |\n|---|---:|---|---|---|\n");
    for variant in variants {
        for run in &variant.runs {
            let state =
                run.summary.as_ref().map_or_else(|reason| format!("failed: {}", plain(reason)), |_| String::new());
            let _infallible =
                writeln!(out, "| {} | {} | `{}` | `{}` | {state} |", variant.name, run.seed, run.dir, run.command);
        }
    }
    out
}

fn line(row: &Row) -> String {
    let name = if row.trained { row.name.clone() } else { format!("*{}*", row.name) };
    let mut out = format!("| {name} |");
    for cell in &row.cells {
        let text = match (cell, row.seeds) {
            (Some(cell), _) => number(cell),
            (None, (0, all)) if all > 0 => "failed".into(),
            (None, _) => "-".into(),
        };
        let _infallible = write!(out, " {text} |");
    }
    match row.seeds {
        (0, 0) => out.push_str(" |\n"),
        (done, all) if done == all => writeln!(out, " {all} |").unwrap_or_default(),
        (done, all) => writeln!(out, " {done} of {all} |").unwrap_or_default(),
    }
    out
}

fn number(cell: &Cell) -> String {
    match (cell.deviation, cell.interval) {
        (Some(deviation), _) => format!("{:.4} ± {deviation:.4}", cell.mean),
        (None, Some((low, high))) => format!("{:.4} [{low:.4}, {high:.4}]", cell.mean),
        (None, None) => format!("{:.4} [-]", cell.mean),
    }
}

/// Text that cannot break out of a cell.
fn plain(text: &str) -> String {
    text.lines().next().unwrap_or_default().replace('|', "\\|")
}

/// One line for each number.
///
/// # Errors
/// None in practice: the writer's target is memory.
pub fn csv(spec: &TableSpec, parts: &[Part]) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "table",
        "segment",
        "users",
        "targets",
        "row",
        "kind",
        "metric",
        "mean",
        "deviation",
        "low",
        "high",
        "seeds",
        "failure",
        "runs",
        "commands",
    ])?;
    let optional = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    for part in parts {
        let (users, targets) = part.size.unwrap_or_default();
        for row in &part.rows {
            for (metric, cell) in spec.metrics.iter().zip(&row.cells) {
                writer.write_record([
                    spec.name.clone(),
                    part.segment.clone(),
                    users.to_string(),
                    targets.to_string(),
                    row.name.clone(),
                    if row.trained { "variant" } else { "comparison" }.to_owned(),
                    metric.clone(),
                    optional(cell.map(|cell| cell.mean)),
                    optional(cell.and_then(|cell| cell.deviation)),
                    optional(cell.and_then(|cell| cell.interval).map(|interval| interval.0)),
                    optional(cell.and_then(|cell| cell.interval).map(|interval| interval.1)),
                    row.seeds.0.to_string(),
                    row.failure.clone().unwrap_or_default(),
                    row.dirs.join("; "),
                    row.commands.join("; "),
                ])?;
            }
        }
    }
    Ok(writer.into_inner()?)
}

#[cfg(test)]
mod tests {
    use super::super::results::part;
    use super::super::results::tests::variant;
    use super::*;

    fn spec() -> TableSpec {
        TableSpec {
            name: "t".into(),
            title: "Towers".into(),
            variants: vec![],
            metrics: vec!["recall@10".into(), "mrr".into()],
            segments: vec!["all".into(), "cold_items".into()],
            plots: vec!["recall@10".into()],
        }
    }

    #[test]
    fn a_number_has_its_spread_its_interval_or_neither() {
        let cell = |deviation, interval| number(&Cell { mean: 0.75, deviation, interval });
        assert_eq!(cell(None, None), "0.7500 [-]");
        assert_eq!(cell(None, Some((0.5, 1.0))), "0.7500 [0.5000, 1.0000]");
        assert_eq!(cell(Some(0.125), Some((0.5, 1.0))), "0.7500 ± 0.1250");
    }

    #[test]
    fn tables_show_numbers_failures_and_where_they_come_from() {
        let variants = [
            variant("one", &[Some(0.2)], 0.1),
            variant("two", &[Some(0.2), Some(0.3), None], 0.1),
            variant("none", &[None], 0.1),
        ];
        let variants: Vec<&VariantResult> = variants.iter().collect();
        let parts: Vec<Part> = spec().segments.iter().map(|name| part(&variants, name, &spec().metrics)).collect();
        let text = markdown(&spec(), &parts, &variants, &["t-all-recall-10.svg".into()]);
        for line in [
            "# Towers",
            "## cold_items: 8 users, 8 targets",
            "| | recall@10 | mrr | seeds |",
            "| *popularity* | 0.0500 [0.0300, 0.0800] | - | |",
            "| one | 0.2000 [0.1800, 0.2300] | - | 1 |",
            "| two | 0.2500 ± 0.0707 | - | 2 of 3 |",
            "| none | failed | failed | 0 of 1 |",
            "![t-all-recall-10.svg](t-all-recall-10.svg)",
            "| none | 1 | `runs/s/none-seed1` | `learn-launch train runs/s/configs/none-seed1.toml` | failed: out of memory |",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        let rows = csv(&spec(), &parts).unwrap();
        let rows: Vec<csv::StringRecord> = csv::Reader::from_reader(rows.as_slice()).records().flatten().collect();
        assert_eq!(rows.len(), 2 * 2 * 5);
        let two = rows.iter().find(|row| &row[4] == "two" && &row[6] == "recall@10").unwrap();
        assert_eq!((&two[7], &two[11], &two[12]), ("0.25", "2", "out of memory"));
        assert_eq!(&two[13], "runs/s/two-seed1; runs/s/two-seed2");
    }
}
