//! The job at a glance, small whatever its size; and its workers a page at a time. Pure functions.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use learn_domain::ledger::EpochCount;
use learn_domain::report::{DatasetFacts, Evaluation, JobState, JobStatus, StepRecord, Task, WorkerStatus};
use learn_domain::{Phase, Step};
use serde::{Deserialize, Serialize};

use crate::board::Counts;

/// A worker is silent when it should have been heard of so many times.
const MISSED_BEATS: u32 = 3;
/// And not before this.
const NEVER_BEFORE: Duration = Duration::from_secs(1);

/// Whether a worker is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Liveness {
    Alive,
    /// It was not heard of when it should have been.
    Silent,
    /// It was taken out of the job.
    Lost,
    /// It has said that it leaves.
    Left,
}

/// When a worker counts as silent.
#[must_use]
pub fn silent_after(heartbeat_interval: Duration) -> Duration {
    (heartbeat_interval * MISSED_BEATS).max(NEVER_BEFORE)
}

#[must_use]
pub fn liveness(worker: &WorkerStatus, silent_after: Duration) -> Liveness {
    match (worker.left, worker.phase) {
        (true, Phase::Lost) => Liveness::Lost,
        (true, _) => Liveness::Left,
        (false, _) if worker.seconds_since_heartbeat > silent_after.as_secs_f64() => Liveness::Silent,
        (false, _) => Liveness::Alive,
    }
}

/// How many workers there are of each kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkerCounts {
    pub alive: u64,
    pub silent: u64,
    pub lost: u64,
    pub left: u64,
    /// Of those that are there, by phase.
    pub phases: BTreeMap<&'static str, u64>,
}

#[must_use]
pub fn count(workers: &[WorkerStatus], silent_after: Duration) -> WorkerCounts {
    let mut counts = WorkerCounts::default();
    for worker in workers {
        match liveness(worker, silent_after) {
            Liveness::Alive => counts.alive += 1,
            Liveness::Silent => counts.silent += 1,
            Liveness::Lost => counts.lost += 1,
            Liveness::Left => counts.left += 1,
        }
        if !worker.left {
            *counts.phases.entry(worker.phase.as_str()).or_default() += 1;
        }
    }
    counts
}

/// The best evaluation so far.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Best<'a> {
    pub step: Step,
    pub epoch: u32,
    /// The metric that says so.
    pub metric: &'a str,
    pub value: f64,
}

/// The ledger in a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LedgerLine {
    pub exact: bool,
    pub epochs: usize,
    /// The epoch that is open, or was closed last.
    pub last: Option<EpochCount>,
}

/// What a page asks for every second.
#[derive(Debug, Serialize)]
pub struct Overview<'a> {
    pub name: &'a str,
    pub task: &'a Task,
    pub state: &'a JobState,
    pub cause: Option<&'a str>,
    pub stall: Option<&'a str>,
    pub generation: u64,
    pub world_size: u32,
    pub wanted_workers: u32,
    pub dataset: &'a DatasetFacts,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
    pub last_step: Option<&'a StepRecord>,
    pub last_checkpoint: Option<Step>,
    pub best: Option<Best<'a>>,
    pub workers: WorkerCounts,
    pub ledger: LedgerLine,
    /// How many lines the other resources have: they need not be asked for if nothing has come.
    pub counts: Counts,
    /// Of the job so far.
    pub seconds: f64,
}

impl<'a> Overview<'a> {
    #[must_use]
    pub fn of(status: &'a JobStatus, metric: &'a str, silent_after: Duration, counts: Counts) -> Self {
        let best = status.best.as_ref().and_then(|evaluation: &Evaluation| {
            let value = *evaluation.metrics.get(metric)?;
            Some(Best { step: evaluation.step, epoch: evaluation.epoch, metric, value })
        });
        let ledger = LedgerLine {
            exact: status.ledger.exact,
            epochs: status.ledger.epochs.len(),
            last: status.ledger.epochs.last().copied(),
        };
        Self {
            name: &status.name,
            task: &status.task,
            state: &status.state,
            cause: status.cause.as_deref(),
            stall: status.stall.as_deref(),
            generation: status.generation.0,
            world_size: status.world_size,
            wanted_workers: status.wanted_workers,
            dataset: &status.dataset,
            steps_per_epoch: status.steps_per_epoch,
            total_steps: status.total_steps,
            last_step: status.last_step.as_ref(),
            last_checkpoint: status.last_checkpoint,
            best,
            workers: count(&status.workers, silent_after),
            ledger,
            counts,
            seconds: status.seconds,
        }
    }
}

/// Which workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Show {
    #[default]
    All,
    /// Alive or silent.
    Present,
    /// Lost or left.
    Gone,
}

/// In which order; those that are gone always come last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    #[default]
    Rank,
    /// Most work for the same step first.
    Work,
    /// Longest silence first.
    Silence,
    /// Longest in its phase first.
    Phase,
}

/// Part of the workers.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub show: Show,
    pub order: Order,
    pub offset: usize,
    pub limit: usize,
}

/// A worker with its liveness.
#[derive(Debug, PartialEq, Serialize)]
pub struct Row<'a> {
    pub liveness: Liveness,
    #[serde(flatten)]
    pub worker: &'a WorkerStatus,
}

