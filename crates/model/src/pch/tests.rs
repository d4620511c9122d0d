//! Tests of the towers that the golden cases do not make: padding, positions, empty shares, precision, the catalogue.

use learn_domain::config::AdaptorInit;
use learn_domain::packing::Packing;
use learn_domain::sampling::Pairs;
use learn_torch::seed;
use tch::{Device, Kind};

use super::*;
use crate::objective::{InfoNce, Tile, local_pairs};

const STILL: Forward = Forward { train: false, precision: Precision::F32 };

fn config() -> ModelConfig {
    ModelConfig {
        layers: 2,
        heads: 2,
        hidden: 8,
        output_dim: 6,
        dropout: 0.2,
        init_std: 0.3,
        item_tower: ItemTower::Causal,
        ..ModelConfig::default()
    }
}

fn towers(model: ModelConfig) -> (Pch, Parameters) {
    let model = Pch::new(PchShape { input_dim: 6, items: 12, model, max_history: 4, cvr_hidden: None }).unwrap();
    let parameters = Parameters::init(model.shape(), 2, Device::Cpu);
    (model, parameters)
}

fn rows(count: i64) -> Tensor {
    seed(9);
    Tensor::randn([count, 6], (Kind::Half, Device::Cpu))
}

/// The items 0, 1, .. of these content embeddings, before the towers.
fn with_inputs<T>(content: &Tensor, run: impl FnOnce(&ItemInputs<'_>) -> T) -> T {
    let items: Vec<u32> = (0..content.size()[0] as u32).collect();
    run(&ItemInputs { items: &items, content, id_seed: Some(5), tape: None })
}

fn items(model: &Pch, parameters: &Parameters, content: &Tensor, forward: &Forward) -> Items {
    with_inputs(content, |inputs| model.items(parameters, inputs, forward))
}

fn catalogue(model: &Pch, parameters: &Parameters, content: &Tensor, forward: &Forward) -> Tensor {
    with_inputs(content, |inputs| model.catalogue(parameters, inputs, forward))
}

/// Sequences, and (sequence, position) of what is sampled.
fn sequences(items: &[&[i64]], sampled: &[(usize, i64)]) -> Sequences {
    let packing = Packing::new(&items.iter().map(|user| user.len()).collect::<Vec<_>>());
    let flat: Vec<i64> = packing.order.iter().flat_map(|&user| items[user]).copied().collect();
    let positions: Vec<i64> = sampled.iter().map(|&(user, position)| packing.starts[user] as i64 + position).collect();
    Sequences {
        items: Tensor::from_slice(&flat),
        runs: packing.runs,
        positions: Tensor::from_slice(&positions),
        gaps: None,
    }
}

/// The same with a time for each item, the shortest sequence first.
fn timed(sequences: Sequences, times: &[&[i64]]) -> Sequences {
    let gaps: Vec<i64> = times.iter().flat_map(|row| time_gap::buckets(row)).map(i64::from).collect();
    let gaps = Tensor::from_slice(&gaps).view_as(&sequences.items);
    Sequences { gaps: Some(gaps), ..sequences }
}

fn gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

#[test]
fn padding_and_neighbours_do_not_matter() {
    for position_embedding in [PositionEmbedding::None, PositionEmbedding::Learned] {
        let (model, parameters) = towers(ModelConfig { position_embedding, ..config() });
        let rows = rows(7);
        let items = items(&model, &parameters, &rows, &STILL);
        let user = |sequences: Sequences| model.user(&parameters, &items, &sequences, &STILL);
        let both = user(sequences(&[&[3, 1, 4], &[5, 2]], &[(0, 1), (0, 2), (1, 0), (1, 1)]));
        let first = user(sequences(&[&[3, 1, 4]], &[(0, 1), (0, 2)]));
        let second = user(sequences(&[&[5, 2]], &[(0, 0), (0, 1)]));
        assert!(gap(&both, &Tensor::cat(&[first, second], 0)) < 1e-6);
        let lengths = both.norm_scalaropt_dim(2.0, [1_i64].as_slice(), false);
        assert!(gap(&lengths, &lengths.ones_like()) < 1e-6);
    }
}

#[test]
fn learned_positions_count_from_the_newest_item_and_spare_the_item_tower() {
    let learned = ModelConfig { position_embedding: PositionEmbedding::Learned, ..config() };
    let (model, parameters) = towers(learned);
    let table = rows(6);
    let items = items(&model, &parameters, &table, &STILL);
    // 6 items, but only 4 positions: the three oldest share the last vector
    let history = sequences(&[&[0, 1, 2, 3, 4, 5], &[2, 3]], &[(0, 5), (1, 1)]);
    model.user(&parameters, &items, &history, &STILL).get(1).sum(Kind::Float).backward();
    let gradient = parameters.gradients_into_flat();
    let positions = |name: &str| parameters.parts(&gradient).find(|(found, _)| *found == name).unwrap().1;
    let moved: Vec<bool> =
        positions(POSITION).abs().sum_dim_intlist([1_i64].as_slice(), false, Kind::Float).gt(0.0).try_into().unwrap();
    assert_eq!(moved, [true, true, false, false]);

    let before = model.item(&parameters, &items, &history, &STILL);
    let _ = tch::no_grad(|| parameters.get(POSITION).shallow_clone().fill_(1.0));
    assert_eq!(before, model.item(&parameters, &items, &history, &STILL));
}

#[test]
fn time_gaps_reach_the_items_that_follow_them_in_both_causal_towers() {
    let gaps = ModelConfig { time_embedding: TimeEmbedding::Gap, ..config() };
    let (model, parameters) = towers(gaps);
    let rows = rows(6);
    let items = items(&model, &parameters, &rows, &STILL);
    let run = |user: bool, times: &[i64]| {
        let sequences = timed(sequences(&[&[0, 1, 2, 3]], &[(0, 0), (0, 1), (0, 2), (0, 3)]), &[times]);
        match user {
            true => model.user(&parameters, &items, &sequences, &STILL),
            false => model.item(&parameters, &items, &sequences, &STILL),
        }
    };
    for user in [true, false] {
        let (first, other) = (run(user, &[0, 10, 10, 500]), run(user, &[70, 80, 80, 9000]));
        assert!(gap(&first.narrow(0, 0, 3), &other.narrow(0, 0, 3)) < 1e-6, "a later time changes nothing before it");
        assert!(gap(&first.narrow(0, 3, 1), &other.narrow(0, 3, 1)) > 1e-4);
        // 10 and 15 share a bucket
        assert!(gap(&first, &run(user, &[0, 15, 15, 505])) < 1e-6);
    }
    let alone = model.item(&parameters, &items, &sequences(&[&[3]], &[(0, 0)]), &STILL);
    assert!(gap(&alone, &catalogue(&model, &parameters, &rows, &STILL).narrow(0, 3, 1)) < 1e-6);

    run(true, &[0, 1, 3, 3]).sum(Kind::Float).backward();
    let gradient = parameters.gradients_into_flat();
    let table = parameters.parts(&gradient).find(|(name, _)| *name == TIME_GAP).unwrap().1;
    let moved: Vec<bool> =
        table.abs().sum_dim_intlist([1_i64].as_slice(), false, Kind::Float).gt(0.0).try_into().unwrap();
    let buckets: Vec<usize> = moved.iter().enumerate().filter(|(_, moved)| **moved).map(|(row, _)| row + 1).collect();
    assert_eq!(buckets, [1, 2, 3], "at once, after 1, after 2");
}

#[test]
#[should_panic(expected = "without its times")]
fn a_history_without_times_is_not_taken_for_one_without_gaps() {
    let (model, parameters) = towers(ModelConfig { time_embedding: TimeEmbedding::Gap, ..config() });
    let items = items(&model, &parameters, &rows(2), &STILL);
    let _ = model.user(&parameters, &items, &sequences(&[&[0, 1]], &[(0, 1)]), &STILL);
}

#[test]
fn an_item_alone_is_the_same_by_every_way() {
    for item_tower in [ItemTower::Causal, ItemTower::PerItem, ItemTower::Content] {
        let (model, parameters) = towers(ModelConfig { item_tower, ..config() });
        let rows = rows(4);
        let items = items(&model, &parameters, &rows, &STILL);
        let singles = sequences(&[&[0], &[1], &[2], &[3]], &[(0, 0), (1, 0), (2, 0), (3, 0)]);
        let one_by_one = model.item(&parameters, &items, &singles, &STILL);
        assert!(gap(&one_by_one, &catalogue(&model, &parameters, &rows, &STILL)) < 1e-6, "{item_tower:?}");
        let together = sequences(&[&[0, 1, 2, 3]], &[(0, 0), (0, 1), (0, 2), (0, 3)]);
        let together = model.item(&parameters, &items, &together, &STILL);
        let context_matters = gap(&one_by_one, &together) > 1e-4;
        assert_eq!(context_matters, item_tower == ItemTower::Causal, "{item_tower:?}");
    }
}

#[test]
fn an_empty_share_has_shapes_and_zero_gradients() {
    for item_tower in [ItemTower::Causal, ItemTower::PerItem, ItemTower::Content] {
        for position_embedding in [PositionEmbedding::None, PositionEmbedding::Learned] {
            let (model, parameters) = towers(ModelConfig { item_tower, position_embedding, ..config() });
            let training = Forward { train: true, precision: Precision::Bf16 };
            for (rows, sequences) in [(rows(0), sequences(&[], &[])), (rows(2), sequences(&[&[0, 1]], &[]))] {
                let items = items(&model, &parameters, &rows, &training);
                let user = model.user(&parameters, &items, &sequences, &training);
                let item = model.item(&parameters, &items, &sequences, &training);
                assert_eq!((user.size(), item.size()), (vec![0, 6], vec![0, 6]));
                (user.sum(Kind::Float) + item.sum(Kind::Float)).backward();
                assert_eq!(parameters.gradients_into_flat().abs().max().double_value(&[]), 0.0);
                assert_eq!(catalogue(&model, &parameters, &rows, &training).size(), [rows.size()[0], 6]);
            }
        }
    }
}

/// Loss and flat gradient of a small batch.
fn step(model: &Pch, parameters: &mut Parameters, forward: &Forward) -> (f64, Tensor) {
    let table = rows(12);
    let history = sequences(&[&[0, 1, 2, 3], &[4, 5], &[6, 7, 8]], &[(0, 1), (0, 3), (1, 0), (1, 1), (2, 1), (2, 2)]);
    let target = sequences(&[&[9, 4], &[10, 1], &[11, 3, 2]], &[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 2)]);
    let users = Tensor::from_slice(&[0_i64, 0, 1, 1, 2, 2]);
    let items = items(model, parameters, &table, forward);
    let user = model.user(parameters, &items, &history, forward);
    let item = model.item(parameters, &items, &target, forward);
    let output = InfoNce {
        user: &user.detach(),
        row_user: &users,
        item: &item.detach(),
        item_id: &Tensor::from_slice(&[9_i64, 4, 10, 1, 11, 2]),
        item_user: &users,
        correction: None,
        pairing: Pairs::AllAction,
        logit_scale: model.logit_scale(parameters),
        pairs: local_pairs(&users, &users, Pairs::AllAction),
        tile: Tile { scores: 16 },
        items_learn: true,
        precision: Precision::F32,
    }
    .compute();
    ((&user * &output.d_user).sum(Kind::Float) + (&item * &output.d_item).sum(Kind::Float)).backward();
    parameters.add_logit_scale_gradient(&output.d_log_scale);
    (output.loss.double_value(&[]), parameters.gradients_into_flat().copy())
}

