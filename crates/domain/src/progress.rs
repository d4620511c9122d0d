//! Who hangs and who lags, from the trainer's own progress.
//!
//! Input: what every rank last said of where it is, and how long its own work took in each step. Output: a rank and a kind
//! of cause. What counts is when a rank *entered* a collective, not how long that took: all wait for the slowest, so the
//! time inside makes all ranks look alike. Pure functions; times are passed in.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{Rank, Step, WorkerId};
use crate::phase::Phase;

/// A deadline by itself is so many median steps long,
const MEDIAN_STEPS: u32 = 20;
/// and at least as long as this.
const SHORTEST_DEADLINE: Duration = Duration::from_secs(30);
/// Steps that the median is taken over.
const REMEMBERED: usize = 64;
/// Weight of the newest step in a rank's smoothed work.
const SMOOTHING: f64 = 0.1;
/// A rank lags when its own work takes so many times the median of all ranks,
const LAGS: f64 = 1.5;
/// and no longer when it takes less than this.
const KEEPS_UP: f64 = 1.2;
/// Steps before a score says anything.
const WARM_UP: u32 = 20;

/// What kind of thing holds a rank up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// It waits for its batches.
    Data,
    /// Its process or its host: it does not answer, or computes on the CPU.
    Host,
    /// It computes on a GPU.
    Device,
    /// Everybody is in the same collective, and nothing moves.
    Network,
}

impl Cause {
    pub const ALL: [Self; 4] = [Self::Data, Self::Host, Self::Device, Self::Network];
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Host => "host",
            Self::Device => "device",
            Self::Network => "network",
        })
    }
}

/// Where a rank is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    pub worker: WorkerId,
    pub rank: Rank,
    /// It computes on a GPU.
    pub gpu: bool,
    /// Finished steps.
    pub step: Step,
    /// Collective operations that it has entered in this generation.
    pub entered: u64,
    /// It is inside the last of them.
    pub inside: bool,
    pub phase: Phase,
    /// It was not heard of when it should have been.
    pub silent: bool,
}

impl Whereabouts {
    /// It is at a step, whose length is known by experience.
    fn trains(&self) -> bool {
        !self.phase.takes_its_time()
    }

    fn cause(&self) -> Cause {
        match self.phase {
            Phase::DataWait => Cause::Data,
            _ if self.gpu => Cause::Device,
            _ => Cause::Host,
        }
    }
}

/// What nothing moves for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// The rank that others wait for; none if they all wait, or cannot be heard.
    pub guilty: Option<(WorkerId, Rank)>,
    pub cause: Cause,
    pub phase: Phase,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { guilty, cause, phase } = self;
        match guilty {
            Some((worker, rank)) => {
                write!(f, "rank {rank} (worker {worker}) holds the others up in the phase {phase} (cause: {cause})")
            }
            None => write!(
                f,
                "no rank gets on, and none by itself holds the others up, in the phase {phase} (cause: {cause})"
            ),
        }
    }
}

/// Names the rank that a job stands still for; none if some rank is at something that takes as long as it takes. Who is
/// silent is at nothing, whatever its phase was.
#[must_use]
pub fn stall(ranks: &[Whereabouts]) -> Option<Stall> {
    if let Some(silent) = ranks.iter().filter(|rank| rank.silent).min_by_key(|rank| rank.rank) {
        // when nobody is heard of, none is guilty: they may not reach their coordinator
        let network = ranks.iter().all(|rank| rank.silent);
        let cause = if network { Cause::Network } else { Cause::Host };
        let guilty = (!network).then_some((silent.worker, silent.rank));
        return Some(Stall { guilty, cause, phase: silent.phase });
    }
    if ranks.is_empty() || !ranks.iter().all(Whereabouts::trains) {
        return None;
    }
    // who is furthest behind; of those at the same place one that is not inside the collective yet
    let behind = ranks.iter().min_by_key(|rank| (rank.step, rank.entered, rank.inside, rank.rank))?;
    let ahead = ranks.iter().any(|rank| (rank.step, rank.entered) > (behind.step, behind.entered));
    let others_wait = ranks.iter().any(|rank| rank.inside);
    let phase = behind.phase;
    if behind.inside {
        // it waits as well: if others have gone on, its data does not reach it
        let guilty = ahead.then_some((behind.worker, behind.rank));
        return Some(Stall { guilty, cause: Cause::Network, phase });
    }
    let alone = ranks.len() == 1;
    let guilty = (others_wait || ahead || alone).then_some((behind.worker, behind.rank));
    Some(Stall { guilty, cause: behind.cause(), phase })
}

