//! A run at one moment, read from its coordinator and its files.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use learn_domain::event::JobEvent;
use learn_domain::ids::{Step, WorkerId};
use learn_domain::report::{JobState, StepRecord, Timed};
use learn_domain::run_dir::{self, RunDir};

use super::gauges::Gauges;
use crate::commands::status::{self, Current};
use crate::lines::{Follower, Fresh};
use crate::render::Freshness;
use crate::runs;
use crate::slurm::queue::{Inquiry, Queue};

/// Steps that are kept one by one for the curve; of more, older ones go.
const MOST_STEPS: usize = 20_000;
/// Steps that stay when older ones go.
const NEWEST: usize = 1_000;
/// Another coordinator takes over from one that was killed well within so many seconds.
const TAKE_OVER: f64 = 10.0;
/// A coordinator that lives writes its status each second; other machines see that within so many seconds.
const SILENCE: f64 = 60.0;
/// Events that are kept.
const MOST_EVENTS: usize = 200;
/// Pause between two looks at the folder of checkpoints while no new one is known.
const FOLDER_PAUSE: Duration = Duration::from_secs(5);

/// Everything that is known now.
#[derive(Clone, Debug, Default)]
pub struct Scene {
    /// None until the coordinator has come that far.
    pub current: Option<Current>,
    /// The job's place in Slurm's queue, asked for where no coordinator answers; `None` too if it is no job of Slurm's.
    pub queue: Option<Queue>,
    /// For so many seconds no coordinator was there, though the job has not ended; or, where nobody can tell whether one is,
    /// the status has stood still.
    pub deserted: f64,
    /// In their order; of a long run older ones are missing here and there.
    pub steps: Vec<Timed<StepRecord>>,
    pub events: Vec<JobEvent>,
    /// Events of the run so far, those that are not kept any more included.
    pub events_seen: usize,
    /// Those on disk, oldest first.
    pub checkpoints: Vec<Kept>,
    /// What the processes of ranks say of themselves; only a screen asks them.
    pub gauges: BTreeMap<WorkerId, Gauges>,
    /// What the run's configuration says; none before it could be read.
    pub settings: Option<Settings>,
    /// Seconds since the Unix epoch.
    pub now: f64,
}

/// A checkpoint on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    pub step: Step,
    /// When it was renamed into place, in seconds since the Unix epoch.
    pub time: f64,
    pub bytes: u64,
}

/// What of a configuration says how the rest is to be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `checkpoint.metric`: what the best checkpoint is best by.
    pub metric: String,
    /// `cluster.heartbeat_timeout`: who is silent for longer is lost.
    pub heartbeat_timeout: Duration,
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
        let Some(Current { status, freshness, .. }) = &self.current else {
            // without a queue to ask, the coordinator may yet come
            return self.queue.as_ref().is_some_and(|queue| queue.ended());
        };
        let patience = if *freshness == Freshness::Unknown { SILENCE } else { TAKE_OVER };
        let ended = *freshness == Freshness::Ended || self.deserted > patience;
        // a job that has stopped may be on its way back into the queue
        let goes_back = status.state != JobState::Finished && self.queue.as_ref().is_some_and(Queue::may_go_on);
        ended && !goes_back
    }
}

/// No coordinator is there, or nobody can tell, and the status is the one that was there before.
fn is_deserted(before: Option<&Current>, now: Option<&Current>) -> bool {
    now.is_some_and(|now| match now.freshness {
        Freshness::Stale => true,
        Freshness::Unknown => before.is_some_and(|before| before.status == now.status),
        Freshness::Live | Freshness::Ended | Freshness::Queued => false,
    })
}

/// Looks at one run.
pub struct Watcher {
    run: RunDir,
    inquiry: Inquiry,
    steps: Follower<Timed<StepRecord>>,
    events: Follower<JobEvent>,
    scene: Scene,
    deserted: Option<Instant>,
    /// The last checkpoint that was known when their folder was read, and when that was.
    listed: Option<(Option<Step>, Instant)>,
}

