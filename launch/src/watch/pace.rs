//! How long a job still takes.

use learn_domain::report::JobStatus;

use super::scene::Scene;
use crate::commands::status::Current;
use crate::render::Freshness;

/// Steps whose mean is the pace, at least.
const WINDOW: usize = 50;

/// Seconds until the last step, as the wall clock of the newest steps says: evaluations and checkpoints between them count.
pub fn remaining(scene: &Scene) -> Option<f64> {
    let Current { status, freshness, .. } = scene.current.as_ref()?;
    let last = status.last_step.as_ref()?;
    if *freshness != Freshness::Live || status.state.ended() {
        return None;
    }
    let left = status.total_steps.saturating_sub(last.step.0) as f64;
    Some(left * step_seconds(scene, status)?)
}

/// Mean wall-clock seconds of a step of this session, over an epoch at least so that its evaluation is in it.
fn step_seconds(scene: &Scene, status: &JobStatus) -> Option<f64> {
    let started = scene.now - status.seconds;
    let window = WINDOW.max(usize::try_from(status.steps_per_epoch).unwrap_or(usize::MAX));
    let newest: Vec<_> = scene.steps.iter().rev().take(window.saturating_add(1)).collect();
    let mut ours =
        newest.iter().filter_map(|step| Some((step.value.step.0, step.time.filter(|time| *time >= started)?)));
    if let (Some(to), Some(from)) = (ours.next(), ours.next_back())
        && to.0 > from.0
        && to.1 > from.1
    {
        return Some((to.1 - from.1) / (to.0 - from.0) as f64);
    }
    newest.first().map(|step| step.value.seconds)
}
