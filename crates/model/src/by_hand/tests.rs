//! Tests of the towers by hand: against those that libtorch differentiates.

use std::collections::BTreeMap;

use learn_domain::config::{ItemInput, ItemTower, ModelConfig, PositionEmbedding, Precision, Residual};
use learn_domain::packing::Packing;
use tch::{Device, Kind, Tensor};

use super::*;
use crate::parameters::Parameters;
use crate::{AdamW, Forward, ItemInputs, Pch, PchShape, Sequences};

const INPUT: i64 = 24;

/// Towers, and a batch for them.
struct Batch {
    model: Pch,
    parameters: Parameters,
    content: Tensor,
    history: Sequences,
    targets: Sequences,
    d_user: Tensor,
    d_item: Tensor,
}

/// What a pass gives.
struct Outcome {
    user: Tensor,
    item: Tensor,
    gradients: BTreeMap<String, Tensor>,
    /// Of learned item vectors.
    rows: Option<Tensor>,
}

/// Users in the order in which they lie: shortest first. The positions are not.
fn sequences(lengths: &[usize], positions: &[i64]) -> Sequences {
    let tokens: i64 = lengths.iter().sum::<usize>() as i64;
    Sequences {
        items: Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).remainder(9),
        runs: Packing::new(lengths).runs,
        positions: Tensor::from_slice(positions),
        gaps: None,
    }
}

impl Batch {
    fn new(item_tower: ItemTower, dropout: f64) -> Self {
        Self::with(item_tower, dropout, |_| {})
    }

    fn with(item_tower: ItemTower, dropout: f64, change: impl Fn(&mut ModelConfig)) -> Self {
        let output_dim = if item_tower == ItemTower::Content { INPUT as u32 } else { 10 };
        let mut model = ModelConfig {
            layers: 3,
            heads: 2,
            hidden: 32,
            output_dim,
            dropout,
            init_std: 0.25,
            item_tower,
            position_embedding: PositionEmbedding::Learned,
            ..ModelConfig::default()
        };
        change(&mut model);
        let model = Pch::new(PchShape { input_dim: INPUT, items: 9, model, max_history: 8, cvr_hidden: None }).unwrap();
        let parameters = Parameters::init(model.shape(), 3, Device::Cpu);
        // biases and scales that are not where they start
        learn_torch::seed(4);
        tch::no_grad(|| {
            let mut flat = parameters.flat().shallow_clone();
            flat += Tensor::randn(flat.size(), (Kind::Float, Device::Cpu)) * 0.05;
        });
        let options = (Kind::Float, Device::Cpu);
        Self {
            content: Tensor::randn([9, INPUT], options),
            history: sequences(&[1, 1, 2, 5, 5, 7], &[20, 18, 0, 3, 2, 13, 9, 4, 20]),
            targets: sequences(&[1, 3, 3], &[6, 4, 0, 1]),
            d_user: Tensor::randn([9, output_dim.into()], options),
            d_item: Tensor::randn([4, output_dim.into()], options),
            model,
            parameters,
        }
    }

    fn run(&mut self, forward: Forward, tape: Option<&Tape>) -> Outcome {
        let (user, item) = self.forward(forward, tape);
        let outputs = [(&user, &self.d_user), (&item, &self.d_item)];
        match tape {
            Some(tape) => tape.backward(&self.parameters, &outputs, &mut |_| ()),
            None => pull(&outputs),
        }
        let flat = self.parameters.gradients_into_flat().copy();
        let gradients = self.parameters.parts(&flat).map(|(name, part)| (name.to_owned(), part)).collect();
        let rows = self.parameters.row_gradient().map(|gradient| gradient.rows);
        Outcome { user: user.detach(), item: item.detach(), gradients, rows }
    }

    fn forward(&self, forward: Forward, tape: Option<&Tape>) -> (Tensor, Tensor) {
        let items: Vec<u32> = (0..9).collect();
        let inputs = ItemInputs { items: &items, content: &self.content, id_seed: Some(5), tape };
        let items = self.model.items(&self.parameters, &inputs, &forward);
        let item = self.model.item(&self.parameters, &items, &self.targets, &forward);
        (self.model.user(&self.parameters, &items, &self.history, &forward), item)
    }
}

