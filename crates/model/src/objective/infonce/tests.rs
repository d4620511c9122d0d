//! Tests of InfoNCE: against the formula spelled out over the full matrix, finite differences, and splits into ranks.

use proptest::prelude::*;
use tch::Device;

use super::*;
use crate::objective::local_pairs;

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

/// A global batch: rows and targets of some users.
#[derive(Debug)]
struct World {
    user: Tensor,
    row_user: Vec<i64>,
    item: Tensor,
    item_id: Vec<i64>,
    item_user: Vec<i64>,
    correction: Option<Tensor>,
    pairing: Pairs,
    log_scale: f64,
}

/// How many rows and targets each user has, how many different items there are, and so on.
#[derive(Clone, Debug)]
struct Plan {
    pairing: Pairs,
    counts: Vec<(usize, usize)>,
    vocabulary: i64,
    dim: i64,
    scale: f64,
    seed: i64,
    scores: i64,
}

fn plans() -> impl Strategy<Value = Plan> {
    let counts = prop::collection::vec((0_usize..4, 0_usize..4), 0..6);
    (counts, any::<bool>(), 1_i64..12, 1_i64..6, 1.0_f64..30.0, 0_i64..1_000, 1_i64..150).prop_map(
        |(mut counts, next, vocabulary, dim, scale, seed, scores)| {
            let pairing = if next { Pairs::Next } else { Pairs::AllAction };
            if next {
                // every row has its target
                counts.iter_mut().for_each(|(rows, targets)| *targets = *rows);
            }
            Plan { pairing, counts, vocabulary, dim, scale, seed, scores }
        },
    )
}

fn index(values: &[i64]) -> Tensor {
    Tensor::from_slice(values)
}

fn unit(rows: i64, dim: i64) -> Tensor {
    let x = Tensor::randn([rows, dim], DOUBLE);
    &x / x.norm_scalaropt_dim(2.0, [-1_i64].as_slice(), true)
}

impl World {
    fn new(plan: &Plan) -> Self {
        tch::manual_seed(plan.seed);
        let owners = |part: fn(&(usize, usize)) -> usize| -> Vec<i64> {
            // places in the global batch need not be dense
            let each = plan.counts.iter().enumerate();
            each.flat_map(|(user, counts)| std::iter::repeat_n(3 * user as i64 + 1, part(counts))).collect()
        };
        let (row_user, item_user) = (owners(|counts| counts.0), owners(|counts| counts.1));
        let ids = Tensor::randint(plan.vocabulary, [item_user.len() as i64], (Kind::Int64, Device::Cpu));
        Self {
            user: unit(row_user.len() as i64, plan.dim),
            item: unit(item_user.len() as i64, plan.dim),
            item_id: Vec::try_from(ids).unwrap(),
            correction: (plan.seed % 2 == 1).then(|| Tensor::randn([item_user.len() as i64], DOUBLE) * 3.0),
            pairing: plan.pairing,
            row_user,
            item_user,
            log_scale: plan.scale.ln(),
        }
    }

    fn pairs(&self) -> i64 {
        local_pairs(&index(&self.row_user), &index(&self.item_user), self.pairing)
    }

    /// The part of the loss of the rows whose user is among `users`.
    fn share(&self, mine: impl Fn(i64) -> bool, scores: i64) -> (Vec<i64>, InfoNceOutput) {
        let rows: Vec<i64> =
            (0..self.row_user.len()).filter(|row| mine(self.row_user[*row])).map(|r| r as i64).collect();
        let row_user: Vec<i64> = rows.iter().map(|row| self.row_user[*row as usize]).collect();
        let output = InfoNce {
            user: &self.user.index_select(0, &index(&rows)),
            row_user: &index(&row_user),
            item: &self.item,
            item_id: &index(&self.item_id),
            item_user: &index(&self.item_user),
            correction: self.correction.as_ref(),
            pairing: self.pairing,
            logit_scale: Tensor::from(self.log_scale.exp()),
            pairs: self.pairs(),
            tile: Tile { scores },
            items_learn: true,
            precision: Precision::F32,
        }
        .compute();
        (rows, output)
    }

