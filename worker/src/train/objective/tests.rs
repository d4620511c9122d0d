//! Whole steps in float64 over the TCP collective, ranks as threads: however many ranks there are, loss and gradient are
//! those of one, and the gradient is the slope of the loss.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::f16;
use learn_collective::{Aborter, CommonVector, Group, MemoryRendezvous, connect_tcp};
use learn_domain::UserIndex;
use learn_domain::config::{Config, ItemInput, ItemTower, ObjectiveKind, PositionEmbedding, TimeEmbedding};
use learn_domain::random::Draws;
use learn_domain::report::DatasetFacts;
use learn_domain::sampling::{Pairs, SampleKey};
use learn_model::pch::ID_EMBEDDING;
use learn_model::{AdamW, Forward, Milestone, Parameters, Pch};
use learn_proto::flight::BatchMeta;
use learn_telemetry::WorkerMetrics;
use learn_torch::HostRows;
use tch::{Device, Kind, Tensor};

use super::*;
use crate::control::Progress;
use crate::feed::assemble::{Layout, Seen, UserShare, assemble};
use crate::feed::{PreparedStep, UniformNegatives};
use crate::train::{DeviceRows, Stepper, Word, rows_tensor, shape};

const ITEMS: u32 = 13;
const USERS: u32 = 7;
const DIM: usize = 6;
const SEED: u64 = 11;

/// What a step of the whole world gave: loss, accuracy, and the gradient of all parameters in the order of their names, that
/// of learned item vectors last.
#[derive(Clone, Debug)]
struct Outcome {
    loss: f64,
    accuracy: f64,
    gradient: Vec<f64>,
}

fn config(change: impl Fn(&mut Config)) -> Config {
    let mut config = Config::default();
    let model = &mut config.model;
    (model.layers, model.heads, model.hidden, model.output_dim) = (1, 2, 8, 5);
    (model.dropout, model.init_std, model.logit_scale, model.learn_logit_scale) = (0.0, 0.3, 6.0, true);
    (config.sampling.history, config.sampling.targets) = (6, 4);
    (config.sampling.user_positions, config.sampling.item_positions) = (5, 3);
    // so that the first moment is the gradient
    (config.optimizer.beta1, config.optimizer.clip_norm, config.optimizer.weight_decay) = (0.0, 0.0, 0.0);
    change(&mut config);
    config.validate().unwrap();
    config
}

fn row(item: u32) -> Vec<f16> {
    let mut draws = Draws::new(&[SEED, 1, item.into()]);
    (0..DIM).map(|_| f16::from_f64(2.0 * draws.unit() - 1.0)).collect()
}

fn users(config: &Config) -> (Vec<UserShare>, u64) {
    let shape = config.sample_shape();
    let drawn = (0..USERS).map(|user| {
        let mut draws = Draws::new(&[SEED, 2, user.into()]);
        let length = 2 + draws.below(7);
        let items: Vec<u32> = (0..length).map(|_| draws.below(ITEMS.into()) as u32).collect();
        // far enough apart for buckets to differ, and now and then at the same time
        let steps = (0..length).map(|_| draws.below(2) << draws.below(12));
        let times: Vec<i64> = steps
            .scan(0, |time, step| {
                Some({
                    *time += step as i64;
                    *time
                })
            })
            .collect();
        let times = if config.model.reads_times() { &times[..] } else { &[] };
        let key = SampleKey { seed: SEED, epoch: 0, user: UserIndex(user) };
        UserShare::draw(Seen { items: &items, times }, key, &shape).unwrap()
    });
    let (users, pairs): (Vec<UserShare>, Vec<u64>) = drawn.unzip();
    (users, pairs.iter().sum())
}

fn facts() -> DatasetFacts {
    DatasetFacts { embedding_dim: DIM as u32, items: ITEMS, ..DatasetFacts::default() }
}

/// The values that a fresh start has, in the order of their names, with those of learned item vectors last.
fn start(config: &Config) -> Vec<f64> {
    let model = Pch::new(shape(config, &facts())).unwrap();
    let parameters = Parameters::init(model.shape(), SEED, Device::Cpu);
    let values = |tensor: &Tensor| Vec::<f64>::try_from(tensor.to_kind(Kind::Double).reshape([-1])).unwrap();
    let mut all = values(parameters.flat());
    // beside content they start at 0, where nothing tells one from the other
    let mut draws = Draws::new(&[SEED, 4]);
    all.extend(
        parameters.item_vectors().map(values).unwrap_or_default().iter().map(|value| value + draws.unit() - 0.5),
    );
    all
}

