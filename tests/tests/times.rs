//! Time gaps from the dataset to the towers, through the real programs.

use learn_tests::{SMALL, Site, f32_tensors, succeeds};

#[test]
fn a_model_of_time_gaps_is_trained_judged_resumed_and_used() {
    let site = Site::new(SMALL);
    let overrides =
        ["model.time_embedding=gap", "model.item_tower=causal", "checkpoint.every_steps=5", "training.max_steps=10"];
    let run = |name: &str| succeeds(&site.launch(&[&site.train(&overrides)[..], &["--name", name]].concat()));
    run("whole");
    run("cut");
    succeeds(&site.launch(&["resume", "runs/cut", "--checkpoint", "step-0000000005"]));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(site.checkpoint_file("whole", 10, file) == site.checkpoint_file("cut", 10, file), "{file} differs");
    }
    let [start, end] = [5, 10].map(|step| {
        f32_tensors(&site.checkpoint_file("whole", step, "model.safetensors")).remove("time_embedding.weight").unwrap()
    });
    let moved = |row: usize| start[row * 16..(row + 1) * 16] != end[row * 16..(row + 1) * 16];
    let buckets: Vec<usize> = (1..=64).filter(|bucket| moved(bucket - 1)).collect();
    // gaps are powers of two up to 2^19, and those of left-out items add up
    assert!(buckets.len() > 10 && buckets.iter().all(|bucket| (2..=24).contains(bucket)), "{buckets:?}");

    succeeds(&site.launch(&["eval", "runs/whole"]));
    succeeds(&site.launch(&["export", "runs/whole", "--out", "exported"]));
    succeeds(&site.launch(&["recommend", "runs/whole", "--users", "user-003"]));
}
