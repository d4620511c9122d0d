use std::collections::BTreeMap;

use learn_domain::config::Span;
use learn_domain::report::Comparison;
use learn_domain::{Incarnation, UserIndex};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn settings(workers: u32) -> JobSettings {
    let mut config = Config::default();
    config.cluster.workers = workers;
    config.cluster.heartbeat_timeout = Span::from_secs(10);
    JobSettings {
        config,
        task: Task::Train { resume_from: None },
        dataset: DatasetFacts { train_users: 8, users: 9, items: 5, interactions: 40, ..DatasetFacts::default() },
        steps_per_epoch: 2,
        total_steps: 4,
        history: History::default(),
    }
}

fn applicant(name: &str) -> Applicant {
    Applicant {
        incarnation: Incarnation(name.into()),
        host: "host".into(),
        pid: 1,
        device: "cpu".into(),
        metrics_url: String::new(),
    }
}

fn running(workers: u32) -> Job {
    let mut job = Job::new(settings(workers));
    for worker in 0..workers {
        job.join(SECOND, applicant(&worker.to_string())).unwrap();
    }
    job
}

fn report(worker: u32, step: u64, users: std::ops::Range<u32>) -> StepReport {
    let (step, epoch) = (Step(step), 0);
    let record = StepRecord { step, epoch, users: 4, seconds: 0.5, ..StepRecord::default() };
    StepReport {
        worker: WorkerId(worker),
        generation: Generation(1),
        step,
        epoch,
        users: users.map(UserIndex).collect(),
        record: (worker == 0).then_some(record),
    }
}

fn evaluation(split: Split, step: u64, value: f64) -> Evaluation {
    let metrics = BTreeMap::from([("ndcg@10".to_owned(), value)]);
    Evaluation {
        split,
        step: Step(step),
        epoch: 0,
        users: 4,
        metrics,
        seconds: 1.0,
        segments: Vec::new(),
        comparisons: Vec::new(),
    }
}

#[test]
fn a_repeated_report_is_journaled_and_counted_once() {
    let mut job = running(2);
    assert!(job.report(report(0, 1, 0..2)).unwrap().is_some());
    assert!(job.report(report(0, 1, 0..2)).unwrap().is_none());
    assert!(job.report(report(1, 1, 2..4)).unwrap().is_none(), "only rank 0's numbers are journaled");
    let status = job.status(SECOND * 2);
    assert_eq!((status.ledger.epochs[0].seen, status.ledger.epochs[0].repeated), (4, 0));
    assert_eq!(status.last_step.unwrap().step, Step(1));
}

#[test]
fn stale_messages_change_nothing() {
    let mut job = running(2);
    let stale = StepReport { generation: Generation(0), ..report(0, 1, 0..4) };
    assert!(matches!(job.report(stale), Err(JobError::StaleGeneration { .. })));
    assert!(matches!(job.report(report(7, 1, 0..4)), Err(JobError::UnknownWorker(WorkerId(7)))));
    assert!(matches!(job.commit(WorkerId(1), Generation(1), Step(1)), Err(JobError::NotRankZero { .. })));
    let test = evaluation(Split::Test, 1, 0.5);
    assert!(matches!(job.evaluation(WorkerId(1), Generation(1), test), Err(JobError::NotRankZero { .. })));
    assert!(job.status(SECOND).evaluations.is_empty());
    let before = Job::new(settings(2));
    assert!(before.member(WorkerId(0), Generation(0)).is_err(), "generation 0 is none");
}

#[test]
fn diverged_numbers_are_refused_with_a_remedy() {
    let mut job = running(1);
    let mut bad = report(0, 1, 0..4);
    bad.record.as_mut().unwrap().loss = f64::NAN;
    let text = job.report(bad).unwrap_err().to_string();
    assert!(text.contains("loss of step 1") && text.contains("optimizer.learning_rate"), "{text}");
    assert!(job.evaluation(WorkerId(0), Generation(1), evaluation(Split::Valid, 1, f64::INFINITY)).is_err());
}

#[test]
fn a_commit_waits_for_the_reports_of_its_step() {
    let mut job = running(2);
    job.report(report(0, 1, 0..2)).unwrap();
    job.commit(WorkerId(0), Generation(1), Step(1)).unwrap();
    assert!(job.complete_commits().is_empty());
    assert_eq!(job.status(SECOND).last_checkpoint, None);
    job.report(report(1, 1, 2..4)).unwrap();
    let complete = job.complete_commits();
    assert_eq!((complete[0].0, complete[0].1.summary().epochs[0].seen), (Step(1), 4));
    assert_eq!(job.status(SECOND).last_checkpoint, Some(Step(1)));
}

#[test]
fn a_lost_worker_does_not_hold_a_commit_up() {
    let mut job = running(2);
    job.report(report(0, 1, 0..2)).unwrap();
    job.commit(WorkerId(0), Generation(1), Step(1)).unwrap();
    job.leave(SECOND * 2, WorkerId(1), Departure::Failed("out of memory".into())).unwrap();
    assert_eq!(job.complete_commits()[0].1.summary().epochs[0].seen, 2);
    assert!(job.status(SECOND * 2).cause.unwrap().contains("out of memory"));
}

