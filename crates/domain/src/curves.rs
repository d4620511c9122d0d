//! The curves of a job: any number of steps in bounded memory, and any part of them in so many points.
//!
//! Input: the records of finished steps, in order. Output: [`Bucket`]s, each of some steps in a row. Invariants: no step is
//! lost or counted twice; a bucket's least and greatest value are those of its steps, so that no spike is smoothed away;
//! the newest [`RECENT`] steps are kept one by one.

use std::collections::VecDeque;

use crate::ids::Step;
use crate::report::StepRecord;

/// Newest steps that are kept one by one.
pub const RECENT: usize = 4096;
/// Most buckets of the older ones; when there are more, each two become one.
const OLDER: usize = 8192;
/// Of the points of a view, so many (one in this number) are kept for the newest buckets as they are.
const NEWEST_SHARE: usize = 4;

/// A number that each step has.
#[derive(Clone, Copy, Debug)]
pub struct Series {
    pub name: &'static str,
    value: fn(&StepRecord) -> Option<f64>,
    /// What a mean weighs a step with.
    weight: fn(&StepRecord) -> f64,
}

const fn plain(name: &'static str, value: fn(&StepRecord) -> Option<f64>) -> Series {
    Series { name, value, weight: |_| 1.0 }
}

/// Weighed by time: the mean of several steps is what they did, divided by the time that they took.
const fn rate(name: &'static str, value: fn(&StepRecord) -> Option<f64>) -> Series {
    Series { name, value, weight: |record| record.seconds }
}

/// All of them. To add one, add a line.
pub const SERIES: [Series; 9] = [
    plain("loss", |record| Some(record.loss)),
    plain("cvr_loss", |record| record.cvr_loss),
    plain("accuracy", |record| Some(record.accuracy)),
    plain("learning_rate", |record| Some(record.learning_rate)),
    plain("gradient_norm", |record| Some(record.gradient_norm)),
    rate("users_per_second", |record| per_second(f64::from(record.users), record)),
    rate("tokens_per_second", |record| per_second(record.tokens as f64, record)),
    plain("seconds", |record| Some(record.seconds)),
    plain("padding_share", |record| Some(record.padding_share)),
];

fn per_second(count: f64, record: &StepRecord) -> Option<f64> {
    (record.seconds > 0.0).then(|| count / record.seconds)
}

/// One series over the steps of a bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extent {
    least: f64,
    greatest: f64,
    sum: f64,
    weight: f64,
}

impl Extent {
    const NONE: Self = Self { least: f64::INFINITY, greatest: f64::NEG_INFINITY, sum: 0.0, weight: 0.0 };

    fn of(record: &StepRecord, series: &Series) -> Self {
        match (series.value)(record).filter(|value| value.is_finite()) {
            Some(value) => {
                let weight = (series.weight)(record);
                Self { least: value, greatest: value, sum: value * weight, weight }
            }
            None => Self::NONE,
        }
    }

    fn join(&mut self, other: &Self) {
        self.least = self.least.min(other.least);
        self.greatest = self.greatest.max(other.greatest);
        self.sum += other.sum;
        self.weight += other.weight;
    }

    fn known(self) -> Option<Self> {
        (self.weight > 0.0).then_some(self)
    }

    /// None if no step has it.
    #[must_use]
    pub fn least(self) -> Option<f64> {
        self.known().map(|extent| extent.least)
    }

    #[must_use]
    pub fn greatest(self) -> Option<f64> {
        self.known().map(|extent| extent.greatest)
    }

    /// Of one step its value, to the bit.
    #[must_use]
    pub fn mean(self) -> Option<f64> {
        let one = |extent: &Self| extent.least == extent.greatest;
        self.known().map(|extent| if one(&extent) { extent.least } else { extent.sum / extent.weight })
    }
}

/// Some steps in a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    pub first: Step,
    pub last: Step,
    /// How many of them were finished: one that was skipped has no record.
    pub steps: u64,
    /// By the place in [`SERIES`].
    pub extents: [Extent; SERIES.len()],
}

impl From<&StepRecord> for Bucket {
    fn from(record: &StepRecord) -> Self {
        let extents = SERIES.each_ref().map(|series| Extent::of(record, series));
        Self { first: record.step, last: record.step, steps: 1, extents }
    }
}

