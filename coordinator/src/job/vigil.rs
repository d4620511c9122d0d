//! Watching a job's progress: whom it stands still for, who lags, and whether its ledger stays exact.
//!
//! Input: finished steps, each rank's own work, heartbeats. Output: what is to be noted, and the loss of a rank that holds
//! the others up for twice the deadline. `learn_domain::progress` has the rules.

use std::time::Duration;

use learn_domain::event::Happening;
use learn_domain::membership::{Effect, Event, State};
use learn_domain::progress::{Cause, Lag, Pace, Stall, Whereabouts, Work, stall};
use learn_domain::{Rank, WorkerId};

use super::{Job, Worker};

/// Heartbeats that a rank may owe before it counts as silent.
const HEARTBEATS: u32 = 3;

/// What the job remembers of its progress.
#[derive(Debug, Default)]
pub(super) struct Vigil {
    pace: Pace,
    lag: Lag,
    /// When a step was finished, or something else that takes its time was under way.
    moved: Duration,
    stall: Option<Stall>,
    /// What has happened and is to be noted.
    notices: Vec<Happening>,
}

impl Vigil {
    /// A step was finished.
    pub(super) fn moved(&mut self, now: Duration) {
        self.moved = now;
        self.stall = None;
    }

    /// A generation was formed.
    pub(super) fn begin(&mut self, now: Duration) {
        self.moved(now);
        self.lag.clear();
    }

    /// The whole batch took so long.
    pub(super) fn paced(&mut self, seconds: f64) {
        self.pace.add(seconds);
    }

    /// A rank has done its part of a step.
    pub(super) fn worked(&mut self, rank: Rank, work: Work, on_gpu: bool) {
        let Some(change) = self.lag.add(rank, work) else { return };
        let ratio = change.ratio;
        self.notices.push(if change.lags {
            let computes = if on_gpu { Cause::Device } else { Cause::Host };
            let cause = if change.waits_for_data { Cause::Data } else { computes };
            Happening::Lagging { rank, ratio, cause }
        } else {
            Happening::KeepsUp { rank, ratio }
        });
    }

    pub(super) fn stall(&self) -> Option<&Stall> {
        self.stall.as_ref()
    }

    pub(super) fn work_ratio(&self, rank: Rank) -> Option<f64> {
        self.lag.ratio(rank)
    }
}

impl Job {
    /// What is to be noted since the last call.
    pub fn take_notices(&mut self) -> Vec<Happening> {
        let mut notices = std::mem::take(&mut self.vigil.notices);
        let known = notices.len();
        notices.extend(self.books.faults().skip(self.faults_told).map(Happening::LedgerInexact));
        self.faults_told += notices.len() - known;
        notices
    }

    /// Each rank's own work, divided by the median of all, as far as there is enough to say so.
    pub fn work_ratios(&self) -> impl Iterator<Item = (Rank, f64)> {
        let ranks = (0..self.membership.world_size()).map(Rank);
        ranks.filter_map(|rank| Some((rank, self.vigil.work_ratio(rank)?)))
    }

    /// Names the rank that nothing moves for, and loses it when that lasts.
    pub(super) fn watch_progress(&mut self, now: Duration) -> Vec<Effect> {
        let cluster = &self.settings.config.cluster;
        let Some(deadline) = self.vigil.pace.deadline(cluster.progress_timeout.0) else { return Vec::new() };
        let silent = HEARTBEATS * cluster.heartbeat_interval.0;
        let ranks = match self.membership.state() {
            State::Running { .. } => self.whereabouts(now, silent),
            _ => Vec::new(),
        };
        let Some(stall) = stall(&ranks) else {
            self.vigil.moved(now);
            return Vec::new();
        };
        let still = now.saturating_sub(self.vigil.moved);
        let seconds = still.as_secs();
        if still > deadline && self.vigil.stall.as_ref() != Some(&stall) {
            self.vigil.notices.push(Happening::Stalled { stall: stall.clone(), seconds });
            self.vigil.stall = Some(stall.clone());
        }
        match stall.guilty {
            Some((worker, _)) if still > 2 * deadline => {
                self.take(now, Event::Stalled { worker, phase: stall.phase, seconds })
            }
            _ => Vec::new(),
        }
    }

    /// Where the participants are.
    fn whereabouts(&self, now: Duration, silent: Duration) -> Vec<Whereabouts> {
        let members = self.membership.members().into_iter().flatten();
        let place = |(&id, member): (&WorkerId, &learn_domain::membership::Member)| {
            let rank = member.rank.filter(|_| member.takes_part())?;
            let worker: &Worker = self.workers.get(&id)?;
            Some(Whereabouts {
                worker: id,
                rank,
                gpu: worker.on_gpu(),
                step: worker.step,
                entered: worker.entered,
                inside: worker.inside,
                phase: worker.phase,
                silent: now.saturating_sub(worker.seen) > silent,
            })
        };
        members.filter_map(place).collect()
    }
}