#[test]
fn the_status_follows_the_membership() {
    let mut job = Job::new(settings(2));
    job.join(SECOND, applicant("a")).unwrap();
    assert_eq!((job.state(), job.status(SECOND).workers.len()), (JobState::Gathering, 1));
    job.join(SECOND, applicant("b")).unwrap();
    let status = job.status(SECOND * 3);
    assert_eq!((status.state, status.generation), (JobState::Running, Generation(1)));
    assert_eq!(status.workers.iter().map(|worker| worker.rank).collect::<Vec<_>>(), [Some(Rank(0)), Some(Rank(1))]);
    assert!((status.workers[0].seconds_since_heartbeat - 2.0).abs() < 1e-9);
    let beat = Heartbeat { worker: WorkerId(1), step: Step(3), phase: "forward".into() };
    assert!(matches!(job.heartbeat(SECOND * 4, beat).0, Directive::Run { rank: Rank(1), .. }));
    let worker = &job.status(SECOND * 4).workers[1];
    assert_eq!((worker.step, worker.phase.as_str()), (Step(3), "forward"));
    job.operator_stop(SECOND * 5);
    assert_eq!(job.state(), JobState::Stopping);
    for worker in 0..2 {
        job.leave(SECOND * 6, WorkerId(worker), Departure::Stopped).unwrap();
    }
    assert_eq!(job.state(), JobState::Stopped);
    assert!(job.everybody_knows(SECOND * 6));
}

#[test]
fn the_end_waits_until_the_others_were_told() {
    let mut job = running(2);
    let beat = |worker| Heartbeat { worker: WorkerId(worker), step: Step(0), phase: String::new() };
    job.heartbeat(SECOND * 9, beat(0));
    job.tick(SECOND * 12);
    assert_eq!(job.state(), JobState::Stopping, "worker 1 was silent");
    job.tick(SECOND * 20);
    assert_eq!((job.state(), job.everybody_knows(SECOND * 20)), (JobState::Failed, true), "and so is worker 0 now");

    let mut job = Job::new(settings(2));
    job.join(SECOND, applicant("a")).unwrap();
    job.operator_stop(SECOND * 2);
    assert!(job.outcome().is_some() && !job.everybody_knows(SECOND * 2), "a worker waits for its generation");
    assert!(matches!(job.heartbeat(SECOND * 3, beat(0)).0, Directive::Stop(StopCause::Operator)));
    assert!(job.everybody_knows(SECOND * 3));
}

#[test]
fn the_summary_shows_the_tested_weights() {
    let mut job = running(1);
    for step in 1..=4 {
        job.report(report(0, step, 0..4)).unwrap();
    }
    for (split, step, value) in [(Split::Valid, 2, 0.4), (Split::Valid, 3, 0.4), (Split::Valid, 4, 0.3)] {
        let new = evaluation(split, step, value);
        assert!(job.evaluation(WorkerId(0), Generation(1), new.clone()).unwrap().is_some());
        assert!(job.evaluation(WorkerId(0), Generation(1), new).unwrap().is_none(), "a retry is not another one");
    }
    assert_eq!(job.best().unwrap().step, Step(2), "the first of equals");
    let popularity = BTreeMap::from([("ndcg@10".to_owned(), 0.1)]);
    let test = Evaluation {
        comparisons: ["last_item", "popularity"]
            .map(|name| Comparison { name: name.into(), metrics: popularity.clone(), segments: Vec::new() })
            .into(),
        ..evaluation(Split::Test, 2, 0.35)
    };
    job.evaluation(WorkerId(0), Generation(1), test.clone()).unwrap();
    job.leave(SECOND * 11, WorkerId(0), Departure::Done).unwrap();
    let summary = job.summary();
    assert_eq!((&summary.popularity, &summary.comparisons), (&popularity, &test.comparisons));
    assert_eq!((summary.steps, summary.best_step, summary.world_size), (4, Step(2), 1));
    assert_eq!((summary.valid["ndcg@10"], summary.test["ndcg@10"]), (0.4, 0.35));
    assert!((summary.samples_per_second - 8.0).abs() < 1e-9, "16 users in 2 s");
    assert!((summary.seconds - 10.0).abs() < 1e-9);
}

#[test]
fn a_resumed_job_goes_on_counting() {
    let mut settings = settings(1);
    let mut ledger = Ledger::new(8, 2);
    ledger.record(0, &(0..4).map(UserIndex).collect::<Vec<_>>());
    let steps = vec![StepRecord { step: Step(1), users: 4, seconds: 2.0, ..StepRecord::default() }];
    let evaluations = vec![evaluation(Split::Valid, 1, 0.2)];
    settings.history = History { step: Step(1), ledger: Some(ledger), steps, evaluations };
    let mut job = Job::new(settings);
    assert_eq!(job.status(SECOND).last_checkpoint, Some(Step(1)));
    job.join(SECOND, applicant("a")).unwrap();
    job.report(report(0, 1, 0..4)).unwrap();
    assert_eq!(job.status(SECOND).ledger.epochs[0].seen, 4, "a step of before is not counted again");
    job.report(report(0, 2, 4..8)).unwrap();
    assert!(job.status(SECOND).ledger.exact && job.status(SECOND).ledger.epochs[0].exact());
    job.leave(SECOND * 2, WorkerId(0), Departure::Done).unwrap();
    let summary = job.summary();
    assert!((summary.samples_per_second - 8.0 / 2.5).abs() < 1e-9);
    assert!((summary.seconds - 4.0).abs() < 1e-9, "2 s of steps and 1 s of evaluation before, 1 s now");
}