#[test]
fn bf16_stays_near_f32() {
    for item_tower in [ItemTower::Causal, ItemTower::PerItem, ItemTower::Content] {
        let (model, mut parameters) = towers(ModelConfig { item_tower, learn_logit_scale: true, ..config() });
        let (loss, gradient) = step(&model, &mut parameters, &STILL);
        let bf16 = Forward { precision: Precision::Bf16, ..STILL };
        let (coarse_loss, coarse) = step(&model, &mut parameters, &bf16);
        assert!(coarse != gradient && (coarse_loss / loss - 1.0).abs() < 0.05, "{coarse_loss} and {loss}");
        let cosine = (&gradient * &coarse).sum(Kind::Float) / (gradient.norm() * coarse.norm());
        assert!(cosine.double_value(&[]) > 0.99, "{item_tower:?}: {cosine:?}");
    }
}

#[test]
fn dropout_follows_the_seed() {
    let (model, parameters) = towers(config());
    let training = Forward { train: true, precision: Precision::F32 };
    let run = |number| {
        // `step` makes its rows from a seed of its own, so the draws of dropout come after it
        seed(number);
        let items = items(&model, &parameters, &Tensor::ones([3, 6], (Kind::Float, Device::Cpu)), &training);
        let user = model.user(&parameters, &items, &sequences(&[&[0, 1, 2]], &[(0, 0), (0, 2)]), &training);
        user.sum(Kind::Float).backward();
        (user.detach(), parameters.gradients_into_flat().copy())
    };
    let first = run(1);
    assert_eq!(first, run(1));
    assert_ne!(first.0, run(2).0);
}

