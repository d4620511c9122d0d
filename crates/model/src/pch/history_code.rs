//! The history code: dimensions in which a user's embedding says which items its history holds.
//!
//! Input: item indices, and histories. Output: a fixed vector of length 1 for each item, and -weight times the sum over a
//! history's distinct items. Invariants: a code depends on the item index and the number of dimensions alone; two codes are
//! nearly orthogonal (their cosine has mean 0 and deviation 1 / sqrt(dimensions)), so an item of the history scores lower
//! by about the weight and the others as before.

use learn_domain::random::{Draws, text_key};
use tch::{Device, Kind, Tensor};

use super::{Sequences, take};

/// `[U, K]`: the codes of `items`, signs divided by sqrt(K).
pub fn codes(items: &[u32], dimensions: i64, options: (Kind, Device)) -> Tensor {
    let name = text_key("history code");
    let signs: Vec<i8> = items
        .iter()
        .flat_map(|&item| {
            let mut draws = Draws::new(&[name, item.into()]);
            let mut word = 0;
            (0..dimensions).map(move |place| {
                if place % 64 == 0 {
                    word = draws.next_u64();
                }
                let sign = if word & 1 == 1 { 1 } else { -1 };
                word >>= 1;
                sign
            })
        })
        .collect();
    let signs = Tensor::from_slice(&signs).view([items.len() as i64, dimensions]);
    signs.to_device(options.1).to_kind(options.0) / (dimensions as f64).sqrt()
}

/// `[R, K]`: at each sampled position -`weight` times the sum of the codes `[U, K]` of the distinct items up to it.
pub fn history(codes: &Tensor, histories: &Sequences, weight: f64) -> Tensor {
    if histories.is_unread() {
        return codes.narrow(0, 0, 0);
    }
    let sums = histories.by_block(|items, _| {
        let again = items.unsqueeze(2).eq_tensor(&items.unsqueeze(1)).tril(-1).any_dim(-1, false);
        let first = again.logical_not().to_kind(codes.kind()).unsqueeze(2);
        (take(codes, items) * first).cumsum(1, codes.kind())
    });
    sums * -weight
}

#[cfg(test)]
mod tests {
    use learn_domain::packing::Run;

    use super::*;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    #[test]
    fn codes_are_fixed_units_that_hardly_meet() {
        let all = codes(&(0..200).collect::<Vec<_>>(), 130, OPTIONS);
        let products = all.matmul(&all.tr());
        let own = products.diagonal(0, 0, 1) - 1.0;
        assert!(own.abs().max().double_value(&[]) < 1e-12);
        let others = products - Tensor::eye(200, OPTIONS);
        let deviation = others.square().mean(Kind::Double).double_value(&[]).sqrt();
        assert!((deviation * 130_f64.sqrt() - 1.0).abs() < 0.05, "{deviation}");
        // an item's code does not depend on its neighbours
        assert_eq!(codes(&[7], 130, OPTIONS).get(0), all.get(7));
    }

    #[test]
    fn a_repeated_item_counts_once_and_later_ones_not_yet() {
        let all = codes(&[5, 9, 2], 8, OPTIONS);
        let histories = Sequences {
            items: Tensor::from_slice(&[2_i64, 2, 1, 0, 1, 2]),
            runs: [2, 4].map(|length| Run { count: 1, length }).to_vec(),
            positions: Tensor::from_slice(&[2_i64, 4, 5, 1]),
            gaps: None,
        };
        let ours = history(&all, &histories, 0.5);
        let sum = |rows: &[i64]| rows.iter().fold(Tensor::zeros([8], OPTIONS), |sum, row| sum + all.get(*row)) * -0.5;
        for (row, items) in [&[1][..], &[1, 0], &[1, 0, 2], &[2]].into_iter().enumerate() {
            let gap = (ours.get(row as i64) - sum(items)).abs().max().double_value(&[]);
            assert!(gap < 1e-12, "{items:?}: {gap}");
        }
    }
}
