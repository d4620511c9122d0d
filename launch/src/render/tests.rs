use learn_domain::ids::{Generation, Rank, Step, WorkerId};
use learn_domain::ledger::{EpochCount, LedgerSummary};
use learn_domain::report::{
    Comparison, DataServerStatus, DatasetFacts, EmbeddingStatus, EmbeddingWorker, Estimate, Interval, JobState,
    SegmentResult, Split, Summary, Task, WorkerStatus,
};

use super::*;

fn metrics(pairs: &[(&str, f64)]) -> Metrics {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

fn job() -> JobStatus {
    let last_step = StepRecord {
        step: Step(30),
        epoch: 1,
        loss: 3.25,
        accuracy: 0.125,
        users: 256,
        seconds: 0.5,
        ..StepRecord::default()
    };
    let epoch = |epoch, seen| EpochCount { epoch, users: 943, seen, repeated: 0, unknown: 0 };
    JobStatus {
        name: "quickstart".into(),
        task: Task::Train { resume_from: None },
        state: JobState::Running,
        cause: None,
        stall: None,
        generation: Generation(2),
        world_size: 2,
        wanted_workers: 2,
        most_workers: Some(64),
        dataset: DatasetFacts { name: "ml-100k".into(), users: 943, items: 1682, ..DatasetFacts::default() },
        steps_per_epoch: 20,
        total_steps: 2000,
        last_step: Some(last_step),
        last_checkpoint: Some(Step(20)),
        best: None,
        evaluations: vec![],
        workers: vec![WorkerStatus {
            worker: WorkerId(7),
            rank: Some(Rank(1)),
            host: "here".into(),
            pid: 42,
            device: "cpu".into(),
            step: Step(30),
            phase: Phase::Backward,
            metrics_url: String::new(),
            seconds_since_heartbeat: 0.25,
            seconds_in_phase: 0.5,
            left: false,
            work_ratio: None,
        }],
        data_servers: vec![DataServerStatus {
            location: "http://there:4".into(),
            metrics_url: String::new(),
            host: "there".into(),
            pid: 43,
        }],
        ledger: LedgerSummary { exact: true, epochs: vec![epoch(0, 943), epoch(1, 512)] },
        restarts: 0,
        operator_stop: false,
        seconds: 61.0,
    }
}

#[test]
fn numbers_read_well() {
    for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
        assert_eq!(count(number), text);
    }
    for (seconds, text) in [(5.64, "5.6s"), (184.0, "3m 04s"), (3723.0, "1h 02m"), (f64::NAN, "?"), (-1.0, "?")] {
        assert_eq!(duration(seconds), text);
    }
}

#[test]
fn what_a_job_does_names_its_evaluation() {
    let mut now = job();
    assert_eq!(doing(&now), step(now.last_step.as_ref().unwrap()));
    now.workers[0].phase = Phase::Evaluation;
    assert!(doing(&now).starts_with("evaluating; epoch 2 loss"), "{}", doing(&now));
    now.last_step = None;
    assert_eq!(doing(&now), "evaluating");
    now.workers[0].left = true;
    assert_eq!(doing(&now), "running");
    now.state = JobState::Gathering;
    assert_eq!(doing(&now), "gathering");
}