#[test]
fn the_logit_scale_is_learned_or_fixed() {
    let (model, parameters) = towers(config());
    assert_eq!(model.logit_scale(&parameters).double_value(&[]), 20.0);
    let (model, mut parameters) = towers(ModelConfig { learn_logit_scale: true, ..config() });
    assert!((model.logit_scale(&parameters).double_value(&[]) - 20.0).abs() < 1e-4);
    let (_, gradient) = step(&model, &mut parameters, &STILL);
    let slope = parameters.parts(&gradient).find(|(name, _)| *name == LOGIT_SCALE).unwrap().1.double_value(&[]);
    let loss_at = |logarithm: f64| {
        let (model, mut parameters) = towers(ModelConfig { learn_logit_scale: true, ..config() });
        let _ = tch::no_grad(|| parameters.get(LOGIT_SCALE).shallow_clone().fill_(logarithm));
        step(&model, &mut parameters, &STILL).0
    };
    let expected = (loss_at(20_f64.ln() + 1e-2) - loss_at(20_f64.ln() - 1e-2)) / 2e-2;
    assert!((slope - expected).abs() < 1e-3 * expected.abs().max(1.0), "{slope} and {expected}");
}

#[test]
fn names_are_those_of_the_published_checkpoint() {
    let all = ModelConfig { position_embedding: PositionEmbedding::Learned, learn_logit_scale: true, ..config() };
    let (_, parameters) = towers(all);
    let names: Vec<_> = parameters.names().collect();
    assert_eq!(names.len(), 2 + 2 * 16 + 2 + 2);
    for name in [
        "adaptor.weight",
        "summary_encoder.layer.1.attention.self.query.bias",
        "summary_encoder.layer.0.attention.output.LayerNorm.weight",
        "mlp.0.bias",
        POSITION,
        LOGIT_SCALE,
    ] {
        assert!(names.contains(&name), "{name}");
    }
    let decaying = |name: &str| parameters.specs().iter().find(|spec| spec.name == name).unwrap().role.decays();
    assert!(decaying("mlp.0.weight"));
    assert!(
        !decaying("summary_encoder.layer.0.output.LayerNorm.weight") && !decaying(POSITION) && !decaying(LOGIT_SCALE)
    );
}

