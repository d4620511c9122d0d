//! The curves of a page, as the JSON that `page.js` draws.

use learn_domain::event::Happening;
use learn_domain::report::{StepRecord, Timed};
use serde::Serialize;

use super::load::RunFacts;

/// Points of a curve; of more, neighbours are averaged.
const POINTS: usize = 600;

/// Everything that is drawn.
#[derive(Debug, PartialEq, Serialize)]
pub struct Curves {
    pub charts: Vec<Chart>,
}

/// One diagram.
#[derive(Debug, PartialEq, Serialize)]
pub struct Chart {
    pub title: String,
    /// Points of evaluations are marked one by one.
    pub marked: bool,
    /// Smoothing shows more than it hides.
    pub noisy: bool,
    pub series: Vec<Series>,
}

/// One run in a diagram.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Series {
    /// Place of the run among those of the page, which gives it its colour.
    pub run: usize,
    pub step: Vec<f64>,
    pub epoch: Vec<f64>,
    /// Hours of the steps so far, without the time between a stop and its resume.
    pub hours: Vec<f64>,
    pub value: Vec<f64>,
    /// Happenings, in the diagram of the loss.
    pub events: Vec<Mark>,
}

/// Something that happened.
#[derive(Debug, PartialEq, Serialize)]
pub struct Mark {
    /// Index of the point before it.
    pub at: usize,
    pub text: String,
}

/// Where a step lies on each axis.
struct Axes {
    steps_per_epoch: f64,
    /// Hours after each of the steps.
    hours: Vec<f64>,
}

/// A function of the step, without noise.
const LEARNING_RATE: &str = "Learning rate";

type Of = fn(&StepRecord) -> Option<f64>;

const STEPS: [(&str, Of); 7] = [
    ("Loss", |step| Some(step.loss)),
    ("CVR loss", |step| step.cvr_loss),
    ("In-batch accuracy", |step| Some(step.accuracy)),
    (LEARNING_RATE, |step| Some(step.learning_rate)),
    ("Gradient norm", |step| Some(step.gradient_norm)),
    ("Throughput, users/s", |step| (step.seconds > 0.0).then(|| f64::from(step.users) / step.seconds)),
    ("Padding, share of rows", |step| (step.padding_share > 0.0).then_some(step.padding_share)),
];

/// All diagrams that some run has points for.
#[must_use]
pub fn curves(runs: &[RunFacts], metrics: &[String]) -> Curves {
    let axes: Vec<Axes> = runs.iter().map(Axes::new).collect();
    let mut charts = Vec::new();
    for (number, (title, of)) in STEPS.into_iter().enumerate() {
        let series = |(run, (facts, axes)): (usize, (&RunFacts, &Axes))| axes.steps(run, facts, of, number == 0);
        let series: Vec<_> = runs.iter().zip(&axes).enumerate().filter_map(series).collect();
        charts.push(Chart { title: title.into(), marked: false, noisy: title != LEARNING_RATE, series });
    }
    for metric in metrics {
        let series = |(run, (facts, axes)): (usize, (&RunFacts, &Axes))| axes.evaluations(run, facts, metric);
        let series: Vec<_> = runs.iter().zip(&axes).enumerate().filter_map(series).collect();
        charts.push(Chart { title: format!("Valid {metric}"), marked: true, noisy: false, series });
    }
    // evaluations stand right behind the loss, which is what a reader looks for
    let (steps, evaluations): (Vec<_>, Vec<_>) =
        charts.into_iter().filter(|chart| !chart.series.is_empty()).partition(|chart| !chart.marked);
    let mut steps = steps.into_iter();
    let charts = steps.next().into_iter().chain(evaluations).chain(steps).collect();
    Curves { charts }
}

impl Axes {
    fn new(run: &RunFacts) -> Self {
        let per_epoch = run.status.as_ref().map_or(0, |status| status.steps_per_epoch);
        let mut seconds = 0.0;
        let mut before: Option<&Timed<StepRecord>> = None;
        let hours = run.steps.iter().map(|step| {
            seconds += spent(before, step);
            before = Some(step);
            seconds / 3600.0
        });
        Self { steps_per_epoch: per_epoch as f64, hours: hours.collect() }
    }

    fn epoch(&self, step: f64, epoch: u32) -> f64 {
        if self.steps_per_epoch > 0.0 { step / self.steps_per_epoch } else { f64::from(epoch + 1) }
    }

    fn steps(&self, run: usize, facts: &RunFacts, of: Of, with_events: bool) -> Option<Series> {
        let points: Vec<(usize, f64)> = facts
            .steps
            .iter()
            .enumerate()
            .filter_map(|(at, step)| Some((at, of(&step.value).filter(|value| value.is_finite())?)))
            .collect();
        let width = points.len().div_ceil(POINTS).max(1);
        let mut series = Series { run, ..Series::default() };
        for part in points.chunks(width) {
            // a mean of neighbours stands where the last of them is
            let last = part.last()?.0;
            let step = &facts.steps[last].value;
            series.step.push(step.step.0 as f64);
            series.epoch.push(self.epoch(step.step.0 as f64, step.epoch));
            series.hours.push(self.hours[last]);
            series.value.push(part.iter().map(|point| point.1).sum::<f64>() / part.len() as f64);
        }
        if with_events {
            series.events = marks(facts, &series.step);
        }
        (!series.value.is_empty()).then_some(series)
    }

    fn evaluations(&self, run: usize, facts: &RunFacts, metric: &str) -> Option<Series> {
        let mut series = Series { run, ..Series::default() };
        let valid = facts.evaluations.iter().filter(|line| line.value.split == learn_domain::report::Split::Valid);
        for line in valid {
            let evaluation = &line.value;
            let Some(value) = evaluation.metrics.get(metric) else { continue };
            let step = evaluation.step.0 as f64;
            let after = facts.steps.partition_point(|step| step.value.step <= evaluation.step);
            series.step.push(step);
            series.epoch.push(if self.steps_per_epoch > 0.0 {
                step / self.steps_per_epoch
            } else {
                evaluation.epoch.into()
            });
            series.hours.push(after.checked_sub(1).map_or(0.0, |at| self.hours[at]));
            series.value.push(*value);
        }
        (!series.value.is_empty()).then_some(series)
    }
}

/// Seconds that the job has spent from one step to the next: by the clock, if both were in one session, so that evaluations
/// count and nights do not.
fn spent(before: Option<&Timed<StepRecord>>, step: &Timed<StepRecord>) -> f64 {
    let seconds = step.value.seconds.max(0.0);
    let between = before.and_then(|before| Some(step.time? - before.time?)).filter(|between| *between >= 0.0);
    match between {
        Some(between) if between < 3600.0 => between.max(seconds),
        _ => seconds,
    }
}

/// What is worth a mark, at the points that stood before it.
fn marks(facts: &RunFacts, steps: &[f64]) -> Vec<Mark> {
    let shown = |happening: &Happening| !matches!(happening, Happening::Formed { .. } | Happening::KeepsUp { .. });
    let mark = |event: &learn_domain::event::JobEvent| {
        let before = facts.steps.partition_point(|step| step.time.is_some_and(|time| time <= event.time));
        let step = facts.steps.get(before.checked_sub(1)?)?.value.step.0 as f64;
        let at = steps.partition_point(|&other| other < step).min(steps.len().checked_sub(1)?);
        Some(Mark { at, text: event.happening.to_string() })
    };
    facts.events.iter().filter(|event| shown(&event.happening)).filter_map(mark).collect()
}