impl Bucket {
    /// Takes in the steps of a later one.
    fn join(&mut self, later: &Self) {
        self.last = later.last;
        self.steps += later.steps;
        for (extent, other) in self.extents.iter_mut().zip(&later.extents) {
            extent.join(other);
        }
    }
}

/// The curves of one job.
#[derive(Clone, Debug)]
pub struct Curves {
    recent: VecDeque<Bucket>,
    /// All steps, the recent ones included.
    all: Vec<Bucket>,
    /// Steps in a bucket of `all`.
    width: u64,
    steps: u64,
}

impl Default for Curves {
    fn default() -> Self {
        Self { recent: VecDeque::new(), all: Vec::new(), width: 1, steps: 0 }
    }
}

impl Curves {
    /// Takes a step in; one that is not later than the last changes nothing.
    pub fn add(&mut self, record: &StepRecord) {
        if self.last().is_some_and(|last| record.step <= last) {
            return;
        }
        let one = Bucket::from(record);
        match self.all.last_mut().filter(|bucket| bucket.steps < self.width) {
            Some(open) => open.join(&one),
            None => self.all.push(one.clone()),
        }
        if self.all.len() > OLDER {
            self.all = pairs(&self.all);
            self.width *= 2;
        }
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(one);
        self.steps += 1;
    }

    /// Steps that were taken in.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    #[must_use]
    pub fn last(&self) -> Option<Step> {
        self.recent.back().map(|bucket| bucket.last)
    }

    /// The steps `from` to `to`, both included, in at most `points` buckets. A bucket at the edge may begin earlier or end
    /// later: older steps are not kept one by one.
    #[must_use]
    pub fn view(&self, from: Step, to: Step, points: usize) -> Vec<Bucket> {
        let within = |bucket: &&Bucket| bucket.last >= from && bucket.first <= to;
        let known_singly = self.recent.front().map_or(Step(0), |bucket| bucket.first);
        let older: Vec<&Bucket> = self.all.iter().take_while(|bucket| bucket.first < known_singly).collect();
        // the last of the older ones may reach into the recent ones
        let reached = older.last().map_or(Step(0), |bucket| bucket.last);
        let recent = self.recent.iter().filter(|bucket| bucket.first > reached);
        let buckets: Vec<Bucket> = older.into_iter().chain(recent).filter(within).cloned().collect();
        thin(buckets, points)
    }
}

fn pairs(buckets: &[Bucket]) -> Vec<Bucket> {
    let pair = |two: &[Bucket]| {
        let mut joined = two[0].clone();
        two[1..].iter().for_each(|later| joined.join(later));
        joined
    };
    buckets.chunks(2).map(pair).collect()
}

