use std::fs;
use std::path::Path;

use learn_domain::Config;
use learn_domain::event::{Happening, JobEvent};
use learn_domain::ids::{Generation, Rank, Step, WorkerId};
use learn_domain::membership::LossCause;
use learn_domain::report::{
    Comparison, Estimate, Evaluation, Interval, JobState, SegmentResult, Split, StepRecord, Summary, Timed,
};
use learn_domain::run_dir::RunDir;

use super::data::curves;
use super::*;
use crate::watch::tests::scene;

fn write(path: &Path, value: &impl serde::Serialize) {
    fs::write(path, serde_json::to_vec(value).unwrap()).unwrap();
}

fn write_lines<T: serde::Serialize>(path: &Path, values: &[T]) {
    let text: String = values.iter().map(|value| serde_json::to_string(value).unwrap() + "\n").collect();
    fs::write(path, text).unwrap();
}

/// Steps of 2 seconds, with a night between the tenth and the one after it.
fn steps(count: u64) -> Vec<Timed<StepRecord>> {
    let time = |step: u64| 1000.0 + 2.0 * step as f64 + if step > 10 { 40_000.0 } else { 0.0 };
    let record = |step| StepRecord {
        step: Step(step),
        loss: 8.0 / step as f64,
        users: 100,
        seconds: 1.5,
        ..StepRecord::default()
    };
    (1..=count).map(|step| Timed { time: Some(time(step)), value: record(step) }).collect()
}

fn evaluation(step: u64, recall: f64) -> Timed<Evaluation> {
    let metrics = [("recall@10".to_owned(), recall)].into();
    let value = Evaluation {
        split: Split::Valid,
        step: Step(step),
        epoch: 1,
        users: 9,
        metrics,
        seconds: 1.0,
        segments: vec![],
        comparisons: vec![],
    };
    Timed { time: Some(1000.0 + 2.0 * step as f64), value }
}

fn summary(recall: f64) -> Summary {
    let interval = Some(Interval { low: recall - 0.01, high: recall + 0.01 });
    let segment = |name: &str| SegmentResult {
        segment: name.into(),
        users: 9,
        targets: 9,
        metrics: [("recall@10".to_owned(), Estimate { value: recall, interval })].into(),
    };
    Summary {
        dataset: "shop".into(),
        fingerprint: "f".into(),
        users: 9,
        items: 1682,
        interactions: 99,
        world_size: 2,
        steps: 20,
        seconds: 60.0,
        samples_per_second: 50.0,
        best_step: Step(10),
        valid: [("recall@10".to_owned(), recall)].into(),
        test: [("recall@10".to_owned(), recall)].into(),
        popularity: [("recall@10".to_owned(), 0.05)].into(),
        segments: vec![segment("all"), segment("cold_items")],
        comparisons: vec![Comparison {
            name: "popularity".into(),
            metrics: [("recall@10".to_owned(), 0.05)].into(),
            segments: vec![],
        }],
    }
}

/// A run directory as a finished job leaves it.
fn finished(root: &Path, learning_rate: f64, recall: f64) -> RunDir {
    let run = RunDir::new(root);
    fs::create_dir_all(root).unwrap();
    let mut config = Config::default();
    config.optimizer.learning_rate = learning_rate;
    config.training.epochs = 7;
    write(&run.config(), &config);
    let mut status = scene().current.unwrap().status;
    (status.state, status.stall, status.total_steps) = (JobState::Finished, None, 20);
    status.steps_per_epoch = 10;
    write(&run.status(), &status);
    write(&run.summary(), &summary(recall));
    write_lines(&run.metrics(), &steps(20));
    write_lines(&run.evaluations(), &[evaluation(10, recall / 2.0), evaluation(20, recall)]);
    let lost = Happening::WorkerLost { worker: WorkerId(1), rank: Rank(1), cause: LossCause::Disconnected };
    write_lines(&run.events(), &[JobEvent { time: 1011.0, generation: Generation(1), happening: lost }]);
    run
}

fn load(run: &RunDir, name: &str) -> RunFacts {
    RunFacts::load(run, name.into(), format!("runs/{name}"))
}

