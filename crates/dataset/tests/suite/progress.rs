//! Every long part says where it stands.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use learn_dataset::{DatasetError, Preparation, PrepareError, Progress, Unit, prepare_with};
use learn_domain::config::SplitPolicy;

use crate::builders::{Fixture, csv, grid, gzip, parquet_rows, temporary};

/// Stages of `prepare` that end when somebody asks them to.
const STAGES: [&str; 9] = [
    "read items",
    "read interactions",
    "divide",
    "sort",
    "k-core, pass 1",
    "check lengths",
    "find the split times",
    "write items",
    "write",
];
/// Interactions of two users of the grid: a partition with more is divided.
const TWO_USERS: u64 = 16;

/// The stages.
#[derive(Default)]
struct Recorder(Mutex<Vec<Stage>>);

struct Stage {
    name: String,
    total: Option<u64>,
    unit: Unit,
    done: u64,
}

impl Progress for Recorder {
    fn stage(&self, name: &str, total: Option<u64>, unit: Unit) {
        self.0.lock().unwrap().push(Stage { name: name.into(), total, unit, done: 0 });
    }

    fn advance(&self, amount: u64) {
        self.0.lock().unwrap().last_mut().unwrap().done += amount;
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
    fixture.options.layout.partition_rows = TWO_USERS;
    let recorder = Recorder::default();
    let out = fixture.out();
    let preparation =
        Preparation { config: &fixture.config, name: "x", out: &out, options: fixture.options, keep_out: None };
    prepare_with(&preparation, &recorder).unwrap();
    learn_dataset::Dataset::open(&out).unwrap().verify(&recorder).unwrap();
    let stages = recorder.0.into_inner().unwrap();
    for Stage { name, total, unit, done } in &stages {
        let bytes = name.starts_with("read") || name == "verify";
        assert_eq!(*unit, if bytes { Unit::Bytes } else { Unit::Rows }, "{name}");
        assert!(total.is_none_or(|total| total == *done), "{name}: {done} of {total:?}");
    }
    let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
    for name in STAGES.iter().chain(&["sync", "verify"]) {
        assert!(names.contains(name), "{name} is missing in {names:?}");
    }
}

/// Asks to stop in a stage.
struct Stopper {
    at: &'static str,
    here: AtomicBool,
}

impl Stopper {
    fn at(at: &'static str) -> Self {
        Self { at, here: AtomicBool::new(false) }
    }
}

impl Progress for Stopper {
    fn stage(&self, name: &str, _total: Option<u64>, _unit: Unit) {
        self.here.fetch_or(name == self.at, Ordering::Relaxed);
    }

    fn advance(&self, _amount: u64) {}

    fn stopped(&self) -> bool {
        self.here.load(Ordering::Relaxed)
    }
}

#[test]
fn a_stop_ends_every_stage_and_leaves_nothing() {
    let mut fixture = Fixture::with_rows(&grid(300, 8, 40));
    fixture.items("i.csv", (0..40).fold("item_id\n".to_owned(), |all, item| all + &format!("i{item}\n")));
    fixture.config.k_core = 2;
    fixture.config.split = SplitPolicy::ByTime;
    fixture.options.layout.partition_rows = TWO_USERS;
    let out = fixture.out();
    for at in STAGES {
        let preparation =
            Preparation { config: &fixture.config, name: "x", out: &out, options: fixture.options, keep_out: None };
        let ended = prepare_with(&preparation, &Stopper::at(at));
        assert!(matches!(ended, Err(PrepareError::Stopped)), "{at}: {ended:?}");
        assert!(!out.exists() && temporary(fixture.dir.path()).is_empty(), "{at}");
    }
}

#[test]
fn a_stopped_check_of_the_dataset_that_is_there_changes_nothing() {
    let mut fixture = Fixture::with_rows(&grid(30, 6, 12));
    let (report, dataset) = fixture.prepare();
    let recorder = Recorder::default();
    for replace in [false, true] {
        fixture.options.replace = replace;
        let out = fixture.out();
        let preparation =
            Preparation { config: &fixture.config, name: "x", out: &out, options: fixture.options, keep_out: None };
        let ended = prepare_with(&preparation, &Stopper::at("verify"));
        assert!(matches!(ended, Err(PrepareError::Stopped)), "{ended:?}");
        assert!(temporary(fixture.dir.path()).is_empty());
        assert!(prepare_with(&preparation, &recorder).unwrap().kept);
    }
    assert_eq!(learn_dataset::Dataset::open(&fixture.out()).unwrap().manifest(), &report.manifest);
    let checks = recorder.0.into_inner().unwrap();
    assert_eq!(checks.iter().filter(|stage| stage.name == "verify").count(), 2, "a check of what is there is shown");

    // what was not read to its end is not said to be whole
    let ended = dataset.verify(&Stopper::at("verify"));
    assert!(matches!(ended, Err(DatasetError::Stopped)), "{ended:?}");
}
