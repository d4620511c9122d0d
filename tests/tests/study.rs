//! A study with real jobs: its tables, what a second start does, what a stop leaves, and datasets that it makes.

use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::path::Path;

use learn_tests::{SMALL, Shape, Site, follow, signal, succeeds, text};
use serde_json::Value;

/// A study of the repository, on small data of the same dimension.
fn site_for(study: &str) -> (Site, String) {
    let site = Site::new(Shape { dim: 384, ..SMALL });
    fs::create_dir(site.path("configs")).expect("the folder is writable");
    let config = fs::read_to_string(site.path("job.toml")).expect("it is there");
    let config = config.replace("output_dim = 8", "output_dim = 384");
    fs::write(site.path("configs/amazon-towers.toml"), config).expect("the folder is writable");
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
    assert_eq!(names, ["popularity", "last_item", "decayed_mean", "causal", "per_item", "content", "id-sasrec"]);
    for row in &rows[3..7] {
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
    assert!(text(&again).contains("12 runs, 0 of them to do"), "{}", text(&again));
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
set.training.epochs = 200
set.model.layers = 3
set.evaluation.every_epochs = 100

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
    assert_eq!(site.status("long/long-seed1")["last_step"]["step"], 1200);
    let numbers: Vec<u64> = site.steps("long/long-seed1").iter().map(|r| r["step"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=1200).collect::<Vec<_>>(), "it went on where it was");
    let table = fs::read_to_string(site.run_dir("long").join("tables/long.md")).unwrap();
    assert!(table.contains("| wrong | failed | failed | failed | 0 of 1 |"), "{table}");
    assert!(table.contains("model.output_dim is 8: set model.output_dim=16"), "{table}");
    assert!(table.lines().any(|line| line.starts_with("| long | 0.")), "{table}");
}

/// Datasets of its own for each way to embed, from the raw files of [`Site::raw`] on.
fn study_from_raw_files(site: &Site) {
    let encoder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/ceg/tests/golden/tiny-bert");
    let embed = format!("set.embed = {{ from = \"\", model = \"{}\", device = \"cpu\"", encoder.display());
    let study = format!(
        r#"
        study = {{ name = "raw", config = "job.toml" }}
        table = [{{ name = "raw", title = "From raw files" }}]
        [[variant]]
        name = "bert"
        set.data.dataset = "bert"
        {embed} }}
        [[variant]]
        name = "whitened"
        set.data.dataset = "whitened"
        {embed}, refine = {{ whitening = true }} }}
        [[variant]]
        name = "id"
        set.data.dataset = "bare"
        set.model.item_input = "id"
        "#
    );
    fs::write(site.path("raw.toml"), study).expect("the folder is writable");
}

#[test]
fn a_study_prepares_and_embeds_what_its_runs_read() {
    let site = Site::raw(SMALL);
    study_from_raw_files(&site);
    let arguments = ["study", "raw.toml", "--set", "training.max_steps=3"];
    let dry = site.launch(&[&arguments[..], &["--dry-run"]].concat());
    for words in ["would prepare and embed bert", "would prepare and embed whitened", "would prepare bare\n"] {
        assert!(text(&dry).contains(words), "{words} is not in {}", text(&dry));
    }
    let done = site.launch(&[&arguments[..], &["--json"]].concat());
    succeeds(&done);
    let embeddings = |dataset: &str| -> Value {
        let manifest: Value =
            serde_json::from_slice(&fs::read(site.path(dataset).join("dataset.json")).unwrap()).unwrap();
        manifest["embeddings"].clone()
    };
    assert_eq!(embeddings("bert")["model"], "tiny-bert");
    assert_eq!(embeddings("whitened")["model"], "tiny-bert (refined)");
    assert!(embeddings("bare").is_null(), "nobody reads content there");
    let studies: Value = serde_json::from_slice(&done.stdout).unwrap();
    let rows = studies[0]["tables"][0]["parts"][0]["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names[0], "popularity");
    assert_eq!(names[names.len() - 3..], ["bert", "whitened", "id"]);
    assert!(names.contains(&"last_item (bert)") && names.contains(&"last_item (whitened)"), "{names:?}");

    // other vectors in the dataset of a finished run
    succeeds(&site.launch(&["embed", "runs/raw/configs/bert-seed1.toml", "--set", "embed.refine.smoothing=1"]));
    let other = site.launch(&arguments);
    assert_eq!(other.status.code(), Some(2), "{}", text(&other));
    for words in ["bert-seed1 was trained with other content embeddings", "--force"] {
        assert!(text(&other).contains(words), "{words} is not in {}", text(&other));
    }
    let forced = site.launch(&[&arguments[..], &["--force"]].concat());
    succeeds(&forced);
    assert!(text(&forced).contains("3 runs, 1 of them to do"), "{}", text(&forced));
    assert!(text(&site.launch(&arguments)).contains("3 runs, 0 of them to do"));
}

const WITHOUT_A_MODEL: &str = r#"
study = { name = "s", config = "job.toml" }
table = [{ name = "s", title = "S" }]

[[variant]]
name = "llm"
set.data.dataset = "llm"
set.embed = { from = "", model = "nowhere" }

[[variant]]
name = "there"

[[variant]]
name = "id"
set.data.dataset = "llm"
set.embed = { from = "", model = "nowhere" }
set.model.item_input = "id"
"#;

#[test]
fn a_dataset_that_cannot_be_made_fails_the_runs_that_read_it() {
    let site = Site::raw(SMALL);
    fs::write(site.path("s.toml"), WITHOUT_A_MODEL).unwrap();
    let done = site.launch(&["study", "s.toml", "--set", "training.max_steps=3"]);
    assert_eq!(done.status.code(), Some(1), "{}", text(&done));
    let table = fs::read_to_string(site.run_dir("s").join("tables/s.md")).unwrap();
    for words in ["| llm | failed | failed | failed | 0 of 1 |", "| there | 0.", "| id | 0.", "set embed.model to"] {
        assert!(table.contains(words), "{words} is not in {table}");
    }
}

#[test]
fn a_study_that_is_stopped_while_it_embeds_goes_on_from_there() {
    let site = Site::raw(SMALL);
    // a server that takes requests and never answers
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", server.local_addr().unwrap());
    let study = format!(
        r#"
        study = {{ name = "slow", config = "job.toml" }}
        variant = [{{ name = "slow", set.embed = {{ from = "", endpoint = {{ url = "{url}", model = "m" }} }} }}]
        table = [{{ name = "slow", title = "Slow" }}]
        "#
    );
    fs::write(site.path("slow.toml"), study).unwrap();
    let child = site.start(&["study", "slow.toml"]);
    let (mut request, _) = server.accept().unwrap();
    signal("TERM", child.id().into());
    let stopped = child.wait_with_output().unwrap();
    assert_eq!(stopped.status.code(), Some(3), "{}", text(&stopped));
    assert!(text(&stopped).contains("the study was stopped"), "{}", text(&stopped));
    // it ends only with the process that has sent it
    let _ended_or_reset = request.read_to_end(&mut Vec::new());
    let dry = site.launch(&["study", "slow.toml", "--dry-run"]);
    assert!(text(&dry).contains("would embed dataset\n") && text(&dry).contains("slow-seed1 would be trained"));
}