#[test]
fn shapes_that_make_no_sense_are_refused() {
    let refused = |model, input_dim| {
        Pch::new(PchShape { input_dim, items: 12, model, max_history: 4, cvr_hidden: None }).unwrap_err().to_string()
    };
    assert!(refused(ModelConfig { heads: 3, ..config() }, 6).contains("model.heads"));
    let error = refused(ModelConfig { item_tower: ItemTower::Content, ..config() }, 7);
    assert!(error.contains("model.output_dim") && error.contains('7'), "{error}");
    assert!(refused(config(), 0).contains("learn-launch embed"));
}

#[test]
fn a_standardized_adaptor_sees_mean_0_and_variance_1() {
    let standardized = ModelConfig { adaptor_init: AdaptorInit::Standardized, ..config() };
    let shape = PchShape { input_dim: 24, items: 500, model: standardized, max_history: 4, cvr_hidden: None };
    let model = Pch::new(shape).unwrap();
    let mut parameters = Parameters::init(model.shape(), 3, Device::Cpu);
    let before = parameters.get("adaptor.weight").detach().copy();
    let sample = Tensor::randn([500, 24], (Kind::Float, Device::Cpu)) * 0.01 + 0.3;
    model.measure(&mut parameters, &sample, &model.measured());
    let Adapted::All(ours) = items(&model, &parameters, &sample, &STILL).adapted else {
        panic!("the causal item tower reads every item");
    };
    let standardized = (&sample - sample.mean_dim([0_i64].as_slice(), false, Kind::Float)) / 0.01;
    let wanted = standardized.matmul(&before.tr());
    assert!((ours - &wanted).abs().max().double_value(&[]) < 0.05 * wanted.abs().max().double_value(&[]));
}

/// `[count, dim]`: unit vectors with a large part in common, as a text encoder gives them.
fn common(count: i64, dim: i64) -> Tensor {
    seed(9);
    normalise(&(Tensor::randn([count, dim], (Kind::Float, Device::Cpu)) + 2.0)).to_kind(Kind::Half)
}

