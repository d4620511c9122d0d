//! A stored dataset of each version, and the fingerprint that must never change for the same content.
//!
//! `tests/data/v1` was written by the first release of version 1 from [`ROWS`] and [`ITEMS`].

use std::path::Path;

use half::f16;
use learn_dataset::Dataset;

use crate::builders::{Fixture, view};

const ROWS: &str =
    "user_id,item_id,timestamp\nann,b,3\nann,a,1\nann,c,2.5\nann,d,7\nann,a,8\nbob,d,1\nbob,c,2\nbob,b,3\nbob,a,4\n";
const ITEMS: &str = "item_id,title,brand\na,Lamp,Acme\nb,Desk,\nc,,\nd,Chair,Oak & Co\ne,Unseen,\n";

#[test]
fn version_1_is_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v1");
    let dataset = Dataset::open(&dir).unwrap();
    dataset.verify().unwrap();
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
