//! What the runs of a study have reached: means over seeds, beside the built-in comparisons.

use std::collections::BTreeMap;

use learn_domain::report::{Interval, SegmentResult, Summary};
use learn_domain::segments::Segment;
use serde::Serialize;

/// One run, finished or not.
#[derive(Clone, Debug)]
pub struct RunResult {
    pub seed: u64,
    /// Its directory, as it is shown.
    pub dir: String,
    /// What makes it again.
    pub command: String,
    /// Or why there is none.
    pub summary: Result<Summary, String>,
}

/// All seeds of one variant.
#[derive(Clone, Debug)]
pub struct VariantResult {
    pub name: String,
    /// The dataset it was trained on, as it is shown.
    pub dataset: String,
    pub runs: Vec<RunResult>,
}

/// One number of a table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Over seeds.
    pub mean: f64,
    /// Sample standard deviation over seeds; none with one seed.
    pub deviation: Option<f64>,
    /// 95 % bootstrap interval over users, with one seed.
    pub interval: Option<(f64, f64)>,
}

/// A row of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub name: String,
    pub trained: bool,
    /// Finished seeds, and all of them; both 0 for a comparison.
    pub seeds: (usize, usize),
    /// One for each metric.
    pub cells: Vec<Option<Cell>>,
    /// Why a seed has no result.
    pub failure: Option<String>,
    /// Directories of the runs that the numbers come from.
    pub dirs: Vec<String>,
    pub commands: Vec<String>,
}

/// One segment of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    pub segment: String,
    /// Users and targets in it, of the first finished run.
    pub size: Option<(u64, u64)>,
    /// Comparisons first.
    pub rows: Vec<Row>,
}

/// The part of a table about one segment.
#[must_use]
pub fn part(variants: &[&VariantResult], segment: &str, metrics: &[String]) -> Part {
    let mut finished = variants.iter().flat_map(|variant| &variant.runs).filter_map(|run| run.summary.as_ref().ok());
    let size = finished.find_map(|summary| of(&summary.segments, segment)).map(|found| (found.users, found.targets));
    let mut rows = comparisons(variants, segment, metrics);
    rows.extend(variants.iter().map(|variant| trained(variant, segment, metrics)));
    Part { segment: segment.to_owned(), size, rows }
}

fn of<'a>(segments: &'a [SegmentResult], name: &str) -> Option<&'a SegmentResult> {
    segments.iter().find(|segment| segment.segment == name)
}

fn trained(variant: &VariantResult, segment: &str, metrics: &[String]) -> Row {
    let finished: Vec<(&RunResult, &Summary)> =
        variant.runs.iter().filter_map(|run| Some((run, run.summary.as_ref().ok()?))).collect();
    let cell = |metric: &String| {
        let values: Option<Vec<f64>> =
            finished.iter().map(|(_, summary)| value(&summary.test, &summary.segments, segment, metric)).collect();
        let interval = match finished.as_slice() {
            [(_, summary)] => interval(&summary.segments, segment, metric),
            _ => None,
        };
        Cell::over(&values?, interval)
    };
    Row {
        name: variant.name.clone(),
        trained: true,
        seeds: (finished.len(), variant.runs.len()),
        cells: metrics.iter().map(cell).collect(),
        failure: variant.runs.iter().find_map(|run| run.summary.as_ref().err().cloned()),
        dirs: finished.iter().map(|(run, _)| run.dir.clone()).collect(),
        commands: finished.iter().map(|(run, _)| run.command.clone()).collect(),
    }
}

/// A metric on everything may be one that segments do not have.
fn value(whole: &BTreeMap<String, f64>, segments: &[SegmentResult], segment: &str, metric: &str) -> Option<f64> {
    if segment == Segment::All.name()
        && let Some(value) = whole.get(metric)
    {
        return Some(*value);
    }
    let found = of(segments, segment).filter(|found| found.users > 0)?;
    found.metrics.get(metric).map(|estimate| estimate.value)
}

fn interval(segments: &[SegmentResult], segment: &str, metric: &str) -> Option<(f64, f64)> {
    let Interval { low, high } = of(segments, segment)?.metrics.get(metric)?.interval?;
    Some((low, high))
}

impl Cell {
    fn over(values: &[f64], interval: Option<(f64, f64)>) -> Option<Self> {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let spread = || (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0)).sqrt();
        let deviation = (values.len() > 1).then(spread);
        (!values.is_empty()).then_some(Self { mean, deviation, interval })
    }

    /// Ends of an error bar.
    #[must_use]
    pub fn bounds(&self) -> (f64, f64) {
        match (self.deviation, self.interval) {
            (Some(deviation), _) => (self.mean - deviation, self.mean + deviation),
            (None, Some(interval)) => interval,
            (None, None) => (self.mean, self.mean),
        }
    }
}

