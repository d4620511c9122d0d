//! The curves of a screen: few points that keep what many steps were like.

use learn_domain::curves::{Bucket, Curves, Extent, SERIES};
use learn_domain::ids::Step;
use learn_domain::report::{JobStatus, Split, StepRecord, Timed};

use super::METRICS;
use crate::render;
use crate::watch::scene::Scene;

/// Points of a curve of steps: a wide terminal has two in each of so many columns.
const POINTS: usize = 240;
/// A point is the mean of its neighbours up to this share of the curve's steps away, the near ones weighing more.
const REACH: f64 = 0.02;
/// Of the newest part alone, this share of the run,
const NEWEST_SHARE: u64 = 10;
/// and so many steps at least.
const NEWEST_LEAST: u64 = 200;
/// Steps whose mean is a rate.
const WINDOW: usize = 50;
/// Newest steps that a rate remembers.
const PAST: usize = 120;

/// A curve with its heading.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    pub title: String,
    /// (step, value), as it is drawn.
    pub line: Vec<(f64, f64)>,
    /// The least and the greatest value of every part: what the line has smoothed away.
    pub around: Vec<(f64, f64)>,
    /// The best point.
    pub best: Option<(f64, f64)>,
    /// What is said while there are no points.
    pub empty: String,
}

/// So much in a second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rate {
    pub name: &'static str,
    pub now: String,
    /// Of the newest steps one by one.
    pub past: Vec<f64>,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drawn {
    pub loss: Curve,
    pub held_out: Curve,
    pub rates: Vec<Rate>,
}

pub fn all(scene: &Scene, newest: bool) -> Drawn {
    let status = scene.current.as_ref().map(|current| &current.status);
    let from = from(&scene.steps, newest);
    let metric = scene.settings.as_ref().map(|settings| settings.metric.as_str());
    Drawn { loss: loss(&scene.steps, from), held_out: held_out(status, metric, from), rates: rates(&scene.steps) }
}

/// The first step that is shown.
fn from(steps: &[Timed<StepRecord>], newest: bool) -> Step {
    match steps.last() {
        Some(last) if newest => {
            let last = last.value.step.0;
            Step((last + 1).saturating_sub((last / NEWEST_SHARE).max(NEWEST_LEAST)))
        }
        _ => Step(0),
    }
}

fn loss(steps: &[Timed<StepRecord>], from: Step) -> Curve {
    let mut curves = Curves::default();
    steps.iter().filter(|step| step.value.step >= from).for_each(|step| curves.add(&step.value));
    let buckets = curves.view(from, Step(u64::MAX), POINTS);
    let middle = |bucket: &Bucket| (bucket.first.0 + bucket.last.0) as f64 / 2.0;
    let extent = |bucket: &Bucket| bucket.extents[place("loss")];
    let point = |bucket: &Bucket| Some((middle(bucket), extent(bucket).mean()?, bucket.steps as f64));
    let line = smooth(&buckets.iter().filter_map(point).collect::<Vec<_>>());
    let ends = |of: fn(Extent) -> Option<f64>| {
        buckets.iter().filter_map(move |bucket| Some((middle(bucket), of(extent(bucket))?)))
    };
    let around = ends(Extent::least).chain(ends(Extent::greatest)).collect();
    let title = match (line.last(), from.0 > 1) {
        (Some((_, value)), false) => format!("loss {value:.4}, smoothed"),
        (Some((_, value)), true) => format!("loss {value:.4}, smoothed, from step {}", render::count(from.0)),
        (None, _) => "loss".into(),
    };
    Curve { title, line, around, best: None, empty: "no finished step yet".into() }
}

fn place(name: &str) -> usize {
    SERIES.iter().position(|series| series.name == name).unwrap_or_default()
}

/// Means of neighbours, (x, y) of (x, y, weight); x grows.
fn smooth(points: &[(f64, f64, f64)]) -> Vec<(f64, f64)> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
    let reach = (REACH * (last.0 - first.0)).max(f64::MIN_POSITIVE);
    let mut start = 0;
    let mean = |(x, _, _): &(f64, f64, f64)| {
        while points[start].0 < x - reach {
            start += 1;
        }
        let near = points[start..].iter().take_while(|point| point.0 <= x + reach);
        let weighed = near.map(|point| (point.1, point.2 * (1.0 - (point.0 - x).abs() / reach).max(1e-6)));
        let (sum, weight) = weighed.fold((0.0, 0.0), |(sum, all), (y, weight)| (sum + y * weight, all + weight));
        (*x, sum / weight)
    };
    points.iter().map(mean).collect()
}

