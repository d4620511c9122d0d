//! What has changed since it was last told: lines for people, or JSON lines.

use learn_domain::report::{Evaluation, JobStatus};
use serde_json::json;

use super::pace::remaining;
use super::scene::Scene;
use crate::commands::status::Current;
use crate::render::{self, Freshness};

/// Seconds between two lines about steps alone.
const STEP_INTERVAL: f64 = 10.0;

/// What was told last.
#[derive(Debug, Default)]
pub struct Told {
    last: Option<Known>,
    /// The step that had the last line about steps, its epoch, and when that was.
    step: Option<(u64, u32, f64)>,
    /// That there is no status yet, and why.
    waiting: Option<String>,
}

/// What is worth a line.
#[derive(Clone, Debug, PartialEq)]
struct Known {
    state: (&'static str, &'static str),
    generation: u64,
    world_size: u32,
    step: u64,
    checkpoint: Option<u64>,
    evaluations: Vec<Evaluation>,
    stall: Option<String>,
    events: usize,
}

impl Known {
    fn new(status: &JobStatus, freshness: Freshness, scene: &Scene) -> Self {
        Self {
            state: (status.state.name(), freshness.name()),
            generation: status.generation.0,
            world_size: status.world_size,
            step: status.last_step.as_ref().map_or(0, |step| step.step.0),
            checkpoint: status.last_checkpoint.map(|step| step.0),
            evaluations: status.evaluations.clone(),
            stall: status.stall.clone(),
            events: scene.events_seen,
        }
    }
}

impl Told {
    /// A line for each thing that is new.
    pub fn lines(&mut self, scene: &Scene) -> Vec<String> {
        let mut lines = Vec::new();
        let Some(Current { status, freshness, .. }) = &scene.current else {
            let waiting = match &scene.queue {
                Some(queue) if queue.waits() || queue.ended() => format!("Slurm's {}", queue.describe()),
                _ => "the job has no status yet; waiting for its coordinator".to_owned(),
            };
            if self.waiting.as_ref() != Some(&waiting) {
                lines.push(waiting.clone());
                self.waiting = Some(waiting);
            }
            return lines;
        };
        let known = Known::new(status, *freshness, scene);
        let before = self.last.replace(known.clone());
        let before = before.as_ref();
        let changed = before.is_none_or(|before| before.state != known.state);
        let state = changed.then(|| state(status, *freshness));
        // the end is said after what came before it
        let (begins, ends) = if status.state.ended() { (None, state) } else { (state, None) };
        lines.extend(begins);
        // those that were there before the first look are history
        lines.extend(scene.newest_events(before.map(|before| before.events)).map(|event| event.happening.to_string()));
        if before.is_none_or(|before| before.stall != known.stall) {
            lines.extend(status.stall.as_ref().map(|stall| format!("stands still: {stall}")));
        }
        let evaluations = before.map(|before| before.evaluations.as_slice()).unwrap_or_default();
        lines.extend(render::newer(evaluations, status).iter().map(render::evaluation));
        if before.is_none_or(|before| before.checkpoint != known.checkpoint) {
            lines.extend(known.checkpoint.map(|step| format!("checkpoint of step {}", render::count(step))));
        }
        if let Some(record) = &status.last_step {
            let due = |(step, epoch, at)| {
                step != known.step && (epoch != record.epoch || changed || scene.now - at >= STEP_INTERVAL)
            };
            if self.step.is_none_or(due) {
                let left = remaining(scene).map(|left| format!(", {} left", render::duration(left)));
                let (done, total) = (render::count(known.step), render::count(status.total_steps));
                lines.push(format!("step {done} of {total}: {}{}", render::step(record), left.unwrap_or_default()));
                self.step = Some((known.step, record.epoch, scene.now));
            }
        }
        lines.extend(ends);
        lines
    }

    /// One JSON object if anything is new: the status, its `freshness`, the `time`, the `seconds_left`, and the `events`
    /// that have come.
    pub fn json(&mut self, scene: &Scene) -> Option<String> {
        let Current { status, freshness, .. } = scene.current.as_ref()?;
        let known = Known::new(status, *freshness, scene);
        let before = self.last.replace(known.clone());
        if before.as_ref() == Some(&known) {
            return None;
        }
        let mut value = serde_json::to_value(status).ok()?;
        value["freshness"] = freshness.name().into();
        value["time"] = scene.now.into();
        value["events"] = json!(scene.newest_events(before.map(|before| before.events)).collect::<Vec<_>>());
        value["seconds_left"] = json!(remaining(scene));
        Some(value.to_string())
    }
}

