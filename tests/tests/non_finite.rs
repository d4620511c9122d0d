//! A loss that is not a finite number: every worker does the same about it, and it is told with its users.

use std::fs;
use std::path::Path;
use std::process::Command;

use learn_tests::{Shape, Site, f32_values, succeeds, text};
use serde_json::{Value, json};

/// So many items that a step has a given one now and then.
const MANY_ITEMS: Shape = Shape { users: 90, items: 400, dim: 16 };

/// A site with a run `base`, in whose checkpoint the vectors of two items are finite, but their sums over dimensions are not.
fn site_with_a_bad_item() -> Site {
    let site = Site::without_content(MANY_ITEMS);
    succeeds(&site.launch(&site.train(&["job.name=base", "model.item_input=id", "training.max_steps=1"])));
    let folder = site.run_dir("base").join("checkpoints").join("step-0000000001");
    let (model, state) = (folder.join("model.safetensors"), folder.join("state.json"));
    let mut bytes = fs::read(&model).expect("it is there");
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).expect("a header");
    let start = header["id_embedding.weight"]["data_offsets"][0].as_u64().expect("it has item vectors") as usize;
    // the items of some users, not of many
    let row = 8 + header_bytes + start + 30 * 16 * 4;
    for value in bytes[row..row + 2 * 16 * 4].chunks_exact_mut(4) {
        value.copy_from_slice(&3e38_f32.to_le_bytes());
    }
    let size = bytes.len();
    fs::write(&model, bytes).expect("it is writable");
    let mut told: Value = serde_json::from_slice(&fs::read(&state).expect("it is there")).expect("a state");
    told["files"]["model.safetensors"] = json!({ "bytes": size, "sha256": sha256(&model) });
    fs::write(&state, told.to_string()).expect("it is writable");
    site
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum starts");
    String::from_utf8_lossy(&output.stdout).chars().take(64).collect()
}

const COMMON: [&str; 6] = [
    "model.item_input=id",
    "training.init=runs/base",
    "training.epochs=50",
    "evaluation.every_epochs=0",
    "checkpoint.every_epochs=0",
    "checkpoint.keep_last=100",
];

/// The events about steps; there are others about checkpoints.
fn non_finite(site: &Site, run: &str) -> Vec<Value> {
    site.events(run).into_iter().filter(|event| event["event"] == "non_finite").collect()
}

/// Trains to the end that the budget brings; the events, and the step of the last checkpoint.
fn diverges(site: &Site, name: &str, overrides: &[&str]) -> (Vec<Value>, u64) {
    let job = format!("job.name={name}");
    let mut all = vec![job.as_str()];
    all.extend(COMMON);
    all.extend(overrides);
    let output = site.launch(&site.train(&all));
    assert_eq!(output.status.code(), Some(5), "{}", text(&output));
    assert!(text(&output).contains("is not a finite number"), "{}", text(&output));
    let status = site.status(name);
    assert_eq!((&status["state"], &status["ledger"]["exact"]), (&Value::from("failed"), &Value::from(true)));
    (non_finite(site, name), status["last_checkpoint"].as_u64().unwrap_or(0))
}

fn optimizer_steps(site: &Site, run: &str, step: u64) -> u64 {
    let state: Value = serde_json::from_slice(&site.checkpoint_file(run, step, "state.json")).expect("it is there");
    state["optimizer_step"].as_u64().expect("it is there")
}

fn number(event: &Value, key: &str) -> u64 {
    event[key].as_u64().expect("it is there")
}

