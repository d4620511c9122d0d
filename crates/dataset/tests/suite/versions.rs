//! A stored dataset of each version, and the fingerprint that must never change for the same content.
//!
//! `tests/data/v1` was written by the first release of version 1 from [`ROWS`] and [`ITEMS`]; `tests/data/v2` by that of
//! version 2 from [`RATED_ROWS`] and [`ITEMS`], a rating of at least 4 being a conversion.

use std::path::Path;

use half::f16;
use learn_dataset::Dataset;
use learn_domain::report::Split;

use crate::builders::{Fixture, view};

const ROWS: &str =
    "user_id,item_id,timestamp\nann,b,3\nann,a,1\nann,c,2.5\nann,d,7\nann,a,8\nbob,d,1\nbob,c,2\nbob,b,3\nbob,a,4\n";
const RATED_ROWS: &str = "user_id,item_id,timestamp,rating\nann,b,3,4\nann,a,1,2\nann,c,2.5,5\nann,d,7,3\nann,a,8,4.5\n\
                          bob,d,1,1\nbob,c,2,4\nbob,b,3,5\nbob,a,4,3.5\n";
const ITEMS: &str = "item_id,title,brand\na,Lamp,Acme\nb,Desk,\nc,,\nd,Chair,Oak & Co\ne,Unseen,\n";

#[test]
fn version_1_is_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v1");
    let dataset = Dataset::open(&dir).unwrap();
    dataset.verify(&()).unwrap();
    let users = view(&dataset);
    assert_eq!(users[0].id, "ann");
    assert_eq!(users[0].train, [("a".into(), 1_000_000), ("c".into(), 2_500_000), ("b".into(), 3_000_000)]);
    assert_eq!(users[1].test, Some((["d", "c", "b"].map(String::from).to_vec(), vec!["a".into()])));
    let items = dataset.items().unwrap();
    assert_eq!(items[3].brand.as_deref(), Some("Oak & Co"));
    assert_eq!(items[2].title, None);
    let embeddings = dataset.embeddings().unwrap();
    assert_eq!((embeddings.rows(), embeddings.dim()), (5, 2));
    assert_eq!(embeddings.row(4), [5.0, -1.0].map(f16::from_f32));
}

#[test]
fn version_1_has_no_times_of_held_out_rows_and_no_labels() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v1");
    let dataset = Dataset::open(&dir).unwrap();
    assert!(!dataset.has_labels() && !dataset.has_held_out_times());
    assert!(dataset.train().labels(0).is_none());
    let test = dataset.held_out(Split::Test);
    assert!(test.times(0).is_none() && test.labels(0).is_none());
}

/// Makes the dataset that is stored as version 2.
fn rated() -> Fixture {
    let mut fixture = Fixture::new();
    fixture.interactions("interactions.csv", RATED_ROWS);
    fixture.items("items.csv", ITEMS);
    fixture.config.interactions.label = Some("rating".into());
    fixture.config.interactions.label_at_least = Some(4.0);
    fixture
}

#[test]
fn version_2_is_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v2");
    let dataset = Dataset::open(&dir).unwrap();
    dataset.verify(&()).unwrap();
    assert_eq!(dataset.manifest().labels.as_ref().unwrap().conversions, 5);
    // ann: a (2), c (5), b (4), d (3), a (4.5); bob: d (1), c (4), b (5), a (3.5)
    let train = dataset.train();
    let ann = (0..train.len()).find(|&row| train.items(row).len() == 3).unwrap();
    assert_eq!((train.items(ann), train.labels(ann)), (&[0, 2, 1][..], Some(&[0, 1, 1][..])));
    let test = dataset.held_out(Split::Test);
    let ann = (0..test.len()).find(|&row| test.history(row).len() == 4).unwrap();
    assert_eq!(test.labels(ann), Some((&[0, 1, 1, 0][..], &[1][..])));
    let millions = |times: &[i64]| times.iter().map(|time| time * 100_000).collect::<Vec<_>>();
    let (history, targets) = test.times(ann).unwrap();
    assert_eq!((history, targets), (&millions(&[10, 25, 30, 70])[..], &millions(&[80])[..]));
    assert_eq!(rated().prepare().0.manifest.fingerprint, dataset.manifest().fingerprint);
}

#[test]
fn replacing_brings_an_older_version_up_to_date() {
    let mut fixture = Fixture::new();
    fixture.interactions("interactions.csv", ROWS);
    fixture.items("items.csv", ITEMS);
    let copy = |from: &Path, to: &Path| {
        std::fs::create_dir_all(to).unwrap();
        std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
    };
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v1");
    for name in copy(&stored, &fixture.out()) {
        let (from, to) = (stored.join(&name), fixture.out().join(&name));
        if from.is_dir() {
            for file in copy(&from, &to) {
                std::fs::copy(from.join(&file), to.join(&file)).unwrap();
            }
        } else {
            std::fs::copy(from, to).unwrap();
        }
    }
    let (kept, dataset) = fixture.prepare();
    assert!(kept.kept && !dataset.has_held_out_times(), "the same content stays as it is");
    fixture.options.replace = true;
    let (replaced, dataset) = fixture.prepare();
    assert!(!replaced.kept && dataset.has_held_out_times());
    assert_eq!(replaced.manifest.fingerprint, kept.manifest.fingerprint);
    assert!(fixture.prepare().0.kept, "nothing is gained by writing the same version again");
}

#[test]
fn the_same_content_still_has_the_fingerprint_of_version_1() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v1");
    let mut fixture = Fixture::new();
    fixture.interactions("interactions.csv", ROWS);
    fixture.items("items.csv", ITEMS);
    let (report, _) = fixture.prepare();
    let stored = Dataset::open(&dir).unwrap();
    assert_eq!(report.manifest.fingerprint, stored.manifest().fingerprint);
    assert_eq!(report.manifest.counts, stored.manifest().counts);
}