/// The state of a job, and why it is so.
fn state(status: &JobStatus, freshness: Freshness) -> String {
    let cause = status.cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default();
    let whence = match freshness {
        Freshness::Stale => " (stale: its coordinator is gone)",
        Freshness::Queued => " (waits in the queue of its scheduler)",
        Freshness::Unknown => " (its coordinator was on another machine, and may be there still)",
        Freshness::Live | Freshness::Ended => "",
    };
    format!("{}: {}{whence}{cause}", status.name, status.state.name())
}

#[cfg(test)]
mod tests {
    use learn_domain::Step;
    use learn_domain::report::JobState;

    use super::super::tests::{evaluation, scene};
    use super::*;

    /// The scene some steps and seconds later.
    fn later(before: &Scene, steps: u64, seconds: f64) -> Scene {
        let mut scene = before.clone();
        scene.now += seconds;
        let last = scene.current.as_mut().unwrap().status.last_step.as_mut().unwrap();
        last.step = Step(last.step.0 + steps);
        scene
    }

    #[test]
    fn a_line_comes_when_something_changes_and_steps_now_and_then() {
        let mut told = Told::default();
        assert_eq!(told.lines(&Scene::default()).len(), 1, "that it waits is said once");
        assert_eq!(told.lines(&Scene::default()).len(), 0);
        let first = scene();
        let lines = told.lines(&first);
        assert_eq!(lines[0], "shop: running");
        assert!(lines.iter().any(|line| line.starts_with("stands still: rank 1")), "{lines:?}");
        assert!(lines.last().unwrap().starts_with("step 1,200 of 4,000: epoch 3 loss "), "{lines:?}");
        assert!(!lines.iter().any(|line| line.contains("was formed")), "what is history is not told: {lines:?}");
        assert_eq!(told.lines(&first), Vec::<String>::new(), "nothing has changed");
        let next = later(&first, 1, 1.0);
        assert_eq!(told.lines(&next), Vec::<String>::new(), "a step alone waits");
        let next = later(&next, 30, 10.0);
        assert!(told.lines(&next)[0].starts_with("step 1,231 of 4,000"));
        let mut next = later(&next, 1, 0.1);
        next.current.as_mut().unwrap().status.state = JobState::Regrouping;
        next.events.push(first.events[0].clone());
        next.events_seen += 1;
        let lines = told.lines(&next);
        assert_eq!(lines[..2], ["shop: regrouping".to_owned(), first.events[0].happening.to_string()]);
        next.current.as_mut().unwrap().freshness = Freshness::Stale;
        assert!(told.lines(&next)[0].contains("its coordinator is gone"));
        let mut next = later(&next, 20, 11.0);
        next.current.as_mut().unwrap().status.state = JobState::Finished;
        let lines = told.lines(&next);
        assert!(lines[0].starts_with("step 1,252 of 4,000"), "{lines:?}");
        assert!(lines.last().unwrap().starts_with("shop: finished"), "the end is the last line: {lines:?}");
    }

    #[test]
    fn evaluations_are_told_once_although_a_status_has_the_newest_alone() {
        let mut told = Told::default();
        let mut scene = scene();
        let mut lines = |steps: &[u64]| {
            let status = &mut scene.current.as_mut().unwrap().status;
            status.evaluations = steps.iter().map(|&step| evaluation(step, 0.05)).collect();
            told.lines(&scene).into_iter().filter(|line| line.starts_with("valid at step ")).collect::<Vec<_>>()
        };
        let line = |step: u64| render::evaluation(&evaluation(step, 0.05));
        assert_eq!(lines(&[400, 800]), [400, 800].map(line));
        assert_eq!(lines(&[800, 1200]), [line(1200)], "as many as before");
        assert_eq!(lines(&[800]), Vec::<String>::new(), "another coordinator knows fewer");
        assert_eq!(lines(&[1600, 2000]), [1600, 2000].map(line), "more have come than a status has");
        assert_eq!(lines(&[1600, 2000]), Vec::<String>::new());
    }

    #[test]
    fn json_lines_say_all_there_is_whenever_it_changes() {
        let mut told = Told::default();
        assert_eq!(told.json(&Scene::default()), None);
        let first = scene();
        let parse = |line: Option<String>| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap();
        let value = parse(told.json(&first));
        assert_eq!((&value["freshness"], &value["last_step"]["step"]), (&json!("live"), &json!(1200)));
        assert!(value["seconds_left"].as_f64().unwrap() > 0.0 && value["events"] == json!([]));
        let mut idle = first.clone();
        idle.now += 1.0;
        assert_eq!(told.json(&idle), None);
        let mut next = later(&first, 1, 1.0);
        next.events.push(first.events[0].clone());
        next.events_seen += 1;
        assert_eq!(parse(told.json(&next))["events"].as_array().unwrap().len(), 1);
    }
}
