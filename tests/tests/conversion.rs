//! The CVR task with real processes: joint training, the adapter stage, metrics and features.

use std::fs;

use learn_tests::{SMALL, Site, f32_tensors, f32_values, succeeds, text};
use serde_json::Value;

const STEPS: u64 = 20;

fn metrics(site: &Site, run: &str, split: &str) -> Value {
    let status = site.status(run);
    let evaluations = status["evaluations"].as_array().unwrap_or_else(|| panic!("{status}"));
    let last = evaluations.iter().rfind(|evaluation| evaluation["split"] == split);
    last.unwrap_or_else(|| panic!("{status}"))["metrics"].clone()
}

#[test]
fn joint_training_is_the_same_for_any_number_of_workers_and_passes() {
    let site = Site::labelled(SMALL);
    let mut runs = Vec::new();
    for (workers, micro_batch) in [(1, 0), (2, 0), (4, 3)] {
        let name = format!("w{workers}-m{micro_batch}");
        let overrides = [
            format!("job.name={name}"),
            format!("cluster.workers={workers}"),
            format!("training.micro_batch={micro_batch}"),
            format!("training.max_steps={STEPS}"),
            "objective.cvr_weight=0.5".into(),
            "objective.cvr_hidden=8".into(),
        ];
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        succeeds(&site.launch(&site.train(&overrides)));
        let cvr: Vec<f64> =
            site.steps(&name).iter().map(|record| record["cvr_loss"].as_f64().unwrap_or(f64::NAN)).collect();
        let parameters = f32_values(&site.checkpoint_file(&name, STEPS, "model.safetensors"));
        let losses = site.losses(&name).into_iter().chain(cvr).collect::<Vec<_>>();
        runs.push((losses, parameters, metrics(&site, &name, "test")));
    }
    let (losses, parameters, wanted) = &runs[0];
    assert_eq!(losses.len() as u64, 2 * STEPS);
    assert!(losses[39] < losses[20], "the head learns: {losses:?}");
    for name in ["cvr.auc", "cvr.log_loss", "cvr.calibration", "cvr.ece"] {
        assert!(wanted[name].as_f64().is_some_and(f64::is_finite), "{name}: {wanted}");
    }
    let log_loss = |segment: &str| {
        let status = site.status("w2-m0");
        let evaluations = status["evaluations"].as_array().cloned().unwrap_or_default();
        let segments = evaluations.iter().rfind(|one| one["split"] == "test").map(|one| one["segments"].clone());
        let segments = segments.as_ref().and_then(Value::as_array).cloned().unwrap_or_default();
        let found = segments.into_iter().find(|one| one["segment"] == segment).unwrap_or_else(|| panic!("{status}"));
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        (number(&found["targets"]), number(&found["metrics"]["cvr.log_loss"]["value"]))
    };
    let [(all, whole), (head, of_head), (tail, of_tail)] = ["all", "head_items", "tail_items"].map(log_loss);
    assert!(head > 0.0 && tail > 0.0 && head + tail == all, "{head} + {tail} of {all} targets");
    assert!((head * of_head + tail * of_tail - all * whole).abs() < 1e-6, "{of_head} and {of_tail} make {whole}");
    for (other_losses, other_parameters, other) in &runs[1..] {
        for (one, other) in losses.iter().zip(other_losses) {
            assert!((one - other).abs() < 1e-5, "{other} instead of {one}");
        }
        let largest = parameters.iter().zip(other_parameters).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 1e-5, "parameters differ by {largest}");
        let gap = wanted["cvr.log_loss"].as_f64().unwrap_or(f64::NAN) - other["cvr.log_loss"].as_f64().unwrap_or(0.0);
        assert!(gap.abs() < 1e-5, "{other} instead of {wanted}");
    }
}

