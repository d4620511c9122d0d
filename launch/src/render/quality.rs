//! Tables of ranking quality: the model beside the built-in comparisons, as a whole and by segment.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use learn_domain::report::{Comparison, Evaluation, Interval, SegmentResult, Summary};

use super::{Metrics, NAME, count, duration, metrics_table, ordered};

/// An evaluation that was asked for: one table, and one for each segment if they are wanted.
#[must_use]
pub fn evaluated(evaluation: &Evaluation, segments: bool) -> String {
    let Evaluation { split, step, users, .. } = evaluation;
    let mut out = format!("{} users of {split}, checkpoint of step {step}\n\n", count(*users));
    let mut columns = vec![("model", &evaluation.metrics)];
    columns.extend(evaluation.comparisons.iter().map(|one| (one.name.as_str(), &one.metrics)));
    out += &metrics_table(&columns);
    if segments {
        for segment in &evaluation.segments {
            out.push('\n');
            out += &segment_table(segment, &evaluation.comparisons);
        }
    }
    out
}

/// One segment: the model with its interval, then the comparisons' values.
fn segment_table(segment: &SegmentResult, comparisons: &[Comparison]) -> String {
    let (users, targets) = (count(segment.users), count(segment.targets));
    let mut out = format!("{}: {users} users, {targets} targets\n", segment.segment);
    if segment.users == 0 {
        return out;
    }
    let _infallible = write!(out, "{:<NAME$}{:>12}  {:<16}", "metric", "model", "95 % interval");
    let others: Vec<(&str, Option<&SegmentResult>)> = comparisons
        .iter()
        .map(|one| (one.name.as_str(), one.segments.iter().find(|other| other.segment == segment.segment)))
        .collect();
    for (name, _) in &others {
        let _infallible = write!(out, "{name:>14}");
    }
    out.push('\n');
    let values: Metrics = segment.metrics.iter().map(|(name, estimate)| (name.clone(), estimate.value)).collect();
    for (name, value) in ordered(&values) {
        let interval = segment.metrics[name].interval;
        let interval = interval.map_or("-".to_owned(), |Interval { low, high }| format!("{low:.4} - {high:.4}"));
        let _infallible = write!(out, "{name:<NAME$}{value:>12.4}  {interval:<16}");
        for (_, other) in &others {
            let cell = other.and_then(|other| other.metrics.get(name));
            let cell = cell.map_or("-".to_owned(), |estimate| format!("{:.4}", estimate.value));
            let _infallible = write!(out, "{cell:>14}");
        }
        out.push('\n');
    }
    out
}

/// The table of a finished job: valid, test, the comparisons, and how many times better than popularity the model is.
#[must_use]
pub fn summary(summary: &Summary) -> String {
    let mut out = format!(
        "{}: {} users, {} items, {} interactions\n{} steps on {} workers in {} ({:.0} users/s); best checkpoint: step {}\n\n",
        summary.dataset,
        count(summary.users),
        count(summary.items.into()),
        count(summary.interactions),
        count(summary.steps),
        summary.world_size,
        duration(summary.seconds),
        summary.samples_per_second,
        summary.best_step,
    );
    let mut columns = vec![("valid", &summary.valid), ("test", &summary.test)];
    columns.extend(compared(summary));
    for (number, row) in metrics_table(&columns).lines().enumerate() {
        let name = row.split_whitespace().next().unwrap_or_default();
        let factor = match (summary.test.get(name), summary.popularity.get(name)) {
            (Some(test), Some(popularity)) if *popularity > 0.0 => format!("{:.2}x", test / popularity),
            _ if number == 0 => "test/pop.".into(),
            _ => "-".into(),
        };
        let _infallible = writeln!(out, "{row}{factor:>12}");
    }
    out
}

/// The comparisons of a summary; one of an older version has popularity alone.
fn compared(summary: &Summary) -> Vec<(&str, &BTreeMap<String, f64>)> {
    if summary.comparisons.is_empty() {
        return vec![("popularity", &summary.popularity)];
    }
    summary.comparisons.iter().map(|one| (one.name.as_str(), &one.metrics)).collect()
}
