//! Tests of the softmax over a catalogue: against autograd over the full matrix, however it is cut into shards and tiles.

use proptest::prelude::*;
use tch::Device;

use super::*;

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

fn unit(rows: i64, dim: i64) -> Tensor {
    let x = Tensor::randn([rows, dim], DOUBLE);
    &x / x.norm_scalaropt_dim(2.0, [-1_i64].as_slice(), true)
}

fn gap(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    if ours.numel() == 0 { 0.0 } else { (ours - theirs).abs().max().double_value(&[]) }
}

/// Rows, a catalogue, and the pairs that are trained.
struct World {
    user: Tensor,
    item: Tensor,
    pair_row: Tensor,
    pair_item: Tensor,
    log_scale: f64,
}

impl World {
    fn new(rows: i64, items: i64, pairs: i64, log_scale: f64, seed: i64) -> Self {
        tch::manual_seed(seed);
        let integers = (Kind::Int64, Device::Cpu);
        Self {
            user: unit(rows, 5),
            item: unit(items, 5),
            pair_row: Tensor::randint(rows, [pairs], integers),
            pair_item: Tensor::randint(items, [pairs], integers),
            log_scale,
        }
    }

    /// Cut at these items, in tiles: the sums over the shards, and their item gradients side by side.
    fn ours(&self, cuts: &[i64], tile: i64) -> ShardLoss {
        let items = self.item.size()[0];
        let bounds: Vec<i64> = std::iter::once(0).chain(cuts.iter().copied()).chain([items]).collect();
        let parts: Vec<Tensor> = bounds.windows(2).map(|at| self.item.narrow(0, at[0], at[1] - at[0])).collect();
        let shards: Vec<Shard<'_>> = parts
            .iter()
            .zip(&bounds)
            .map(|(item, &first_item)| Shard {
                user: &self.user,
                item,
                first_item,
                pair_row: &self.pair_row,
                pair_item: &self.pair_item,
                logit_scale: Tensor::from(self.log_scale.exp()),
                tile,
            })
            .collect();
        let rows: Vec<Tensor> = shards.iter().map(|shard| shard.scores().rows()).collect();
        let whole = Normalizer::merge(&Tensor::stack(&rows, 0));
        let losses: Vec<ShardLoss> = shards.iter().map(|shard| shard.loss(&whole)).collect();
        let sum = |part: fn(&ShardLoss) -> &Tensor| {
            losses.iter().map(part).fold(Tensor::zeros_like(part(&losses[0])), |sum, one| sum + one)
        };
        ShardLoss {
            loss: sum(|shard| &shard.loss),
            correct: sum(|shard| &shard.correct),
            d_user: sum(|shard| &shard.d_user),
            d_log_scale: sum(|shard| &shard.d_log_scale),
            d_item: Tensor::cat(&losses.iter().map(|shard| &shard.d_item).collect::<Vec<_>>(), 0),
        }
    }

    /// By autograd over the full matrix.
    fn spelled_out(&self) -> (f64, i64, [Tensor; 3]) {
        let user = self.user.copy().set_requires_grad(true);
        let item = self.item.copy().set_requires_grad(true);
        let log_scale = Tensor::from(self.log_scale).set_requires_grad(true);
        let scores = user.matmul(&item.tr()) * log_scale.exp();
        let rows = scores.log_softmax(1, Kind::Double).index_select(0, &self.pair_row);
        let loss = -rows.gather(1, &self.pair_item.unsqueeze(1), false).mean(Kind::Double);
        let best = scores.argmax(1, false).index_select(0, &self.pair_row);
        let correct = best.eq_tensor(&self.pair_item).sum(Kind::Int64).int64_value(&[]);
        let gradients = Tensor::run_backward(&[&loss], &[&user, &item, &log_scale], false, false);
        (loss.double_value(&[]), correct, gradients.try_into().unwrap())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_shards_and_tiles_equal_the_full_matrix(
        (rows, items, pairs) in (1_i64..9, 1_i64..30, 1_i64..25),
        (first, second) in (0_i64..30, 0_i64..30), tile in 1_i64..12, scale in 1.0_f64..40.0, seed in 0_i64..1_000,
    ) {
        let world = World::new(rows, items, pairs, scale.ln(), seed);
        let (loss, correct, [d_user, d_item, d_log_scale]) = world.spelled_out();
        let cuts = [first.min(second).min(items), first.max(second).min(items)];
        let ours = world.ours(&cuts, tile);
        prop_assert!((ours.loss.double_value(&[]) - loss).abs() < 1e-12);
        prop_assert_eq!(ours.correct.int64_value(&[]), correct);
        prop_assert!(gap(&ours.d_user, &d_user) < 1e-12);
        prop_assert!(gap(&ours.d_item, &d_item) < 1e-12);
        prop_assert!(gap(&ours.d_log_scale, &d_log_scale) < 1e-11);
    }
}

#[test]
fn nobody_learns_nothing() {
    let ours = World::new(3, 7, 0, 2.0, 1).ours(&[4], 2);
    assert_eq!((ours.loss.double_value(&[]), ours.correct.int64_value(&[])), (0.0, 0));
    assert_eq!(ours.d_user.abs().max().double_value(&[]) + ours.d_item.abs().max().double_value(&[]), 0.0);
    let alone = World { user: unit(0, 5), ..World::new(3, 7, 0, 2.0, 1) }.ours(&[], 9);
    assert_eq!(alone.d_user.size(), [0, 5]);
}

#[test]
fn large_scores_do_not_overflow_in_f32() {
    let world = World::new(6, 40, 12, 100_f64.ln(), 4);
    let exact = world.ours(&[13], 7);
    let narrow = World { user: world.user.to_kind(Kind::Float), item: world.item.to_kind(Kind::Float), ..world };
    let ours = narrow.ours(&[13], 7);
    assert_eq!(ours.d_item.kind(), Kind::Float);
    assert!((ours.loss.double_value(&[]) / exact.loss.double_value(&[]) - 1.0).abs() < 1e-5);
}