#[test]
fn the_adapter_stage_trains_the_head_alone_and_its_features_are_exported() {
    let site = Site::labelled(SMALL);
    let steps = format!("training.max_steps={STEPS}");
    succeeds(&site.launch(&site.train(&["job.name=towers", &steps])));
    assert!(metrics(&site, "towers", "test").get("cvr.auc").is_none(), "there is no head");
    let adapter = [
        "job.name=adapter",
        "training.init=runs/towers",
        "training.freeze_towers=true",
        "objective.cvr_weight=1",
        "objective.cvr_hidden=8",
        "optimizer.learning_rate=0.02",
        "checkpoint.metric=cvr.auc",
        "cluster.workers=2",
        &steps,
    ];
    succeeds(&site.launch(&site.train(&adapter)));

    // the start is the best checkpoint of the other run, and the towers are what they were there
    let best = site.status("towers")["best"]["step"].as_u64();
    let before = f32_tensors(&site.checkpoint_file("towers", best.unwrap_or(STEPS), "model.safetensors"));
    let after = f32_tensors(&site.checkpoint_file("adapter", STEPS, "model.safetensors"));
    assert_eq!(after.len(), before.len() + 4);
    for (name, values) in &before {
        assert_eq!(&after[name], values, "{name} has changed");
    }
    let losses = site.losses("adapter");
    assert!(losses[19] < 0.95 * losses[0], "the head learns: {losses:?}");

    let summary = std::fs::read(site.run_dir("adapter").join("summary.json")).unwrap_or_default();
    let summary: Value = serde_json::from_slice(&summary).unwrap_or_default();
    let all = &summary["segments"][0]["metrics"];
    assert!(all["recall@10"]["low"].is_f64() && all["cvr.auc"]["value"].is_f64(), "{summary}");
    assert!(all["cvr.auc"].get("low").is_none(), "it is not resampled: {all}");

    let export = ["export", "runs/adapter", "--out", "export", "--cvr-features", "test", "--json"];
    let output = site.launch(&export);
    succeeds(&output);
    let exported: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    assert_eq!(exported["cvr_pairs"], SMALL.users, "leave-one-out: one pair a user: {exported}");
    assert!(site.path("export/cvr-features.parquet").exists());
    let refused = site.launch(&["export", "runs/towers", "--out", "none", "--cvr-features", "test"]);
    assert!(!refused.status.success() && text(&refused).contains("objective.cvr_weight"), "{}", text(&refused));
}

#[test]
fn a_metric_that_cannot_be_told_makes_no_checkpoint_the_best_and_ends_nothing() {
    let site = Site::raw(SMALL);
    // nobody converts
    let rows = fs::read_to_string(site.path("interactions.csv")).unwrap_or_default().replace(",1\n", ",0\n");
    fs::write(site.path("interactions.csv"), rows).unwrap_or_else(|error| panic!("{error}"));
    let files = "files = [\"interactions.csv\"]\n";
    let config = fs::read_to_string(site.path("job.toml")).unwrap_or_default();
    fs::write(site.path("job.toml"), config.replace(files, &format!("{files}label = \"liked\"\n")))
        .unwrap_or_else(|error| panic!("{error}"));
    succeeds(&site.launch(&["prepare", "job.toml"]));
    succeeds(&site.launch(&["embed", "job.toml"]));
    let steps = format!("training.max_steps={STEPS}");
    let overrides = [
        "job.name=untold",
        "objective.cvr_weight=0.5",
        "objective.cvr_hidden=8",
        "checkpoint.metric=cvr.auc",
        "cluster.workers=2",
        &steps,
    ];
    succeeds(&site.launch(&site.train(&overrides)));
    let status = site.status("untold");
    assert_eq!(status["state"], "finished", "{status}");
    assert_eq!(status["last_checkpoint"], STEPS, "{status}");
    assert!(!site.run_dir("untold").join("checkpoints").join("best").exists());
    let events = site.events("untold");
    let told: Vec<_> = events.iter().filter(|event| event["event"] == "metric_missing").collect();
    assert!(told.len() == 1 && told[0]["metric"] == "cvr.auc", "it is said once: {events:?}");
    let tested = metrics(&site, "untold", "test");
    assert!(tested["recall@10"].is_f64() && tested.get("cvr.auc").is_none(), "{tested}");
}

#[test]
fn a_dataset_without_labels_is_refused_with_the_remedy() {
    let site = Site::new(SMALL);
    let refused = site.launch(&site.train(&["job.name=none", "objective.cvr_weight=1"]));
    assert!(!refused.status.success());
    assert!(text(&refused).contains("prepare.interactions.label"), "{}", text(&refused));
}
