//! Promise 2: the loss curve and the parameters do not depend on the number of workers, whatever is minimised.

use learn_tests::{SMALL, Site, f32_values, succeeds};

const STEPS: u64 = 20;

/// Trains with 1, 2 and 4 workers, and with 2 in micro-batches, and compares every loss and the last parameters.
fn trains_the_same(settings: &[&str]) {
    let site = Site::new(SMALL);
    let mut runs = Vec::new();
    for (workers, micro_batch) in [(1, 0), (2, 0), (4, 0), (2, 3)] {
        let name = format!("w{workers}-m{micro_batch}");
        let own = [
            format!("job.name={name}"),
            format!("cluster.workers={workers}"),
            format!("training.micro_batch={micro_batch}"),
            format!("training.max_steps={STEPS}"),
        ];
        let overrides: Vec<&str> = own.iter().map(String::as_str).chain(settings.iter().copied()).collect();
        succeeds(&site.launch(&site.train(&overrides)));
        let status = site.status(&name);
        assert_eq!(status["world_size"], workers);
        assert_eq!(status["ledger"]["exact"], true, "{}", status["ledger"]);
        runs.push((
            name.clone(),
            site.losses(&name),
            f32_values(&site.checkpoint_file(&name, STEPS, "model.safetensors")),
        ));
    }
    let (_, losses, parameters) = &runs[0];
    assert_eq!(losses.len() as u64, STEPS);
    assert!(losses[19] < losses[0], "it learns: {losses:?}");
    for (name, other_losses, other_parameters) in &runs[1..] {
        assert_eq!(other_losses.len(), losses.len());
        for (step, (one, other)) in losses.iter().zip(other_losses).enumerate() {
            assert!((one - other).abs() < 1e-5, "{name}, step {step}: loss {other} instead of {one}");
        }
        let largest = parameters.iter().zip(other_parameters).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 1e-5, "{name}: parameters differ by {largest}");
    }
}

#[test]
fn one_two_and_four_workers_train_the_same() {
    trains_the_same(&[]);
}

#[test]
fn next_items_train_the_same() {
    trains_the_same(&["objective.kind=next_item", "sampling.user_positions=8", "model.item_tower=causal"]);
}

#[test]
fn a_softmax_over_the_catalogue_trains_the_same() {
    trains_the_same(&[
        "objective.kind=full_softmax",
        "objective.pairs=next",
        "objective.catalogue_batch=9",
        "model.learn_logit_scale=true",
    ]);
}

#[test]
fn uniform_negatives_train_the_same() {
    trains_the_same(&["objective.uniform_negatives=10", "objective.logq_correction=true"]);
}

#[test]
fn time_gaps_train_the_same() {
    trains_the_same(&["model.time_embedding=gap", "model.item_tower=causal"]);
}