/// The built-in comparisons of each dataset; what is the same on several is shown once.
fn comparisons(variants: &[&VariantResult], segment: &str, metrics: &[String]) -> Vec<Row> {
    let mut rows: Vec<(Row, &str)> = Vec::new();
    for variant in variants {
        let first = variant.runs.iter().find_map(|run| Some((run, run.summary.as_ref().ok()?)));
        let Some((run, summary)) = first else { continue };
        for comparison in &summary.comparisons {
            let cell = |metric: &String| {
                let value = value(&comparison.metrics, &comparison.segments, segment, metric)?;
                Cell::over(&[value], interval(&comparison.segments, segment, metric))
            };
            let row = Row {
                name: comparison.name.clone(),
                trained: false,
                seeds: (0, 0),
                cells: metrics.iter().map(cell).collect(),
                failure: None,
                dirs: vec![run.dir.clone()],
                commands: vec![run.command.clone()],
            };
            // what has none of the metrics has nothing to compare
            let silent = row.cells.iter().all(Option::is_none);
            if !silent && !rows.iter().any(|(known, _)| known.name == row.name && known.cells == row.cells) {
                rows.push((row, &variant.dataset));
            }
        }
    }
    let names: Vec<String> = rows.iter().map(|(row, _)| row.name.clone()).collect();
    let repeated = |name: &str| names.iter().filter(|other| *other == name).count() > 1;
    let named = rows.into_iter().map(|(mut row, dataset)| {
        if repeated(&row.name) {
            row.name = format!("{} ({dataset})", row.name);
        }
        row
    });
    named.collect()
}

#[cfg(test)]
pub(super) mod tests {
    use learn_domain::Step;
    use learn_domain::report::{Comparison, Estimate};

    use super::*;

    fn metrics(recall: f64) -> BTreeMap<String, f64> {
        [("recall@10".to_owned(), recall), ("cvr_auc".to_owned(), 0.75)].into()
    }

    fn segment(name: &str, users: u64, recall: f64) -> SegmentResult {
        let interval = Some(Interval { low: recall - 0.02, high: recall + 0.03 });
        let estimate = Estimate { value: recall, interval };
        SegmentResult { segment: name.into(), users, targets: users, metrics: [("recall@10".into(), estimate)].into() }
    }

    fn summary(recall: f64, last_item: f64) -> Summary {
        let parts = |recall| vec![segment("all", 40, recall), segment("cold_items", 8, recall / 2.0)];
        let comparison =
            |name: &str, recall| Comparison { name: name.into(), metrics: metrics(recall), segments: parts(recall) };
        Summary {
            dataset: "d".into(),
            fingerprint: "f".into(),
            users: 40,
            items: 9,
            interactions: 300,
            world_size: 1,
            steps: 10,
            seconds: 1.0,
            samples_per_second: 1.0,
            best_step: Step(10),
            valid: metrics(recall),
            test: metrics(recall),
            popularity: metrics(0.05),
            segments: parts(recall),
            comparisons: vec![comparison("popularity", 0.05), comparison("last_item", last_item)],
        }
    }

    /// A variant whose seeds reached these values, or failed.
    pub(in crate::study) fn variant(name: &str, recalls: &[Option<f64>], last_item: f64) -> VariantResult {
        let run = |(seed, recall): (u64, &Option<f64>)| RunResult {
            seed,
            dir: format!("runs/s/{name}-seed{seed}"),
            command: format!("learn-launch train runs/s/configs/{name}-seed{seed}.toml"),
            summary: recall.map(|recall| summary(recall, last_item)).ok_or_else(|| "out of memory".to_owned()),
        };
        VariantResult {
            name: name.into(),
            dataset: format!("data/{last_item}"),
            runs: (1..).zip(recalls).map(run).collect(),
        }
    }

    #[test]
    fn seeds_are_averaged_and_failures_kept_apart() {
        let good = variant("good", &[Some(0.2), Some(0.3)], 0.1);
        let half = variant("half", &[Some(0.25), None], 0.1);
        let bad = variant("bad", &[None], 0.1);
        let part = part(&[&good, &half, &bad], "all", &["recall@10".into(), "cvr_auc".into()]);
        let names: Vec<_> = part.rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["popularity", "last_item", "good", "half", "bad"]);
        assert_eq!(part.size, Some((40, 40)));
        let cell = part.rows[2].cells[0].unwrap();
        assert!((cell.mean - 0.25).abs() < 1e-12 && (cell.deviation.unwrap() - 0.005_f64.sqrt()).abs() < 1e-12);
        assert_eq!(part.rows[2].cells[1].unwrap().mean, 0.75, "a metric that only the whole test has");
        let half = &part.rows[3];
        assert_eq!((half.seeds, half.failure.as_deref()), ((1, 2), Some("out of memory")));
        assert_eq!(half.cells[0].unwrap().bounds(), (0.23, 0.28), "one seed has the interval over users");
        assert_eq!((part.rows[4].seeds, part.rows[4].cells[0]), ((0, 1), None));
    }

    #[test]
    fn comparisons_without_any_of_the_metrics_are_left_out() {
        let mut only = variant("only", &[Some(0.2)], 0.1);
        let summary = only.runs[0].summary.as_mut().unwrap();
        summary.comparisons.iter_mut().for_each(|one| one.metrics = [("recall@10".to_owned(), 0.1)].into());
        let part = part(&[&only], "all", &["cvr_auc".into()]);
        assert_eq!(part.rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["only"]);
    }

    #[test]
    fn comparisons_of_other_embeddings_have_rows_of_their_own() {
        let (small, large) = (variant("small", &[Some(0.2)], 0.1), variant("large", &[Some(0.3)], 0.2));
        let part = part(&[&small, &large], "cold_items", &["recall@10".into()]);
        let names: Vec<_> = part.rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["popularity", "last_item (data/0.1)", "last_item (data/0.2)", "small", "large"]);
        assert_eq!(part.rows[4].cells[0].unwrap().mean, 0.15);
        assert_eq!(part.size, Some((8, 8)));
    }
}
