//! Conversion labels: read from every format, kept beside their items, part of the fingerprint only where they are.

use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray, Float64Array, Int64Array};
use learn_dataset::{Dataset, DefectKind};
use learn_domain::Config;
use learn_domain::config::SplitPolicy;
use learn_domain::report::Split;

use crate::builders::{Fixture, Row, grid, parquet, text_column};

/// The rating of a row, 1 to 5.
fn rating(at: usize) -> u8 {
    (at * 7 % 5) as u8 + 1
}

fn rated_csv(rows: &[Row], rating: impl Fn(usize) -> String) -> String {
    let line = |(at, (user, item, time)): (usize, &Row)| format!("{user},{},{item},{time}\n", rating(at));
    std::iter::once("user_id,rating,item_id,timestamp\n".to_owned()).chain(rows.iter().enumerate().map(line)).collect()
}

fn labelled(name: &str, contents: impl AsRef<[u8]>, at_least: Option<f64>) -> Fixture {
    let mut fixture = Fixture::new();
    fixture.interactions(name, contents);
    fixture.config.interactions.label = Some("rating".into());
    fixture.config.interactions.label_at_least = at_least;
    fixture
}

/// (user, item, time, label) of everything that the splits show, sorted.
fn shown(dataset: &Dataset) -> Vec<(String, String, i64, u8)> {
    let items: Vec<String> = dataset.items().unwrap().into_iter().map(|item| item.id).collect();
    let users = dataset.user_ids().unwrap();
    let mut all = Vec::new();
    let mut add = |user: u32, row: &[u32], times: &[i64], labels: &[u8]| {
        assert!(times.len() == row.len() && labels.len() == row.len());
        for ((&item, &time), &label) in row.iter().zip(times).zip(labels) {
            all.push((users[user as usize].clone(), items[item as usize].clone(), time, label));
        }
    };
    let train = dataset.train();
    for row in 0..train.len() {
        add(train.user(row), train.items(row), train.times(row), train.labels(row).unwrap());
    }
    for split in [Split::Valid, Split::Test] {
        let rows = dataset.held_out(split);
        for row in 0..rows.len() {
            let (times, labels) = (rows.times(row).unwrap(), rows.labels(row).unwrap());
            add(rows.user(row), rows.history(row), times.0, labels.0);
            add(rows.user(row), rows.targets(row), times.1, labels.1);
        }
    }
    all.sort();
    all.dedup();
    all
}

#[test]
fn labels_and_times_stay_beside_their_items() {
    let rows = grid(12, 6, 9);
    let fixture = labelled("a.csv", rated_csv(&rows, |at| rating(at).to_string()), Some(4.0));
    let (report, dataset) = fixture.prepare();
    let mut wanted: Vec<_> = rows
        .iter()
        .enumerate()
        .map(|(at, (user, item, time))| (user.clone(), item.clone(), *time, u8::from(rating(at) >= 4)))
        .collect();
    wanted.sort();
    assert_eq!(shown(&dataset), wanted);
    let labels = report.manifest.labels.unwrap();
    let conversions = wanted.iter().filter(|row| row.3 == 1).count() as u64;
    assert_eq!((labels.conversions, labels.at_least), (conversions, Some(4.0)));
    assert!(dataset.has_labels() && dataset.has_held_out_times());
}

