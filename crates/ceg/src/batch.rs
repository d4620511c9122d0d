//! Which texts share a forward pass.
//!
//! Input: the length of each text in tokens and a budget. Output: batches of text numbers. Invariants: each text is in
//! exactly one batch; a batch's count times its longest length (its size with padding) stays within the budget unless
//! it holds a single text; longest first, so that a budget that is too large for the device fails at once.

/// Divides texts of these lengths into batches of at most `budget` tokens, padding included.
#[must_use]
pub fn by_length(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&text| (std::cmp::Reverse(lengths[text]), text));
    let mut batches = Vec::new();
    let mut rest = order.as_slice();
    while let Some(&longest) = rest.first() {
        let count = (budget / lengths[longest].max(1)).clamp(1, rest.len());
        let (batch, after) = rest.split_at(count);
        batches.push(batch.to_vec());
        rest = after;
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_list_needs_no_batch() {
        assert!(by_length(&[], 8).is_empty());
    }

    #[test]
    fn a_text_beyond_the_budget_goes_alone() {
        assert_eq!(by_length(&[3, 9, 2], 5), [vec![1], vec![0], vec![2]]);
    }

    proptest! {
        #[test]
        fn every_text_once_within_the_budget(
            lengths in prop::collection::vec(0_usize..300, 0..200),
            budget in 1_usize..4000,
        ) {
            let batches = by_length(&lengths, budget);
            let mut seen: Vec<usize> = batches.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for batch in &batches {
                let longest = batch.iter().map(|&text| lengths[text]).max().unwrap();
                prop_assert!(batch.len() == 1 || longest * batch.len() <= budget);
            }
        }
    }
}