/// The training-free recommender, spelled out: centred rows, and their mean with weights 1, decay, decay^2, … from the
/// newest item back.
fn training_free(rows: &Tensor, history: &[i64], decay: f64) -> (Tensor, Tensor) {
    let rows = rows.to_kind(Kind::Double);
    let centred = normalise(&(&rows - rows.mean_dim([0_i64].as_slice(), false, Kind::Double)));
    let weighed = history.iter().rev().enumerate().map(|(age, item)| centred.get(*item) * decay.powi(age as i32));
    let user = normalise(&weighed.fold(Tensor::zeros([rows.size()[1]], (Kind::Double, Device::Cpu)), |a, b| a + b));
    (user, centred)
}

fn residual(output_dim: u32, item_tower: ItemTower) -> ModelConfig {
    ModelConfig {
        centring: true,
        residual: Residual::Content,
        residual_decay: 0.6,
        residual_trained: true,
        output_dim,
        item_tower,
        ..config()
    }
}

#[test]
fn a_residual_model_starts_as_the_training_free_recommender() {
    for (output_dim, item_tower) in
        [(6, ItemTower::PerItem), (6, ItemTower::Causal), (6, ItemTower::Content), (9, ItemTower::PerItem)]
    {
        let (model, mut parameters) = towers(residual(output_dim, item_tower));
        let rows = common(7, 6);
        model.measure(&mut parameters, &rows, &model.measured());
        let history = [3, 1, 4, 1];
        let items = items(&model, &parameters, &rows, &STILL);
        let packed = sequences(&[&history, &[2, 6]], &[(0, 1), (0, 3), (1, 1)]);
        let user = model.user(&parameters, &items, &packed, &STILL);
        let catalogue = catalogue(&model, &parameters, &rows, &STILL);
        let target = model.item(&parameters, &items, &sequences(&[&[5, 0, 2]], &[(0, 0), (0, 2)]), &STILL);
        for (row, history) in [&history[..2], &history[..], &[2, 6][..]].into_iter().enumerate() {
            let (free_user, free_items) = training_free(&rows, history, 0.6);
            let user = user.get(row as i64).to_kind(Kind::Double);
            let embedded = catalogue.to_kind(Kind::Double);
            let scores = embedded.mv(&user) - free_items.mv(&free_user);
            assert!(scores.abs().max().double_value(&[]) < 1e-6, "{output_dim} {item_tower:?}, history {history:?}");
            let own = gap(&target.narrow(0, 0, 1), &catalogue.narrow(0, 5, 1));
            assert!(own < 1e-6 && gap(&target.narrow(0, 1, 1), &catalogue.narrow(0, 2, 1)) < 1e-6, "{item_tower:?}");
        }
    }
}

#[test]
fn a_residual_model_learns_projection_and_correction_but_not_the_mean() {
    let (model, mut parameters) = towers(residual(4, ItemTower::PerItem));
    model.measure(&mut parameters, &common(12, 6), &model.measured());
    let mean = parameters.get(CONTENT_MEAN).copy();
    let (_, gradient) = step(&model, &mut parameters, &STILL);
    let size = |name: &str| parameters.parts(&gradient).find(|(found, _)| *found == name).unwrap().1.norm();
    for (name, moves) in [(RESIDUAL, true), ("mlp.0.weight", true), ("mlp.0.bias", true), (CONTENT_MEAN, false)] {
        assert_eq!(size(name).double_value(&[]) > 0.0, moves, "{name}");
    }
    let mut optimizer = crate::AdamW::new(&parameters, &learn_domain::config::OptimizerConfig::default());
    optimizer.step(&mut parameters, &[gradient], 0.1);
    assert_eq!(*parameters.get(CONTENT_MEAN), mean);
    // the correction is there now, so the encoder learns too
    let (_, gradient) = step(&model, &mut parameters, &STILL);
    let query =
        parameters.parts(&gradient).find(|(name, _)| name.ends_with("0.attention.self.query.weight")).unwrap().1;
    assert!(query.norm().double_value(&[]) > 0.0);
}