/// How long a step may take, from the steps before.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    seconds: Vec<f64>,
    next: usize,
}

impl Pace {
    /// A step took so long.
    pub fn add(&mut self, seconds: f64) {
        if self.seconds.len() < REMEMBERED {
            self.seconds.push(seconds);
        } else {
            self.seconds[self.next] = seconds;
        }
        self.next = (self.next + 1) % REMEMBERED;
    }

    /// Within this a step must be finished; none before there was one. `set` is the deadline that somebody has set, or 0.
    #[must_use]
    pub fn deadline(&self, set: Duration) -> Option<Duration> {
        if set > Duration::ZERO {
            return Some(set);
        }
        let median = median(&self.seconds)?;
        Some(Duration::try_from_secs_f64(median * f64::from(MEDIAN_STEPS)).ok()?.max(SHORTEST_DEADLINE))
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().checked_sub(1)? / 2;
    // of an even number the lower one: of two ranks the faster is what the slower is measured by
    sorted.get(middle).copied()
}

/// What a rank did by itself in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Seconds of waiting for batches.
    pub data_seconds: f64,
    /// Seconds of everything else outside collectives.
    pub compute_seconds: f64,
}

/// A rank that began to lag, or keeps up again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    pub rank: Rank,
    pub lags: bool,
    /// Its work, divided by the median of all ranks.
    pub ratio: f64,
    /// Its share that grew: data or compute.
    pub waits_for_data: bool,
}

/// The smoothed work of each rank of a generation.
#[derive(Clone, Debug, Default)]
pub struct Lag {
    ranks: BTreeMap<Rank, (Work, u32)>,
    lagging: BTreeMap<Rank, bool>,
}

impl Lag {
    /// A rank has finished a step; gives what has changed for it.
    pub fn add(&mut self, rank: Rank, work: Work) -> Option<Change> {
        let (smooth, steps) = self.ranks.entry(rank).or_default();
        // a mean first, so that the first steps do not count more than they should
        let weight = SMOOTHING.max(1.0 / f64::from(*steps + 1));
        smooth.data_seconds += weight * (work.data_seconds - smooth.data_seconds);
        smooth.compute_seconds += weight * (work.compute_seconds - smooth.compute_seconds);
        *steps += 1;
        let ratio = self.ratio(rank)?;
        let lags = self.lagging.get(&rank).copied().unwrap_or(false);
        let now = if lags { ratio > KEEPS_UP } else { ratio > LAGS };
        if now == lags {
            return None;
        }
        self.lagging.insert(rank, now);
        let of = |part: fn(&Work) -> f64| {
            let parts: Vec<f64> = self.ranks.values().map(|(work, _)| part(work)).collect();
            self.ranks.get(&rank).map_or(0.0, |(work, _)| part(work)) - median(&parts).unwrap_or(0.0)
        };
        let waits_for_data = of(|work| work.data_seconds) > of(|work| work.compute_seconds);
        Some(Change { rank, lags: now, ratio, waits_for_data })
    }

    /// A rank's work, divided by the median of all ranks; none while there is too little to say so.
    #[must_use]
    pub fn ratio(&self, rank: Rank) -> Option<f64> {
        let total = |work: &Work| work.data_seconds + work.compute_seconds;
        if self.ranks.len() < 2 || self.ranks.values().any(|(_, steps)| *steps < WARM_UP) {
            return None;
        }
        let all: Vec<f64> = self.ranks.values().map(|(work, _)| total(work)).collect();
        let median = median(&all).filter(|median| *median > 0.0)?;
        self.ranks.get(&rank).map(|(work, _)| total(work) / median)
    }