fn load(model: &Pch, values: &[f64], kind: Kind) -> Parameters {
    let specs = Parameters::init(model.shape(), SEED, Device::Cpu);
    let (flat, table) = values.split_at(specs.count() as usize);
    let flat = Tensor::from_slice(flat);
    let mut tensors: Vec<_> = specs.parts(&flat).map(|(name, part)| (name.to_owned(), part.copy())).collect();
    if let Some(vectors) = specs.item_vectors() {
        tensors.push((ID_EMBEDDING.to_owned(), Tensor::from_slice(table).view_as(vectors)));
    }
    Parameters::load(model.shape(), tensors, kind, Device::Cpu).unwrap()
}

/// One rank's step from each of these parameter values.
fn rank_steps(config: &Config, points: &[Vec<f64>], exchange: &mut Exchange) -> Vec<Outcome> {
    let step = prepared(config, exchange);
    points.iter().map(|values| rank_step(config, values, &step, exchange)).collect()
}

/// One rank's share of a step.
fn prepared(config: &Config, exchange: &Exchange) -> PreparedStep {
    let (rank, world) = (exchange.rank() as u32, exchange.world_size() as u32);
    let (users, pairs) = users(config);
    // in a world of four the last two ranks have nobody
    let mine: Vec<UserShare> = users.into_iter().filter(|user| user.place % world.min(2) == rank).collect();
    let uniform = UniformNegatives { seed: SEED, items: ITEMS, count: config.objective.uniform_negatives };
    let layout = Layout::new(&config.objective, config.training.micro_batch);
    let micro_batches = assemble(&mine, &uniform.part(0, rank, world), layout)
        .into_iter()
        .map(|batch| {
            let rows: Vec<f16> = batch.unique_items.iter().flat_map(|&item| row(item)).collect();
            (batch, HostRows::from(&rows[..]).into())
        })
        .collect();
    let meta = BatchMeta { step: 0, epoch: 0, global_users: USERS, global_pairs: pairs, part: 0, parts: 1 };
    let places = mine.iter().map(|user| user.place).collect();
    PreparedStep { meta, users: mine.iter().map(|user| user.user).collect(), places, micro_batches }
}

/// One that begins with these values of this kind.
fn stepper(config: &Config, values: &[f64], kind: Kind, exchange: &mut Exchange) -> Stepper {
    let objective = match config.objective.kind {
        ObjectiveKind::FullSoftmax => {
            let part = learn_domain::plan::contiguous_part(ITEMS as usize, exchange.rank(), exchange.world_size());
            let rows: Vec<f16> = part.clone().flat_map(|item| row(item as u32)).collect();
            let rows = rows_tensor(&rows, (part.len(), DIM), Device::Cpu);
            Objective::FullSoftmax(FullSoftmax::new(&config.objective, (rows, part.start as i64)))
        }
        _ => {
            let popularity: Vec<u32> = (0..ITEMS).map(|item| item * item % 7).collect();
            let popularity = config.objective.logq_correction.then_some(&popularity[..]);
            Objective::InBatch(InBatch::new(&config.objective, popularity, Device::Cpu))
        }
    };
    let model = Pch::new(shape(config, &facts())).unwrap();
    let mut parameters = load(&model, values, kind);
    exchange.share_gradient_memory(&mut parameters).unwrap();
    Stepper {
        optimizer: AdamW::new(&parameters, &config.optimizer),
        model,
        parameters,
        optimizer_config: config.optimizer.clone(),
        forward: Forward { train: true, precision: config.training.precision },
        activation_checkpointing: config.training.activation_checkpointing,
        device: Device::Cpu,
        rows: DeviceRows::new((0, DIM), Device::Cpu),
        objective,
        conversion: None,
        draw_seed: SEED,
        clock: PhaseClock::new(WorkerMetrics::new(), Arc::new(Progress::default())),
    }
}

