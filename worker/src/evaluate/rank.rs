//! Where the targets of a batch of users stand among all items, for any scorer.
//!
//! Input: user vectors `[B, d]` and item vectors `[N, d]`, whose products are the scores. Output: a [`Placement`] for each
//! target, user by user. Invariants: the whole catalogue competes, in tiles of bounded memory; the history does not if
//! it is excluded, the target itself never competes nor is left out.

use std::collections::HashSet;

use learn_domain::ranking::Placement;
use tch::{IndexOp, Kind, Tensor};

use crate::error::WorkerError;
use crate::feed::flight::HeldOutUser;

/// Scores that are in memory at once, for the users or their targets, whichever are more.
const SCORES: i64 = 1 << 24;

/// The placements of all targets of `batch`, in its order.
///
/// # Errors
/// If a score is not finite.
pub fn place(
    users: &Tensor,
    items: &Tensor,
    batch: &[HeldOutUser],
    exclude_history: bool,
) -> Result<Vec<Placement>, WorkerError> {
    let pairs: Vec<(i64, i64)> = (0..)
        .zip(batch)
        .flat_map(|(row, user)| user.targets.iter().map(move |&target| (row, i64::from(target))))
        .collect();
    if pairs.is_empty() {
        return Ok(Vec::new());
    }
    let pair_user = Tensor::from_slice(&pairs.iter().map(|pair| pair.0).collect::<Vec<_>>()).to_device(users.device());
    let pair_item = Tensor::from_slice(&pairs.iter().map(|pair| pair.1).collect::<Vec<_>>()).to_device(users.device());
    let count = pairs.len() as i64;
    let options = (Kind::Int64, users.device());
    let (mut higher, mut equal) = (Tensor::zeros([count], options), Tensor::zeros([count], options));
    let scores = Scores::new(users, items, count.max(batch.len() as i64))?;
    let wanted = scores.of_targets(&pair_user, &pair_item)?.unsqueeze(1);
    for first in scores.tiles() {
        let mut tile = scores.tile(first)?;
        if exclude_history {
            exclude(&mut tile, batch, first);
        }
        let mut rows = tile.index_select(0, &pair_user);
        // a target does not compete with itself
        let (inside, column) = columns(&pair_item, first, rows.size()[1]);
        let own = inside.nonzero().squeeze_dim(1);
        let nothing = Tensor::from(f64::NEG_INFINITY).to_kind(rows.kind()).to_device(rows.device());
        let _ = rows.index_put_(&[Some(own.shallow_clone()), Some(column.index_select(0, &own))], &nothing, false);
        higher += rows.gt_tensor(&wanted).sum_dim_intlist(1, false, Kind::Int64);
        equal += rows.eq_tensor(&wanted).sum_dim_intlist(1, false, Kind::Int64);
    }
    let (higher, equal) = (Vec::<i64>::try_from(&higher)?, Vec::<i64>::try_from(&equal)?);
    let competitors = batch.iter().flat_map(|user| competitors(user, items.size()[0] as u64, exclude_history));
    let counts = higher.iter().zip(&equal).zip(competitors);
    Ok(counts
        .map(|((&higher, &equal), competitors)| Placement {
            higher: higher.unsigned_abs(),
            equal: equal.unsigned_abs(),
            competitors,
        })
        .collect())
}

/// How many items each target of a user is ranked against.
fn competitors(user: &HeldOutUser, items: u64, exclude_history: bool) -> impl Iterator<Item = u64> {
    let excluded: HashSet<u32> = if exclude_history { user.history.iter().copied().collect() } else { HashSet::new() };
    let others = items - 1;
    user.targets.iter().map(move |target| others - excluded.iter().filter(|item| *item != target).count() as u64)
}

/// Scores `[B, N]`, made in tiles of items.
struct Scores<'a> {
    users: &'a Tensor,
    items: &'a Tensor,
    width: i64,
    /// The only tile, if there is but one.
    only: Option<Tensor>,
}

impl<'a> Scores<'a> {
    fn new(users: &'a Tensor, items: &'a Tensor, rows: i64) -> Result<Self, WorkerError> {
        let mut scores = Self { users, items, width: (SCORES / rows.max(1)).max(1), only: None };
        if scores.width >= items.size()[0] {
            scores.only = Some(scores.tile(0)?);
        }
        Ok(scores)
    }

    /// First items of the tiles.
    fn tiles(&self) -> impl Iterator<Item = i64> + use<> {
        (0..self.items.size()[0]).step_by(self.width as usize)
    }

    fn tile(&self, first: i64) -> Result<Tensor, WorkerError> {
        if let Some(only) = &self.only {
            return Ok(only.shallow_clone());
        }
        let width = self.width.min(self.items.size()[0] - first);
        let scores = self.users.matmul(&self.items.narrow(0, first, width).transpose(0, 1));
        if scores.isfinite().all().int64_value(&[]) == 0 {
            return Err(WorkerError::NonFiniteScores);
        }
        Ok(scores)
    }