    /// Loss, accurate pairs and gradients by the definition, row by row with autograd.
    fn spelled_out(&self) -> (f64, i64, [Tensor; 3]) {
        let user = self.user.copy().set_requires_grad(true);
        let item = self.item.copy().set_requires_grad(true);
        let log_scale = Tensor::from(self.log_scale).set_requires_grad(true);
        let mut loss = (user.sum(Kind::Double) + item.sum(Kind::Double) + &log_scale) * 0.0;
        let mut correct = 0;
        for (row, me) in self.row_user.iter().enumerate() {
            let mine = |item: &usize| self.item_user[*item] == *me;
            let own: Vec<usize> = (0..self.item_user.len()).filter(mine).collect();
            let is_own = |id: i64| own.iter().any(|at| self.item_id[*at] == id);
            let others: Vec<usize> =
                (0..self.item_user.len()).filter(|at| !mine(at) && !is_own(self.item_id[*at])).collect();
            let corrected = |at: usize| self.correction.as_ref().map_or(0.0, |all| all.double_value(&[at as i64]));
            let score = |at: usize| {
                (user.get(row as i64) * item.get(at as i64)).sum(Kind::Double) * log_scale.exp() - corrected(at)
            };
            let nth = self.row_user[..row].iter().filter(|user| *user == me).count();
            let trained = match self.pairing {
                Pairs::AllAction => &own[..],
                Pairs::Next => &own[nth..=nth],
            };
            for &target in trained {
                let s = score(target);
                let all: Vec<Tensor> =
                    std::iter::once(s.shallow_clone()).chain(others.iter().map(|at| score(*at))).collect();
                loss += Tensor::stack(&all, 0).logsumexp([0_i64].as_slice(), false) - &s;
                let value = s.double_value(&[]);
                correct += i64::from(all[1..].iter().all(|negative| value > negative.double_value(&[])));
            }
        }
        let loss = loss / self.pairs().max(1);
        let gradients = Tensor::run_backward(&[&loss], &[&user, &item, &log_scale], false, false);
        (loss.double_value(&[]), correct, gradients.try_into().unwrap())
    }
}