#[test]
fn steps_that_are_not_finite_are_skipped_alike_until_the_budget_is_spent() {
    let site = site_with_a_bad_item();
    let skip = ["training.non_finite=skip", "training.non_finite_budget=3"];
    let runs: Vec<_> = [1, 2]
        .map(|workers| {
            let workers = format!("cluster.workers={workers}");
            let (events, last) = diverges(&site, &workers[16..], &[&skip[..], &[&workers]].concat());
            let actions: Vec<_> = events.iter().map(|event| event["action"].as_str().unwrap().to_owned()).collect();
            assert_eq!(actions, ["skip", "skip", "skip", "stop"]);
            let steps: Vec<_> = events.iter().map(|event| number(event, "step")).collect();
            (events, steps, last, workers[16..].to_owned())
        })
        .into();
    let (events, steps, last, _) = &runs[0];
    assert_eq!(steps, &runs[1].1, "the number of workers does not matter");
    assert_eq!((*last, runs[1].2), (steps[3] - 1, steps[3] - 1), "the checkpoint is from before the step");
    for event in events {
        let users = event["users"].as_array().unwrap();
        assert_eq!((&event["event"], number(event, "user_count")), (&"non_finite".into(), users.len() as u64));
        // an item behind the sampled positions has no part in an embedding, but in the gradient
        let only_gradient = event["loss"].is_number();
        assert_eq!(event["suspected"], !only_gradient, "{event}");
        assert!(only_gradient || (1..=8).contains(&users.len()), "only those with the items: {event}");
    }
    assert!(events.iter().any(|event| event["suspected"] == true));
    let parts: Vec<_> = runs[1].0.iter().map(|event| &event["users"]).collect();
    assert_eq!(events.iter().map(|event| &event["users"]).collect::<Vec<_>>(), parts);
    // a skipped step has no numbers and no update, but its users have had their turn
    let recorded: Vec<u64> = site.steps("1").iter().map(|record| number(record, "step")).collect();
    let applied: Vec<u64> = (1..steps[3]).filter(|step| !steps.contains(step)).collect();
    assert_eq!(recorded, applied);
    assert_eq!(optimizer_steps(&site, "1", *last), applied.len() as u64);
    let [one, two] = ["1", "2"].map(|run| f32_values(&site.checkpoint_file(run, *last, "model.safetensors")));
    let gap = one.iter().zip(&two).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(gap < 1e-5, "parameters differ by {gap}");

    // the budget is that of the run: a resume with the same stops again, with a larger one it goes past
    let again = site.launch(&["resume", "runs/1"]);
    assert_eq!(again.status.code(), Some(5), "{}", text(&again));
    let past = site.launch(&["resume", "runs/1", "--set", "training.non_finite_budget=6"]);
    assert_eq!(past.status.code(), Some(5), "{}", text(&past));
    let status = site.status("1");
    assert!(status["last_checkpoint"].as_u64().unwrap() > *last && status["ledger"]["exact"] == true, "{status}");
    assert!(number(non_finite(&site, "1").last().unwrap(), "step") > steps[3]);
}

#[test]
fn a_rollback_goes_back_to_the_last_checkpoint_and_on_past_the_step() {
    let site = site_with_a_bad_item();
    let rollback = ["training.non_finite=rollback", "training.non_finite_budget=6", "checkpoint.every_steps=2"];
    let mut ends = Vec::new();
    for workers in ["1", "2"] {
        let workers = format!("cluster.workers={workers}");
        let (events, last) = diverges(&site, &workers[16..], &[&rollback[..], &[&workers]].concat());
        let steps: Vec<u64> = events.iter().map(|event| number(event, "step")).collect();
        assert_eq!(events[0]["action"], "rollback");
        // updates that the state has seen: back to those of the newest even step at each, from which the next are counted
        let (mut updates, mut held) = (0, 0);
        for step in 1..=last {
            updates = if steps.contains(&step) { held } else { updates + 1 };
            if step % 2 == 0 {
                held = updates;
            }
        }
        assert_eq!(optimizer_steps(&site, &workers[16..], last), updates);
        assert!(updates + (steps.len() as u64 - 1) < last, "some update was taken back: {steps:?}");
        ends.push((steps, f32_values(&site.checkpoint_file(&workers[16..], last, "model.safetensors"))));
    }
    assert_eq!(ends[0].0, ends[1].0);
    let gap = ends[0].1.iter().zip(&ends[1].1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(gap < 1e-5, "parameters differ by {gap}");
}

#[test]
fn the_default_stops_with_a_checkpoint_from_before_the_step() {
    let site = site_with_a_bad_item();
    let (events, last) = diverges(&site, "run", &["cluster.workers=2"]);
    assert_eq!((events.len(), &events[0]["action"], number(&events[0], "step")), (1, &"stop".into(), last + 1));
    // and an evaluation that meets it says the same, on every worker
    let evaluated = site.launch(&["eval", "runs/base", "--split", "test", "--workers", "2"]);
    assert_eq!(evaluated.status.code(), Some(5), "{}", text(&evaluated));
    assert!(text(&evaluated).contains("not finite"), "{}", text(&evaluated));
}
