use std::collections::BTreeMap;

use learn_domain::Incarnation;
use learn_domain::config::Span;
use learn_domain::event::Happening;
use learn_domain::ledger::Fault;
use learn_domain::membership::{LossCause, RegroupCause, StopCause};
use learn_domain::plan::PlanKey;
use learn_domain::progress::Work;
use learn_domain::report::{Comparison, JobState, Split};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

pub(crate) fn settings(workers: u32) -> JobSettings {
    let mut config = Config::default();
    config.cluster.workers = workers;
    config.cluster.heartbeat_timeout = Span::from_secs(10);
    JobSettings {
        config,
        task: Task::Train { resume_from: None },
        dataset: DatasetFacts { train_users: 8, users: 9, items: 5, interactions: 40, ..DatasetFacts::default() },
        plan: Plan::new(PlanKey { fingerprint: "f".into(), seed: 1, users: 8, global_batch: 4 }).unwrap(),
        total_steps: 4,
        restarts: 0,
        most_workers: None,
        history: History::default(),
    }
}

pub(super) fn applicant(name: &str) -> Applicant {
    Applicant {
        incarnation: Incarnation(name.into()),
        host: "host".into(),
        pid: 1,
        device: "cpu".into(),
        metrics_url: String::new(),
    }
}

fn enter(job: &mut Job, name: &str) -> WorkerId {
    let (worker, _) = job.join(SECOND, applicant(name)).unwrap();
    job.ready(SECOND, worker, (Generation(0), None)).unwrap();
    worker
}

pub(super) fn running(workers: u32) -> Job {
    let mut job = Job::new(settings(workers));
    for worker in 0..workers {
        enter(&mut job, &worker.to_string());
    }
    job.begin(SECOND, beginning(0, 1, 0)).unwrap();
    job
}

fn beginning(worker: u32, generation: u64, step: u64) -> Beginning {
    let record = |step| StepRecord { step: Step(step), users: 4, ..StepRecord::default() };
    let (worker, generation) = (WorkerId(worker), Generation(generation));
    Beginning { worker, generation, step: Step(step), last: (1..=step).map(record).collect() }
}

/// The first worker is lost, and the others go on without it.
fn regroup(job: &mut Job, left: u64, survivors: std::ops::Range<u32>) {
    for worker in survivors {
        job.ready(SECOND, WorkerId(worker), (Generation(left), Some("peer lost".into()))).unwrap();
    }
    assert_eq!(job.generation(), Generation(left + 1));
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
        work: Work::default(),
        record: (worker == 0).then_some(record),
    }
}

/// A part of the users that the plan has for a step.
fn share(job: &Job, (worker, generation): (u32, u64), step: u64, part: std::ops::Range<usize>) -> StepReport {
    let (epoch, users) = planned(&job.settings.plan, Step(step));
    StepReport { generation: Generation(generation), epoch, users: users[part].to_vec(), ..report(worker, step, 0..0) }
}

pub(super) fn evaluation(split: Split, step: u64, value: f64) -> Evaluation {
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
    assert!(job.report(SECOND, report(0, 1, 0..2)).unwrap().is_some());
    assert!(job.report(SECOND, report(0, 1, 0..2)).unwrap().is_none());
    assert!(job.report(SECOND, report(1, 1, 2..4)).unwrap().is_none(), "only rank 0's numbers are journaled");
    let status = job.status(SECOND * 2);
    assert_eq!((status.ledger.epochs[0].seen, status.ledger.epochs[0].repeated), (4, 0));
    assert_eq!(status.last_step.unwrap().step, Step(1));
}

#[test]
fn stale_messages_change_nothing() {
    let mut job = running(2);
    let stale = StepReport { generation: Generation(0), ..report(0, 1, 0..4) };
    assert!(matches!(job.report(SECOND, stale), Err(JobError::StaleGeneration { .. })));
    assert!(matches!(job.report(SECOND, report(7, 1, 0..4)), Err(JobError::UnknownWorker(WorkerId(7)))));
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
    let text = job.report(SECOND, bad).unwrap_err().to_string();
    assert!(text.contains("loss of step 1") && text.contains("optimizer.learning_rate"), "{text}");
    assert!(job.evaluation(WorkerId(0), Generation(1), evaluation(Split::Valid, 1, f64::INFINITY)).is_err());
}