/// The metric that the best checkpoint is best by, or the first that there is, on the held-out users.
fn held_out(status: Option<&JobStatus>, metric: Option<&str>, from: Step) -> Curve {
    let Some(status) = status else {
        return Curve { title: "held-out users".into(), empty: "no evaluation yet".into(), ..Curve::default() };
    };
    let valid = || status.evaluations.iter().filter(|evaluation| evaluation.split == Split::Valid);
    let has = |name: &&str| valid().any(|evaluation| evaluation.metrics.contains_key(*name));
    let name = metric.into_iter().chain(METRICS).find(has);
    let Some(name) = name else {
        let empty = match status.steps_per_epoch {
            0 => "no evaluation yet".into(),
            steps => format!("no evaluation yet; an epoch has {} steps", render::count(steps)),
        };
        return Curve { title: "held-out users".into(), empty, ..Curve::default() };
    };
    let values = valid().filter_map(|evaluation| Some((evaluation.step, *evaluation.metrics.get(name)?)));
    let line: Vec<_> = values
        .filter(|(step, value)| *step >= from && value.is_finite())
        .map(|(step, value)| (step.0 as f64, value))
        .collect();
    let best = status.best.as_ref().and_then(|best| Some((best.step.0 as f64, *best.metrics.get(name)?)));
    let title = match (line.last(), best) {
        (Some((_, now)), Some((step, best))) => {
            format!("{name} {now:.4}, best {best:.4} at {}", render::count(step as u64))
        }
        (Some((_, now)), None) => format!("{name} {now:.4}"),
        (None, _) => name.to_owned(),
    };
    let best = best.filter(|(step, _)| *step >= from.0 as f64);
    Curve { title, line, around: Vec::new(), best, empty: "no evaluation in these steps".into() }
}

fn rates(steps: &[Timed<StepRecord>]) -> Vec<Rate> {
    let newest = &steps[steps.len().saturating_sub(PAST)..];
    let timed: Vec<_> = newest.iter().map(|step| &step.value).filter(|step| step.seconds > 0.0).collect();
    if timed.is_empty() {
        return Vec::new();
    }
    let rate = |name, of: fn(&StepRecord) -> f64| {
        let window = &timed[timed.len().saturating_sub(WINDOW)..];
        let seconds: f64 = window.iter().map(|step| step.seconds).sum();
        let now = window.iter().map(|step| of(step)).sum::<f64>() / seconds;
        let past = timed.iter().map(|step| of(step) / step.seconds).collect();
        Rate { name, now: render::count(now.round() as u64), past }
    };
    vec![rate("users/s", |step| f64::from(step.users)), rate("tokens/s", |step| step.tokens as f64)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn step(step: u64, loss: f64) -> Timed<StepRecord> {
        let value = StepRecord { step: Step(step), loss, users: 8, tokens: 100, seconds: 0.5, ..StepRecord::default() };
        Timed { time: None, value }
    }

    #[test]
    fn a_spike_stays_around_the_line_and_a_loss_that_is_no_number_is_left_out() {
        let spike = |at| if at == 700 { 9.0 } else { 1.0 };
        let steps: Vec<_> = (1..=5000).map(|at| step(at, if at == 60 { f64::NAN } else { spike(at) })).collect();
        let curve = loss(&steps, Step(0));
        assert!(curve.line.len() <= POINTS && curve.line.iter().all(|point| point.1 < 2.0), "{:?}", curve.line);
        assert!(curve.around.iter().any(|point| point.1 == 9.0 && (point.0 - 700.0).abs() < 20.0));
        assert_eq!(curve.title, "loss 1.0000, smoothed");
        let newest = from(&steps, true);
        assert_eq!((from(&steps, false), newest), (Step(0), Step(4501)));
        let curve = loss(&steps, newest);
        assert_eq!(curve.title, "loss 1.0000, smoothed, from step 4,501");
        assert!(curve.line[0].0 >= 4501.0 && curve.line.len() > 100);
        assert_eq!(from(&steps[..50], true), Step(0), "all of a short one are the newest");
    }

    #[test]
    fn a_rate_is_what_was_done_by_the_time_it_took() {
        let mut steps: Vec<_> = (1..=50).map(|at| step(at, 1.0)).collect();
        steps[49].value.seconds = 25.5;
        steps.push(Timed { time: None, value: StepRecord { seconds: 0.0, ..steps[0].value.clone() } });
        let rates = rates(&steps);
        assert_eq!((rates[0].name, rates[0].now.as_str()), ("users/s", "8"), "400 users in 50 s");
        assert_eq!((rates[1].name, rates[1].now.as_str()), ("tokens/s", "100"));
        assert_eq!((rates[0].past.len(), rates[0].past[0]), (50, 16.0));
        assert_eq!(super::rates(&[]), []);
    }

    proptest! {
        #[test]
        fn a_smoothed_line_has_all_places_and_stays_within_the_values(
            gaps in prop::collection::vec(1..30_u32, 1..300),
            values in prop::collection::vec(-100.0..100.0_f64, 300),
        ) {
            let places = gaps.iter().scan(0, |at, gap| { *at += gap; Some(f64::from(*at)) });
            let points: Vec<_> = places.zip(&values).map(|(x, y)| (x, *y, 1.0)).collect();
            let smoothed = smooth(&points);
            prop_assert!(smoothed.iter().map(|point| point.0).eq(points.iter().map(|point| point.0)));
            let used = &values[..points.len()];
            let (low, high) = used.iter().fold((f64::MAX, f64::MIN), |(low, high), y| (low.min(*y), high.max(*y)));
            prop_assert!(smoothed.iter().all(|point| (low - 1e-9..=high + 1e-9).contains(&point.1)));
        }
    }
}