/// Joins neighbours until there are at most `points`, so that each spans as many steps as the others; the newest stay as they
/// are.
#[must_use]
pub fn thin(buckets: Vec<Bucket>, points: usize) -> Vec<Bucket> {
    if buckets.len() <= points {
        return buckets;
    }
    let newest = points / NEWEST_SHARE;
    let places = (points - newest) as u128;
    let (older, newest) = buckets.split_at(buckets.len() - newest);
    let (Some(first), Some(last), true) = (older.first(), older.last(), places > 0) else { return newest.to_vec() };
    let span = u128::from(last.last.0 - first.first.0) + 1;
    let place = |bucket: &Bucket| u128::from(bucket.last.0 - first.first.0) * places / span;
    let mut thinned: Vec<Bucket> = Vec::with_capacity(points);
    let mut before = None;
    for bucket in older {
        let here = Some(place(bucket));
        match thinned.last_mut().filter(|_| before == here) {
            Some(open) => open.join(bucket),
            None => thinned.push(bucket.clone()),
        }
        before = here;
    }
    thinned.extend_from_slice(newest);
    thinned
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(step: u64, loss: f64) -> StepRecord {
        StepRecord { step: Step(step), loss, users: 10, seconds: 0.5, ..StepRecord::default() }
    }

    fn curves(steps: impl IntoIterator<Item = (u64, f64)>) -> Curves {
        let mut curves = Curves::default();
        steps.into_iter().for_each(|(step, loss)| curves.add(&record(step, loss)));
        curves
    }

    fn all(curves: &Curves, points: usize) -> Vec<Bucket> {
        curves.view(Step(0), Step(u64::MAX), points)
    }

    fn loss(bucket: &Bucket) -> Extent {
        bucket.extents[0]
    }

    #[test]
    fn a_short_job_is_shown_step_by_step() {
        let view = all(&curves([(1, 3.0), (2, 2.0), (2, 9.0), (4, 1.0)]), 10);
        let shown: Vec<(u64, u64, Option<f64>)> =
            view.iter().map(|bucket| (bucket.first.0, bucket.last.0, loss(bucket).mean())).collect();
        assert_eq!(shown, [(1, 1, Some(3.0)), (2, 2, Some(2.0)), (4, 4, Some(1.0))], "a step counts once");
        assert!(view[0].extents[1].least().is_none(), "there is no CVR head");
    }

    #[test]
    fn millions_of_steps_stay_within_bounds_and_keep_their_spikes() {
        let count = 1_000_000;
        let curves = curves((1..=count).map(|step| (step, if step == 123_456 { 1e6 } else { 1.0 / step as f64 })));
        assert!(curves.all.len() <= OLDER && curves.recent.len() == RECENT);
        for points in [4, 100, 400, 100_000] {
            let view = all(&curves, points);
            assert!(view.len() <= points);
            assert_eq!(view.iter().map(|bucket| bucket.steps).sum::<u64>(), count);
            let greatest = view.iter().filter_map(|bucket| loss(bucket).greatest()).fold(0.0, f64::max);
            assert_eq!(greatest, 1e6, "the spike is there");
            assert_eq!((view[0].first, loss(&view[0]).greatest().unwrap() >= 1.0), (Step(1), true));
            let newest = &view[view.len() - points.min(400) / NEWEST_SHARE..];
            for (bucket, step) in newest.iter().rev().zip((0..=count).rev()) {
                assert_eq!((bucket.last, loss(bucket).mean()), (Step(step), Some(1.0 / step as f64)));
            }
        }
        let part = curves.view(Step(count - 99), Step(count), 1000);
        assert_eq!((part.len(), part[0].first), (100, Step(count - 99)), "the newest are known one by one");
        let early = curves.view(Step(123_400), Step(123_500), 1000);
        assert!(early.iter().any(|bucket| loss(bucket).greatest() == Some(1e6)), "{early:?}");
        assert!(early.iter().all(|bucket| bucket.last >= Step(123_400) && bucket.first <= Step(123_500)));
    }

    #[test]
    fn the_mean_of_a_rate_is_what_was_done_by_the_time_it_took() {
        let mut quick = record(1, 0.0);
        quick.seconds = 0.1;
        let mut slow = record(2, 0.0);
        slow.seconds = 0.9;
        let mut joined = Bucket::from(&quick);
        joined.join(&Bucket::from(&slow));
        let place = SERIES.iter().position(|series| series.name == "users_per_second").unwrap();
        let rate = joined.extents[place];
        assert!((rate.mean().unwrap() - 20.0).abs() < 1e-9, "20 users in a second, not the mean of 100 and 11");
        assert_eq!((rate.greatest(), rate.least()), (Some(100.0), Some(10.0 / 0.9)));
    }

    proptest! {
        #[test]
        fn any_view_holds_every_step_once(
            gaps in prop::collection::vec(1..50_u64, 1..400),
            losses in prop::collection::vec(-1e6..1e6_f64, 400),
            points in 1..120_usize,
        ) {
            let steps: Vec<u64> = gaps.iter().scan(0, |step, gap| { *step += gap; Some(*step) }).collect();
            let curves = curves(steps.iter().copied().zip(losses.iter().copied()));
            let view = all(&curves, points);
            prop_assert!(view.len() <= points && !view.is_empty());
            prop_assert_eq!(view.iter().map(|bucket| bucket.steps).sum::<u64>(), steps.len() as u64);
            prop_assert!(view.windows(2).all(|pair| pair[0].last < pair[1].first));
            for bucket in &view {
                let inside = steps.iter().zip(&losses).filter(|(step, _)| (bucket.first.0..=bucket.last.0).contains(*step));
                let inside: Vec<f64> = inside.map(|(_, loss)| *loss).collect();
                prop_assert_eq!(inside.len() as u64, bucket.steps);
                prop_assert_eq!(loss(bucket).least(), inside.iter().copied().reduce(f64::min));
                prop_assert_eq!(loss(bucket).greatest(), inside.iter().copied().reduce(f64::max));
                let mean = inside.iter().sum::<f64>() / inside.len() as f64;
                prop_assert!((loss(bucket).mean().unwrap() - mean).abs() < 1e-6);
            }
        }
    }
}