fn gap(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    if ours.numel() == 0 { 0.0 } else { (ours - theirs).abs().max().double_value(&[]) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn equals_the_definition(plan in plans()) {
        let world = World::new(&plan);
        let (loss, correct, [d_user, d_item, d_log_scale]) = world.spelled_out();
        let (_, ours) = world.share(|_| true, plan.scores);
        prop_assert!((ours.loss.double_value(&[]) - loss).abs() < 1e-12);
        prop_assert_eq!(ours.correct.int64_value(&[]), correct);
        prop_assert!(gap(&ours.d_user, &d_user) < 1e-11);
        prop_assert!(gap(&ours.d_item, &d_item) < 1e-11);
        prop_assert!(gap(&ours.d_log_scale, &d_log_scale) < 1e-11);
    }

    #[test]
    fn shares_of_ranks_add_up_to_the_whole(plan in plans(), ranks in 1_i64..5) {
        let world = World::new(&plan);
        let (_, whole) = world.share(|_| true, 1_000_000);
        let mut d_user = world.user.zeros_like();
        let (mut loss, mut log_scale, mut correct) = (0.0, 0.0, 0);
        let mut d_item = world.item.zeros_like();
        for rank in 0..ranks {
            let (rows, share) = world.share(|user| user % ranks == rank, plan.scores);
            d_user = d_user.index_add(0, &index(&rows), &share.d_user);
            d_item += share.d_item;
            loss += share.loss.double_value(&[]);
            log_scale += share.d_log_scale.double_value(&[]);
            correct += share.correct.int64_value(&[]);
        }
        prop_assert!((loss - whole.loss.double_value(&[])).abs() < 1e-12);
        prop_assert!((log_scale - whole.d_log_scale.double_value(&[])).abs() < 1e-11);
        prop_assert_eq!(correct, whole.correct.int64_value(&[]));
        prop_assert!(gap(&d_user, &whole.d_user) < 1e-12 && gap(&d_item, &whole.d_item) < 1e-12);
    }
}

fn some() -> Plan {
    Plan {
        pairing: Pairs::AllAction,
        counts: vec![(2, 1), (1, 3), (3, 2), (2, 2)],
        vocabulary: 5,
        dim: 4,
        scale: 12.0,
        seed: 3,
        scores: 9,
    }
}

#[test]
fn the_gradient_is_the_slope() {
    let world = World::new(&some());
    let (_, at) = world.share(|_| true, 9);
    let step = 1e-6;
    let slope = |change: &dyn Fn(&mut World, f64)| {
        let loss = |by: f64| {
            let mut moved = World::new(&some());
            change(&mut moved, by);
            moved.share(|_| true, 9).1.loss.double_value(&[])
        };
        (loss(step) - loss(-step)) / (2.0 * step)
    };
    for (row, column) in [(0, 0), (3, 2), (7, 3)] {
        let user = slope(&|world, by| world.user = nudged(&world.user, (row, column), by));
        let item = slope(&|world, by| world.item = nudged(&world.item, (row, column), by));
        assert!((user - at.d_user.double_value(&[row, column])).abs() < 1e-8);
        assert!((item - at.d_item.double_value(&[row, column])).abs() < 1e-8);
    }
    let scale = slope(&|world, by| world.log_scale += by);
    assert!((scale - at.d_log_scale.double_value(&[])).abs() < 1e-8);
}

fn nudged(x: &Tensor, (row, column): (i64, i64), by: f64) -> Tensor {
    let moved = x.copy();
    let _ = moved.get(row).get(column).fill_(x.double_value(&[row, column]) + by);
    moved
}

#[test]
fn without_a_negative_the_loss_is_zero_and_every_pair_is_right() {
    let plan = Plan { vocabulary: 1, ..some() };
    let (_, output) = World::new(&plan).share(|_| true, 2);
    assert_eq!(output.loss.double_value(&[]), 0.0);
    assert_eq!(output.correct.int64_value(&[]), World::new(&plan).pairs());
    assert_eq!(output.d_user.abs().max().double_value(&[]), 0.0);
    assert_eq!(output.d_item.abs().max().double_value(&[]), 0.0);
}

#[test]
fn order_of_rows_does_not_matter() {
    let world = World::new(&some());
    let (_, straight) = world.share(|_| true, 4);
    let order: Vec<i64> = vec![5, 2, 7, 0, 3, 6, 1, 4];
    let shuffled = World {
        user: world.user.index_select(0, &index(&order)),
        row_user: order.iter().map(|row| world.row_user[*row as usize]).collect(),
        item: world.item.copy(),
        ..World::new(&some())
    };
    let (_, output) = shuffled.share(|_| true, 4);
    assert!(gap(&output.d_user, &straight.d_user.index_select(0, &index(&order))) < 1e-14);
    assert!(gap(&output.d_item, &straight.d_item) < 1e-14);
}

/// A larger batch in f32.
fn in_f32(world: &World, precision: Precision, items_learn: bool) -> InfoNceOutput {
    InfoNce {
        user: &world.user.to_kind(Kind::Float),
        row_user: &index(&world.row_user),
        item: &world.item.to_kind(Kind::Float),
        item_id: &index(&world.item_id),
        item_user: &index(&world.item_user),
        correction: None,
        pairing: world.pairing,
        logit_scale: Tensor::from(world.log_scale.exp() as f32),
        pairs: world.pairs(),
        tile: Tile { scores: 4096 },
        items_learn,
        precision,
    }
    .compute()
}

fn large(scale: f64) -> World {
    World::new(&Plan { counts: vec![(10, 10); 20], vocabulary: 150, dim: 16, scale, seed: 8, scores: 4096, ..some() })
}

#[test]
fn f32_stays_near_f64_even_for_large_scales() {
    let world = large(100.0);
    let (_, exact) = world.share(|_| true, 4096);
    let output = in_f32(&world, Precision::F32, true);
    assert_eq!((output.loss.kind(), output.d_item.kind()), (Kind::Float, Kind::Float));
    assert!((output.loss.double_value(&[]) / exact.loss.double_value(&[]) - 1.0).abs() < 1e-5);
    // scores up to 100 have a last digit of 8e-6, and their exponentials move by as much
    for (ours, theirs) in [(&output.d_user, &exact.d_user), (&output.d_item, &exact.d_item)] {
        let error = gap(&ours.to_kind(Kind::Double), theirs) / theirs.abs().max().double_value(&[]);
        assert!(error < 3e-5, "{error:e}");
    }
}

#[test]
fn bf16_products_move_the_loss_little() {
    let world = large(20.0);
    let (exact, coarse) = (in_f32(&world, Precision::F32, true), in_f32(&world, Precision::Bf16, true));
    let moved = coarse.loss.double_value(&[]) / exact.loss.double_value(&[]) - 1.0;
    assert!(moved != 0.0 && moved.abs() < 1e-3, "{moved:e}");
    for (ours, theirs) in [(&coarse.d_user, &exact.d_user), (&coarse.d_item, &exact.d_item)] {
        assert_eq!(ours.kind(), Kind::Float);
        let error = gap(ours, theirs) / theirs.abs().max().double_value(&[]);
        assert!(error < 0.02, "{error:e}");
    }
}

#[test]
fn nobody_learns_from_items_that_do_not_learn() {
    let world = large(20.0);
    let (all, some) = (in_f32(&world, Precision::F32, true), in_f32(&world, Precision::F32, false));
    assert!(((&all.loss - &some.loss) / &all.loss).abs().max().double_value(&[]) < 1e-6);
    assert!(
        (&all.d_user - &some.d_user).abs().max().double_value(&[]) < 1e-6 * all.d_user.abs().max().double_value(&[])
    );
    assert_eq!(some.d_item.abs().max().double_value(&[]), 0.0);
}

#[test]
fn a_tile_is_as_long_as_there_is_need_down_to_a_square() {
    let gpu = |rows, items| {
        let tile = Tile::on(Device::Cuda(0), (rows, items));
        (tile.rows(rows, items), tile.items(rows, items))
    };
    assert_eq!(gpu(6_500, 10_240), (6_500, 10_240), "what fits is whole");
    let (rows, items) = gpu(40_960, 40_960);
    assert!(rows * items <= 1 << 22, "and the rest in tiles: {rows} x {items}");
    assert_eq!(Tile::on(Device::Cpu, (6_500, 10_240)), Tile::default());
    let tile = Tile { scores: 1 << 12 };
    let shape = |rows, items| (tile.rows(rows, items), tile.items(rows, items));
    assert_eq!(shape(60, 60), (60, 60), "all at once");
    assert_eq!(shape(10, 5000), (10, 409));
    assert_eq!(shape(5000, 10), (409, 10));
    assert_eq!(shape(5000, 5000), (64, 64));
    assert_eq!(Tile { scores: 0 }.rows(5, 5), 1);
}