/// Some workers of so many.
#[must_use]
pub fn part(workers: &[WorkerStatus], part: Part, silent_after: Duration) -> (usize, Vec<Row<'_>>) {
    let shown = |worker: &&WorkerStatus| match part.show {
        Show::All => true,
        Show::Present => !worker.left,
        Show::Gone => worker.left,
    };
    let mut chosen: Vec<&WorkerStatus> = workers.iter().filter(shown).collect();
    let descending = |a: f64, b: f64| b.total_cmp(&a);
    chosen.sort_by(|a, b| {
        let ordered = match part.order {
            _ if a.left && b.left => a.seconds_since_heartbeat.total_cmp(&b.seconds_since_heartbeat),
            Order::Rank => std::cmp::Ordering::Equal,
            Order::Work => descending(a.work_ratio.unwrap_or(0.0), b.work_ratio.unwrap_or(0.0)),
            Order::Silence => descending(a.seconds_since_heartbeat, b.seconds_since_heartbeat),
            Order::Phase => descending(a.seconds_in_phase, b.seconds_in_phase),
        };
        let last = |worker: &WorkerStatus| (worker.rank.is_none(), worker.rank, Reverse(worker.worker));
        a.left.cmp(&b.left).then(ordered).then_with(|| last(a).cmp(&last(b)))
    });
    let rows = chosen.iter().skip(part.offset).take(part.limit);
    let rows = rows.map(|worker| Row { liveness: liveness(worker, silent_after), worker }).collect();
    (chosen.len(), rows)
}

#[cfg(test)]
mod tests {
    use learn_domain::{Rank, WorkerId};

    use super::*;

    const SILENT_AFTER: Duration = Duration::from_secs(6);

    fn worker(id: u32, rank: Option<u32>, phase: Phase, heard: f64) -> WorkerStatus {
        WorkerStatus {
            worker: WorkerId(id),
            rank: rank.map(Rank),
            host: "h".into(),
            pid: 1,
            device: "cpu".into(),
            step: Step(3),
            phase,
            metrics_url: String::new(),
            seconds_since_heartbeat: heard,
            seconds_in_phase: 0.0,
            work_ratio: rank.map(|rank| f64::from(rank) + 1.0),
            left: [Phase::Lost, Phase::Done].contains(&phase),
        }
    }

    fn ids(workers: &[WorkerStatus], show: Show, order: Order) -> Vec<u32> {
        let (_, rows) = part(workers, Part { show, order, offset: 0, limit: 99 }, SILENT_AFTER);
        rows.iter().map(|row| row.worker.worker.0).collect()
    }

    #[test]
    fn workers_are_ordered_by_what_is_asked_and_the_gone_come_last() {
        let workers = [
            worker(0, None, Phase::Lost, 900.0),
            worker(1, Some(1), Phase::Backward, 0.1),
            worker(2, Some(0), Phase::Gather, 9.0),
            worker(3, None, Phase::Joining, 0.2),
            worker(4, None, Phase::Lost, 3.0),
            worker(5, None, Phase::Done, 400.0),
        ];
        assert_eq!(ids(&workers, Show::All, Order::Rank), [2, 1, 3, 4, 5, 0]);
        assert_eq!(ids(&workers, Show::Present, Order::Work), [1, 2, 3]);
        assert_eq!(ids(&workers, Show::All, Order::Silence), [2, 3, 1, 4, 5, 0]);
        assert_eq!(ids(&workers, Show::Gone, Order::Rank), [4, 5, 0], "the last that went comes first");
        let (all, rows) =
            part(&workers, Part { show: Show::All, order: Order::Rank, offset: 1, limit: 2 }, SILENT_AFTER);
        assert_eq!((all, rows.iter().map(|row| row.worker.worker.0).collect::<Vec<_>>()), (6, vec![1, 3]));
        let counts = count(&workers, SILENT_AFTER);
        assert_eq!((counts.alive, counts.silent, counts.lost, counts.left), (2, 1, 2, 1));
        assert_eq!(counts.phases.len(), 3);
    }

    #[test]
    fn a_worker_is_silent_when_it_was_not_heard_of_in_time() {
        assert_eq!(silent_after(Duration::from_secs(2)), Duration::from_secs(6));
        assert_eq!(silent_after(Duration::from_millis(100)), NEVER_BEFORE);
        for (phase, heard, expected) in [
            (Phase::Gather, 5.9, Liveness::Alive),
            (Phase::Gather, 6.1, Liveness::Silent),
            (Phase::Lost, 0.0, Liveness::Lost),
            (Phase::Done, 0.0, Liveness::Left),
        ] {
            assert_eq!(liveness(&worker(1, Some(0), phase, heard), SILENT_AFTER), expected, "{phase}, {heard} s");
        }
    }

    #[test]
    fn an_overview_of_ten_thousand_workers_is_small() {
        let workers: Vec<WorkerStatus> = (0..10_000).map(|id| worker(id, Some(id), Phase::Backward, 0.1)).collect();
        let status = JobStatus {
            name: "wide".into(),
            task: Task::Train { resume_from: None },
            state: JobState::Running,
            cause: None,
            stall: None,
            generation: learn_domain::Generation(1),
            world_size: 10_000,
            wanted_workers: 10_000,
            most_workers: None,
            dataset: DatasetFacts::default(),
            steps_per_epoch: 1,
            total_steps: 1,
            last_step: Some(StepRecord::default()),
            last_checkpoint: None,
            best: None,
            evaluations: Vec::new(),
            workers,
            data_servers: Vec::new(),
            ledger: Default::default(),
            restarts: 0,
            operator_stop: false,
            seconds: 1.0,
        };
        let overview = Overview::of(&status, "recall@10", SILENT_AFTER, Counts::default());
        assert_eq!(overview.workers.alive, 10_000);
        assert!(serde_json::to_string(&overview).unwrap().len() < 2000);
    }
}