    /// A new generation begins, with other ranks.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(rank: u32, entered: u64, inside: bool, phase: Phase) -> Whereabouts {
        Whereabouts {
            worker: WorkerId(10 + rank),
            rank: Rank(rank),
            gpu: false,
            step: Step(5),
            entered,
            inside,
            phase,
            silent: false,
        }
    }

    fn named(rank: u32, cause: Cause, phase: Phase) -> Option<Stall> {
        Some(Stall { guilty: Some((WorkerId(10 + rank), Rank(rank))), cause, phase })
    }

    #[test]
    fn the_rank_that_has_not_entered_what_others_wait_in_is_named() {
        let waits = |rank| at(rank, 8, true, Phase::Gather);
        assert_eq!(
            stall(&[waits(0), at(1, 7, false, Phase::DataWait), waits(2)]),
            named(1, Cause::Data, Phase::DataWait)
        );
        assert_eq!(
            stall(&[waits(0), waits(1), at(2, 7, false, Phase::Backward)]),
            named(2, Cause::Host, Phase::Backward)
        );
        let on_gpu = Whereabouts { gpu: true, ..at(2, 7, false, Phase::Backward) };
        assert_eq!(stall(&[waits(0), waits(1), on_gpu]), named(2, Cause::Device, Phase::Backward));
        let stopped = Whereabouts { silent: true, ..waits(1) };
        assert_eq!(stall(&[waits(0), stopped, waits(2)]), named(1, Cause::Host, Phase::Gather));
    }

    #[test]
    fn when_all_wait_it_is_the_network() {
        let waits = |rank, entered| at(rank, entered, true, Phase::Reduce);
        let all = Some(Stall { guilty: None, cause: Cause::Network, phase: Phase::Reduce });
        assert_eq!(stall(&[waits(0, 8), waits(1, 8)]), all);
        assert_eq!(stall(&[waits(0, 9), waits(1, 8), waits(2, 9)]), named(1, Cause::Network, Phase::Reduce));
    }

    #[test]
    fn what_takes_as_long_as_it_takes_is_no_stall() {
        assert_eq!(stall(&[at(0, 8, true, Phase::Gather), at(1, 7, false, Phase::Evaluation)]), None);
        assert_eq!(stall(&[]), None);
        // nor is it a reason to wait for a process that has stopped in the midst of it
        let stopped = Whereabouts { silent: true, ..at(1, 7, false, Phase::Evaluation) };
        assert_eq!(
            stall(&[at(0, 7, false, Phase::Evaluation), stopped.clone()]),
            named(1, Cause::Host, Phase::Evaluation)
        );
        let everybody = [stopped.clone(), Whereabouts { silent: true, ..at(0, 7, false, Phase::Evaluation) }];
        assert_eq!(stall(&everybody).map(|stall| (stall.guilty, stall.cause)), Some((None, Cause::Network)));
        assert_eq!(stall(&[at(0, 3, false, Phase::Forward)]), named(0, Cause::Host, Phase::Forward));
    }

    #[test]
    fn the_deadline_follows_the_median_step() {
        let mut pace = Pace::default();
        assert_eq!(pace.deadline(Duration::ZERO), None);
        assert_eq!(pace.deadline(Duration::from_secs(2)), Some(Duration::from_secs(2)));
        for seconds in [0.1, 0.1, 90.0] {
            pace.add(seconds);
        }
        assert_eq!(pace.deadline(Duration::ZERO), Some(SHORTEST_DEADLINE));
        (0..100).for_each(|_| pace.add(3.0));
        assert_eq!(pace.deadline(Duration::ZERO), Some(Duration::from_secs(60)));
    }

    #[test]
    fn a_slow_rank_is_told_once_and_so_is_its_recovery() {
        let mut lag = Lag::default();
        let work = |data_seconds, compute_seconds| Work { data_seconds, compute_seconds };
        let mut changes = Vec::new();
        let mut steps = |lag: &mut Lag, slow: Work, count: u32| {
            for _ in 0..count {
                changes.extend(
                    [0, 1, 2]
                        .into_iter()
                        .filter_map(|rank| lag.add(Rank(rank), if rank == 1 { slow } else { work(0.01, 0.1) })),
                );
            }
            std::mem::take(&mut changes)
        };
        assert_eq!(steps(&mut lag, work(0.01, 0.1), 50), []);
        let [began] = steps(&mut lag, work(0.15, 0.1), 50)[..] else { panic!("it is told once") };
        assert!(began.lags && began.rank == Rank(1) && began.waits_for_data && began.ratio > LAGS, "{began:?}");
        let [ended] = steps(&mut lag, work(0.01, 0.1), 100)[..] else { panic!("it is told once") };
        assert!(!ended.lags && ended.ratio < KEEPS_UP, "{ended:?}");
        let [compute] = steps(&mut lag, work(0.01, 0.3), 50)[..] else { panic!("it is told once") };
        assert!(compute.lags && !compute.waits_for_data);
        assert!((lag.ratio(Rank(0)).unwrap() - 1.0).abs() < 1e-9);
    }
}
