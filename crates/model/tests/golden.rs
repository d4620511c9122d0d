//! The golden cases beside this file, in float64, through the code that training runs. `cargo xtask gpu-check` checks the
//! same ones on a GPU, by the example `golden`.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use learn_model::golden;
use tch::{Device, Kind};

const TOLERANCE: f64 = 1e-9;
/// In f32, for values and gradients up to about 10.
const ROUGH: f64 = 1e-3;

fn files() -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")).collect();
    files.sort();
    files
}

fn check_all(kind: Kind, tolerance: f64) {
    let files = files();
    assert_eq!(files.len(), 24, "{files:?}");
    for path in files {
        let errors = golden::check(&path, Device::Cpu, kind).unwrap();
        assert!(errors.contains_key("grad.summary_encoder.layer.0") && errors.contains_key("out.loss"));
        for (group, error) in errors {
            assert!(error <= tolerance, "{}: {group} is off by {error:e}", path.display());
        }
    }
}

#[test]
fn outputs_losses_and_every_gradient_agree_with_pytorch() {
    check_all(Kind::Double, TOLERANCE);
}

#[test]
fn they_agree_roughly_in_f32() {
    check_all(Kind::Float, ROUGH);
}

#[test]
fn a_wrong_value_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.safetensors");
    let good = learn_model::safetensors::read_all(&files()[0]).unwrap();
    let wrong: Vec<_> = good
        .tensors
        .into_iter()
        .map(|(name, tensor)| if name == "grad.mlp.0.bias" { (name, tensor + 1e-6) } else { (name, tensor) })
        .collect();
    learn_model::safetensors::write(&mut std::fs::File::create(&path).unwrap(), &path, &wrong, &good.metadata).unwrap();
    let errors = golden::check(&path, Device::Cpu, Kind::Double).unwrap();
    assert!((errors["grad.mlp"] - 1e-6).abs() < 1e-9 && errors["grad.adaptor"] < TOLERANCE);
}
