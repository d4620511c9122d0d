//! Learned item vectors and what else gives items their input, through the real programs.

use learn_tests::{SMALL, Site, f32_values, succeeds, text};

const STEPS: u64 = 20;

fn trained(site: &Site, name: &str, overrides: &[&str]) -> (Vec<f64>, Vec<f32>) {
    let job = format!("job.name={name}");
    let steps = format!("training.max_steps={STEPS}");
    let mut all = vec![job.as_str(), steps.as_str()];
    all.extend(overrides);
    succeeds(&site.launch(&site.train(&all)));
    (site.losses(name), f32_values(&site.checkpoint_file(name, STEPS, "model.safetensors")))
}

fn largest_gap(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn learned_vectors_train_the_same_on_one_two_and_four_workers() {
    for (input, site) in [("id", Site::without_content(SMALL)), ("content_id", Site::new(SMALL))] {
        let item_input = format!("model.item_input={input}");
        let id_dropout = if input == "content_id" { "model.id_dropout=0.3" } else { "model.id_dropout=0" };
        let run = |workers: u32, micro_batch: u32| {
            let (workers, micro) =
                (format!("cluster.workers={workers}"), format!("training.micro_batch={micro_batch}"));
            let name = format!("{input}-{}-{micro_batch}", &workers[16..]);
            trained(&site, &name, &[&item_input, id_dropout, &workers, &micro])
        };
        let (losses, parameters) = run(1, 0);
        assert!(losses[19] < losses[0], "{input} learns: {losses:?}");
        for (workers, micro_batch) in [(2, 0), (4, 0), (2, 3)] {
            let (other_losses, other_parameters) = run(workers, micro_batch);
            for (step, (one, other)) in losses.iter().zip(&other_losses).enumerate() {
                assert!((one - other).abs() < 1e-5, "{input}, {workers} workers, step {step}: {other}, not {one}");
            }
            let gap = largest_gap(&parameters, &other_parameters);
            assert!(gap < 1e-5, "{input}, {workers} workers, micro-batch {micro_batch}: parameters differ by {gap}");
        }
    }
}

#[test]
fn learned_vectors_are_resumed_bitwise_and_need_no_content() {
    let site = Site::without_content(SMALL);
    let overrides = ["model.item_input=id", "model.dropout=0.1", "checkpoint.every_steps=5", "checkpoint.keep_last=9"];
    trained(&site, "whole", &overrides);
    trained(&site, "cut", &overrides);
    succeeds(&site.launch(&["resume", "runs/cut", "--checkpoint", "step-0000000010"]));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let (whole, cut) = (site.checkpoint_file("whole", STEPS, file), site.checkpoint_file("cut", STEPS, file));
        assert!(whole == cut, "{file} differs");
    }
    succeeds(&site.launch(&["eval", "runs/whole"]));
    succeeds(&site.launch(&["export", "runs/whole", "--out", "exported"]));
    succeeds(&site.launch(&["recommend", "runs/whole", "--users", "user-003"]));

    // content embeddings that come later do not matter to it
    succeeds(&site.launch(&["embed", "job.toml"]));
    succeeds(&site.launch(&["eval", "runs/whole"]));
    let refused = site.launch(&site.train(&["job.name=no", "model.item_input=id", "model.centring=true"]));
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert!(text(&refused).contains("model.centring"), "{}", text(&refused));
}

#[test]
fn a_residual_model_with_a_history_code_trains_the_same_on_one_and_two_workers() {
    let site = Site::new(SMALL);
    let overrides =
        ["model.residual=content", "model.centring=true", "model.residual_trained=true", "model.history_code=64"];
    let run = |workers: &str, name: &str| {
        let mut all = overrides.to_vec();
        all.push(workers);
        trained(&site, name, &all)
    };
    let (losses, parameters) = run("cluster.workers=1", "one");
    let (other_losses, other_parameters) = run("cluster.workers=2", "two");
    assert!(losses[19] < losses[0], "{losses:?}");
    assert!(losses.iter().zip(&other_losses).all(|(one, other)| (one - other).abs() < 1e-5));
    assert!(largest_gap(&parameters, &other_parameters) < 1e-5);
    succeeds(&site.launch(&["export", "runs/two", "--out", "exported"]));
    succeeds(&site.launch(&["recommend", "runs/two", "--users", "user-003"]));
}
