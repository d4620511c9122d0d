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
            optimizer.step(&mut parameters, &[case.flat(&format!("gradient.{step}"))], *rate);
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
        optimizer.step(&mut parameters, &[gradient(step)], *rate);
    }
    let folder = tempfile::tempdir().unwrap();
    let (model, state) = (folder.path().join("m.safetensors"), folder.path().join("o.safetensors"));
    let values: Vec<_> = parameters.iter().map(|(name, leaf)| (name.to_owned(), leaf.shallow_clone())).collect();
    safetensors::write(&mut std::fs::File::create(&model).unwrap(), &model, &values, &BTreeMap::new()).unwrap();
    safetensors::write(
        &mut std::fs::File::create(&state).unwrap(),
        &state,
        &optimizer.state(&parameters),
        &BTreeMap::new(),
    )
    .unwrap();

    let loaded = safetensors::read(&model).unwrap();
    let mut other = Parameters::load_specs(specs(), loaded, Kind::Float, Device::Cpu).unwrap();
    let mut resumed = AdamW::new(&other, &config());
    resumed.load_state(&other, safetensors::read(&state).unwrap(), optimizer.steps()).unwrap();
    for (step, rate) in RATES.iter().enumerate().skip(3) {
        optimizer.step(&mut parameters, &[gradient(step)], *rate);
        resumed.step(&mut other, &[gradient(step)], *rate);
    }
    assert_eq!(parameters.flat(), other.flat());
    assert_eq!((optimizer.first, optimizer.second), (resumed.first, resumed.second));
}

#[test]
fn a_foreign_state_is_refused_and_changes_nothing() {
    let case = Case::open("f32");
    let mut parameters = case.start(Kind::Float);
    let mut optimizer = AdamW::new(&parameters, &config());
    optimizer.step(&mut parameters, &[case.flat("gradient.0")], 0.1);
    let before = optimizer.first.copy();
    let mut state = optimizer.state(&parameters);
    state.retain(|(name, _)| name != "exp_avg_sq.b.bias");
    state.push(("exp_avg.c".into(), Tensor::from(1.0)));
    let error = optimizer.load_state(&parameters, state, 9).unwrap_err().to_string();
    assert!(error.contains("missing: exp_avg_sq.b.bias") && error.contains("unexpected: exp_avg.c"), "{error}");
    assert_eq!((optimizer.first.shallow_clone(), optimizer.steps()), (before, 1));
}

#[test]
fn clipping_shortens_and_never_lengthens() {
    for kind in [Kind::Float, Kind::Double] {
        let (one, other) = (Tensor::from_slice(&[3.0_f32, 0.0]).to_kind(kind), Tensor::from_slice(&[-4.0_f32]));
        let length = norm(std::slice::from_ref(&one), Some(&other.to_kind(kind).view([1, 1])));
        assert_eq!(length, 5.0);
        let scale = |longest| UpdateScale::clipped(0.1, length, longest).gradient_scale;
        assert_eq!((scale(0.0), scale(6.0)), (1.0, 1.0));
        assert!((scale(1.0) - 0.2).abs() < 1e-6);
        assert_eq!(norm(&[one.zeros_like()], None), 0.0);
        assert!(norm(&[one / 0.0], None).is_nan());
    }
    assert_eq!(UpdateScale::clipped(0.1, 0.0, 1.0), UpdateScale::from(0.1));
}

#[test]
fn a_scaled_gradient_is_that_of_the_scaled_values() {
    for (label, kind) in [("f64", Kind::Double), ("f32", Kind::Float)] {
        let case = Case::open(label);
        let gradient = case.flat("gradient.0").to_kind(kind);
        let (mut scaled, mut given) = (case.start(kind), case.start(kind));
        let scale = UpdateScale { learning_rate: 0.1, gradient_scale: 0.25 };
        let version = scaled.version();
        AdamW::new(&scaled, &config()).step(&mut scaled, std::slice::from_ref(&gradient), scale);
        // what follows the values learns of the update; by hand the copies have followed it already
        assert_eq!(scaled.version() > version, kind == Kind::Double, "{label}");
        AdamW::new(&given, &config()).step(&mut given, &[&gradient * 0.25], 0.1);
        assert_eq!(scaled.flat(), given.flat(), "{label}");
    }
}

/// A table of item vectors, alone or as a weight of the flat buffer.
fn table(role: Role, start: &Tensor) -> Parameters {
    let specs = vec![ParameterSpec::new("t", &start.size(), role)];
    Parameters::load_specs(specs, vec![("t".into(), start.copy())], Kind::Double, Device::Cpu).unwrap()
}

