//! The whole road on a small dataset: prepare, embed, train with two workers, evaluate, export, recommend.

use std::fs;
use std::process::Command;

use learn_tests::{SMALL, Site, binary, succeeds, text};
use serde_json::{Value, json};

#[test]
fn from_files_to_recommendations() {
    let site = Site::new(SMALL);
    let trained = site.launch(&site.train(&["job.name=road", "cluster.workers=2", "training.epochs=12"]));
    succeeds(&trained);

    let summary: Value = serde_json::from_slice(&fs::read(site.run_dir("road").join("summary.json")).unwrap()).unwrap();
    assert_eq!((&summary["world_size"], &summary["users"]), (&Value::from(2), &Value::from(SMALL.users)));
    assert_eq!(summary["steps"], 12 * 6);
    for part in ["test", "popularity"] {
        for metric in ["recall@10", "ndcg@10", "mrr"] {
            let value = summary[part][metric].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&value), "{part} {metric} {value}");
        }
    }
    let recall = |part: &str| summary[part]["recall@10"].as_f64().unwrap();
    assert!(recall("test") > 1.5 * recall("popularity"), "the groups are easy to learn: {summary}");

    // the test is divided into segments and set beside what needs no training
    let names = |of: &Value, key: &str| -> Vec<String> {
        of.as_array().unwrap().iter().map(|one| one[key].as_str().unwrap().to_owned()).collect()
    };
    let segments = ["all", "cold_items", "tail_items", "head_items", "cold_users", "active_users"];
    assert_eq!(names(&summary["segments"], "segment"), segments);
    assert_eq!(names(&summary["comparisons"], "name"), ["popularity", "last_item", "decayed_mean"]);
    assert_eq!(summary["comparisons"][0]["metrics"], summary["popularity"]);
    let all = &summary["segments"][0];
    assert_eq!((&all["users"], &all["targets"]), (&Value::from(SMALL.users), &Value::from(SMALL.users)));
    let of_all = |key: &str| all["metrics"]["recall@10"][key].as_f64().unwrap();
    assert_eq!(of_all("value"), recall("test"));
    assert!(of_all("low") < of_all("value") && of_all("value") < of_all("high"), "{all}");
    let users = |place: usize| summary["segments"][place]["users"].as_u64().unwrap();
    assert_eq!(users(2) + users(3), SMALL.users as u64, "each target is of the tail or of the head");

    let status = site.status("road");
    assert_eq!((&status["state"], &status["ledger"]["exact"]), (&Value::from("finished"), &Value::from(true)));
    let epochs = status["ledger"]["epochs"].as_array().unwrap();
    assert_eq!(epochs.len(), 12);
    assert!(epochs.iter().all(|epoch| epoch["seen"] == epoch["users"]), "{epochs:?}");

    // the same checkpoint on the same split gives the same numbers, with another number of workers too
    let said = || ["summary.json", "status.json"].map(|file| fs::read(site.run_dir("road").join(file)).unwrap());
    let before = said();
    let evaluated = site.launch(&["eval", "runs/road", "--split", "test", "--workers", "1", "--json"]);
    succeeds(&evaluated);
    assert!(said() == before, "an evaluation leaves the run as it was");
    let evaluation: Value = serde_json::from_slice(&evaluated.stdout).unwrap();
    let again = evaluation["metrics"]["recall@10"].as_f64().unwrap();
    assert!((again - recall("test")).abs() < 0.02, "{again} against {}", recall("test"));

    assert_eq!(evaluation["comparisons"][0], summary["comparisons"][0], "popularity has the same bits, intervals too");
    let shown = site.launch(&["eval", "runs/road", "--split", "valid", "--segments"]);
    succeeds(&shown);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("decayed_mean") && shown.contains("\ncold_users: "), "{shown}");
    assert!(shown.lines().all(|line| line.len() <= 100), "{shown}");

    succeeds(&site.launch(&["export", "runs/road", "--out", "exported"]));
    for file in ["items.npy", "items.parquet", "users.npy", "users.parquet", "model.safetensors"] {
        assert!(fs::metadata(site.path("exported").join(file)).unwrap().len() > 0, "{file}");
    }
    says_how_far_it_is(&site);
    let again = site.launch(&["export", "runs/road", "--out", "exported"]);
    assert_eq!(again.status.code(), Some(2), "{}", text(&again));
    assert!(text(&again).contains("exists already"), "{}", text(&again));

    let recommended = site.launch(&["recommend", "runs/road", "--users", "user-003,user-004", "-k", "4", "--json"]);
    succeeds(&recommended);
    let lists: Value = serde_json::from_slice(&recommended.stdout).unwrap();
    assert_eq!(lists.as_array().unwrap().len(), 2);
    let titles: Vec<&str> =
        lists[0]["items"].as_array().unwrap().iter().map(|item| item["title"].as_str().unwrap()).collect();
    assert_eq!(titles.len(), 4);
    assert!(titles.iter().filter(|title| title.ends_with("group 3")).count() >= 2, "{titles:?}");

    let unknown = site.launch(&["recommend", "runs/road", "--users", "nobody", "--json"]);
    assert_eq!(unknown.status.code(), Some(2), "{}", text(&unknown));
    let error: Value = serde_json::from_slice(&unknown.stdout).unwrap();
    assert!(error["error"].as_str().unwrap().starts_with("user `nobody` is not in the dataset"), "{error}");

    // the data may have moved since
    fs::rename(site.path("dataset"), site.path("moved")).unwrap();
    let lost = site.launch(&["recommend", "runs/road", "--users", "user-003"]);
    assert!(lost.status.code() == Some(2) && text(&lost).contains("--dataset DIR"), "{}", text(&lost));
    let found =
        site.launch(&["recommend", "runs/road", "--user", "user-003", "-k", "4", "--dataset", "moved", "--json"]);
    succeeds(&found);
    let found: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!((&found[0]["user"], found[0]["items"].as_array().unwrap().len()), (&lists[0]["user"], 4));
    succeeds(&site.launch(&["eval", "runs/road", "--dataset", "moved", "--set", "evaluation.cutoffs=[20]"]));
    needs_no_gpus(&site);
}

