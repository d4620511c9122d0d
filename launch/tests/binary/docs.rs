//! docs/operations.md says what the code says; `UPDATE=1` rewrites the tables.

use std::path::{Path, PathBuf};

use crate::support::TestResult;

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md")
}

/// The page with the part between two markers replaced.
fn with(page: &str, name: &str, table: &str) -> TestResult<String> {
    let (begin, end) = (format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->"));
    let (before, rest) = page.split_once(&begin).ok_or_else(|| format!("no {begin}"))?;
    let (_, after) = rest.split_once(&end).ok_or_else(|| format!("no {end}"))?;
    Ok(format!("{before}{begin}{table}{end}{after}"))
}

#[test]
fn the_metrics_table_is_current() -> TestResult {
    let found = std::fs::read_to_string(page())?;
    let wanted = with(&found, "metrics", &learn_telemetry::names::markdown_table())?;
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(page(), &wanted)?;
    } else {
        assert!(found == wanted, "docs/operations.md is stale: run this test with UPDATE=1");
    }
    Ok(())
}

#[test]
fn the_exit_codes_are_those_of_the_code() -> TestResult {
    use learn_domain::report::exit::{
        DIVERGED, FAILED, NO_PROGRESS, OK, RESTARTS, RESUBMIT, STOPPED, UNSAVED, USAGE, WORKER_LOST,
    };
    let text = std::fs::read_to_string(page())?;
    let rows: Vec<_> =
        text.lines().filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit()).collect();
    let meant = [
        (OK, "Done"),
        (FAILED, "failed"),
        (USAGE, "Wrong flags"),
        (STOPPED, "Stopped"),
        (WORKER_LOST, "Workers were lost"),
        (DIVERGED, "not a finite number"),
        (UNSAVED, "could not be written"),
        (NO_PROGRESS, "without a finished step"),
        (RESUBMIT, "slurm --resubmit"),
        (RESTARTS, "as often as it may"),
    ];
    assert_eq!(rows.len(), meant.len(), "{rows:?}");
    for (row, (code, words)) in rows.iter().zip(meant) {
        assert!(row.starts_with(&format!("| {code} |")) && row.contains(words), "{row}");
    }
    Ok(())
}