fn rank_step(config: &Config, values: &[f64], step: &PreparedStep, exchange: &mut Exchange) -> Outcome {
    let mut stepper = stepper(config, values, Kind::Double, exchange);
    let outcome = stepper.step(step, exchange, 0.0, Word::default()).unwrap().finished().unwrap();
    let state = stepper.optimizer.state(&stepper.parameters);
    // after one step without momentum, the first moment is the gradient
    let first = state.iter().filter(|(name, _)| name.starts_with("exp_avg."));
    let gradient = first.flat_map(|(_, moment)| Vec::<f64>::try_from(moment.reshape([-1])).unwrap()).collect();
    Outcome { loss: outcome.loss, accuracy: outcome.accuracy, gradient }
}

fn group((rank, world_size): (usize, usize), shares_memory: bool) -> Group {
    Group {
        rank,
        world_size,
        generation: 1,
        secret: b"the job's secret".to_vec(),
        bind: "127.0.0.1".into(),
        advertise: "127.0.0.1".into(),
        timeout: Duration::from_secs(60),
        shares_memory,
        aborter: Aborter::default(),
    }
}

/// What each rank of a world gives, each as a thread.
fn each_rank<T: Send>(world_size: usize, shares_memory: bool, work: impl Fn(&mut Exchange) -> T + Sync) -> Vec<T> {
    let store = MemoryRendezvous::default();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                let (store, work) = (store.clone(), &work);
                scope.spawn(move || {
                    let collective = connect_tcp(group((rank, world_size), shares_memory), &store).unwrap();
                    work(&mut Exchange::new(collective, WorkerMetrics::new(), Arc::default()))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Steps of a world, from each of these parameter values; every rank says the same.
fn steps(config: &Config, world_size: usize, points: &[Vec<f64>]) -> Vec<Outcome> {
    let outcomes = each_rank(world_size, true, |exchange| rank_steps(config, points, exchange));
    for other in &outcomes[1..] {
        for (one, other) in outcomes[0].iter().zip(other) {
            assert_eq!((one.loss, &one.gradient), (other.loss, &other.gradient));
        }
    }
    outcomes.into_iter().next().unwrap()
}

fn largest_gap(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The same in several passes.
fn in_passes(config: &Config) -> Config {
    Config {
        training: learn_domain::config::TrainingConfig { micro_batch: 2, ..config.training.clone() },
        objective: learn_domain::config::ObjectiveConfig { catalogue_batch: 3, ..config.objective.clone() },
        ..config.clone()
    }
}

/// Worlds of two and four against one, and the slope of the loss in a world of two along some directions.
fn is_exact(config: &Config) {
    let start = start(config);
    let at = |world| steps(config, world, std::slice::from_ref(&start)).remove(0);
    let one = at(1);
    assert_eq!(one.gradient.len(), start.len());
    assert!(one.loss > 0.1 && one.gradient.iter().any(|slope| slope.abs() > 1e-3));
    let few = at(2);
    for other in [&few, &at(4)] {
        assert!((other.loss - one.loss).abs() < 1e-12 && other.accuracy == one.accuracy);
        assert!(largest_gap(&other.gradient, &one.gradient) < 1e-11);
    }
    let other = steps(&in_passes(config), 2, std::slice::from_ref(&start)).remove(0);
    assert!((other.loss - one.loss).abs() < 1e-12);
    assert!(largest_gap(&other.gradient, &one.gradient) < 1e-11);

    let directions: Vec<Vec<f64>> = (0..6_u64)
        .map(|number| {
            let mut draws = Draws::new(&[SEED, 3, number]);
            let raw: Vec<f64> = start.iter().map(|_| draws.unit() - 0.5).collect();
            let norm = raw.iter().map(|x| x * x).sum::<f64>().sqrt();
            raw.into_iter().map(|x| x / norm).collect()
        })
        .collect();
    // the five-point rule: its error is of the fourth order in the step
    const STEP: f64 = 2e-3;
    const RULE: [(f64, f64); 4] = [(-2.0, 1.0), (-1.0, -8.0), (1.0, 8.0), (2.0, -1.0)];
    let points: Vec<Vec<f64>> = directions
        .iter()
        .flat_map(|direction| {
            let start = &start;
            RULE.map(|(by, _)| start.iter().zip(direction).map(|(x, d)| x + by * STEP * d).collect())
        })
        .collect();
    let losses = steps(config, 2, &points);
    for (direction, losses) in directions.iter().zip(losses.chunks(RULE.len())) {
        let weighted = losses.iter().zip(RULE).map(|(outcome, (_, weight))| outcome.loss * weight);
        let slope = weighted.sum::<f64>() / (12.0 * STEP);
        let ours: f64 = few.gradient.iter().zip(direction).map(|(g, d)| g * d).sum();
        assert!((slope - ours).abs() < 1e-9, "{slope:e} is the slope, {ours:e} the gradient");
    }
}

fn softmax(tower: ItemTower, pairs: Pairs) -> Config {
    config(|config| {
        config.objective.kind = ObjectiveKind::FullSoftmax;
        config.objective.pairs = pairs;
        config.model.item_tower = tower;
        if tower == ItemTower::Content {
            config.model.output_dim = DIM as u32;
        }
    })
}

#[test]
fn the_full_softmax_is_exact_with_next_items() {
    is_exact(&softmax(ItemTower::PerItem, Pairs::Next));
}

#[test]
fn the_full_softmax_is_exact_with_all_actions() {
    is_exact(&softmax(ItemTower::Causal, Pairs::AllAction));
}

#[test]
fn the_full_softmax_is_exact_over_content() {
    is_exact(&softmax(ItemTower::Content, Pairs::Next));
}

#[test]
fn next_items_are_exact_with_every_kind_of_negative() {
    is_exact(&config(|config| {
        config.objective.kind = ObjectiveKind::NextItem;
        config.objective.uniform_negatives = 9;
        config.objective.history_negatives = 2;
        config.objective.logq_correction = true;
    }));
}

#[test]
fn all_actions_are_exact_with_uniform_negatives() {
    is_exact(&config(|config| {
        config.objective.uniform_negatives = 5;
        config.model.item_tower = ItemTower::Causal;
    }));
}

#[test]
fn time_gaps_are_exact_in_both_towers() {
    is_exact(&config(|config| {
        config.model.time_embedding = TimeEmbedding::Gap;
        config.model.item_tower = ItemTower::Causal;
        config.objective.history_negatives = 2;
    }));
}

#[test]
fn time_gaps_and_positions_are_exact_in_a_full_softmax_over_next_items() {
    let mut config = softmax(ItemTower::PerItem, Pairs::Next);
    config.model.time_embedding = TimeEmbedding::Gap;
    config.model.position_embedding = PositionEmbedding::Learned;
    is_exact(&config);
}

/// The full softmax with learned item vectors: a row has gradients from histories of all ranks and from the rank that has it
/// in its part of the catalogue.
fn softmax_of_vectors(item_input: ItemInput, tower: ItemTower, pairs: Pairs) -> Config {
    let mut config = softmax(tower, pairs);
    config.model.item_input = item_input;
    config
}

#[test]
fn the_full_softmax_is_exact_with_learned_vectors_alone() {
    is_exact(&softmax_of_vectors(ItemInput::Id, ItemTower::PerItem, Pairs::Next));
}

#[test]
fn the_full_softmax_is_exact_with_learned_vectors_beside_content() {
    is_exact(&softmax_of_vectors(ItemInput::ContentId, ItemTower::Causal, Pairs::AllAction));
    let mut with_dropout = softmax_of_vectors(ItemInput::ContentId, ItemTower::PerItem, Pairs::Next);
    with_dropout.model.id_dropout = 0.4;
    is_exact(&with_dropout);
}

#[test]
fn sampled_negatives_are_exact_with_learned_vectors() {
    is_exact(&config(|config| {
        config.objective.kind = ObjectiveKind::NextItem;
        config.objective.uniform_negatives = 9;
        config.model.item_input = ItemInput::ContentId;
    }));
}

/// With a gradient of several parts.
fn wide(mut config: Config) -> Config {
    (config.model.layers, config.model.hidden, config.model.init_std) = (2, 384, 0.05);
    let model = Pch::new(shape(&config, &facts())).unwrap();
    assert_eq!(Parameters::init(model.shape(), SEED, Device::Cpu).buckets().len(), 3);
    config
}

#[test]
fn parts_that_are_summed_while_the_backward_goes_on_are_whole() {
    for config in [config(|_| ()), softmax(ItemTower::Causal, Pairs::AllAction)] {
        let config = wide(config);
        let start = start(&config);
        let at = |config: &Config, world| steps(config, world, std::slice::from_ref(&start)).remove(0).gradient;
        let one = at(&config, 1);
        let largest = largest_gap(&one, &vec![0.0; one.len()]);
        // in a world of four the last two ranks have nothing to bring
        let others = [at(&config, 2), at(&config, 4), at(&in_passes(&config), 2)];
        for other in others {
            assert!(largest_gap(&other, &one) < 1e-11 * largest.max(1.0));
        }
    }
}

#[test]
fn a_part_of_the_catalogue_goes_before_another_one_comes() {
    let store = MemoryRendezvous::default();
    let config = softmax(ItemTower::Causal, Pairs::AllAction).objective;
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let (store, config) = (store.clone(), &config);
            scope.spawn(move || {
                let mut collective = connect_tcp(group((rank, 2), true), &store).unwrap();
                // memory of which it is known who holds it
                let vectors = CommonVector::new(&mut *collective, Some(&[2 * DIM][..])).unwrap().unwrap();
                let memory = vectors.own();
                let rows = learn_torch::over(memory).view([2, DIM as i64]);
                let held = Arc::strong_count(memory);
                let mut objective = Objective::FullSoftmax(FullSoftmax::new(config, (rows, 0)));
                let failed = objective.replace(|| {
                    assert_eq!(Arc::strong_count(memory), held - 1);
                    Err(WorkerError::Signature)
                });
                assert!(failed.is_err() && !objective.trains_towers());
                objective.replace(|| Ok(Objective::InBatch(InBatch::new(config, None, Device::Cpu)))).unwrap();
                assert!(objective.trains_towers());
            });
        }
    });
}

#[test]
fn a_rank_that_panics_in_its_backward_holds_nobody_up_and_leaves_nothing_behind() {
    let config = wide(config(|_| ()));
    let values = start(&config);
    let ended = each_rank(2, false, |exchange| {
        let mut stepper = stepper(&config, &values, Kind::Double, exchange);
        let lost = exchange.rank() == 1;
        let started = Instant::now();
        // the gradient of a first step is under way when the rank is lost
        stepper.parameters.get("mlp.0.weight").sum(Kind::Double).backward();
        let ended = catch_unwind(AssertUnwindSafe(|| {
            exchange.sum_gradient(&stepper.parameters, &mut stepper.clock, |passed| {
                passed(Milestone::Projection);
                assert!(!lost, "out of memory");
            })
        }));
        let ended = match ended {
            Ok(summed) => summed.unwrap_err().to_string(),
            Err(panic) => (*panic.downcast::<&str>().unwrap()).to_owned(),
        };
        assert!(started.elapsed() < Duration::from_secs(30), "nobody waits for the deadline");
        // each goes on by itself, as if nothing had been collected
        let collective = connect_tcp(group((0, 1), false), &MemoryRendezvous::default()).unwrap();
        let mut exchange = Exchange::new(collective, WorkerMetrics::new(), Arc::default());
        exchange.share_gradient_memory(&mut stepper.parameters).unwrap();
        let step = prepared(&config, &exchange);
        let mut fresh = self::stepper(&config, &values, Kind::Double, &mut exchange);
        let [norm, expected] = [&mut stepper, &mut fresh].map(|stepper| {
            let end = stepper.step(&step, &mut exchange, 0.0, Word::default()).unwrap();
            end.finished().unwrap().gradient_norm
        });
        assert_eq!(norm, expected);
        ended
    });
    assert!(ended[0].contains("rank 1"), "{ended:?}");
    assert_eq!(ended[1], "out of memory");
}

#[test]
fn the_way_of_gradients_changes_no_bit() {
    let config = wide(config(|config| {
        config.optimizer.beta1 = 0.9;
        config.optimizer.clip_norm = 0.5;
    }));
    let values = start(&config);
    for world in [2, 3] {
        let trained = |shares_memory| {
            each_rank(world, shares_memory, |exchange| {
                let step = prepared(&config, exchange);
                let mut stepper = stepper(&config, &values, Kind::Float, exchange);
                let mut norms = Vec::new();
                for _ in 0..4 {
                    let end = stepper.step(&step, exchange, 0.01, Word::default()).unwrap();
                    norms.push(end.finished().unwrap().gradient_norm.to_bits());
                }
                (norms, Vec::<f32>::try_from(stepper.parameters.flat().copy()).unwrap())
            })
        };
        let (shared, by_sockets) = (trained(true), trained(false));
        assert!(shared[0].1.iter().zip(&values).any(|(now, then)| (f64::from(*now) - then).abs() > 1e-3));
        assert!(shared.windows(2).all(|pair| pair[0] == pair[1]), "all ranks of {world} come to the same");
        assert_eq!(shared, by_sockets, "{world} ranks");
    }
}
