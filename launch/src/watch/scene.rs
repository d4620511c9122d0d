//! A run at one moment, read from its coordinator and its files.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use learn_domain::event::JobEvent;
use learn_domain::report::{StepRecord, Timed};
use learn_domain::run_dir::RunDir;

use crate::commands::status::{self, Current};
use crate::lines::{Follower, Fresh};
use crate::render::Freshness;

/// Steps that are kept one by one for the curve; of more, older ones go.
const MOST_STEPS: usize = 20_000;
/// Steps that stay when older ones go.
const NEWEST: usize = 1_000;
/// Another coordinator takes over from one that was killed well within so many seconds.
const TAKE_OVER: f64 = 10.0;
/// Events that are kept.
const MOST_EVENTS: usize = 200;

/// Everything that is known now.
#[derive(Clone, Debug, Default)]
pub struct Scene {
    /// None until the coordinator has come that far.
    pub current: Option<Current>,
    /// For so many seconds no coordinator was there, though the job has not ended.
    pub deserted: f64,
    /// In their order; of a long run older ones are missing here and there.
    pub steps: Vec<Timed<StepRecord>>,
    pub events: Vec<JobEvent>,
    /// Events of the run so far, those that are not kept any more included.
    pub events_seen: usize,
    /// Seconds since the Unix epoch.
    pub now: f64,
}

impl Scene {
    /// The events that are kept and came after the first `told` ones; none if nothing was told yet.
    pub fn newest_events(&self, told: Option<usize>) -> impl Iterator<Item = &JobEvent> {
        // a resume begins the file anew: then all are new
        let news = told.map_or(0, |told| self.events_seen.checked_sub(told).unwrap_or(self.events_seen));
        self.events.iter().skip(self.events.len().saturating_sub(news))
    }

    /// Nothing more will happen unless somebody resumes the run.
    pub fn over(&self) -> bool {
        let ended = self.current.as_ref().is_some_and(|current| current.freshness == Freshness::Ended);
        ended || self.deserted > TAKE_OVER
    }
}

/// Looks at one run.
pub struct Watcher {
    run: RunDir,
    steps: Follower<Timed<StepRecord>>,
    events: Follower<JobEvent>,
    scene: Scene,
    deserted: Option<Instant>,
}

impl Watcher {
    pub fn new(run: RunDir) -> Self {
        let (steps, events) = (Follower::new(run.metrics()), Follower::new(run.events()));
        Self { run, steps, events, scene: Scene::default(), deserted: None }
    }

    /// The run as it is now.
    ///
    /// # Errors
    /// A file is there and cannot be read.
    pub fn look(&mut self) -> Result<Scene> {
        self.scene.current = status::current(&self.run)?;
        let stale = self.scene.current.as_ref().is_some_and(|current| current.freshness == Freshness::Stale);
        self.deserted = stale.then(|| self.deserted.unwrap_or_else(Instant::now));
        self.scene.deserted = self.deserted.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let steps = self.steps.read().with_context(|| format!("cannot read {}", self.run.metrics().display()))?;
        let events = self.events.read().with_context(|| format!("cannot read {}", self.run.events().display()))?;
        self.take(steps, events);
        self.scene.now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        Ok(self.scene.clone())
    }

    fn take(&mut self, steps: Fresh<Timed<StepRecord>>, events: Fresh<JobEvent>) {
        let scene = &mut self.scene;
        if steps.anew {
            scene.steps.clear();
        }
        scene.steps.extend(steps.values);
        while scene.steps.len() > MOST_STEPS {
            scene.steps = thinned(std::mem::take(&mut scene.steps));
        }
        if events.anew {
            scene.events.clear();
            scene.events_seen = 0;
        }
        scene.events_seen += events.values.len();
        scene.events.extend(events.values);
        let surplus = scene.events.len().saturating_sub(MOST_EVENTS);
        scene.events.drain(..surplus);
    }
}

/// Every second one of the older steps.
fn thinned(steps: Vec<Timed<StepRecord>>) -> Vec<Timed<StepRecord>> {
    let older = steps.len().saturating_sub(NEWEST);
    steps.into_iter().enumerate().filter(|(place, _)| *place >= older || place % 2 == 0).map(|(_, step)| step).collect()
}

#[cfg(test)]
mod tests {
    use learn_domain::Step;

    use super::*;

    fn steps(range: std::ops::RangeInclusive<u64>) -> Vec<Timed<StepRecord>> {
        let value = |step| StepRecord { step: Step(step), ..StepRecord::default() };
        range.map(|step| Timed { time: Some(step as f64), value: value(step) }).collect()
    }

    #[test]
    fn a_long_run_keeps_its_newest_steps_and_a_rewritten_one_begins_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut watcher = Watcher::new(RunDir::new(folder.path()));
        let none = || Fresh { values: Vec::new(), anew: false };
        watcher.take(Fresh { values: steps(1..=100_000), anew: false }, none());
        let kept = &watcher.scene.steps;
        assert!(kept.len() <= MOST_STEPS && kept.len() > MOST_STEPS / 3, "{}", kept.len());
        let newest: Vec<u64> = kept.iter().rev().take(NEWEST).map(|step| step.value.step.0).collect();
        assert_eq!(newest, (99_001..=100_000).rev().collect::<Vec<_>>());
        assert_eq!(kept[0].value.step, Step(1), "the start of the curve stays");
        watcher.take(Fresh { values: steps(1..=3), anew: true }, none());
        assert_eq!(watcher.scene.steps, steps(1..=3));
    }
}