#[test]
fn a_commit_waits_for_the_reports_of_its_step() {
    let mut job = running(2);
    job.report(SECOND, report(0, 1, 0..2)).unwrap();
    job.commit(WorkerId(0), Generation(1), Step(1)).unwrap();
    assert!(job.complete_commits().is_empty());
    assert_eq!(job.status(SECOND).last_checkpoint, None);
    job.report(SECOND, report(1, 1, 2..4)).unwrap();
    let complete = job.complete_commits();
    assert_eq!((complete[0].0, complete[0].1.summary().epochs[0].seen), (Step(1), 4));
    assert_eq!(job.status(SECOND).last_checkpoint, Some(Step(1)));
}

#[test]
fn commits_that_wait_for_one_report_are_completed_in_order() {
    let mut job = running(2);
    job.report(SECOND, report(0, 1, 0..2)).unwrap();
    job.commit(WorkerId(0), Generation(1), Step(1)).unwrap();
    assert!(job.complete_commits().is_empty());
    // all of this comes in one turn
    job.report(SECOND, report(1, 1, 2..4)).unwrap();
    job.report(SECOND, report(0, 2, 4..6)).unwrap();
    job.report(SECOND, report(1, 2, 6..8)).unwrap();
    job.commit(WorkerId(0), Generation(1), Step(2)).unwrap();
    let complete = job.complete_commits();
    assert_eq!(complete.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [Step(1), Step(2)]);
    assert_eq!(complete.iter().map(|(_, ledger)| ledger.summary().epochs[0].seen).collect::<Vec<_>>(), [4, 8]);
    assert!(!job.awaits(Step(1)) && !job.awaits(Step(2)));
}

#[test]
fn a_commit_whose_ledger_is_lost_holds_no_other_up() {
    let mut job = running(1);
    let far = job.commit(WorkerId(0), Generation(1), Step(9000));
    assert!(matches!(far, Err(JobError::Books(BooksError::TooFarAhead { .. }))), "{far:?}");
    for step in 1..=2 {
        job.report(SECOND, report(0, step, 0..4)).unwrap();
    }
    job.commit(WorkerId(0), Generation(1), Step(1)).unwrap();
    assert_eq!(job.complete_commits().len(), 1);
    // such may be in what a coordinator before has left
    job.commits.extend([Step(0), Step(9000)]);
    job.commit(WorkerId(0), Generation(1), Step(2)).unwrap();
    let complete = job.complete_commits();
    assert_eq!(complete.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [Step(2)]);
    assert!(job.commits.is_empty(), "what is lost is told of once: {:?}", job.commits);

    job.leave(SECOND * 2, WorkerId(0), Departure::Failed("no memory".into())).unwrap();
    job.commits.insert(Step(9000));
    assert!(job.complete_commits().is_empty() && job.commits.is_empty(), "nor is it settled when the job ends");
}

#[test]
fn a_lost_worker_does_not_hold_a_commit_up() {
    let mut job = running(2);
    job.report(SECOND, report(0, 1, 0..2)).unwrap();
    job.commit(WorkerId(0), Generation(1), Step(1)).unwrap();
    job.leave(SECOND * 2, WorkerId(1), Departure::Failed("out of memory".into())).unwrap();
    assert!(job.complete_commits().is_empty(), "the other one says first what it holds");
    job.ready(SECOND * 2, WorkerId(0), (Generation(1), None)).unwrap();
    let last = Vec::new();
    let beginning = Beginning { worker: WorkerId(0), generation: Generation(2), step: Step(1), last };
    job.begin(SECOND * 2, beginning).unwrap();
    let complete = job.complete_commits();
    assert_eq!(complete[0].1.summary().epochs[0].seen, 4, "the step was finished, so all had their part in it");
    assert!(job.status(SECOND * 2).cause.unwrap().contains("out of memory"));
}