/// The largest difference, in parts of the larger one's largest value.
fn gap(a: &Tensor, b: &Tensor) -> f64 {
    let largest = |tensor: Tensor| tensor.abs().max().double_value(&[]);
    largest(a - b) / largest(b.shallow_clone()).max(1e-3)
}

/// A change of the model, with its name.
type Change = (&'static str, fn(&mut ModelConfig));

/// Changes that let the towers share graphs: of a residual path, of learned item vectors.
const SHARING: [Change; 5] = [
    ("residual", |model| (model.residual, model.residual_trained) = (Residual::Content, true)),
    ("ids", |model| model.item_input = ItemInput::Id),
    ("both", |model| (model.item_input, model.id_dropout) = (ItemInput::ContentId, 0.3)),
    ("no layers", |model| (model.layers, model.residual, model.residual_trained) = (0, Residual::Content, true)),
    ("no layers, both", |model| (model.layers, model.item_input, model.id_dropout) = (0, ItemInput::ContentId, 0.3)),
];

const TOWERS: [ItemTower; 3] = [ItemTower::Causal, ItemTower::PerItem, ItemTower::Content];

#[test]
fn towers_without_rows_learn_nothing_in_either_kind() {
    for precision in [Precision::F32, Precision::Bf16] {
        for tower in TOWERS {
            // wider than a block of products
            let mut batch = Batch::with(tower, 0.1, |model| {
                model.hidden = 64;
                if tower != ItemTower::Content {
                    model.output_dim = 48;
                }
            });
            let none = |sequences: &mut Sequences| sequences.positions = sequences.positions.narrow(0, 0, 0);
            none(&mut batch.history);
            none(&mut batch.targets);
            let width = batch.model.output_dim();
            batch.d_user = Tensor::zeros([0, width], (Kind::Float, Device::Cpu));
            batch.d_item = batch.d_user.shallow_clone();
            let outcome = batch.run(Forward { train: true, precision }, Some(&Tape::new(1)));
            assert_eq!((outcome.user.size(), outcome.item.size()), (vec![0, width], vec![0, width]), "{tower:?}");
            let largest = outcome.gradients.values().map(|part| part.abs().max().double_value(&[])).fold(0.0, f64::max);
            assert_eq!(largest, 0.0, "{tower:?} {precision:?}");
        }
    }
}

#[test]
fn graphs_that_towers_share_are_gone_through_once() {
    // f16 has no kernels of its own: libtorch differentiates its layers one by one
    for (tower, precision) in [
        (ItemTower::Causal, Precision::F32),
        (ItemTower::PerItem, Precision::F32),
        (ItemTower::Causal, Precision::F16),
        (ItemTower::PerItem, Precision::F16),
    ] {
        let forward = Forward { train: true, precision };
        for (name, change) in SHARING {
            for unread in ["nothing", "history", "targets"] {
                let mut batch = Batch::with(tower, 0.0, change);
                let side = match unread {
                    "history" => Some((&mut batch.history, &mut batch.d_user)),
                    "targets" => Some((&mut batch.targets, &mut batch.d_item)),
                    _ => None,
                };
                if let Some((sequences, gradient)) = side {
                    sequences.positions = sequences.positions.narrow(0, 0, 0);
                    *gradient = gradient.narrow(0, 0, 0);
                }
                let reference = batch.run(forward, None);
                let by_hand = batch.run(forward, Some(&Tape::new(1)));
                let largest =
                    reference.gradients.values().map(|part| part.abs().max().double_value(&[])).fold(0.0, f64::max);
                for (parameter, theirs) in &reference.gradients {
                    let error = (&by_hand.gradients[parameter] - theirs).abs().max().double_value(&[]) / largest;
                    assert!(error < 1e-5, "{tower:?} {precision:?}, {name}, unread {unread}, {parameter}: {error:e}");
                }
                if let (Some(ours), Some(theirs)) = (by_hand.rows, reference.rows) {
                    assert!(gap(&ours, &theirs) < 1e-4, "{tower:?}, {name}, unread {unread}, item vectors");
                }
            }
        }
    }
}

/// Layers of which the tape keeps no more than the input.
fn layers_kept(batch: &Batch, forward: Forward, tape: Tape) -> usize {
    let _outputs = batch.forward(forward, Some(&tape));
    let of = |stage: &Stage| match &stage.work {
        Work::Layer(_, recorded) => usize::from(matches!(recorded, Recorded::Input(_))),
        Work::Encoding(encoding) => match &encoding.layers {
            Layers::F32(all) | Layers::Bf16(all) => all.iter().filter(|kept| matches!(kept, Kept::Input(_))).count(),
        },
        Work::Dense(_) | Work::Unit(_) => 0,
    };
    tape.0.stages.borrow().iter().map(of).sum()
}

#[test]
fn activation_checkpointing_changes_no_bit() {
    // f16 has no kernels of its own: libtorch differentiates its layers
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        for tower in TOWERS {
            let forward = Forward { train: true, precision };
            let mut batch = Batch::new(tower, 0.2);
            let mut run = |tape: Tape| batch.run(forward, Some(&tape));
            let kept = run(Tape::new(1));
            let again = run(Tape::with_checkpointing(1));
            assert_eq!(layers_kept(&batch, forward, Tape::new(1)), 0, "{tower:?} {precision:?}");
            // both towers' layers; the tower `content` has none
            let layers = if tower == ItemTower::Content { 3 } else { 6 };
            assert_eq!(layers_kept(&batch, forward, Tape::with_checkpointing(1)), layers, "{tower:?} {precision:?}");
            let mut run = |tape: Tape| batch.run(forward, Some(&tape));
            assert_eq!(again.user, kept.user, "{tower:?} {precision:?}");
            assert_eq!(again.gradients, kept.gradients, "{tower:?} {precision:?}");
            let largest = kept.gradients.values().map(|part| part.abs().max().double_value(&[])).fold(0.0, f64::max);
            assert!(largest > 0.0 && largest.is_finite(), "{tower:?} {precision:?}: {largest}");
            assert_ne!(run(Tape::with_checkpointing(2)).user, kept.user, "{tower:?} {precision:?}");
        }
    }
}