#[test]
fn a_projection_that_is_not_trained_has_no_gradient() {
    let frozen = ModelConfig { residual_trained: false, ..residual(4, ItemTower::PerItem) };
    let (model, mut parameters) = towers(frozen);
    model.measure(&mut parameters, &common(12, 6), &model.measured());
    let (_, gradient) = step(&model, &mut parameters, &STILL);
    let moved = parameters.parts(&gradient).filter(|(_, part)| part.norm().double_value(&[]) > 0.0);
    assert_eq!(moved.map(|(name, _)| name.to_owned()).collect::<Vec<_>>(), ["mlp.0.bias", "mlp.0.weight"]);
}

#[test]
fn padding_and_neighbours_do_not_matter_to_a_residual_model() {
    let (model, mut parameters) = towers(residual(4, ItemTower::PerItem));
    let rows = common(7, 6);
    model.measure(&mut parameters, &rows, &model.measured());
    let items = items(&model, &parameters, &rows, &STILL);
    let user = |sequences: Sequences| model.user(&parameters, &items, &sequences, &STILL);
    let both = user(sequences(&[&[3, 1, 4], &[5, 2]], &[(0, 1), (0, 2), (1, 0), (1, 1)]));
    let first = user(sequences(&[&[3, 1, 4]], &[(0, 1), (0, 2)]));
    let second = user(sequences(&[&[5, 2]], &[(0, 0), (0, 1)]));
    assert!(gap(&both, &Tensor::cat(&[first, second], 0)) < 1e-6);
    let empty = user(sequences(&[], &[]));
    empty.sum(Kind::Float).backward();
    assert_eq!(empty.size(), [0, 4]);
}

fn with_ids(item_input: ItemInput) -> (Pch, Parameters) {
    let model = ModelConfig { item_input, ..config() };
    let input_dim = if item_input.has_content() { 6 } else { 0 };
    let model = Pch::new(PchShape { input_dim, items: 12, model, max_history: 4, cvr_hidden: None }).unwrap();
    let parameters = Parameters::init(model.shape(), 2, Device::Cpu);
    (model, parameters)
}

#[test]
fn items_of_learned_vectors_alone_need_no_content() {
    let (model, parameters) = with_ids(ItemInput::Id);
    assert!(parameters.find(ADAPTOR_WEIGHT).is_none() && parameters.item_vectors().unwrap().size() == [12, 8]);
    let nothing = Tensor::zeros([2, 0], (Kind::Half, Device::Cpu));
    let inputs = ItemInputs { items: &[7, 3], content: &nothing, id_seed: None, tape: None };
    let pair = model.catalogue(&parameters, &inputs, &STILL);
    let all = catalogue(&model, &parameters, &Tensor::zeros([12, 0], (Kind::Half, Device::Cpu)), &STILL);
    assert!(gap(&pair, &all.index_select(0, &Tensor::from_slice(&[7_i64, 3]))) < 1e-6);
    assert!(gap(&pair.narrow(0, 0, 1), &pair.narrow(0, 1, 1)) > 1e-3);
}

#[test]
fn vectors_beside_content_start_as_nothing_and_stay_so_for_items_that_are_not_touched() {
    let (model, mut parameters) = with_ids(ItemInput::ContentId);
    let (plain, alone) = towers(config());
    let rows = rows(12);
    let before = catalogue(&model, &parameters, &rows, &STILL);
    assert_eq!(before, catalogue(&plain, &alone, &rows, &STILL), "content alone");
    let still = learn_domain::config::OptimizerConfig { weight_decay: 0.0, ..Default::default() };
    let mut optimizer = crate::AdamW::new(&parameters, &still);
    let read = Tensor::from_slice(&[0_i64, 1, 2, 3]);
    // item 2 is read but has no training interaction
    parameters.freeze_item_vectors(&Tensor::arange(12, (Kind::Int64, Device::Cpu)).eq(2_i64));
    let content = rows.index_select(0, &read);
    let inputs = ItemInputs { items: &[0, 1, 2, 3], content: &content, id_seed: None, tape: None };
    let items = model.items(&parameters, &inputs, &STILL);
    model.user(&parameters, &items, &sequences(&[&[0, 1, 2, 3]], &[(0, 3)]), &STILL).get(0).get(0).backward();
    let flat = parameters.gradients_into_flat().zeros_like();
    let gradient = parameters.row_gradient().unwrap();
    assert_eq!(Vec::<i64>::try_from(&gradient.items).unwrap(), [0, 1, 2, 3]);
    optimizer.step(&mut parameters, &[flat], 0.1);
    optimizer.step_rows(&mut parameters, &gradient, 0.1);
    let table = parameters.item_vectors().unwrap();
    let learned: Vec<bool> =
        table.abs().sum_dim_intlist([1_i64].as_slice(), false, Kind::Float).gt(0.0).try_into().unwrap();
    assert_eq!(learned.iter().filter(|learned| **learned).count(), 3);
    assert!(learned[0] && learned[1] && learned[3]);
    let after = catalogue(&model, &parameters, &rows, &STILL);
    // the dense weights did not move, so an item without a vector is what it was
    assert!(gap(&after.narrow(0, 4, 8), &before.narrow(0, 4, 8)) < 1e-6);
    assert!(gap(&after.narrow(0, 2, 1), &before.narrow(0, 2, 1)) < 1e-6);
    assert!(gap(&after.narrow(0, 0, 1), &before.narrow(0, 0, 1)) > 1e-3);
}

