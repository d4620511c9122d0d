//! Which texts share a forward pass.
//!
//! Input: the length of each text in tokens and a budget. Output: batches of text numbers. Invariants: each text is in
//! exactly one batch; a batch's size (with padding if its texts are padded: count times longest length) stays within the
//! budget unless it holds a single text; longest first, so that a budget that is too large for the device fails at once.

/// How the texts of a batch lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Each as long as the longest.
    Padded,
    /// One behind the other.
    Packed,
}

/// Divides texts of these lengths into batches of at most `budget` tokens.
#[must_use]
pub fn by_length(lengths: &[usize], budget: usize, layout: Layout) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&text| (std::cmp::Reverse(lengths[text]), text));
    let mut batches = Vec::new();
    let mut rest = order.as_slice();
    while let Some(&longest) = rest.first() {
        let mut tokens = 0_usize;
        let fits = |&&text: &&usize| {
            tokens += lengths[if layout == Layout::Padded { longest } else { text }].max(1);
            tokens <= budget
        };
        let count = rest.iter().take_while(fits).count().max(1);
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
        assert!(by_length(&[], 8, Layout::Packed).is_empty());
    }

    #[test]
    fn a_text_beyond_the_budget_goes_alone() {
        assert_eq!(by_length(&[3, 9, 2], 5, Layout::Padded), [vec![1], vec![0], vec![2]]);
        assert_eq!(by_length(&[3, 9, 2], 5, Layout::Packed), [vec![1], vec![0, 2]]);
    }

    proptest! {
        #[test]
        fn every_text_once_within_the_budget(
            lengths in prop::collection::vec(0_usize..300, 0..200),
            budget in 1_usize..4000, padded: bool,
        ) {
            let batches = by_length(&lengths, budget, if padded { Layout::Padded } else { Layout::Packed });
            let mut seen: Vec<usize> = batches.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for batch in &batches {
                let longest = batch.iter().map(|&text| lengths[text]).max().unwrap();
                let tokens = batch.iter().map(|&text| lengths[text]).sum::<usize>();
                let size = if padded { longest * batch.len() } else { tokens };
                prop_assert!(batch.len() == 1 || size <= budget);
            }
            for pair in batches.windows(2) {
                let next = pair[1].iter().map(|&text| lengths[text]).max().unwrap();
                prop_assert!(pair[0].iter().all(|&text| lengths[text] >= next), "longest first");
            }
        }
    }
}