#[test]
fn survivors_go_on_from_a_finished_step_that_was_not_reported() {
    let mut job = running(3);
    for (worker, part) in [(0, 0..1), (1, 1..3), (2, 3..4)] {
        let told = share(&job, (worker, 1), 1, part);
        job.report(SECOND, told).unwrap();
    }
    // rank 0 tells of step 2 and writes its checkpoint, and is gone before the others have told
    let told = share(&job, (0, 1), 2, 0..1);
    job.report(SECOND, told).unwrap();
    job.commit(WorkerId(0), Generation(1), Step(2)).unwrap();
    let effects = job.disconnected(SECOND, WorkerId(0));
    assert!(matches!(effects[..], [Effect::Lost(_), Effect::Regrouping(RegroupCause::Lost(_))]), "{effects:?}");
    assert_eq!((job.state(), job.complete_commits().len()), (JobState::Regrouping, 0));
    assert!(matches!(job.running_member(WorkerId(1), Generation(1)), Err(JobError::Regrouping(Generation(1)))));
    regroup(&mut job, 1, 1..3);

    let not_first = job.begin(SECOND, beginning(2, 2, 3));
    assert!(matches!(not_first, Err(JobError::NotRankZero { .. })));
    let stale = job.begin(SECOND, beginning(1, 1, 3));
    assert!(matches!(stale, Err(JobError::StaleGeneration { .. })));
    let behind = job.begin(SECOND, beginning(1, 2, 0));
    assert!(matches!(behind, Err(JobError::Books(BooksError::Behind { .. }))), "all have told of step 1");
    let records = job.begin(SECOND, beginning(1, 2, 3)).unwrap();
    let steps: Vec<u64> = records.iter().map(|record| record.step.0).collect();
    assert_eq!(steps, [3], "steps 1 and 2 were told of by the one that is lost");
    let commits = job.complete_commits();
    assert_eq!((commits.len(), commits[0].1.summary().epochs[0].seen), (1, 8), "the plan knows whose step 2 was");
    assert_eq!(job.status(SECOND).ledger.epochs[1].seen, 4);

    // a report that comes before a retry of the beginning stays
    let told = share(&job, (2, 2), 4, 0..2);
    job.report(SECOND, told).unwrap();
    assert_eq!(job.begin(SECOND, beginning(1, 2, 3)).unwrap(), []);
    let told = share(&job, (1, 2), 4, 2..4);
    job.report(SECOND, told).unwrap();
    let ledger = job.status(SECOND).ledger;
    assert!(ledger.exact && ledger.epochs.iter().all(|epoch| epoch.exact()), "{ledger:?}");
}

#[test]
fn a_process_that_breaks_down_takes_no_share_out_of_a_step() {
    let mut job = running(2);
    job.report(SECOND, report(0, 1, 0..2)).unwrap();
    job.leave(SECOND, WorkerId(1), Departure::Crashed("it panicked".into())).unwrap();
    assert_eq!(job.status(SECOND).ledger.epochs, [], "whether step 1 was finished is for the survivors to say");
    regroup(&mut job, 1, 0..1);
    job.begin(SECOND, beginning(0, 2, 1)).unwrap();
    assert_eq!(job.status(SECOND).ledger.epochs[0].seen, 4);
}

#[test]
fn a_step_that_only_the_next_generation_tells_of_is_progress_too() {
    let mut settings = settings(3);
    settings.config.cluster.max_recoveries = 1;
    let mut job = Job::new(settings);
    for worker in 0..3 {
        enter(&mut job, &worker.to_string());
    }
    job.begin(SECOND, beginning(0, 1, 0)).unwrap();
    for generation in 1..=2 {
        job.disconnected(SECOND, WorkerId(generation - 1));
        assert_eq!(job.state(), JobState::Regrouping, "generation {generation}");
        regroup(&mut job, generation.into(), generation..3);
        job.begin(SECOND, beginning(generation, u64::from(generation) + 1, generation.into())).unwrap();
    }
    let broken = (Generation(3), Some("x".to_owned()));
    job.ready(SECOND, WorkerId(2), broken).unwrap();
    job.begin(SECOND, beginning(2, 4, 2)).unwrap();
    job.ready(SECOND, WorkerId(2), (Generation(4), Some("x".into()))).unwrap();
    assert!(matches!(job.membership.stop_cause(), Some(StopCause::NoProgress { .. })), "step 2 was told of before");
}