    /// The score of each (user, target) pair, from the same product that its competitors' scores come from: another
    /// product could round differently and break ties by chance.
    fn of_targets(&self, pair_user: &Tensor, pair_item: &Tensor) -> Result<Tensor, WorkerError> {
        let mut wanted = Tensor::zeros(pair_user.size(), (self.users.kind(), self.users.device()));
        for first in self.tiles() {
            let scores = self.tile(first)?;
            let (inside, column) = columns(pair_item, first, scores.size()[1]);
            let picked = scores.index(&[Some(pair_user.shallow_clone()), Some(column)]);
            wanted = picked.where_self(&inside, &wanted);
        }
        Ok(wanted)
    }
}

/// Which items lie in a tile of `width` from `first` on, and their columns there (any column for the others).
fn columns(items: &Tensor, first: i64, width: i64) -> (Tensor, Tensor) {
    let column = items - first;
    (column.ge(0).logical_and(&column.lt(width)), column.clamp(0, width - 1))
}

/// Takes the items of each user's history out of a tile that starts at item `first`.
fn exclude(scores: &mut Tensor, batch: &[HeldOutUser], first: i64) {
    let width = scores.size()[1];
    for (row, user) in (0..).zip(batch) {
        let seen =
            user.history.iter().map(|&item| i64::from(item) - first).filter(|column| (0..width).contains(column));
        let columns: Vec<i64> = seen.collect();
        if !columns.is_empty() {
            let columns = Tensor::from_slice(&columns).to_device(scores.device());
            let _ = scores.i(row).index_fill_(0, &columns, f64::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn placed(scores: &[f32], history: &[u32], target: u32, exclude_history: bool) -> Placement {
        // users [1, 1] and items [N, 1] make the scores the items themselves
        let items = Tensor::from_slice(scores).view([-1, 1]);
        let batch = [HeldOutUser { history: history.to_vec(), targets: vec![target], ..HeldOutUser::default() }];
        let users = Tensor::ones([1, 1], (Kind::Float, Device::Cpu));
        place(&users, &items, &batch, exclude_history).unwrap()[0]
    }

    #[test]
    fn ranks_by_hand() {
        let scores = [0.1, 0.9, 0.5, 0.7];
        let placement = |higher, equal, competitors| Placement { higher, equal, competitors };
        assert_eq!(placed(&scores, &[], 2, false), placement(2, 0, 3));
        assert_eq!(placed(&scores, &[1, 3, 3], 2, true), placement(0, 0, 1));
        assert_eq!(placed(&scores, &[1, 2], 2, true), placement(1, 0, 2), "the target itself is never left out");
        assert_eq!(placed(&[0.5; 5], &[], 4, false), placement(0, 4, 4));
    }

    #[test]
    fn tiles_give_what_one_product_gives() {
        tch::manual_seed(3);
        let users = Tensor::randn([3, 4], (Kind::Float, Device::Cpu));
        // repeated items tie
        let items = Tensor::randn([10, 4], (Kind::Float, Device::Cpu)).repeat([2, 1]);
        let user = |row, history: &[u32], targets: &[u32]| HeldOutUser {
            row,
            history: history.to_vec(),
            targets: targets.to_vec(),
            ..HeldOutUser::default()
        };
        let batch = [user(0, &[1, 2], &[3, 13]), user(1, &[5], &[19]), user(2, &[0, 7], &[])];
        let whole = place(&users, &items, &batch, true).unwrap();
        let tiled = Scores { users: &users, items: &items, width: 7, only: None };
        assert_eq!(tiled.tiles().collect::<Vec<_>>(), [0, 7, 14]);
        let (pair_user, pair_item) = (Tensor::from_slice(&[0_i64, 0, 1]), Tensor::from_slice(&[3_i64, 13, 19]));
        let wanted = tiled.of_targets(&pair_user, &pair_item).unwrap();
        let expected = users.matmul(&items.transpose(0, 1)).index(&[Some(pair_user), Some(pair_item)]);
        assert!((wanted - expected).abs().max().double_value(&[]) < 1e-6);
        assert_eq!(whole.len(), 3);
        assert_eq!((whole[0].equal, whole[0].competitors), (1, 17), "its twin, without the two of the history");
    }

    #[test]
    fn scores_that_are_not_numbers_are_refused() {
        let items = Tensor::from_slice(&[0.1_f32, f32::NAN]).view([-1, 1]);
        let batch = [HeldOutUser { history: vec![0], targets: vec![0], ..HeldOutUser::default() }];
        let users = Tensor::ones([1, 1], (Kind::Float, Device::Cpu));
        assert!(matches!(place(&users, &items, &batch, false), Err(WorkerError::NonFiniteScores)));
    }
}
