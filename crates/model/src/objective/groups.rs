//! Rows by user, as a padded table.
//!
//! Input: the user of each row, and the users that matter. Output: for each of these users the numbers of its rows.
//! Invariants: rows keep their order inside a user; a row stands in at most one place; users without rows have an empty
//! line.

use tch::{Kind, Tensor};

/// G users, W = most rows of one of them, K = rows that belong to any of them.
pub struct Groups {
    /// `[G, W]` i64: row numbers; 0 where absent.
    index: Tensor,
    /// `[G, W]` bool.
    pub present: Tensor,
    /// `[K]`: row numbers by user.
    rows: Tensor,
    /// `[K]`: their places in the flattened table.
    places: Tensor,
}

impl Groups {
    /// `keys` `[n]` i64 is the user of each row; `users` `[G]` i64 are ascending and distinct.
    pub fn new(keys: &Tensor, users: &Tensor) -> Self {
        let (device, groups) = (keys.device(), users.size()[0]);
        let integers = (Kind::Int64, device);
        if groups == 0 || keys.size()[0] == 0 {
            let none = || Tensor::zeros([0], integers);
            let index = Tensor::zeros([groups, 0], integers);
            return Self { present: index.to_kind(Kind::Bool), index, rows: none(), places: none() };
        }
        let group = keys.searchsorted(users, false, false, "left", None::<Tensor>).clamp_max(groups - 1);
        let rows = users.index_select(0, &group).eq_tensor(keys).nonzero().squeeze_dim(1);
        let (group, order) = group.index_select(0, &rows).sort_stable(true, 0, false);
        let rows = rows.index_select(0, &order);
        let counts = group.bincount(None::<Tensor>, groups);
        let first = counts.cumsum(0, Kind::Int64) - &counts;
        let width = counts.max().int64_value(&[]);
        let nth = Tensor::arange(rows.size()[0], integers) - first.index_select(0, &group);
        let places = group * width + nth;
        let index = Tensor::zeros([groups * width], integers).scatter(0, &places, &rows).view([groups, width]);
        let present = Tensor::arange(width, integers).unsqueeze(0).lt_tensor(&counts.unsqueeze(1));
        Self { index, present, rows, places }
    }

    /// Values by row, `[n]` or `[n, d]`, as `[G, W]` or `[G, W, d]`; some row's value where absent.
    pub fn table(&self, values: &Tensor) -> Tensor {
        let mut size = self.index.size();
        size.extend(&values.size()[1..]);
        values.index_select(0, &self.index.reshape([-1])).view(size.as_slice())
    }

    /// The places of a table `[G, W, d]` at which there is a row, by user: `[K, d]`.
    pub fn dense(&self, table: &Tensor) -> Tensor {
        table.flatten(0, 1).index_select(0, &self.places)
    }

    /// `[K]`: the user, as a number among the `users`, of each row of [`Groups::dense`].
    pub fn group(&self) -> Tensor {
        self.places.divide_scalar_mode(self.index.size()[1].max(1), "floor")
    }

    /// The table `[G, W]` or `[G, W, d]` of which these are the dense rows, `[K]` or `[K, d]`; `absent` elsewhere.
    pub fn spread(&self, dense: &Tensor, absent: f64) -> Tensor {
        let size = dense.size();
        let whole = |places: &[i64]| [places, &size[1..]].concat();
        let table = Tensor::full(whole(&[self.index.numel() as i64]), absent, (dense.kind(), dense.device()));
        table.index_copy(0, &self.places, dense).view(whole(&self.index.size()).as_slice())
    }

    /// Puts dense rows `[K, d]` where they belong among rows `[n, d]`.
    pub fn put_rows(&self, rows: &mut Tensor, dense: &Tensor) {
        let _ = rows.index_copy_(0, &self.rows, dense);
    }

    /// Adds a table `[G, W, d]` to rows `[n, d]` in place. A row has one place, so the order of the sum is no matter.
    pub fn add_to_rows(&self, rows: &mut Tensor, table: &Tensor) {
        let flat = table.reshape([self.index.numel() as i64, table.size()[2]]);
        let _ = rows.index_add_(0, &self.rows, &flat.index_select(0, &self.places));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_by_user_in_order() {
        let keys = Tensor::from_slice(&[7_i64, 3, 7, 9, 1, 3, 7]);
        let groups = Groups::new(&keys, &Tensor::from_slice(&[3_i64, 4, 7]));
        let present: Vec<Vec<bool>> = (&groups.present).try_into().unwrap();
        assert_eq!(present, [[true, true, false], [false; 3], [true; 3]]);
        let values = Tensor::arange(7, (Kind::Int64, tch::Device::Cpu));
        let table: Vec<Vec<i64>> = (&groups.table(&values)).try_into().unwrap();
        assert_eq!((&table[0][..2], &table[2][..]), (&[1_i64, 5][..], &[0_i64, 2, 6][..]));

        let dense = groups.dense(&groups.table(&values.unsqueeze(1)));
        assert_eq!(Vec::<i64>::try_from(dense.view(-1)).unwrap(), [1, 5, 0, 2, 6]);
        assert_eq!(Vec::<i64>::try_from(groups.group()).unwrap(), [0, 0, 2, 2, 2]);
        let spread: Vec<Vec<i64>> = groups.spread(&dense.view(-1), -1.0).try_into().unwrap();
        assert_eq!(spread, [[1, 5, -1], [-1; 3], [0, 2, 6]]);

        let mut rows = Tensor::zeros([7, 1], (Kind::Int64, tch::Device::Cpu));
        groups.put_rows(&mut rows, &dense);
        assert_eq!(Vec::<i64>::try_from(rows.view(-1)).unwrap(), [0, 1, 2, 0, 0, 5, 6]);
        let _ = rows.zero_();
        groups.add_to_rows(&mut rows, &groups.table(&(values + 10).unsqueeze(1)));
        assert_eq!(Vec::<i64>::try_from(rows.view(-1)).unwrap(), [10, 11, 12, 0, 0, 15, 16]);
    }

    #[test]
    fn nobody_and_nothing_are_fine() {
        let none = Tensor::zeros([0], (Kind::Int64, tch::Device::Cpu));
        let some = Tensor::from_slice(&[1_i64, 2]);
        assert_eq!(Groups::new(&none, &some).present.size(), [2, 0]);
        assert_eq!(Groups::new(&some, &none).present.size(), [0, 0]);
        assert_eq!(Groups::new(&some, &Tensor::from_slice(&[5_i64])).present.size(), [1, 0]);
    }
}
