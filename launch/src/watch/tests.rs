use std::time::Duration;

use learn_domain::Phase;
use learn_domain::event::{Happening, JobEvent};
use learn_domain::ids::{Generation, Rank, Step, WorkerId};
use learn_domain::ledger::LedgerSummary;
use learn_domain::membership::LossCause;
use learn_domain::report::{
    DatasetFacts, Evaluation, JobState, JobStatus, Split, StepRecord, Task, Timed, WorkerStatus,
};

use super::gauges::Gauges;
use super::pace::remaining;
use super::scene::{Kept, Scene, Settings};
use crate::commands::status::Current;
use crate::render::Freshness;

pub const NOW: f64 = 1_000_000.0;

fn record(step: u64) -> StepRecord {
    // no function of the mathematics library: the screens are compared to the letter
    let fall = 5.4 / (1.0 + step as f64 / 200.0);
    StepRecord {
        step: Step(step),
        epoch: (step.saturating_sub(1) / 400) as u32,
        loss: 2.1 + fall + 0.08 * ((step * 7919) % 13) as f64 / 13.0,
        accuracy: 0.31,
        learning_rate: 0.00072,
        gradient_norm: 0.482,
        users: 256,
        tokens: 15_000,
        padding_share: 0.043,
        seconds: 0.4,
        ..StepRecord::default()
    }
}

pub fn worker(number: u32, phase: Phase, ratio: f64) -> WorkerStatus {
    WorkerStatus {
        worker: WorkerId(number),
        rank: Some(Rank(number)),
        host: "node1".into(),
        pid: 4200 + number,
        device: "cpu".into(),
        step: Step(1200),
        phase,
        metrics_url: String::new(),
        seconds_since_heartbeat: 0.3,
        seconds_in_phase: 0.2,
        work_ratio: Some(ratio),
        left: false,
    }
}

pub fn evaluation(step: u64, recall: f64) -> Evaluation {
    let metrics = [("recall@10", recall), ("ndcg@10", recall / 2.1), ("mrr", recall / 2.3), ("hr@10", recall)];
    Evaluation {
        split: Split::Valid,
        step: Step(step),
        epoch: (step / 400) as u32,
        users: 943,
        metrics: metrics.map(|(name, value)| (name.to_owned(), value)).into(),
        seconds: 1.5,
        segments: vec![],
        comparisons: vec![],
    }
}

/// A job of four ranks in its third epoch, one of which holds the others up.
pub fn scene() -> Scene {
    let mut hangs = worker(1, Phase::DataWait, 1.62);
    (hangs.seconds_in_phase, hangs.seconds_since_heartbeat, hangs.step) = (31.4, 0.8, Step(1199));
    let status = JobStatus {
        name: "shop".into(),
        task: Task::Train { resume_from: None },
        state: JobState::Running,
        cause: None,
        stall: Some("rank 1 (worker 1) holds the others up in the phase data_wait (cause: data)".into()),
        generation: Generation(2),
        world_size: 4,
        wanted_workers: 4,
        most_workers: Some(64),
        dataset: DatasetFacts { name: "shop".into(), users: 102_400, items: 20_033, ..DatasetFacts::default() },
        steps_per_epoch: 400,
        total_steps: 4000,
        last_step: Some(record(1200)),
        last_checkpoint: Some(Step(800)),
        best: Some(evaluation(800, 0.0921)),
        evaluations: vec![evaluation(400, 0.0714), evaluation(800, 0.0921)],
        workers: vec![
            worker(0, Phase::Gather, 0.98),
            hangs,
            worker(2, Phase::Gather, 1.0),
            worker(3, Phase::Gather, 1.02),
        ],
        ledger: LedgerSummary { exact: true, epochs: vec![] },
        data_servers: vec![],
        restarts: 0,
        operator_stop: false,
        seconds: 620.0,
    };
    let time = |step: u64| Some(NOW - 31.4 - 0.45 * (1200 - step) as f64);
    let event = |ago: f64, happening| JobEvent { time: NOW - ago, generation: Generation(2), happening };
    let lost = Happening::WorkerLost { worker: WorkerId(1), rank: Rank(1), cause: LossCause::Disconnected };
    let events = vec![
        event(604.0, Happening::Formed { world_size: 4 }),
        event(212.0, lost),
        event(211.0, Happening::Formed { world_size: 4 }),
        event(64.0, Happening::Lagging { rank: Rank(1), ratio: 1.62, cause: learn_domain::progress::Cause::Data }),
    ];
    let kept = |step: u64, ago: f64| Kept { step: Step(step), time: NOW - ago, bytes: 41_500_000 };
    let gauges = |number: u32, own: f64| {
        let gauges = Gauges {
            resident_bytes: Some(1_200_000_000 + 50_000_000 * u64::from(number)),
            gpu_bytes: None,
            step_seconds: Some(0.412),
            own_seconds: Some(own),
        };
        (WorkerId(number), gauges)
    };
    Scene {
        current: Some(Current { status, freshness: Freshness::Live, age: None, trouble: None }),
        queue: None,
        deserted: 0.0,
        steps: (1..=1200).map(|step| Timed { time: time(step), value: record(step) }).collect(),
        events_seen: events.len(),
        events,
        checkpoints: vec![kept(400, 430.0), kept(800, 211.0)],
        gauges: [gauges(0, 0.21), gauges(1, 0.35), gauges(2, 0.22), gauges(3, 0.22)].into(),
        settings: Some(Settings { metric: "ndcg@10".into(), heartbeat_timeout: Duration::from_secs(15) }),
        now: NOW,
    }
}

#[test]
fn the_time_left_is_that_of_the_wall_clock_in_this_session() {
    let mut scene = scene();
    let left = remaining(&scene).unwrap();
    assert!((left - 2800.0 * 0.45).abs() < 1.0, "{left}");
    // steps of an earlier session, long ago, say nothing about the pace
    for step in scene.steps.iter_mut().take(1190) {
        step.time = step.time.map(|time| time - 86_400.0);
    }
    let left = remaining(&scene).unwrap();
    assert!((left - 2800.0 * 0.45).abs() < 1.0, "{left}");
    scene.steps.iter_mut().for_each(|step| step.time = None);
    assert!((remaining(&scene).unwrap() - 2800.0 * 0.4).abs() < 1.0, "lines of older versions have seconds alone");
    scene.current.as_mut().unwrap().freshness = Freshness::Ended;
    assert_eq!(remaining(&scene), None);
}