#[test]
fn vectors_are_left_out_by_step_and_item_alone() {
    let model = ModelConfig { item_input: ItemInput::ContentId, id_dropout: 0.5, dropout: 0.0, ..config() };
    let model = Pch::new(PchShape { input_dim: 6, items: 12, model, max_history: 4, cvr_hidden: None }).unwrap();
    let parameters = Parameters::init(model.shape(), 2, Device::Cpu);
    let _ = parameters.item_vectors().unwrap().shallow_clone().fill_(1.0);
    let rows = rows(12);
    let training = Forward { train: true, precision: Precision::F32 };
    let run = |items: &[u32], id_seed, forward: &Forward| {
        let index: Vec<i64> = items.iter().map(|&item| item.into()).collect();
        let content = rows.index_select(0, &Tensor::from_slice(&index));
        model.catalogue(&parameters, &ItemInputs { items, content: &content, id_seed, tape: None }, forward)
    };
    let all: Vec<u32> = (0..12).collect();
    let first = run(&all, Some(1), &training);
    assert!(gap(&first.narrow(0, 4, 3), &run(&[4, 5, 6], Some(1), &training)) < 1e-6, "whatever the pass");
    assert!(gap(&first, &run(&all, Some(2), &training)) > 1e-3);
    let (with, without) = (run(&all, None, &training), run(&all, Some(1), &STILL));
    assert!(gap(&with, &without) < 1e-6, "evaluation reads every vector");
    let dropped = (first - with).abs().sum_dim_intlist([1_i64].as_slice(), false, Kind::Float).gt(1e-4);
    let dropped = dropped.sum(Kind::Int64).int64_value(&[]);
    assert!((1..12).contains(&dropped), "{dropped}");
}

#[test]
fn a_history_code_lowers_the_items_of_the_history() {
    for item_tower in [ItemTower::PerItem, ItemTower::Causal, ItemTower::Content] {
        let (plain, parameters) = towers(ModelConfig { item_tower, ..config() });
        let coded = ModelConfig { item_tower, history_code: 256, history_code_weight: 0.5, ..config() };
        let (model, _) = towers(coded);
        assert_eq!(model.output_dim(), 6 + 256);
        let rows = rows(12);
        let packed = sequences(&[&[3, 1, 3], &[2, 6]], &[(0, 2), (1, 1)]);
        let scores = |model: &Pch| {
            let items = items(model, &parameters, &rows, &STILL);
            let user = model.user(&parameters, &items, &packed, &STILL);
            user.matmul(&catalogue(model, &parameters, &rows, &STILL).tr())
        };
        let lowered = scores(&plain) - scores(&model);
        for (row, item, seen) in [(0, 3, 1.0), (0, 1, 1.0), (0, 2, 0.0), (1, 2, 1.0), (1, 6, 1.0), (1, 3, 0.0)] {
            // two codes meet by 1/16 in the mean square
            let change = lowered.double_value(&[row, item]);
            assert!((change - 0.5 * seen).abs() < 0.2, "{item_tower:?}: user {row}, item {item}: {change}");
        }
        let items = items(&model, &parameters, &rows, &STILL);
        let target = model.item(&parameters, &items, &sequences(&[&[5, 0]], &[(0, 0)]), &STILL);
        let whole = catalogue(&model, &parameters, &rows, &STILL);
        assert!(gap(&target, &whole.narrow(0, 5, 1)) < 1e-6);
        assert_eq!(model.user(&parameters, &items, &sequences(&[], &[]), &STILL).size(), [0, 262]);
    }
}