#[test]
fn rows_move_as_in_a_dense_optimizer_whenever_they_are_touched() {
    learn_torch::seed(8);
    let options = (Kind::Double, Device::Cpu);
    let start = Tensor::randn([5, 3], options);
    let mut sparse = table(Role::ItemVector { std: 1.0 }, &start);
    let mut optimizer = AdamW::new(&sparse, &config());
    let mut dense = table(Role::Weight { std: 1.0 }, &start);
    let mut reference = AdamW::new(&dense, &config());
    // 0, 2 and 3 are touched by every step, 4 by the last one, 1 never
    for (step, rate) in RATES.iter().enumerate() {
        let touched: &[i64] = if step + 1 == RATES.len() { &[0, 2, 3, 4] } else { &[0, 2, 3] };
        let items = Tensor::from_slice(touched);
        let rows = Tensor::randn([touched.len() as i64, 3], options);
        let whole = Tensor::zeros([5, 3], options).index_copy(0, &items, &rows);
        reference.step(&mut dense, &[whole.view([-1])], *rate);
        let nothing = Tensor::zeros([0], options);
        optimizer.step(&mut sparse, std::slice::from_ref(&nothing), *rate);
        optimizer.step_rows(&mut sparse, &RowGradient { items, rows }, *rate);
    }
    let (ours, theirs) = (sparse.item_vectors().unwrap(), dense.get("t").detach());
    let always = Tensor::from_slice(&[0_i64, 2, 3]);
    assert!(gap(&ours.index_select(0, &always), &theirs.index_select(0, &always)) < 1e-14);
    assert_eq!(ours.get(1), start.get(1), "an untouched row does not even decay");
    assert!(optimizer.rows.as_ref().unwrap().0.get(1).abs().max().double_value(&[]) == 0.0);

    // saved and loaded, moments of rows included
    let state: Vec<_> = optimizer.state(&sparse).into_iter().map(|(name, part)| (name, part.copy())).collect();
    assert_eq!(state.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["exp_avg.t", "exp_avg_sq.t"]);
    let mut again = table(Role::ItemVector { std: 1.0 }, ours);
    let mut resumed = AdamW::new(&again, &config());
    resumed.load_state(&again, state, optimizer.steps()).unwrap();
    let gradient = || RowGradient { items: Tensor::from_slice(&[1_i64, 4]), rows: Tensor::ones([2, 3], options) };
    for (optimizer, parameters) in [(&mut optimizer, &mut sparse), (&mut resumed, &mut again)] {
        optimizer.step(parameters, &[Tensor::zeros([0], options)], 0.1);
        optimizer.step_rows(parameters, &gradient(), 0.1);
    }
    assert_eq!(sparse.item_vectors(), again.item_vectors());
}

#[test]
fn parameters_outside_the_weight_decay_without_a_gradient_keep_their_values() {
    let specs = ["cvr.0.weight", "mlp.0.weight"].map(|name| ParameterSpec::new(name, &[3], Role::Weight { std: 1.0 }));
    let mut parameters = Parameters::init_specs(specs.to_vec(), 3, Device::Cpu);
    let before = parameters.flat().copy();
    let mut optimizer = AdamW::new(&parameters, &OptimizerConfig { weight_decay: 0.5, ..OptimizerConfig::default() });
    optimizer.exclude_from_decay(&parameters, |name| !crate::objective::cvr::owns(name));
    let gradient = Tensor::from_slice(&[1.0_f32, -2.0, 3.0, 0.0, 0.0, 0.0]);
    for _ in 0..3 {
        optimizer.step(&mut parameters, std::slice::from_ref(&gradient), 0.1);
    }
    let changed: Vec<bool> = parameters.flat().ne_tensor(&before).try_into().unwrap();
    assert_eq!(changed, [true, true, true, false, false, false]);
}

#[test]
fn a_gradient_in_parts_is_the_same_gradient() {
    let options = (Kind::Float, Device::Cpu);
    let gradient = Tensor::arange(6, options) - 2.5;
    let after = |parts: &[Tensor]| {
        let specs = vec![
            ParameterSpec::new("a.weight", &[2], Role::Weight { std: 1.0 }),
            ParameterSpec::new("b.weight", &[4], Role::Weight { std: 1.0 }),
        ];
        let mut parameters = Parameters::init_specs(specs, 1, Device::Cpu);
        AdamW::new(&parameters, &config()).step(&mut parameters, parts, 0.1);
        parameters.flat().copy()
    };
    let whole = after(std::slice::from_ref(&gradient));
    for sizes in [[0, 6, 0], [1, 3, 2], [2, 4, 0], [3, 0, 3]] {
        let parts = gradient.split_with_sizes(&sizes[..], 0);
        assert_eq!(after(&parts), whole, "{sizes:?}");
        assert_eq!(norm(&parts, None), norm(std::slice::from_ref(&gradient), None));
    }
}