impl Watcher {
    pub fn new(run: RunDir) -> Self {
        let (steps, events) = (Follower::new(run.metrics()), Follower::new(run.events()));
        Self { run, inquiry: Inquiry::default(), steps, events, scene: Scene::default(), deserted: None, listed: None }
    }

    /// The name of the run directory.
    pub fn name(&self) -> String {
        self.run.root().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The run as it is now.
    ///
    /// # Errors
    /// A file is there and cannot be read.
    pub fn look(&mut self) -> Result<Scene> {
        let current = status::current(&self.run, &mut self.inquiry)?;
        let deserted = is_deserted(self.scene.current.as_ref(), current.as_ref());
        self.deserted = deserted.then(|| self.deserted.unwrap_or_else(Instant::now));
        self.scene.current = current;
        let live = self.scene.current.as_ref().is_some_and(|current| current.freshness == Freshness::Live);
        self.scene.queue = if live { None } else { self.inquiry.of(&self.run) };
        self.scene.deserted = self.deserted.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let steps = self.steps.read().with_context(|| format!("cannot read {}", self.run.metrics().display()))?;
        let events = self.events.read().with_context(|| format!("cannot read {}", self.run.events().display()))?;
        self.take(steps, events);
        self.list_checkpoints();
        if self.scene.settings.is_none() {
            self.scene.settings = runs::config(&self.run).ok().map(|config| Settings {
                metric: config.checkpoint.metric,
                heartbeat_timeout: config.cluster.heartbeat_timeout.0,
            });
        }
        self.scene.now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        Ok(self.scene.clone())
    }

    /// Reads the folder of checkpoints when there is a new one, and now and then for those that went.
    fn list_checkpoints(&mut self) {
        let last = self.scene.current.as_ref().and_then(|current| current.status.last_checkpoint);
        if self.listed.is_some_and(|(known, at)| known == last && at.elapsed() < FOLDER_PAUSE) {
            return;
        }
        self.listed = Some((last, Instant::now()));
        self.scene.checkpoints = kept(&self.run);
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

/// The checkpoints of a run, oldest first; one that goes meanwhile is none.
fn kept(run: &RunDir) -> Vec<Kept> {
    let entries = fs::read_dir(run.checkpoints()).into_iter().flatten().flatten();
    let one = |entry: fs::DirEntry| {
        let step = run_dir::checkpoint_step(entry.file_name().to_str()?)?;
        let changed = entry.metadata().and_then(|facts| facts.modified()).ok()?;
        let files = fs::read_dir(entry.path()).ok()?.flatten();
        let bytes = files.filter_map(|file| file.metadata().ok()).map(|facts| facts.len()).sum();
        let time = changed.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        Some(Kept { step, time, bytes })
    };
    let mut kept: Vec<_> = entries.filter_map(one).collect();
    kept.sort_by_key(|kept| kept.step);
    kept
}

/// Every second one of the older steps.
fn thinned(steps: Vec<Timed<StepRecord>>) -> Vec<Timed<StepRecord>> {
    let older = steps.len().saturating_sub(NEWEST);
    steps.into_iter().enumerate().filter(|(place, _)| *place >= older || place % 2 == 0).map(|(_, step)| step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slurm::client::Queued;
    use crate::slurm::run::SlurmJob;

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

    #[test]
    fn checkpoints_are_those_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        assert_eq!(kept(&run), []);
        for step in [20, 10] {
            fs::create_dir_all(run.checkpoint(Step(step))).unwrap();
            fs::write(run.checkpoint(Step(step)).join("model.safetensors"), vec![0; 700]).unwrap();
            fs::write(run.checkpoint(Step(step)).join("checkpoint.json"), vec![0; 11]).unwrap();
        }
        fs::create_dir(run.checkpoints().join("step-0000000030.tmp")).unwrap();
        fs::write(run.best(), "{}").unwrap();
        let found = kept(&run);
        assert_eq!(found.iter().map(|kept| (kept.step.0, kept.bytes)).collect::<Vec<_>>(), [(10, 711), (20, 711)]);
        assert!(found.iter().all(|kept| kept.time > 1.6e9));
        // a look finds the folder again when another checkpoint is known, or some time has passed
        let mut watcher = Watcher::new(run.clone());
        watcher.list_checkpoints();
        fs::remove_dir_all(run.checkpoint(Step(10))).unwrap();
        watcher.list_checkpoints();
        assert_eq!(watcher.scene.checkpoints.len(), 2);
        watcher.listed = watcher.listed.map(|(_, at)| (Some(Step(30)), at));
        watcher.list_checkpoints();
        assert_eq!(watcher.scene.checkpoints.len(), 1);
    }

    #[test]
    fn a_job_of_slurm_is_over_when_slurm_has_done_with_it() {
        let queue = |state: &str| {
            let known = Queued { job_id: 12, state: state.into(), ..Queued::default() };
            Some(Queue { job: SlurmJob { job_id: 12 }, known: Ok(Some(known)) })
        };
        let at = |state: Option<(JobState, Freshness)>, queue: Option<Queue>| {
            let mut scene = super::super::tests::scene();
            scene.current = scene.current.take().zip(state).map(|(mut current, (state, freshness))| {
                (current.status.state, current.freshness) = (state, freshness);
                current
            });
            Scene { queue, deserted: 0.0, ..scene }
        };
        let stopped = || Some((JobState::Stopped, Freshness::Ended));
        assert!(at(stopped(), None).over());
        assert!(!at(stopped(), queue("COMPLETING")).over(), "it may be on its way back into the queue");
        assert!(!at(Some((JobState::Stopped, Freshness::Queued)), queue("PENDING")).over(), "it will go on");
        assert!(at(stopped(), queue("CANCELLED")).over());
        assert!(at(Some((JobState::Finished, Freshness::Ended)), queue("COMPLETING")).over());
        assert!(!at(None, queue("PENDING")).over() && !at(None, None).over());
        assert!(at(None, queue("CANCELLED")).over(), "it was cancelled before it had a status");
        let stale = || Some((JobState::Running, Freshness::Stale));
        assert!(Scene { deserted: TAKE_OVER + 1.0, ..at(stale(), queue("NODE_FAIL")) }.over());
        assert!(!Scene { deserted: TAKE_OVER + 1.0, ..at(stale(), queue("COMPLETING")) }.over());
        let unknown = || Some((JobState::Running, Freshness::Unknown));
        assert!(!Scene { deserted: TAKE_OVER + 1.0, ..at(unknown(), None) }.over(), "it may be slow to be seen");
        assert!(Scene { deserted: SILENCE + 1.0, ..at(unknown(), None) }.over());
    }

    #[test]
    fn a_job_of_which_nobody_can_tell_is_deserted_once_its_status_stands_still() {
        let at = |freshness, seconds| {
            let mut current = super::super::tests::scene().current.unwrap();
            (current.freshness, current.status.seconds) = (freshness, seconds);
            current
        };
        let deserted = |before: Option<Current>, now: Current| is_deserted(before.as_ref(), Some(&now));
        let unknown = |seconds| at(Freshness::Unknown, seconds);
        assert!(deserted(Some(unknown(1.0)), unknown(1.0)));
        assert!(!deserted(Some(unknown(1.0)), unknown(2.0)), "somebody writes it");
        assert!(!deserted(None, unknown(1.0)), "it is the first look");
        assert!(deserted(None, at(Freshness::Stale, 1.0)) && !deserted(None, at(Freshness::Live, 1.0)));
        assert!(!is_deserted(None, None));
    }
}
