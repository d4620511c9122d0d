//! Splits of a global batch whose lengths are those of real users: few long histories, many short ones.

use learn_domain::plan::split_by_tokens;
use proptest::prelude::*;

/// Tokens of a user: a tenth has 5 items, half at most 7, a tenth more than 15, one in a hundred more than 40.
fn tokens() -> impl Strategy<Value = u32> {
    prop_oneof![10 => Just(5_u32), 40 => 5_u32..=7, 40 => 8_u32..=15, 9 => 16_u32..=40, 1 => 41_u32..=60]
}

proptest! {
    #[test]
    fn no_rank_has_two_percent_more_than_the_mean_at_64_users(
        tokens in prop::collection::vec(tokens(), 8 * 64),
        ranks in 1_usize..=8,
    ) {
        let tokens = &tokens[..64 * ranks];
        let shares = split_by_tokens(tokens, ranks);
        let loads = shares.iter().map(|share| share.iter().map(|&place| f64::from(tokens[place as usize])).sum::<f64>());
        let mean = tokens.iter().map(|&count| f64::from(count)).sum::<f64>() / ranks as f64;
        let largest = loads.fold(0.0, f64::max);
        prop_assert!(largest <= 1.02 * mean, "{largest} against {mean}");
    }
}
