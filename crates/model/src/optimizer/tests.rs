//! Tests of the optimizer.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Device;

use super::*;
use crate::parameters::Role;
use crate::safetensors;

/// As in `tests/adamw/make_adamw.py`.
const RATES: [f64; 6] = [1e-2, 3e-2, 2e-2, 5e-3, 1e-3, 0.0];

fn config() -> OptimizerConfig {
    OptimizerConfig { beta1: 0.9, beta2: 0.95, epsilon: 1e-6, weight_decay: 0.3, ..OptimizerConfig::default() }
}

fn specs() -> Vec<ParameterSpec> {
    vec![
        ParameterSpec::new("a.weight", &[3, 5], Role::Weight { std: 1.0 }),
        ParameterSpec::new("b.bias", &[4], Role::Bias),
    ]
}

struct Case {
    tensors: BTreeMap<String, Tensor>,
    label: &'static str,
}

impl Case {
    fn open(label: &'static str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adamw/adamw.safetensors");
        Self { tensors: safetensors::read(&path).unwrap().into_iter().collect(), label }
    }

    fn flat(&self, what: &str) -> Tensor {
        let part = |name: &str| self.tensors[&format!("{}.{what}.{name}", self.label)].reshape([-1]);
        Tensor::cat(&[part("a.weight"), part("b.bias")], 0)
    }

    fn start(&self, kind: Kind) -> Parameters {
        let named = specs().into_iter().map(|spec| {
            let tensor = self.tensors[&format!("{}.start.{}", self.label, spec.name)].shallow_clone();
            (spec.name, tensor)
        });
        Parameters::load_specs(specs(), named.collect(), kind, Device::Cpu).unwrap()
    }
}

fn gap(ours: &Tensor, theirs: &Tensor) -> f64 {
    (ours - theirs).abs().max().double_value(&[])
}

#[test]
fn agrees_with_torch_optim_adamw() {
    for (label, kind, tolerance) in [("f64", Kind::Double, 1e-14), ("f32", Kind::Float, 5e-7)] {
        let case = Case::open(label);
        let mut parameters = case.start(kind);
        let mut optimizer = AdamW::new(&parameters, &config());
        for (step, rate) in RATES.iter().enumerate() {
            optimizer.step(&mut parameters, &case.flat(&format!("gradient.{step}")), *rate);
            let error = gap(parameters.flat(), &case.flat(&format!("value.{step}")));
            assert!(error <= tolerance, "{label}, step {step}: {error:e}");
        }
        assert!(gap(&optimizer.first, &case.flat("exp_avg")) <= tolerance);
        assert!(gap(&optimizer.second, &case.flat("exp_avg_sq")) <= tolerance);
        assert_eq!(optimizer.steps(), RATES.len() as u64);
    }
}

#[test]
fn saved_and_loaded_state_continues_bit_by_bit() {
    let case = Case::open("f32");
    let gradient = |step: usize| case.flat(&format!("gradient.{step}"));
    let mut parameters = case.start(Kind::Float);
    let mut optimizer = AdamW::new(&parameters, &config());
    for (step, rate) in RATES.iter().enumerate().take(3) {
        optimizer.step(&mut parameters, &gradient(step), *rate);
    }
    let folder = tempfile::tempdir().unwrap();
    let (model, state) = (folder.path().join("m.safetensors"), folder.path().join("o.safetensors"));
    let values: Vec<_> = parameters.iter().map(|(name, leaf)| (name.to_owned(), leaf.shallow_clone())).collect();
    safetensors::write(&model, &values, &BTreeMap::new()).unwrap();
    safetensors::write(&state, &optimizer.state(&parameters), &BTreeMap::new()).unwrap();

    let loaded = safetensors::read(&model).unwrap();
    let mut other = Parameters::load_specs(specs(), loaded, Kind::Float, Device::Cpu).unwrap();
    let mut resumed = AdamW::new(&other, &config());
    resumed.load_state(&other, safetensors::read(&state).unwrap(), optimizer.steps()).unwrap();
    for (step, rate) in RATES.iter().enumerate().skip(3) {
        optimizer.step(&mut parameters, &gradient(step), *rate);
        resumed.step(&mut other, &gradient(step), *rate);
    }
    assert_eq!(parameters.flat(), other.flat());
    assert_eq!((optimizer.first, optimizer.second), (resumed.first, resumed.second));
}

#[test]
fn a_foreign_state_is_refused_and_changes_nothing() {
    let case = Case::open("f32");
    let mut parameters = case.start(Kind::Float);
    let mut optimizer = AdamW::new(&parameters, &config());
    optimizer.step(&mut parameters, &case.flat("gradient.0"), 0.1);
    let before = optimizer.first.copy();
    let mut state = optimizer.state(&parameters);
    state.retain(|(name, _)| name != "exp_avg_sq.b.bias");
    state.push(("exp_avg.c".into(), Tensor::from(1.0)));
    let error = optimizer.load_state(&parameters, state, 9).unwrap_err().to_string();
    assert!(error.contains("missing: exp_avg_sq.b.bias") && error.contains("unexpected: exp_avg.c"), "{error}");
    assert_eq!((optimizer.first.shallow_clone(), optimizer.steps()), (before, 1));
}

#[test]
fn clipping_keeps_the_direction() {
    let start = Tensor::from_slice(&[3.0_f32, 0.0, -4.0]);
    let clipped = |longest| {
        let mut gradient = start.copy();
        assert_eq!(clip(&mut gradient, longest), 5.0);
        gradient
    };
    assert_eq!(clipped(0.0), start);
    assert_eq!(clipped(6.0), start);
    assert!(gap(&clipped(1.0), &(&start / 5.0)) < 1e-6);
    let mut zero = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    assert_eq!((clip(&mut zero, 1.0), global_norm(&zero)), (0.0, 0.0));
    let mut broken = Tensor::from_slice(&[f32::NAN, 1.0]);
    assert!(clip(&mut broken, 1.0).is_nan());
}

#[test]
fn spared_parameters_without_a_gradient_keep_their_values() {
    let specs = ["cvr.0.weight", "mlp.0.weight"].map(|name| ParameterSpec::new(name, &[3], Role::Weight { std: 1.0 }));
    let mut parameters = Parameters::init_specs(specs.to_vec(), 3, Device::Cpu);
    let before = parameters.flat().copy();
    let mut optimizer = AdamW::new(&parameters, &OptimizerConfig { weight_decay: 0.5, ..OptimizerConfig::default() });
    optimizer.spare(&parameters, |name| !crate::objective::cvr::owns(name));
    let gradient = Tensor::from_slice(&[1.0_f32, -2.0, 3.0, 0.0, 0.0, 0.0]);
    for _ in 0..3 {
        optimizer.step(&mut parameters, &gradient, 0.1);
    }
    let changed: Vec<bool> = parameters.flat().ne_tensor(&before).try_into().unwrap();
    assert_eq!(changed, [true, true, true, false, false, false]);
}
