//! What the screen shows, as a pure function of a [`Scene`].
//!
//! Input: a scene, and whether its newest steps alone are wanted. Output: a [`View`], in words and numbers that only have to
//! be placed. Invariants: what somebody should look at comes first; nothing is said by colour alone ([`Tone::mark`]).

mod curves;
mod ranks;

use std::collections::BTreeMap;

pub use curves::{Curve, Rate};
use learn_domain::event::{Happening, JobEvent};
use learn_domain::report::{Evaluation, JobState, JobStatus, Split};
pub use ranks::RankRow;

use super::pace::remaining;
use super::scene::{Kept, Scene};
use crate::commands::status::Current;
use crate::render::{self, Freshness};

/// Metrics that are shown of an evaluation, as far as it has them, after the one that the best checkpoint is best by.
const METRICS: [&str; 6] = ["recall@10", "ndcg@10", "mrr", "hr@10", "auc", "cvr.auc"];
/// Columns of metrics.
const COLUMNS: usize = 3;

/// How something looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tone {
    /// Of no interest any more.
    Faint,
    #[default]
    Plain,
    Good,
    Warn,
    Bad,
}

impl Tone {
    /// The same without colour.
    pub fn mark(self) -> &'static str {
        match self {
            Self::Faint => "·",
            Self::Plain => " ",
            Self::Good => "●",
            Self::Warn => "▲",
            Self::Bad => "✖",
        }
    }
}