#[test]
fn it_agrees_with_libtorchs_own_differentiation() {
    let forward = Forward { train: true, precision: Precision::F32 };
    for tower in TOWERS {
        let mut batch = Batch::new(tower, 0.0);
        let reference = batch.run(forward, None);
        let by_hand = batch.run(forward, Some(&Tape::new(1)));
        assert!(gap(&by_hand.user, &reference.user) < 1e-5 && gap(&by_hand.item, &reference.item) < 1e-5, "{tower:?}");
        let largest = reference.gradients.values().map(|part| part.abs().max().double_value(&[])).fold(0.0, f64::max);
        for (name, theirs) in &reference.gradients {
            let ours = &by_hand.gradients[name];
            // a key's bias moves all scores of a query alike, so its gradient is 0 but for rounding
            let error = match name.ends_with("key.bias") {
                true => (ours - theirs).abs().max().double_value(&[]) / largest,
                false => gap(ours, theirs),
            };
            assert!(error < 1e-5, "{tower:?}, {name}: {error:e}");
        }
        // and again: nothing of a step is left for the next
        let again = batch.run(forward, Some(&Tape::new(1)));
        assert_eq!(again.gradients, by_hand.gradients, "{tower:?}");
    }
}

/// 1 - cosine.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let product = (a * b).sum(Kind::Double).double_value(&[]);
    1.0 - product / (a.norm().double_value(&[]) * b.norm().double_value(&[])).max(1e-30)
}

