//! Learned vectors of items and their gradients, of which a step touches a few rows only.
//!
//! Input: item indices. Output: their vectors with a graph, and after a backward pass one gradient row for each item.
//! Invariants: the table is no part of the flat buffers; equal gradients give an equal merged one, whatever the order in
//! which their parts were made, up to rounding, and bit by bit for the same order.

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use super::ParameterSpec;

/// A gradient of some rows of a table.
#[derive(Debug)]
pub struct RowGradient {
    /// `[K]` i64, ascending, each once.
    pub items: Tensor,
    /// `[K, D]`.
    pub rows: Tensor,
}

/// A table `[N, D]` of item vectors.
#[derive(Debug)]
pub(super) struct ItemVectors {
    pub spec: ParameterSpec,
    /// `[N, D]`; no leaf.
    pub values: Tensor,
    /// `[N, 1]`: 0 for items whose vectors do not learn, else 1.
    learns: Option<Tensor>,
    /// Items `[U]` and leaves `[U, D]` that have been handed out with a graph.
    handed_out: RefCell<Vec<(Tensor, Tensor)>>,
}

impl RowGradient {
    /// Adds up rows `[k, D]` of `items` `[k]`, in which an item may come several times.
    #[must_use]
    pub fn merge(items: &Tensor, rows: &Tensor) -> Self {
        let (items, place) = items.internal_unique(true, true);
        // the backward of an embedding adds up in a fixed order on every device
        let rows = Tensor::embedding_dense_backward(rows, &place, items.size()[0], -1, false);
        Self { items, rows }
    }

    fn none(width: i64, kind: Kind, device: Device) -> Self {
        Self { items: Tensor::zeros([0], (Kind::Int64, device)), rows: Tensor::zeros([0, width], (kind, device)) }
    }
}

impl ItemVectors {
    pub fn new(spec: ParameterSpec, values: Tensor) -> Self {
        Self { spec, values, learns: None, handed_out: RefCell::default() }
    }

    /// Keeps the vectors of these items (bool, `[N]`) as they are.
    pub fn freeze(&mut self, items: &Tensor) {
        self.learns =
            Some(items.logical_not().to_kind(self.values.kind()).to_device(self.values.device()).unsqueeze(1));
    }

    /// The vectors `[U, D]` of `items` `[U]`; what a backward pass brings to them is kept for [`ItemVectors::gradient`].
    pub fn take(&self, items: &Tensor) -> Tensor {
        let leaf = tch::no_grad(|| self.values.index_select(0, items)).set_requires_grad(true);
        // a copy: unlike a view it has no graph where none is kept, and then nothing will come back
        let vectors = &leaf * 1.0;
        if vectors.requires_grad() {
            self.handed_out.borrow_mut().push((items.shallow_clone(), leaf));
        }
        vectors
    }

    /// What backward passes have brought since the last call.
    pub fn gradient(&self) -> RowGradient {
        let parts: Vec<(Tensor, Tensor)> = self.handed_out.take();
        let parts: Vec<(Tensor, Tensor)> =
            parts.into_iter().map(|(items, leaf)| (items, leaf.grad())).filter(|(_, rows)| rows.defined()).collect();
        let (items, rows): (Vec<Tensor>, Vec<Tensor>) = parts.into_iter().unzip();
        if items.is_empty() {
            return RowGradient::none(self.values.size()[1], self.values.kind(), self.values.device());
        }
        tch::no_grad(|| {
            let mut gradient = RowGradient::merge(&Tensor::cat(&items, 0), &Tensor::cat(&rows, 0));
            if let Some(learns) = &self.learns {
                gradient.rows *= learns.index_select(0, &gradient.items);
            }
            gradient
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::parameters::Role;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn table() -> ItemVectors {
        let spec = ParameterSpec::new("id_embedding.weight", &[6, 2], Role::ItemVector { std: 1.0 });
        ItemVectors::new(spec, Tensor::arange(12, OPTIONS).view([6, 2]))
    }

    fn index(items: &[i64]) -> Tensor {
        Tensor::from_slice(items)
    }

    #[test]
    fn only_what_was_taken_with_a_graph_has_a_gradient() {
        let mut table = table();
        let nothing = table.gradient();
        assert_eq!((nothing.items.size(), nothing.rows.size()), (vec![0], vec![0, 2]));
        let unseen = tch::no_grad(|| table.take(&index(&[3])));
        assert!(!unseen.requires_grad());
        let loss = |table: &ItemVectors| {
            let (one, other) = (table.take(&index(&[4, 1])), table.take(&index(&[1, 5])));
            let weights = Tensor::from_slice(&[1.0, 10.0]).unsqueeze(1);
            ((one + other * 3.0) * weights).sum(Kind::Double).backward();
        };
        loss(&table);
        let gradient = table.gradient();
        assert_eq!(Vec::<i64>::try_from(&gradient.items).unwrap(), [1, 4, 5]);
        assert_eq!(Vec::<f64>::try_from(gradient.rows.select(1, 0)).unwrap(), [13.0, 1.0, 30.0]);
        assert_eq!(table.gradient().items.numel(), 0, "once");

        table.freeze(&index(&[0, 1, 0, 0, 0, 0]).to_kind(Kind::Bool));
        loss(&table);
        assert_eq!(Vec::<f64>::try_from(table.gradient().rows.select(1, 1)).unwrap(), [0.0, 1.0, 30.0]);
    }

    proptest! {
        #[test]
        fn merging_is_the_sum_of_each_item(parts in prop::collection::vec((0_i64..9, -100_i32..100), 0..40)) {
            let items: Vec<i64> = parts.iter().map(|part| part.0).collect();
            let rows: Vec<f64> = parts.iter().flat_map(|part| [f64::from(part.1), f64::from(part.1) / 3.0]).collect();
            let rows = Tensor::from_slice(&rows).view([-1, 2]);
            let merged = RowGradient::merge(&index(&items), &rows);
            let dense = Tensor::zeros([9, 2], OPTIONS).index_add(0, &index(&items), &rows);
            let mut distinct = items.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(Vec::<i64>::try_from(&merged.items).unwrap(), distinct);
            prop_assert!((dense.index_select(0, &merged.items) - &merged.rows).abs().sum(Kind::Double).double_value(&[]) < 1e-9);
            // in two steps, as ranks do
            let cut = items.len() / 2;
            let part = |from: i64, count: i64| RowGradient::merge(&index(&items).narrow(0, from, count), &rows.narrow(0, from, count));
            let (one, other) = (part(0, cut as i64), part(cut as i64, (items.len() - cut) as i64));
            let twice = RowGradient::merge(&Tensor::cat(&[one.items, other.items], 0), &Tensor::cat(&[one.rows, other.rows], 0));
            prop_assert_eq!(&twice.items, &merged.items);
            prop_assert!((twice.rows - merged.rows).abs().sum(Kind::Double).double_value(&[]) < 1e-9);
        }
    }
}