#[test]
fn an_old_generation_changes_nothing() {
    let mut job = running(2);
    let lost = job.disconnected(SECOND, WorkerId(0));
    assert!(matches!(&lost[0], Effect::Lost(loss) if loss.cause == LossCause::Disconnected));
    regroup(&mut job, 1, 1..2);
    job.begin(SECOND, beginning(1, 2, 0)).unwrap();
    let stale = JobError::StaleGeneration { theirs: Generation(1), ours: Generation(2) };
    for worker in 0..2 {
        assert_eq!(job.report(SECOND, report(worker, 1, 0..4)).unwrap_err(), stale);
        assert_eq!(job.commit(WorkerId(worker), Generation(1), Step(1)).unwrap_err(), stale);
        let told = evaluation(Split::Valid, 1, 0.5);
        assert_eq!(job.evaluation(WorkerId(worker), Generation(1), told).unwrap_err(), stale);
        assert_eq!(job.running_member(WorkerId(worker), Generation(1)).unwrap_err(), stale);
    }
    let current = StepReport { generation: Generation(2), ..report(0, 1, 0..4) };
    assert_eq!(job.report(SECOND, current).unwrap_err(), JobError::UnknownWorker(WorkerId(0)), "it must join again");
    let status = job.status(SECOND);
    assert_eq!((status.ledger.epochs.len(), status.last_step, status.evaluations.len()), (0, None, 0));
    assert_eq!(status.workers[0].phase, Phase::Lost);
}

#[test]
fn collectives_are_counted_anew_in_each_generation() {
    let mut job = running(2);
    let beat = |generation, entered| Heartbeat {
        worker: WorkerId(1),
        generation: Generation(generation),
        step: Step(3),
        entered,
        inside: true,
        ..Heartbeat::default()
    };
    let counted = |job: &Job| {
        let worker = &job.workers[&WorkerId(1)];
        (worker.seen, worker.step, worker.entered, worker.inside)
    };
    job.heartbeat(SECOND, beat(1, 900));
    assert_eq!(counted(&job), (SECOND, Step(3), 900, true));
    job.disconnected(SECOND, WorkerId(0));
    regroup(&mut job, 1, 1..2);
    assert_eq!(counted(&job), (SECOND, Step(3), 0, false));
    job.heartbeat(SECOND * 2, beat(1, 901));
    assert_eq!(counted(&job), (SECOND * 2, Step(3), 0, false), "it was said before, and is a sign of life only");
    job.heartbeat(SECOND * 3, beat(2, 4));
    assert_eq!(counted(&job), (SECOND * 3, Step(3), 4, true));
}

#[test]
fn the_status_follows_the_membership() {
    let mut job = Job::new(settings(2));
    enter(&mut job, "a");
    assert_eq!((job.state(), job.status(SECOND).workers.len()), (JobState::Gathering, 1));
    let (second, _) = job.join(SECOND, applicant("b")).unwrap();
    assert_eq!(job.state(), JobState::Gathering, "it is not ready");
    job.ready(SECOND, second, (Generation(0), None)).unwrap();
    assert_eq!(job.ready(SECOND, WorkerId(7), (Generation(0), None)), Err(JobError::UnknownWorker(WorkerId(7))));
    let status = job.status(SECOND * 3);
    assert_eq!((status.state, status.generation), (JobState::Running, Generation(1)));
    assert_eq!(status.workers.iter().map(|worker| worker.rank).collect::<Vec<_>>(), [Some(Rank(0)), Some(Rank(1))]);
    assert!((status.workers[0].seconds_since_heartbeat - 2.0).abs() < 1e-9);
    let beat = Heartbeat { worker: WorkerId(1), step: Step(3), phase: Phase::Forward, ..Heartbeat::default() };
    assert!(matches!(job.heartbeat(SECOND * 4, beat).0, Directive::Run { rank: Rank(1), .. }));
    let worker = &job.status(SECOND * 4).workers[1];
    assert_eq!((worker.step, worker.phase), (Step(3), Phase::Forward));
    job.stop(SECOND * 5, Asked::ByCall);
    assert_eq!(job.state(), JobState::Stopping);
    for worker in 0..2 {
        job.leave(SECOND * 6, WorkerId(worker), Departure::Stopped).unwrap();
    }
    assert_eq!(job.state(), JobState::Stopped);
    assert!(job.everybody_knows(SECOND * 6));
}