#[test]
fn a_live_job_shows_its_progress_ledger_and_workers() {
    let text = status(&job(), Freshness::Live, None);
    for part in [
        "quickstart: running\n",
        "ml-100k: 943 users, 1,682 items",
        "30 of 2,000 (100 epochs)",
        "epoch 2 loss 3.2500 accuracy 0.125 512 users/s",
        "ledger      1 epoch, exact\n",
        "epoch 2: 512 of 943 users seen: open",
        "2 with 2 workers",
        "rank 1 here pid 42 cpu: step 30 backward, heard 0.2s ago",
        "data server there pid 43: http://there:4",
        "1m 01s",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
}

#[test]
fn exact_epochs_take_one_line_and_each_of_the_others_its_own() {
    let mut job = job();
    let epoch = |epoch| EpochCount { epoch, users: 943, seen: 943, repeated: 0, unknown: 0 };
    job.ledger.epochs = (0..100).map(epoch).collect();
    let lines = |job: &JobStatus| {
        let text = status(job, Freshness::Live, None);
        text.lines().filter_map(|line| line.trim().strip_prefix("ledger      ")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(lines(&job), ["100 epochs, all exact"]);
    (job.ledger.epochs[41].repeated, job.ledger.epochs[99].seen) = (2, 10);
    let others = ["epoch 42: 943 of 943 users seen: 2 repeated, 0 unknown", "epoch 100: 10 of 943 users seen: open"];
    assert_eq!(lines(&job), ["98 epochs, exact", others[0], others[1]]);
    job.ledger.epochs[98].seen = 11;
    assert_eq!(lines(&job)[2], "epoch 99: 11 of 943 users seen: the others were left out");
    job.ledger = LedgerSummary { exact: false, epochs: vec![epoch(0), epoch(0)] };
    assert_eq!(lines(&job), ["2 epochs, all exact", "an epoch came again, or was left out"]);
}

#[test]
fn a_stale_or_failed_job_says_so() {
    let mut failed = job();
    failed.state = JobState::Failed;
    failed.cause = Some("worker 1 was silent for 15s".into());
    failed.ledger.epochs[1].repeated = 3;
    let text = status(&failed, Freshness::Ended, Some(90.0));
    assert!(text.starts_with("quickstart: failed (ended)\n"), "{text}");
    assert!(text.contains("worker 1 was silent for 15s") && text.contains("3 repeated, 0 unknown"), "{text}");
    assert!(status(&job(), Freshness::Stale, Some(90.0)).contains("STALE"));
    let unknown = status(&job(), Freshness::Unknown, Some(90.0));
    assert!(unknown.contains("may be there still") && !unknown.contains("resume"), "{unknown}");
    assert_eq!(last_word(&failed, Freshness::Ended), "quickstart: failed (ended), step 30 of 2,000");
    assert_eq!(last_word(&job(), Freshness::Live), "quickstart: running, step 30 of 2,000");
}

#[test]
fn an_embed_job_shows_its_ranges_and_processes() {
    let worker = EmbeddingWorker {
        worker: WorkerId(3),
        host: "here".into(),
        pid: 42,
        range: Some(4),
        seconds_since_heard: 0.25,
    };
    let job = EmbeddingStatus {
        items: 5000,
        items_done: 1200,
        ranges: 12,
        ranges_done: 3,
        workers: vec![worker],
        failure: None,
    };
    let text = embedding(Some(&job), Freshness::Live, Some("384 dimensions, minilm"));
    let wanted = "being embedded\nitems       1,200 of 5,000\nranges      3 of 12\nprocess 3   here pid 42: range 4, heard 0.2s ago\n\
                  embeddings  384 dimensions, minilm\n";
    assert_eq!(text, wanted);
    assert_eq!(embedding(None, Freshness::Ended, None), "not embedded; `learn-launch embed CONFIG` does it\n");
}

#[test]
fn a_job_before_its_first_step_can_be_shown() {
    let mut new = job();
    (new.last_step, new.steps_per_epoch, new.total_steps) = (None, 0, 0);
    assert!(status(&new, Freshness::Live, None).contains("0 of 0 (0 epochs)"));
}

#[test]
fn only_a_coordinator_that_answers_has_heard_of_a_worker_just_now() {
    use Freshness::{Ended, Live, Queued, Stale, Unknown};
    for (freshness, age, heard, runs, written) in [
        (Live, None, true, true, false),
        (Live, Some(90.0), false, true, true),
        (Ended, Some(90.0), false, false, false),
        (Stale, Some(90.0), false, false, true),
        (Queued, Some(90.0), false, false, true),
        (Unknown, Some(90.0), false, false, true),
    ] {
        let text = status(&job(), freshness, age);
        assert_eq!(text.contains("step 30 backward, heard 0.2s ago\n"), heard, "{freshness:?}: {text}");
        assert_eq!(text.contains("step 30 backward\n"), !heard, "{freshness:?}: {text}");
        assert_eq!(text.contains("  running for 1m 01s\n"), runs, "{freshness:?}: {text}");
        assert_eq!(text.contains("  ran for     1m 01s\n"), !runs, "{freshness:?}: {text}");
        assert_eq!(
            text.contains("  written     1m 30s ago; nothing newer is known\n"),
            written,
            "{freshness:?}: {text}"
        );
    }
}

fn evaluated_on(metrics: Metrics) -> Evaluation {
    Evaluation {
        split: Split::Valid,
        step: Step(20),
        epoch: 1,
        users: 943,
        metrics,
        seconds: 1.5,
        segments: vec![],
        comparisons: vec![],
    }
}

fn comparison(name: &str, recall: f64) -> Comparison {
    let segments = vec![segment("all", 943, recall), segment("cold_items", 10, recall / 2.0)];
    Comparison { name: name.into(), metrics: metrics(&[("recall@10", recall)]), segments }
}

fn segment(name: &str, users: u64, recall: f64) -> SegmentResult {
    let interval = Some(Interval { low: recall - 0.01, high: recall + 0.01 });
    let estimate = Estimate { value: recall, interval };
    let metrics = [("recall@10".to_owned(), estimate)].into();
    SegmentResult { segment: name.into(), users, targets: 2 * users, metrics }
}

#[test]
fn an_evaluation_shows_the_comparisons_and_on_request_the_segments() {
    let mut cold = segment("cold_items", 10, 0.1);
    cold.metrics.insert("cvr.auc".into(), Estimate { value: 0.75, interval: None });
    let evaluation = Evaluation {
        segments: vec![segment("all", 943, 0.25), cold, segment("cold_users", 0, 0.0)],
        comparisons: vec![
            comparison("popularity", 0.05),
            comparison("last_item", 0.12),
            comparison("decayed_mean", 0.1),
        ],
        ..evaluated_on(metrics(&[("recall@10", 0.25)]))
    };
    let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let short = evaluated(&evaluation, false);
    assert!(short.starts_with("943 users of valid, checkpoint of step 20\n"), "{short}");
    assert_eq!(cells(short.lines().last().unwrap()), ["recall@10", "0.2500", "0.0500", "0.1200", "0.1000"]);
    let long = evaluated(&evaluation, true);
    assert!(long.starts_with(&short) && long.lines().all(|line| line.len() <= 100), "{long}");
    let cold = long.split("cold_items: 10 users, 20 targets\n").nth(1).unwrap();
    assert_eq!(cells(cold.lines().next().unwrap())[..3], ["metric", "model", "95"]);
    let row = ["recall@10", "0.1000", "0.0900", "-", "0.1100", "0.0250", "0.0600", "0.0500"];
    assert_eq!(cells(cold.lines().nth(1).unwrap()), ["cvr.auc", "0.7500", "-", "-", "-", "-"], "it has no interval");
    assert_eq!(cells(cold.lines().nth(2).unwrap()), row);
    assert!(long.ends_with("cold_users: 0 users, 0 targets\n"), "nothing to be shown of nobody: {long}");
}

#[test]
fn metrics_are_ordered_by_their_cutoff() {
    let test = metrics(&[("recall@10", 0.2), ("recall@5", 0.1), ("mrr", 0.3), ("recall@50", 0.4)]);
    let table = metrics_table(&[("test", &test), ("other", &metrics(&[("ndcg@10", 0.5)]))]);
    let names: Vec<_> = table.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(names, ["metric", "mrr", "ndcg@10", "recall@5", "recall@10", "recall@50"]);
    let cells: Vec<_> = table.lines().nth(2).unwrap().split_whitespace().collect();
    assert_eq!(cells, ["ndcg@10", "-", "0.5000"]);
    let more = metrics(&[("auc", 0.6), ("hr@10", 0.2)]);
    let line = evaluation(&evaluated_on(test.into_iter().chain(more).collect()));
    let wanted =
        "valid at step 20 (epoch 1): mrr 0.3000 recall@5 0.1000 recall@10 0.2000 recall@50 0.4000 (943 users, 1.5s)";
    assert_eq!(line, wanted);
}

#[test]
fn the_summary_compares_with_popularity() {
    let mut finished = Summary {
        dataset: "ml-100k".into(),
        fingerprint: "f".into(),
        users: 943,
        items: 1682,
        interactions: 100_000,
        world_size: 2,
        steps: 400,
        seconds: 100.0,
        samples_per_second: 820.4,
        best_step: Step(380),
        valid: metrics(&[("recall@10", 0.21)]),
        test: metrics(&[("recall@10", 0.2), ("mrr", 0.1)]),
        popularity: metrics(&[("recall@10", 0.08), ("mrr", 0.0)]),
        segments: vec![],
        comparisons: vec![],
    };
    let text = summary(&finished);
    let row = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert_eq!(
        row("recall@10").split_whitespace().collect::<Vec<_>>(),
        ["recall@10", "0.2100", "0.2000", "0.0800", "2.50x"]
    );
    assert!(row("mrr").ends_with(" -"));
    assert!(row("metric").ends_with("test/pop."));
    assert!(text.contains("400 steps on 2 workers in 1m 40s (820 users/s); best checkpoint: step 380"));
    finished.comparisons =
        vec![comparison("popularity", 0.08), comparison("last_item", 0.1), comparison("decayed_mean", 0.1)];
    let text = summary(&finished);
    assert!(text.lines().all(|line| line.len() <= 100), "{text}");
    let recall = text.lines().find(|line| line.starts_with("recall@10")).unwrap();
    let cells: Vec<_> = recall.split_whitespace().collect();
    assert_eq!(cells, ["recall@10", "0.2100", "0.2000", "0.0800", "0.1000", "0.1000", "2.50x"]);
}
