//! A study with real jobs: its tables, what a second start does, and what a stop leaves.

use std::fs;
use std::path::Path;

use learn_tests::{SMALL, Shape, Site, follow, signal, succeeds, text};
use serde_json::Value;

/// A study of the repository, on small data of the same dimension.
fn site_for(study: &str) -> (Site, String) {
    let site = Site::new(Shape { dim: 384, ..SMALL });
    fs::create_dir(site.path("configs")).expect("the folder is writable");
    fs::copy(site.path("job.toml"), site.path("configs/quickstart.toml")).expect("the folder is writable");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/studies").join(format!("{study}.toml"));
    (site, file.to_string_lossy().into_owned())
}

#[test]
fn a_study_of_the_repository_writes_its_tables_and_is_done_only_once() {
    let (site, file) = site_for("item-towers");
    let arguments = ["study", &file, "--set", "training.max_steps=3", "--parallel", "2", "--json"];
    let first = site.launch(&arguments);
    succeeds(&first);
    let studies: Value = serde_json::from_slice(&first.stdout).unwrap();
    let parts = studies[0]["tables"][0]["parts"].as_array().unwrap();
    assert_eq!(parts.len(), 2, "{studies}");
    let rows = parts[0]["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["popularity", "last_item", "decayed_mean", "causal", "per_item", "content"]);
    for row in &rows[3..] {
        assert_eq!(row["seeds"], serde_json::json!([3, 3]), "{row}");
        let recall: Vec<f64> = (1..=3)
            .map(|seed| {
                let run = site.run_dir("item-towers").join(format!("{}-seed{seed}", row["name"].as_str().unwrap()));
                let summary: Value = serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap();
                summary["test"]["recall@10"].as_f64().unwrap()
            })
            .collect();
        let mean = row["cells"][0]["mean"].as_f64().unwrap();
        assert!((mean - recall.iter().sum::<f64>() / 3.0).abs() < 1e-12, "{row} {recall:?}");
    }

    let tables = site.run_dir("item-towers").join("tables");
    let markdown = fs::read_to_string(tables.join("item-towers.md")).unwrap();
    for words in ["| *popularity* |", "| causal |", "`learn-launch train runs/item-towers/configs/content-seed3.toml`"]
    {
        assert!(markdown.contains(words), "{words} is not in\n{markdown}");
    }
    for file in ["item-towers.csv", "item-towers-all-recall-10.svg", "item-towers-cold_items-recall-10.png"] {
        assert!(fs::metadata(tables.join(file)).unwrap().len() > 100, "{file}");
    }

    // a second start finds everything done and writes the same tables
    let metrics = site.run_dir("item-towers").join("causal-seed1").join("metrics.jsonl");
    let before = fs::metadata(&metrics).unwrap().modified().unwrap();
    let again = site.launch(&arguments);
    succeeds(&again);
    assert!(text(&again).contains("9 runs, 0 of them to do"), "{}", text(&again));
    assert_eq!(fs::metadata(&metrics).unwrap().modified().unwrap(), before);
    assert_eq!(fs::read_to_string(tables.join("item-towers.md")).unwrap(), markdown);

    // other settings are other runs
    let other = site.launch(&["study", &file, "--set", "training.max_steps=4"]);
    assert_eq!(other.status.code(), Some(2), "{}", text(&other));
    assert!(text(&other).contains("training.max_steps") && text(&other).contains("--force"), "{}", text(&other));
}

const LONG: &str = r#"
study = { name = "long", config = "job.toml" }

[[variant]]
name = "wrong"
set.model.item_tower = "content"

[[variant]]
name = "long"
set.training.epochs = 100
set.model.layers = 3
set.evaluation.every_epochs = 50

[[table]]
name = "long"
title = "Long"
"#;

#[test]
fn a_failed_variant_stops_no_other_and_a_stopped_study_goes_on() {
    let site = Site::new(SMALL);
    fs::write(site.path("long.toml"), LONG).unwrap();
    let child = site.start(&["study", "long.toml"]);
    follow(&site, "long/long-seed1", 8);
    signal("TERM", child.id().into());
    let stopped = child.wait_with_output().unwrap();
    assert_eq!(stopped.status.code(), Some(3), "{}", text(&stopped));
    assert_eq!(site.status("long/long-seed1")["state"], "stopped");

    let dry = site.launch(&["study", "long.toml", "--dry-run"]);
    assert!(text(&dry).contains("long-seed1 would be resumed"), "{}", text(&dry));
    let done = site.launch(&["study", "long.toml"]);
    assert_eq!(done.status.code(), Some(1), "one of its runs failed: {}", text(&done));
    assert_eq!(site.status("long/long-seed1")["last_step"]["step"], 600);
    let numbers: Vec<u64> = site.steps("long/long-seed1").iter().map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=600).collect::<Vec<_>>(), "it went on where it was");
    let table = fs::read_to_string(site.run_dir("long").join("tables/long.md")).unwrap();
    assert!(table.contains("| wrong | failed | failed | failed | 0 of 1 |"), "{table}");
    assert!(table.contains("failed: model.output_dim is 8"), "{table}");
    assert!(table.lines().any(|line| line.starts_with("| long | 0.")), "{table}");
}
