//! Every long part says where it stands.

use std::sync::Mutex;

use learn_dataset::{Preparation, Progress, prepare_with};
use learn_domain::config::SplitPolicy;

use crate::builders::{Fixture, csv, grid, gzip, parquet_rows};

/// Stages with their totals and what was done of them.
#[derive(Default)]
struct Recorder(Mutex<Vec<(String, Option<u64>, u64)>>);

impl Progress for Recorder {
    fn stage(&self, name: &str, total: Option<u64>) {
        self.0.lock().unwrap().push((name.into(), total, 0));
    }

    fn advance(&self, amount: u64) {
        self.0.lock().unwrap().last_mut().unwrap().2 += amount;
    }
}

#[test]
fn every_stage_ends_at_its_total() {
    let rows = grid(300, 8, 40);
    let mut fixture = Fixture::new();
    fixture.interactions("a.csv", csv(&rows[..1000]));
    fixture.interactions("b.csv.gz", gzip(csv(&rows[1000..2000])));
    let table = fixture.path("c.parquet");
    parquet_rows(&table, &rows[2000..]);
    fixture.config.interactions.files.push(table);
    fixture.items("i.csv", (0..40).fold("item_id\n".to_owned(), |all, item| all + &format!("i{item}\n")));
    fixture.config.k_core = 2;
    fixture.config.split = SplitPolicy::ByTime;
    let recorder = Recorder::default();
    let out = fixture.out();
    let preparation = Preparation { config: &fixture.config, name: "x", out: &out, options: fixture.options };
    prepare_with(&preparation, &recorder).unwrap();
    learn_dataset::Dataset::open(&out).unwrap().verify_with(&recorder).unwrap();
    let stages = recorder.0.into_inner().unwrap();
    for (name, total, done) in &stages {
        assert!(total.is_none_or(|total| total == *done), "{name}: {done} of {total:?}");
    }
    let names: Vec<&str> = stages.iter().map(|stage| stage.0.as_str()).collect();
    for name in ["read items", "read interactions", "sort", "k-core, pass 1", "find the split times", "write", "verify"]
    {
        assert!(names.contains(&name), "{name} is missing in {names:?}");
    }
}