/// A run of GPUs may be on a machine without any by now.
fn needs_no_gpus(site: &Site) {
    let path = site.run_dir("road").join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("it is there")).expect("it is JSON");
    config["cluster"]["device"] = "cuda".into();
    fs::write(&path, config.to_string()).expect("it can be written");
    succeeds(&site.launch(&["export", "runs/road", "--dataset", "moved", "--out", "anywhere"]));
    succeeds(&site.launch(&["recommend", "runs/road", "--dataset", "moved", "--users", "user-003"]));
}

/// An export tells the one that has started it of every item and every user.
fn says_how_far_it_is(site: &Site) {
    let mut export = Command::new(binary("learn-worker"));
    export.args(["export", "--progress-json", "--run"]).arg(site.run_dir("road")).arg("--out").arg(site.path("told"));
    let output = export.output().expect("learn-worker starts");
    succeeds(&output);
    let facts = fs::read(site.path("told/export.json")).expect("it is there");
    let facts: Value = serde_json::from_slice(&facts).expect("it is JSON");
    let mut stages: Vec<(Value, Value)> = Vec::new();
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        // log lines are none
        let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
        match line.get("stage") {
            Some(stage) => stages.push((stage.clone(), Value::Null)),
            None => stages.last_mut().expect("a stage has begun").1 = line,
        }
    }
    let wanted = [("embed items", "items"), ("write items", "items"), ("embed users", "users")];
    let whole = |count: &Value| json!({ "done": count, "total": count });
    assert_eq!(stages.pop(), Some((Value::from("sync"), Value::Null)));
    assert_eq!(stages, wanted.map(|(stage, count)| (Value::from(stage), whole(&facts[count]))));
}

#[test]
fn users_without_history_are_counted_by_export_and_named_by_recommend() {
    let site = Site::raw(SMALL);
    let mut rows = fs::read_to_string(site.path("interactions.csv")).unwrap();
    // one interaction before the held-out windows; all of them in the last
    rows.push_str("early,item-000,1,1\n");
    rows.extend((0..3).map(|item| format!("late,item-00{item},1000000000,1\n")));
    fs::write(site.path("interactions.csv"), rows).unwrap();
    let config = fs::read_to_string(site.path("job.toml")).unwrap();
    let by_time = "[prepare]\nsplit = \"by-time\"\nmin_length = 1\n\n[prepare.interactions]";
    fs::write(site.path("job.toml"), config.replace("[prepare.interactions]", by_time)).unwrap();
    for command in ["prepare", "embed"] {
        succeeds(&site.launch(&[command, "job.toml"]));
    }
    succeeds(&site.launch(&site.train(&["job.name=windows", "training.max_steps=3"])));

    let exported = site.launch(&["export", "runs/windows", "--out", "first", "--json"]);
    succeeds(&exported);
    let exported: Value = serde_json::from_slice(&exported.stdout).unwrap();
    let counted = (&exported["users"], &exported["users_without_history"]);
    assert_eq!(counted, (&Value::from(SMALL.users), &Value::from(2)), "{exported}");
    let facts: Value = serde_json::from_slice(&fs::read(site.path("first/export.json")).unwrap()).unwrap();
    assert_eq!(facts, exported);
    let shown = site.launch(&["export", "runs/windows", "--out", "second"]);
    succeeds(&shown);
    assert!(text(&shown).contains("\nleft out users without history: 2 ("), "{}", text(&shown));
    for user in ["early", "late"] {
        let refused = site.launch(&["recommend", "runs/windows", "--users", user]);
        let reason = format!("no interaction of `{user}` lies before the held-out window, or too few");
        assert!(refused.status.code() == Some(2) && text(&refused).contains(&reason), "{}", text(&refused));
    }
}

#[test]
fn a_run_is_never_overwritten_and_bad_settings_are_named() {
    let site = Site::new(SMALL);
    let first = site.train(&["job.name=one", "training.max_steps=2"]);
    succeeds(&site.launch(&[&first[..], &["--dry-run"]].concat()));
    assert!(!site.path("runs").exists());
    succeeds(&site.launch(&first));
    let summary = fs::read(site.run_dir("one").join("summary.json")).unwrap();
    let second = site.launch(&first);
    assert_eq!(second.status.code(), Some(2), "{}", text(&second));
    assert!(text(&second).contains("learn-launch resume"), "{}", text(&second));
    assert_eq!(fs::read(site.run_dir("one").join("summary.json")).unwrap(), summary);
    succeeds(&site.launch(&[&first[..], &["--force"]].concat()));
    let runs: Vec<_> = fs::read_dir(site.path("runs")).unwrap().flatten().map(|entry| entry.path()).collect();
    let aside = runs.iter().find(|run| **run != site.run_dir("one")).unwrap();
    assert_eq!((runs.len(), fs::read(aside.join("summary.json")).unwrap()), (2, summary), "moved aside as it was");

    let refused = |overrides: &[&str], wanted: &str| {
        let output = site.launch(&site.train(overrides));
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains(wanted), "{}", text(&output));
    };
    refused(&["training.epoch=3"], "training.epochs");
    refused(&["training.global_batch=0"], "training.global_batch");
    refused(&["model.heads=3"], "model.heads");
}