#[test]
fn a_page_compares_runs_and_needs_nothing_from_outside() {
    let folder = tempfile::tempdir().unwrap();
    let one = load(&finished(&folder.path().join("one"), 0.001, 0.2), "one");
    let two = load(&finished(&folder.path().join("two"), 0.002, 0.3), "two <&>");
    assert_eq!((&one.problems, &two.problems), (&vec![], &vec![]));
    let page = html(&[one, two]);
    for part in [
        "<title>one and two &lt;&amp;&gt;</title>",
        "<td class=\"n\">0.2000 <span class=\"interval\">[0.1900, 0.2100]</span></td>",
        "<td class=\"n best\">0.3000 <span class=\"interval\">[0.2900, 0.3100]</span></td>",
        "<td class=\"n free\">0.0500</td>",
        "<tr><td><code>optimizer.learning_rate</code></td><td><code>0.001</code></td><td><code>0.002</code></td>",
        "1 that all runs have alike",
        "<td>cold items</td>",
        "rank 1 (worker 1) was lost",
        "20 of 20",
        "<td class=\"state good\">finished</td>",
    ] {
        assert!(page.contains(part), "{part} is not in:\n{page}");
    }
    assert!(!page.contains("job.name</code>"), "where a run lies is no difference");
    let outside = ["src=", "href=", "@import", "url(", "fetch(", "XMLHttpRequest", "<link"];
    for word in outside {
        assert!(!page.contains(word), "{word} may load something");
    }
    assert_eq!(page.matches("http").count(), 1, "the name of SVG is the only address");
    assert_eq!(page.matches("</script>").count(), 2, "data cannot end a script");
}

#[test]
fn curves_have_their_axes_and_events_their_points() {
    let folder = tempfile::tempdir().unwrap();
    let run = load(&finished(&folder.path().join("one"), 0.001, 0.2), "one");
    let curves = curves(std::slice::from_ref(&run), &["recall@10".into()]);
    let titles: Vec<_> = curves.charts.iter().map(|chart| chart.title.as_str()).collect();
    assert_eq!(titles[..3], ["Loss", "Valid recall@10", "In-batch accuracy"], "no head, no CVR loss");
    let loss = &curves.charts[0].series[0];
    assert_eq!((loss.step.len(), loss.step[19], loss.epoch[19], loss.value[1]), (20, 20.0, 2.0, 4.0));
    // 1.5 s for the first step of each session, 2 s by the clock for the others, and no night
    let seconds = loss.hours[19] * 3600.0;
    assert!((seconds - (2.0 * 1.5 + 18.0 * 2.0)).abs() < 1e-9, "{seconds}");
    assert_eq!(loss.events.iter().map(|mark| mark.at).collect::<Vec<_>>(), [4], "at the step before it");
    let recall = &curves.charts[1].series[0];
    assert_eq!((recall.step.as_slice(), recall.value.as_slice()), (&[10.0, 20.0][..], &[0.1, 0.2][..]));
    assert!((recall.hours[1] - loss.hours[19]).abs() < 1e-12);

    let long = RunFacts { steps: steps(100_000), ..RunFacts::default() };
    let curves = super::data::curves(&[long], &[]);
    let loss = &curves.charts[0].series[0];
    assert!(loss.step.len() <= 600 && loss.step.last() == Some(&100_000.0), "{}", loss.step.len());
}

#[test]
fn damaged_and_unfinished_runs_are_shown_as_far_as_they_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let whole = load(&finished(&folder.path().join("whole"), 0.001, 0.2), "whole");
    let damaged = finished(&folder.path().join("damaged"), 0.001, 0.2);
    fs::write(damaged.config(), "{").unwrap();
    fs::write(damaged.summary(), "[]").unwrap();
    fs::write(damaged.status(), "no JSON").unwrap();
    let text = fs::read_to_string(damaged.metrics()).unwrap().replacen("{\"time\"", "{time", 3);
    fs::write(damaged.metrics(), text.clone() + "{\"cut").unwrap();
    let damaged = load(&damaged, "damaged");
    assert_eq!((damaged.steps.len(), damaged.state.as_str()), (17, "unknown"));
    let all = damaged.problems.join("\n");
    for part in ["status.json", "config.json is damaged", "summary.json is damaged", "metrics.jsonl: 3 damaged lines"] {
        assert!(all.contains(part), "{part} is not in {all}");
    }
    let new = RunDir::new(folder.path().join("new"));
    fs::create_dir_all(new.root()).unwrap();
    write(&new.config(), &Config::default());
    let new = load(&new, "new");
    assert!(new.problems[0].contains("its coordinator has not come that far"), "{:?}", new.problems);
    let left = finished(&folder.path().join("left"), 0.001, 0.2);
    let mut status = scene().current.unwrap().status;
    status.cause = Some("nobody knows".into());
    write(&left.status(), &status);
    fs::remove_file(left.summary()).unwrap();
    let left = load(&left, "left");
    assert_eq!(left.state, "running, its coordinator is gone");
    let page = html(&[whole, damaged, new.clone(), left]);
    for part in [
        "damaged: config.json is damaged",
        "damaged: metrics.jsonl: 3 damaged lines",
        "left: running, its coordinator is gone: nobody knows",
    ] {
        assert!(page.contains(part), "{part} is not in:\n{page}");
    }
    assert!(html(&[new]).contains("No run has a finished step yet"));
}