/// The screen, in words and numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    pub name: String,
    pub state: String,
    pub tone: Tone,
    /// Generation, workers, dataset: the most important first.
    pub facts: Vec<String>,
    pub running_for: String,
    /// What somebody should look at now.
    pub alarm: Option<String>,
    /// From 0 to 1.
    pub progress: f64,
    pub steps: String,
    pub epoch: String,
    pub left: String,
    pub loss: Curve,
    pub held_out: Curve,
    pub figures: Vec<(&'static str, String)>,
    pub rates: Vec<Rate>,
    /// Those that somebody should look at first.
    pub ranks: Vec<RankRow>,
    pub metrics: Vec<String>,
    /// Newest first.
    pub evaluations: Vec<EvaluationRow>,
    /// Newest first.
    pub checkpoints: Vec<CheckpointRow>,
    /// Newest first.
    pub events: Vec<EventRow>,
    /// Nothing more will happen.
    pub over: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvaluationRow {
    pub name: String,
    /// One for each of [`View::metrics`].
    pub values: Vec<String>,
    pub best: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct CheckpointRow {
    pub step: String,
    pub size: String,
    pub ago: String,
    pub best: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct EventRow {
    pub ago: String,
    pub text: String,
    pub tone: Tone,
}

/// The screen of a scene; with `newest` its curves begin where the newest part of the run does.
pub fn view(name: &str, scene: &Scene, newest: bool) -> View {
    let curves = curves::all(scene, newest);
    let events = scene.events.iter().rev().map(|event| event_row(event, scene.now)).collect();
    let Some(Current { status, freshness, trouble, .. }) = &scene.current else {
        return View {
            name: name.into(),
            state: "starting".into(),
            tone: Tone::Warn,
            steps: "waiting for its coordinator; the dataset is checked first".into(),
            loss: curves.loss,
            held_out: curves.held_out,
            events,
            ..View::default()
        };
    };
    let (state, tone) = state(status, *freshness);
    let done = status.last_step.as_ref().map_or(0, |step| step.step.0);
    let best = scene.settings.as_ref().map(|settings| settings.metric.as_str());
    let (metrics, evaluations) = evaluations(status, best);
    View {
        name: status.name.clone(),
        state,
        tone,
        facts: facts(status),
        running_for: format!("{} {}", if *freshness == Freshness::Live { "up" } else { "ran" }, span(status.seconds)),
        alarm: alarm(status, trouble.as_deref(), *freshness),
        progress: if status.total_steps > 0 { (done as f64 / status.total_steps as f64).min(1.0) } else { 0.0 },
        steps: format!("step {} of {}", render::count(done), render::count(status.total_steps)),
        epoch: epoch(status),
        left: remaining(scene).map(|seconds| format!("{} left", span(seconds))).unwrap_or_default(),
        loss: curves.loss,
        held_out: curves.held_out,
        figures: figures(status),
        rates: curves.rates,
        ranks: ranks::rows(status, scene),
        metrics,
        evaluations,
        checkpoints: checkpoints(&scene.checkpoints, status, scene.now),
        events,
        over: scene.over(),
    }
}

fn state(status: &JobStatus, freshness: Freshness) -> (String, Tone) {
    let name = status.state.name();
    if freshness == Freshness::Stale {
        return (format!("{name}, stale"), Tone::Bad);
    }
    let tone = match status.state {
        JobState::Running | JobState::Finished => Tone::Good,
        JobState::Gathering | JobState::Regrouping | JobState::Stopping | JobState::Stopped => Tone::Warn,
        JobState::Failed => Tone::Bad,
    };
    (name.into(), tone)
}

fn facts(status: &JobStatus) -> Vec<String> {
    let JobStatus { dataset, generation, world_size, wanted_workers, restarts, .. } = status;
    let mut workers = render::workers(*world_size as usize);
    if ![0, *world_size].contains(wanted_workers) {
        workers += &format!(" of {wanted_workers} wanted");
    }
    let mut facts = vec![format!("generation {generation}"), workers];
    if *restarts > 0 {
        facts.push(format!("restart {restarts}"));
    }
    let (users, items) = (render::count(dataset.users), render::count(dataset.items.into()));
    facts.push(format!("{}: {users} users, {items} items", dataset.name));
    facts
}

fn alarm(status: &JobStatus, trouble: Option<&str>, freshness: Freshness) -> Option<String> {
    if freshness == Freshness::Stale {
        return Some("its coordinator is gone; `learn-launch resume` continues the job".into());
    }
    let stall = status.stall.as_ref().map(|stall| format!("stands still: {stall}"));
    stall.or_else(|| status.cause.clone()).or_else(|| trouble.map(str::to_owned))
}

fn epoch(status: &JobStatus) -> String {
    let epochs = status.total_steps.div_ceil(status.steps_per_epoch.max(1));
    status.last_step.as_ref().map(|step| format!("epoch {} of {epochs}", step.epoch + 1)).unwrap_or_default()
}

/// Seconds without their tenths, which would only flicker.
fn span(seconds: f64) -> String {
    if (0.0..60.0).contains(&seconds) { format!("{seconds:.0}s") } else { render::duration(seconds) }
}

fn figures(status: &JobStatus) -> Vec<(&'static str, String)> {
    let Some(last) = &status.last_step else { return Vec::new() };
    let mut figures = vec![("loss", format!("{:.4}", last.loss))];
    figures.extend(last.cvr_loss.map(|cvr| ("CVR loss", format!("{cvr:.4}"))));
    figures.extend([
        ("accuracy", format!("{:.4}", last.accuracy)),
        ("learning rate", format!("{:.2e}", last.learning_rate)),
        ("gradient norm", format!("{:.3}", last.gradient_norm)),
        ("step time", seconds(last.seconds)),
        ("padding", format!("{:.1} %", 100.0 * last.padding_share)),
    ]);
    figures
}

/// A part of a step.
fn seconds(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.0} ms", 1000.0 * seconds) } else { format!("{seconds:.2} s") }
}

/// The first metrics that there are, `first` before all, and a row for each evaluation.
fn evaluations(status: &JobStatus, first: Option<&str>) -> (Vec<String>, Vec<EvaluationRow>) {
    let has = |name: &&str| status.evaluations.iter().any(|evaluation| evaluation.metrics.contains_key(*name));
    let others = METRICS.into_iter().filter(|name| first != Some(*name));
    let metrics: Vec<String> = first.into_iter().chain(others).filter(has).take(COLUMNS).map(str::to_owned).collect();
    let value = |values: &BTreeMap<String, f64>, name: &String| {
        values.get(name).map_or("-".to_owned(), |value| format!("{value:.4}"))
    };
    let row = |evaluation: &Evaluation| EvaluationRow {
        name: format!("{} {}", evaluation.split, render::count(evaluation.step.0)),
        values: metrics.iter().map(|name| value(&evaluation.metrics, name)).collect(),
        best: evaluation.split == Split::Valid && is_best(status, evaluation.step.0),
    };
    let rows = status.evaluations.iter().rev().map(row).collect();
    (metrics, rows)
}

fn is_best(status: &JobStatus, step: u64) -> bool {
    status.best.as_ref().is_some_and(|best| best.step.0 == step)
}

fn checkpoints(kept: &[Kept], status: &JobStatus, now: f64) -> Vec<CheckpointRow> {
    let row = |kept: &Kept| CheckpointRow {
        step: render::count(kept.step.0),
        size: render::bytes(kept.bytes),
        ago: ago(now - kept.time),
        best: is_best(status, kept.step.0),
    };
    kept.iter().rev().map(row).collect()
}

fn ago(seconds: f64) -> String {
    format!("{} ago", span(seconds.max(0.0)))
}

fn event_row(event: &JobEvent, now: f64) -> EventRow {
    let tone = match &event.happening {
        Happening::NonFinite { .. }
        | Happening::CheckpointFailed { .. }
        | Happening::WorkerLost { .. }
        | Happening::NewcomerLost { .. }
        | Happening::LedgerInexact(..)
        | Happening::Stalled { .. } => Tone::Bad,
        Happening::Lagging { .. }
        | Happening::CheckpointSkipped { .. }
        | Happening::MetricMissing { .. }
        | Happening::Regrouping { .. }
        | Happening::Restarted { .. }
        | Happening::TakenOver => Tone::Warn,
        Happening::Formed { .. } | Happening::KeepsUp { .. } => Tone::Good,
        Happening::WorkerDismissed { .. } => Tone::Plain,
    };
    EventRow { ago: ago(now - event.time), text: event.happening.to_string(), tone }
}

#[cfg(test)]
mod tests;