#[test]
fn in_bf16_it_is_as_near_to_f32_as_libtorchs_is_and_follows_the_parameters() {
    let full = Forward { train: true, precision: Precision::F32 };
    let half = Forward { precision: Precision::Bf16, ..full };
    let mut batch = Batch::new(ItemTower::Causal, 0.0);
    let mut optimizer = AdamW::new(&batch.parameters, &learn_domain::config::OptimizerConfig::default());
    for step in 0..3 {
        let exact = batch.run(full, None);
        let theirs = batch.run(half, None);
        let ours = batch.run(half, Some(&Tape::new(1)));
        let near = |name: &str, ours: &Tensor, theirs: &Tensor, exact: &Tensor| {
            let (ours, theirs) = (distance(ours, exact), distance(theirs, exact));
            assert!(ours > 0.0 && ours < 2.0 * theirs + 1e-3, "step {step}, {name}: {ours:e}, libtorch's {theirs:e}");
        };
        near("user", &ours.user, &theirs.user, &exact.user);
        for (name, exact) in exact.gradients.iter().filter(|(name, _)| !name.ends_with("key.bias")) {
            near(name, &ours.gradients[name], &theirs.gradients[name], exact);
        }
        // the copies in bf16 follow an update, and a change from outside
        let gradient = batch.parameters.flat().ones_like();
        match step {
            0 => optimizer.step(&mut batch.parameters, &[gradient], 0.1),
            _ => drop(tch::no_grad(|| batch.parameters.flat().shallow_clone().g_mul_scalar_(-0.7))),
        }
    }
}

#[test]
fn passes_add_up_by_hand_too() {
    let forward = Forward { train: true, precision: Precision::F32 };
    let mut batch = Batch::new(ItemTower::Causal, 0.0);
    let once = batch.run(forward, Some(&Tape::new(1)));
    let tape = Tape::new(1);
    let (user, item) = batch.forward(forward, Some(&tape));
    tape.backward(&batch.parameters, &[(&user, &batch.d_user), (&item, &batch.d_item)], &mut |_| ());
    let twice = batch.run(forward, Some(&Tape::new(1)));
    for (name, one) in &once.gradients {
        assert!(gap(&twice.gradients[name], &(one * 2.0)) < 1e-5, "{name}");
    }
}

#[test]
fn what_a_backward_has_passed_does_not_change_any_more() {
    // by hand, by libtorch, and with graphs made again
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        for tower in TOWERS {
            for tape in [Tape::new, Tape::with_checkpointing] {
                let forward = Forward { train: true, precision };
                let mut batch = Batch::new(tower, 0.2);
                batch.parameters.cut_buckets(0);
                let expected = batch.run(forward, Some(&tape(1))).gradients;
                let tape = tape(1);
                let (user, item) = batch.forward(forward, Some(&tape));
                let parameters = &batch.parameters;
                let (mut milestones, mut taken) = (Vec::new(), BTreeMap::new());
                let mut take = |milestone| {
                    for bucket in parameters.buckets().iter().filter(|bucket| bucket.whole_at <= milestone) {
                        let start = bucket.elements.start;
                        taken.entry(start).or_insert_with(|| {
                            parameters.collect_bucket(bucket);
                            parameters.bucket_gradient(bucket).copy()
                        });
                    }
                    milestones.push(milestone);
                };
                let outputs = [(&user, &batch.d_user), (&item, &batch.d_item)];
                tape.backward(parameters, &outputs, &mut take);
                take(Milestone::End);
                let _ = parameters.close_gradient();
                let layers = [2, 1, 0].map(|layer| Milestone::Layer(Reverse(layer)));
                let all = [&[Milestone::Projection], &layers[..], &[Milestone::End]].concat();
                assert_eq!(milestones, all, "{tower:?} {precision:?}");
                let flat = Tensor::cat(&taken.into_values().collect::<Vec<_>>(), 0);
                for (name, gradient) in parameters.parts(&flat) {
                    assert_eq!(gradient, expected[name], "{tower:?} {precision:?}: {name}");
                }
            }
        }
    }
}

