//! Weights in: a training that starts with those of another run or of a file.

use std::fs;

use learn_tests::{SMALL, Site, succeeds, text};
use serde_json::Value;

#[test]
fn a_training_starts_with_the_weights_of_another_and_says_so() {
    let site = Site::new(SMALL);
    succeeds(&site.launch(&site.train(&["job.name=base"])));
    let again =
        site.launch(&[&site.train(&["job.name=tuned", "training.max_steps=3"])[..], &["--init", "base"]].concat());
    succeeds(&again);
    assert!(text(&again).contains("parameters taken"), "{}", text(&again));
    // it goes on from what the other has learned, with steps and optimizer of its own
    let (base, tuned) = (site.losses("base"), site.losses("tuned"));
    assert_eq!(tuned.len(), 3);
    assert!(tuned[0] < base[0] - 0.05, "{} after {}", tuned[0], base[0]);
    let state: Value = serde_json::from_slice(&site.checkpoint_file("tuned", 3, "state.json")).unwrap();
    assert_eq!(state["optimizer_step"], 3);
    let origin = state["init"]["path"].as_str().unwrap();
    assert!(origin.contains("runs/base/checkpoints/step-"), "{origin}");
    assert_eq!(state["init"]["sha256"].as_str().unwrap().len(), 64);

    // the same weights as a file give the same training
    let weights = state["init"]["path"].as_str().unwrap().to_owned();
    let file = site.path("weights.safetensors");
    fs::copy(weights, &file).unwrap();
    let arguments = site.train(&["job.name=file", "training.max_steps=3"]);
    succeeds(&site.launch(&[&arguments[..], &["--init", "weights.safetensors"]].concat()));
    assert_eq!(site.losses("file"), tuned);
}

#[test]
fn weights_that_do_not_fit_are_refused_before_a_run_is_made() {
    let site = Site::new(SMALL);
    succeeds(&site.launch(&site.train(&["job.name=base", "training.max_steps=2"])));
    let arguments = site.train(&["job.name=other", "training.max_steps=2", "model.output_dim=6"]);
    let strict = site.launch(&[&arguments[..], &["--init", "runs/base"]].concat());
    let message = text(&strict);
    assert_eq!(strict.status.code(), Some(2), "{message}");
    assert!(message.contains("mlp.0.bias is [8] instead of [6]") && message.contains("--init-partial"), "{message}");
    assert!(!site.run_dir("other").exists());

    let partial = site.launch(&[&arguments[..], &["--init", "runs/base", "--init-partial"]].concat());
    succeeds(&partial);
    assert!(text(&partial).contains("start anew: mlp.0.bias, mlp.0.weight"), "{}", text(&partial));

    fs::write(site.path("model.bin"), b"PK\x03\x04").unwrap();
    let pickle = site.launch(&[&site.train(&["job.name=pickle"])[..], &["--init", "model.bin"]].concat());
    assert_eq!(pickle.status.code(), Some(2));
    assert!(text(&pickle).contains("weights_only=True"), "{}", text(&pickle));
}
