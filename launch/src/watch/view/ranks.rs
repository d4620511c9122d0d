//! The table of ranks: who needs a look comes first, who has gone for long comes last.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use learn_domain::Phase;
use learn_domain::event::Happening;
use learn_domain::ids::{Rank, WorkerId};
use learn_domain::progress::Cause;
use learn_domain::report::{JobStatus, WorkerStatus};

use super::{Tone, ago, seconds, span};
use crate::render::{self, Freshness};
use crate::watch::scene::Scene;

/// A worker that was lost is shown first for so many seconds.
const NEWS: f64 = 60.0;
/// Most workers that have gone and are still shown.
const MOST_GONE: usize = 8;

/// One worker, in words.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankRow {
    /// Whom to ask for more.
    pub worker: Option<WorkerId>,
    pub metrics_url: String,
    pub rank: String,
    pub host: String,
    pub device: String,
    pub phase: String,
    /// In its phase.
    pub since: String,
    /// The last finished one.
    pub step: String,
    pub step_time: String,
    /// Its own work in a step, without waiting for others.
    pub own_time: String,
    /// Its own work, divided by the median of all, and the cause if it lags.
    pub lag: String,
    pub memory: String,
    pub heard: String,
    pub tone: Tone,
}

pub fn rows(status: &JobStatus, scene: &Scene) -> Vec<RankRow> {
    let seen = Seen::new(status, scene);
    let key = |(tone, worker): &(Tone, &WorkerStatus)| {
        (Reverse(*tone), worker.left, worker.rank.is_none(), worker.rank, Reverse(worker.worker))
    };
    let mut workers: Vec<_> = status.workers.iter().map(|worker| (seen.tone(worker), worker)).collect();
    workers.sort_by_key(key);
    let mut gone = 0;
    workers.retain(|(tone, _)| {
        gone += usize::from(*tone == Tone::Faint);
        *tone != Tone::Faint || gone <= MOST_GONE
    });
    workers.into_iter().map(|(tone, worker)| seen.row(tone, worker)).collect()
}

/// What the events and the configuration say about workers.
struct Seen<'a> {
    scene: &'a Scene,
    stall: Option<&'a str>,
    /// A coordinator hears of the workers now.
    live: bool,
    /// Those that lag, and why.
    lagging: BTreeMap<Rank, Cause>,
    /// Ranks of those that were lost, when they were.
    were: BTreeMap<WorkerId, Rank>,
    /// The step of whoever is ahead.
    ahead: u64,
}

impl<'a> Seen<'a> {
    fn new(status: &'a JobStatus, scene: &'a Scene) -> Self {
        let (mut lagging, mut were) = (BTreeMap::new(), BTreeMap::new());
        for event in &scene.events {
            match &event.happening {
                Happening::Lagging { rank, cause, .. } => {
                    lagging.insert(*rank, *cause);
                }
                Happening::KeepsUp { rank, .. } => {
                    lagging.remove(rank);
                }
                // ranks are given anew
                Happening::Formed { .. } => lagging.clear(),
                Happening::WorkerLost { worker, rank, .. } => {
                    were.insert(*worker, *rank);
                }
                _ => {}
            }
        }
        let there = status.workers.iter().filter(|worker| !worker.left);
        let ahead = there.map(|worker| worker.step.0).max().unwrap_or_default();
        let live = scene.current.as_ref().is_some_and(|now| now.freshness == Freshness::Live && now.age.is_none());
        Self { scene, stall: status.stall.as_deref(), live, lagging, were, ahead }
    }

    fn tone(&self, worker: &WorkerStatus) -> Tone {
        let silent = worker.seconds_since_heartbeat;
        let half = self.scene.settings.as_ref().map(|settings| settings.heartbeat_timeout.as_secs_f64() / 2.0);
        let named = |stall: &str| worker.rank.is_some_and(|rank| stall.starts_with(&format!("rank {rank} ")));
        match (worker.left, worker.phase) {
            (true, Phase::Lost) if silent < NEWS => Tone::Bad,
            (true, _) => Tone::Faint,
            _ if half.is_some_and(|half| silent > half) || self.stall.is_some_and(named) => Tone::Bad,
            _ if worker.rank.is_some_and(|rank| self.lagging.contains_key(&rank)) => Tone::Warn,
            (false, _) => Tone::Plain,
        }
    }

    fn row(&self, tone: Tone, worker: &WorkerStatus) -> RankRow {
        let gauges = self.scene.gauges.get(&worker.worker).copied().filter(|_| !worker.left).unwrap_or_default();
        let lost = worker.phase == Phase::Lost;
        let was = || self.were.get(&worker.worker).filter(|_| lost).map(|rank| format!("was {rank}"));
        let step = render::count(worker.step.0);
        let behind = self.ahead.saturating_sub(worker.step.0);
        let resident = gauges.resident_bytes.map(render::bytes);
        let unknown = || "-".to_owned();
        let there = |text: String| if worker.left { unknown() } else { text };
        let cause = worker.rank.and_then(|rank| self.lagging.get(&rank));
        RankRow {
            worker: (!worker.left).then_some(worker.worker),
            metrics_url: worker.metrics_url.clone(),
            rank: worker.rank.map(|rank| rank.to_string()).or_else(was).unwrap_or_else(unknown),
            host: worker.host.clone(),
            device: worker.device.clone(),
            phase: worker.phase.to_string(),
            since: there(span(worker.seconds_in_phase)),
            step: if behind == 0 || worker.rank.is_none() {
                step
            } else {
                format!("{step} (-{})", render::count(behind))
            },
            step_time: gauges.step_seconds.map_or_else(unknown, seconds),
            own_time: gauges.own_seconds.map_or_else(unknown, seconds),
            lag: match (worker.work_ratio, cause) {
                (Some(ratio), Some(cause)) => format!("{ratio:.2}x {cause}"),
                (Some(ratio), None) => format!("{ratio:.2}x"),
                (None, _) => unknown(),
            },
            memory: match gauges.gpu_bytes.map(render::bytes) {
                Some(gpu) => gpu,
                None => resident.unwrap_or_else(unknown),
            },
            heard: if self.live { ago(worker.seconds_since_heartbeat) } else { unknown() },
            tone,
        }
    }
}
