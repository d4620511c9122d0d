//! Which rows and targets of a user are trained on each other.

use learn_domain::sampling::Pairs;
use tch::{Kind, Tensor};

use super::groups::Groups;

/// Rows and targets that are trained on each other, as numbers `[P]` of rows and `[P]` of targets, by user.
///
/// `row_user` `[R]` and `item_user` `[M]` are the users of rows and targets; with [`Pairs::Next`] the nth row of a user
/// belongs to its nth target.
pub fn pair_indices(row_user: &Tensor, item_user: &Tensor, pairing: Pairs) -> (Tensor, Tensor) {
    let (users, ..) = row_user.internal_unique2(true, false, false);
    let (rows, targets) = (Groups::new(row_user, &users), Groups::new(item_user, &users));
    // [P, 3]: user, its nth row, its nth target
    let found = valid(&rows, &targets, pairing).nonzero();
    let number = |groups: &Groups, nth: i64, count: i64| {
        let table = groups.table(&Tensor::arange(count, (Kind::Int64, found.device())));
        let place = found.select(1, 0) * table.size()[1] + found.select(1, nth);
        table.reshape([-1]).index_select(0, &place)
    };
    (number(&rows, 1, row_user.size()[0]), number(&targets, 2, item_user.size()[0]))
}

/// (i, j, k) of the users of these rows.
#[must_use]
pub fn local_pairs(row_user: &Tensor, item_user: &Tensor, pairing: Pairs) -> i64 {
    pair_indices(row_user, item_user, pairing).0.size()[0]
}

/// `[G, J, K]` bool: row and target are both there and belong together.
pub(super) fn valid(rows: &Groups, targets: &Groups, pairing: Pairs) -> Tensor {
    let there = rows.present.unsqueeze(2).logical_and(&targets.present.unsqueeze(1));
    match pairing {
        Pairs::AllAction => there,
        Pairs::Next => {
            let size = there.size();
            let same = Tensor::ones([size[1], size[2]], (Kind::Bool, there.device())).tril(0).triu(0);
            there.logical_and(&same)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(row_user: &[i64], item_user: &[i64], pairing: Pairs) -> Vec<(i64, i64)> {
        let (rows, targets) = pair_indices(&Tensor::from_slice(row_user), &Tensor::from_slice(item_user), pairing);
        Vec::<i64>::try_from(rows).unwrap().into_iter().zip(Vec::<i64>::try_from(targets).unwrap()).collect()
    }

    #[test]
    fn all_of_a_user_or_the_nth_of_each() {
        let (row_user, item_user) = ([5, 2, 5, 9], [2, 5, -1, 2, 5]);
        let all = pairs(&row_user, &item_user, Pairs::AllAction);
        assert_eq!(all, [(1, 0), (1, 3), (0, 1), (0, 4), (2, 1), (2, 4)]);
        let next = pairs(&row_user, &item_user, Pairs::Next);
        assert_eq!(next, [(1, 0), (0, 1), (2, 4)]);
        assert!(pairs(&[], &item_user, Pairs::Next).is_empty() && pairs(&row_user, &[], Pairs::Next).is_empty());
    }
}