#[test]
fn who_waits_when_an_operator_stops_the_job_has_not_failed() {
    let failed = || Departure::Failed("the job stops: an operator asked for it".into());
    let mut job = Job::new(settings(2));
    let waits = enter(&mut job, "a");
    job.stop(SECOND * 2, Asked::BySignal);
    assert_eq!(job.state(), JobState::Stopped);
    job.leave(SECOND * 3, waits, failed()).unwrap();
    assert_eq!(job.status(SECOND * 3).workers[0].phase, Phase::Stopped);

    let mut job = running(1);
    job.stop(SECOND * 2, Asked::BySignal);
    job.leave(SECOND * 3, WorkerId(0), failed()).unwrap();
    assert_eq!(job.status(SECOND * 3).workers[0].phase, Phase::Failed, "it had a step to finish");
}

#[test]
fn one_that_leaves_in_peace_has_done_the_last_step_whatever_its_last_heartbeat_said() {
    for (departure, step) in [(Departure::Done, Step(2)), (Departure::Crashed("broken".into()), Step(0))] {
        let mut job = running(1);
        for step in 1..=2 {
            job.report(SECOND, report(0, step, 0..4)).unwrap();
        }
        job.leave(SECOND * 2, WorkerId(0), departure).unwrap();
        assert_eq!(job.status(SECOND * 2).workers[0].step, step);
    }
}

#[test]
fn an_operators_call_is_told_from_a_signal_whichever_comes_first() {
    for asked in [[Asked::BySignal, Asked::ByCall], [Asked::ByCall, Asked::BySignal]] {
        let mut job = running(1);
        assert!(!job.status(SECOND).operator_stop);
        job.stop(SECOND * 2, asked[0]);
        assert_eq!(
            (job.state(), job.status(SECOND * 2).operator_stop),
            (JobState::Stopping, asked[0] == Asked::ByCall)
        );
        job.stop(SECOND * 3, asked[1]);
        job.leave(SECOND * 4, WorkerId(0), Departure::Stopped).unwrap();
        assert_eq!((job.state(), job.status(SECOND * 4).operator_stop), (JobState::Stopped, true));
    }
}

#[test]
fn the_end_waits_until_the_others_were_told() {
    let mut job = running(2);
    let beat = |worker| Heartbeat { worker: WorkerId(worker), ..Heartbeat::default() };
    job.heartbeat(SECOND * 9, beat(0));
    job.tick(SECOND * 12);
    assert_eq!(job.state(), JobState::Regrouping, "worker 1 was silent");
    job.tick(SECOND * 20);
    assert_eq!(job.state(), JobState::Regrouping, "nobody is heard of, so the last is waited for");
    job.tick(SECOND * 70);
    assert_eq!((job.state(), job.everybody_knows(SECOND * 70)), (JobState::Failed, true), "worker 0 is lost too");

    let mut job = Job::new(settings(2));
    job.join(SECOND, applicant("a")).unwrap();
    job.stop(SECOND * 2, Asked::ByCall);
    assert!(job.outcome().is_some() && !job.everybody_knows(SECOND * 2), "a worker waits for its generation");
    assert!(matches!(job.heartbeat(SECOND * 3, beat(0)).0, Directive::Stop(StopCause::Operator)));
    assert!(job.everybody_knows(SECOND * 3));
}