#[test]
fn dropout_depends_on_the_seed_alone() {
    let train = Forward { train: true, precision: Precision::F32 };
    let mut batch = Batch::new(ItemTower::Causal, 0.3);
    let first = batch.run(train, Some(&Tape::new(1)));
    // a pass without a way back draws the same, as the passes of a share that is embedded twice do
    let (user, item) = tch::no_grad(|| batch.forward(train, Some(&Tape::new(1))));
    assert_eq!((&user, &item), (&first.user, &first.item));
    assert_eq!(batch.run(train, Some(&Tape::new(1))).gradients, first.gradients);
    assert!(gap(&batch.run(train, Some(&Tape::new(2))).user, &first.user) > 0.01);
    let asleep = Forward { train: false, ..train };
    let reference = batch.run(asleep, None);
    assert!(gap(&batch.run(asleep, Some(&Tape::new(1))).user, &reference.user) < 1e-5);
}

#[test]
fn with_dropout_the_gradient_is_the_slope() {
    let train = Forward { train: true, precision: Precision::F32 };
    let mut batch = Batch::new(ItemTower::Causal, 0.3);
    let gradients = batch.run(train, Some(&Tape::new(5))).gradients;
    let names =
        ["layer.0.attention.self.value.weight", "layer.1.intermediate.dense.weight", "layer.2.output.dense.bias"];
    for name in names.map(|name| format!("summary_encoder.{name}")) {
        let gradient = &gradients[&name];
        let direction = gradient / gradient.norm();
        let value_at = |step: f64| {
            tch::no_grad(|| {
                let mut leaf = batch.parameters.get(&name).shallow_clone();
                leaf += &direction * step;
                let (user, item) = batch.forward(train, Some(&Tape::new(5)));
                leaf -= &direction * step;
                let sum = |a: &Tensor, b: &Tensor| (a * b).sum(Kind::Double).double_value(&[]);
                sum(&user, &batch.d_user) + sum(&item, &batch.d_item)
            })
        };
        let slope = (value_at(1e-2) - value_at(-1e-2)) / 2e-2;
        let length = gradient.norm().double_value(&[]);
        assert!((slope / length - 1.0).abs() < 0.02, "{name}: {slope} and {length}");
    }
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let train = Forward { train: true, precision: Precision::F32 };
    let before = tch::get_num_threads();
    let mut batch = Batch::new(ItemTower::Causal, 0.1);
    let mut run = |threads| {
        tch::set_num_threads(threads);
        batch.run(train, Some(&Tape::new(1)))
    };
    let (one, two) = (run(1), run(2));
    tch::set_num_threads(before);
    assert!(gap(&one.user, &two.user) < 1e-5);
    let largest = one.gradients.values().map(|part| part.abs().max().double_value(&[])).fold(0.0, f64::max);
    for (name, gradient) in &one.gradients {
        let error = (&two.gradients[name] - gradient).abs().max().double_value(&[]) / largest;
        assert!(error < 1e-5, "{name}: {error:e}");
    }
}

#[test]
fn sampled_rows_know_their_places() {
    let lengths = [1, 3, 4];
    let packing = Packing::new(&lengths);
    let route = Route::new(&Attention::Causal(&packing.runs), Some(&Tensor::from_slice(&[7_i64, 1, 5, 3, 5])));
    let sampled = route.sampled.unwrap();
    assert_eq!((&sampled.rows[..], &sampled.places[..]), (&[1_u32, 3, 5, 5, 7][..], &[0_u32, 2, 1, 1, 3][..]));
    let parts: Vec<_> = sampled.sequences.iter().map(|s| (s.first_query, s.queries, s.first_key, s.keys)).collect();
    assert_eq!(parts, [(0, 0, 0, 1), (0, 2, 1, 3), (2, 3, 4, 4)]);
    assert_eq!(Vec::<i64>::try_from(sampled.order.unwrap()).unwrap(), [4, 0, 2, 1, 3]);
}