#[test]
fn every_notation_of_a_label_makes_the_same_dataset() {
    let rows = grid(10, 5, 7);
    let yes = |at: usize| rating(at) >= 4;
    let csv = labelled("a.csv", rated_csv(&rows, |at| u8::from(yes(at)).to_string()), None).prepare().0;
    let words = labelled("a.csv", rated_csv(&rows, |at| yes(at).to_string()), None).prepare().0;
    let json: String = rows
        .iter()
        .enumerate()
        .map(|(at, (user, item, time))| {
            format!("{}\n", serde_json::json!({"user_id": user, "rating": yes(at), "item_id": item, "timestamp": time}))
        })
        .collect();
    let json = labelled("a.jsonl", json, None).prepare().0;
    let table = |labels: ArrayRef| {
        let mut fixture = Fixture::new();
        let path = fixture.path("a.parquet");
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("rating", labels),
            ("user_id", text_column(rows.iter().map(|row| &row.0))),
            ("item_id", text_column(rows.iter().map(|row| &row.1))),
            ("timestamp", Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.2)))),
        ];
        parquet(&path, columns);
        fixture.config.interactions.files.push(path);
        fixture.config.interactions.label = Some("rating".into());
        fixture.prepare().0
    };
    let all = 0..rows.len();
    let truths = table(Arc::new(BooleanArray::from(all.clone().map(yes).collect::<Vec<_>>())));
    let reals = table(Arc::new(Float64Array::from_iter_values(all.map(|at| f64::from(u8::from(yes(at)))))));
    for other in [&words, &json, &truths, &reals] {
        assert_eq!(other.manifest.fingerprint, csv.manifest.fingerprint);
        assert_eq!(other.manifest.labels, csv.manifest.labels);
    }
    let flipped = labelled("a.csv", rated_csv(&rows, |at| u8::from(yes(at) || at == 8).to_string()), None);
    assert_ne!(flipped.prepare().0.manifest.fingerprint, csv.manifest.fingerprint, "a label is part of the content");
    let (report, dataset) = Fixture::with_rows(&rows).prepare();
    assert_ne!(report.manifest.fingerprint, csv.manifest.fingerprint);
    assert!(report.manifest.labels.is_none() && dataset.train().labels(0).is_none());
    assert!(dataset.held_out(Split::Test).labels(0).is_none() && dataset.held_out(Split::Test).times(0).is_some());
}

#[test]
fn a_threshold_and_shares_that_come_to_the_same_are_written_down() {
    let mut fixture = labelled("a.csv", rated_csv(&grid(20, 6, 11), |at| rating(at).to_string()), Some(4.0));
    fixture.config.split = SplitPolicy::ByTime;
    (fixture.config.valid_share, fixture.config.test_share) = (0.2, 0.15);
    let before = fixture.prepare().0.manifest;
    // 20 interactions each at the times 0 to 5: the thresholds stay 3 and 5
    fixture.config.valid_share = 0.21;
    fixture.config.interactions.label_at_least = Some(3.5);
    let (report, dataset) = fixture.prepare();
    assert!(report.kept);
    assert_eq!(report.manifest.fingerprint, before.fingerprint);
    let config = Config { prepare: fixture.config.clone(), ..Config::default() };
    assert_eq!(dataset.contradiction(&config, |_| true), None);
    let labels = dataset.manifest().labels.clone().unwrap();
    assert_eq!((labels.at_least, labels.conversions), (Some(3.5), before.labels.unwrap().conversions));
}

#[test]
fn a_repeat_converts_if_one_of_its_rows_did() {
    let mut rows = grid(3, 4, 5);
    rows.push(rows[1].clone());
    let repeat = rows.len() - 1;
    let with = |first: usize| rated_csv(&rows, |at| u8::from(at == first).to_string());
    let (first, _) = labelled("a.csv", with(1), None).prepare();
    let fixture = labelled("a.csv", with(repeat), None);
    let (second, dataset) = fixture.prepare();
    assert_eq!(first.manifest.fingerprint, second.manifest.fingerprint);
    assert_eq!(second.manifest.labels.unwrap().conversions, 1);
    assert!(shown(&dataset).contains(&(rows[1].0.clone(), rows[1].1.clone(), rows[1].2, 1)));
}

#[test]
fn bad_labels_are_named_or_counted() {
    let rows = grid(6, 5, 5);
    let with = |cell: &'static str, at_least| {
        labelled("a.csv", rated_csv(&rows, move |at| if at == 2 { cell.into() } else { "1".into() }), at_least)
    };
    for (cell, at_least, problem) in [
        ("", None, "it has no label"),
        ("2", None, "its label is 2"),
        ("nan", Some(4.0), "its label is nan"),
        ("good", Some(4.0), "its label is good"),
    ] {
        let message = with(cell, at_least).refused();
        assert!(message.contains("a.csv, line 4") && message.contains(problem), "{message}");
        assert!(message.contains("prepare.interactions.label_at_least"), "{message}");
    }
    let mut skipping = with("nan", None);
    skipping.config.skip_bad_rows = true;
    let (report, _) = skipping.prepare();
    assert_eq!((report.skipped[0].kind, report.skipped[0].count), (DefectKind::BadLabel, 1));
    let mut absent = with("1", None);
    absent.config.interactions.label = Some("score".into());
    let message = absent.refused();
    assert!(message.contains("a.csv has no column score") && message.contains("prepare.interactions.label"));
}