#[test]
fn the_summary_shows_the_tested_weights() {
    let mut job = running(1);
    for step in 1..=4 {
        job.report(SECOND, report(0, step, 0..4)).unwrap();
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
fn a_status_has_the_newest_evaluations_and_the_best_of_all() {
    let mut job = running(1);
    for step in 1..=150 {
        let new = evaluation(Split::Valid, step, if step == 3 { 0.9 } else { 0.1 });
        assert!(job.evaluation(WorkerId(0), Generation(1), new).unwrap().is_some());
    }
    let status = job.status(SECOND);
    let steps: Vec<u64> = status.evaluations.iter().map(|evaluation| evaluation.step.0).collect();
    assert_eq!(steps, (51..=150).collect::<Vec<_>>());
    assert_eq!(status.best.unwrap().step, Step(3));
}

#[test]
fn a_ledger_that_is_not_exact_is_noted_once() {
    let mut job = running(1);
    job.report(SECOND, report(0, 1, 0..4)).unwrap();
    assert_eq!(job.take_notices(), []);
    // users of the first step again, and so none of the others
    job.report(SECOND, report(0, 2, 0..4)).unwrap();
    let count = job.status(SECOND).ledger.epochs[0];
    assert_eq!((count.seen, count.repeated), (4, 4));
    assert_eq!(job.take_notices(), [Happening::LedgerInexact(Fault::NotOnce { count })]);
    assert_eq!(job.take_notices(), []);
    let mut ledger = Ledger::new(8, 2);
    (0..2).for_each(|_| ledger.record(0, &(0..4).map(UserIndex).collect::<Vec<_>>()));
    let last = StepRecord { step: Step(2), users: 4, ..StepRecord::default() };
    let trained = Trained::from_iter([last]);
    let history = History { step: Step(2), ledger: Some(ledger), trained, ..History::default() };
    assert_eq!(Job::new(JobSettings { history, ..settings(1) }).take_notices(), [], "the run has it in its events");
}

/// A job that has begun to go on from step 1, in a run that had come further.
fn resumed() -> Job {
    let mut ledger = Ledger::new(8, 2);
    ledger.record(0, &(0..4).map(UserIndex).collect::<Vec<_>>());
    let trained = Trained::from_iter([StepRecord { step: Step(1), users: 4, seconds: 2.0, ..StepRecord::default() }]);
    let evaluations = vec![evaluation(Split::Valid, 1, 0.2)];
    let history = History { step: Step(1), ledger: Some(ledger), trained, evaluations, beyond: true };
    let mut job = Job::new(JobSettings { history, ..settings(1) });
    enter(&mut job, "a");
    job.begin(SECOND, beginning(0, 1, 1)).unwrap();
    job
}

#[test]
fn lines_beyond_a_resume_go_with_the_first_thing_that_the_job_does_itself() {
    // a step, one without a record, one that only the next generation tells of, an evaluation
    let firsts: [fn(&mut Job); 4] = [
        |job| {
            job.report(SECOND, report(0, 2, 4..8)).unwrap();
        },
        |job| {
            job.report(SECOND, StepReport { record: None, ..report(0, 2, 4..8) }).unwrap();
        },
        |job| {
            regroup(job, 1, 0..1);
            job.begin(SECOND, beginning(0, 2, 2)).unwrap();
        },
        |job| drop(job.evaluation(WorkerId(0), Generation(1), evaluation(Split::Test, 1, 0.3)).unwrap()),
    ];
    for (number, first) in firsts.into_iter().enumerate() {
        let mut job = resumed();
        job.report(SECOND, report(0, 1, 0..4)).unwrap();
        assert_eq!(job.take_beyond(), None, "later checkpoints may still be in the way");
        first(&mut job);
        assert_eq!((job.take_beyond(), job.take_beyond()), (Some(Step(1)), None), "{number}");
    }
}

#[test]
fn a_resumed_job_goes_on_counting() {
    let mut job = resumed();
    assert_eq!(job.status(SECOND).last_checkpoint, Some(Step(1)));
    job.report(SECOND, report(0, 1, 0..4)).unwrap();
    assert_eq!(job.status(SECOND).ledger.epochs[0].seen, 4, "a step of before is not counted again");
    job.report(SECOND, report(0, 2, 4..8)).unwrap();
    assert!(job.status(SECOND).ledger.exact && job.status(SECOND).ledger.epochs[0].exact());
    job.leave(SECOND * 2, WorkerId(0), Departure::Done).unwrap();
    let summary = job.summary();
    assert!((summary.samples_per_second - 8.0 / 2.5).abs() < 1e-9);
    assert!((summary.seconds - 4.0).abs() < 1e-9, "2 s of steps and 1 s of evaluation before, 1 s now");
}

#[test]
fn more_workers_than_somebody_can_start_are_refused_and_change_nothing() {
    let mut job = Job::new(JobSettings { most_workers: Some(3), ..settings(2) });
    let refused = job.scale(SECOND, 4).unwrap_err();
    assert_eq!((&refused, job.wanted()), (&JobError::TooManyWorkers { workers: 4, most: 3 }, 2));
    let text = refused.to_string();
    assert!(text.contains("takes 3 at most") && text.contains("--no-workers"), "{text}");
    job.scale(SECOND, 3).unwrap();
    assert_eq!(job.wanted(), 3);
    // a step has 4 users, and each worker takes one at least
    let mut settings = JobSettings { most_workers: Some(4), ..settings(2) };
    settings.config.training.global_batch = 4;
    let mut job = Job::new(settings);
    job.scale(SECOND, 100).unwrap();
    assert_eq!(job.wanted(), 4, "it would not have to start more");
}
