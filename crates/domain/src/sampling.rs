//! How one user's training sequence becomes a history, targets and sampled positions.
//!
//! Input: the sequence's length `n >= 2`, oldest first, and the draw's key. Output: indices into the sequence.
//!
//! 1. **Cut.** A cut point is drawn uniformly: the items before it are the full history (at least one), the
//!    [`SamplingShape::window`] items from it on are the target window (at least one).
//! 2. **Stage 1** draws `history` items from the full history and `targets` items from the target window, uniformly
//!    without replacement, keeping their order; a shorter sequence is taken whole. With [`StageOne::Nearest`] it takes
//!    the items nearest to the cut instead, which is what an evaluation's history looks like.
//! 3. **Stage 2** draws `user_positions` positions of the kept history and `item_positions` of the kept targets
//!    without replacement, with the recency weights of [`recency_weight`] (LEARN, arXiv 2405.03988, section "sample
//!    construction"; the exact form of the weight is our reading).
//!
//! [`Pairs::Next`] has no cut and no stage 1: the history is the newest `history + 1` items of the sequence without the
//! last, and the target of a position is the item that follows it, as in SASRec (Kang and McAuley, ICDM 2018). Stage 2
//! draws the positions; with `user_positions >= history` that is all of them, so one causal pass over a user trains them
//! all in each epoch.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::UserIndex;
use crate::random::Draws;

/// How stage 1 shortens a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StageOne {
    /// Items drawn uniformly without replacement, as published.
    #[default]
    Uniform,
    /// The newest items of the history, the first ones of the target window.
    Nearest,
}

/// Which targets a sampled history position is trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pairs {
    /// Every sampled target of the user, as published.
    #[default]
    AllAction,
    /// The item that follows the position.
    Next,
}

/// Lengths of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingShape {
    pub pairs: Pairs,
    /// `H`: most items the user tower sees.
    pub history: u32,
    /// `T`: most items the item tower sees.
    pub targets: u32,
    /// Items after the cut that targets are drawn from; 0 = all of them.
    pub window: u32,
    pub stage_one: StageOne,
    /// `Nh`: sampled positions of the history.
    pub user_positions: u32,
    /// `Nt`: sampled positions of the targets.
    pub item_positions: u32,
    /// `alpha` of the recency weight.
    pub alpha: f64,
    /// `beta` of the recency weight.
    pub beta: f64,
}

/// What a sample depends on besides the sequence's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleKey {
    /// [`crate::plan::Plan::draw_seed`].
    pub seed: u64,
    pub epoch: u32,
    pub user: UserIndex,
}

/// One user's part of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Indices into the sequence, ascending, `1..=H` of them.
    pub history: Vec<u32>,
    /// Indices into the sequence, ascending. All-action: all after the last of `history`, `1..=T` of them. Next: one for
    /// each of `user_positions`, the index after its own.
    pub targets: Vec<u32>,
    /// Positions in `history`, ascending.
    pub user_positions: Vec<u32>,
    /// Positions in `targets`, ascending.
    pub item_positions: Vec<u32>,
}

/// The recency weight of position `i` of `n`, oldest first:
/// `w_i = log(alpha + i (beta - alpha) / (n - 1))`; a lone position weighs `log(beta)`.
#[must_use]
pub fn recency_weight(i: usize, n: usize, alpha: f64, beta: f64) -> f64 {
    if n <= 1 {
        return beta.ln();
    }
    (alpha + i as f64 * (beta - alpha) / (n - 1) as f64).ln()
}

/// What a sample will hold, known before the draws that fill it: enough to split a batch and to count its pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleSize {
    pub history: u32,
    pub targets: u32,
    /// (history position, target position) pairs that are trained on.
    pub pairs: u64,
}

/// The history that precedes the last item of a sequence, as far as it is seen.
fn before_the_last(length: u32, shape: &SamplingShape) -> std::ops::Range<u32> {
    (length - 1).saturating_sub(shape.history)..length - 1
}

/// The first draw of a sample: the cut point and the end of the target window.
fn cut(draws: &mut Draws, length: u32, shape: &SamplingShape) -> (u32, u32) {
    let cut = 1 + draws.below(u64::from(length - 1)) as u32;
    let window = if shape.window == 0 { length - cut } else { shape.window.min(length - cut) };
    (cut, cut + window)
}

/// The size of what [`sample`] gives, at the price of one draw.
#[must_use]
pub fn sample_size(key: SampleKey, length: u32, shape: &SamplingShape) -> Option<SampleSize> {
    if length < 2 {
        return None;
    }
    if shape.pairs == Pairs::Next {
        let history = before_the_last(length, shape).len() as u32;
        let targets = history.min(shape.user_positions);
        return Some(SampleSize { history, targets, pairs: targets.into() });
    }
    let (cut, end) = cut(&mut draws(key), length, shape);
    let (history, targets) = (cut.min(shape.history), (end - cut).min(shape.targets));
    let pairs = u64::from(history.min(shape.user_positions)) * u64::from(targets.min(shape.item_positions));
    Some(SampleSize { history, targets, pairs })
}

fn draws(key: SampleKey) -> Draws {
    Draws::new(&[key.seed, u64::from(key.epoch), u64::from(key.user.0)])
}

/// Draws the sample of one user in one epoch; `None` if the sequence is shorter than two items.
#[must_use]
pub fn sample(key: SampleKey, length: u32, shape: &SamplingShape) -> Option<Sample> {
    if length < 2 {
        return None;
    }
    let mut draws = draws(key);
    if shape.pairs == Pairs::Next {
        let history: Vec<u32> = before_the_last(length, shape).collect();
        let user_positions = recent_positions(&mut draws, history.len(), shape.user_positions, shape);
        let targets: Vec<u32> = user_positions.iter().map(|&position| history[position as usize] + 1).collect();
        let item_positions = (0..targets.len() as u32).collect();
        return Some(Sample { history, targets, user_positions, item_positions });
    }
    let (cut, end) = cut(&mut draws, length, shape);
    let (history, targets) = match shape.stage_one {
        StageOne::Uniform => {
            let history = uniform_subset(&mut draws, 0..cut, shape.history);
            (history, uniform_subset(&mut draws, cut..end, shape.targets))
        }
        StageOne::Nearest => {
            let history = (cut.saturating_sub(shape.history)..cut).collect();
            (history, (cut..end.min(cut.saturating_add(shape.targets))).collect())
        }
    };
    let user_positions = recent_positions(&mut draws, history.len(), shape.user_positions, shape);
    let item_positions = recent_positions(&mut draws, targets.len(), shape.item_positions, shape);
    Some(Sample { history, targets, user_positions, item_positions })
}

/// Items of a catalogue of `items` that join the negatives of the step after `finished` ones: `count` uniform draws with
/// replacement, the same whoever draws them. `seed` is [`crate::plan::Plan::draw_seed`].
#[must_use]
pub fn uniform_items(seed: u64, finished: u64, items: u32, count: u32) -> Vec<u32> {
    // no epoch has this number, so no sample has this key
    let mut draws = Draws::new(&[seed, u64::MAX, finished]);
    (0..count).map(|_| draws.below(items.into()) as u32).collect()
}

/// `count` values of the range, uniformly without replacement, ascending (Knuth's selection sampling, algorithm S).
fn uniform_subset(draws: &mut Draws, range: std::ops::Range<u32>, count: u32) -> Vec<u32> {
    let mut wanted = u64::from(count.min(range.end - range.start));
    let mut left = u64::from(range.end - range.start);
    let mut chosen = Vec::with_capacity(wanted as usize);
    for value in range {
        if wanted == left || draws.below(left) < wanted {
            chosen.push(value);
            wanted -= 1;
        }
        left -= 1;
        if wanted == 0 {
            break;
        }
    }
    chosen
}

/// `count` positions of `0..length` without replacement, weighted by recency, ascending: the smallest
/// `-ln(u_i) / w_i` (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
fn recent_positions(draws: &mut Draws, length: usize, count: u32, shape: &SamplingShape) -> Vec<u32> {
    if length <= count as usize {
        return (0..length as u32).collect();
    }
    let mut order: Vec<(f64, u32)> = (0..length)
        .map(|i| (-draws.unit().ln() / recency_weight(i, length, shape.alpha, shape.beta), i as u32))
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut chosen: Vec<u32> = order[..count as usize].iter().map(|&(_, i)| i).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: SamplingShape = SamplingShape {
        pairs: Pairs::AllAction,
        history: 40,
        targets: 20,
        window: 0,
        stage_one: StageOne::Uniform,
        user_positions: 10,
        item_positions: 10,
        alpha: 10.0,
        beta: 10_000.0,
    };

    fn draw(user: u32, epoch: u32, length: u32, shape: &SamplingShape) -> Sample {
        sample(SampleKey { seed: 1, epoch, user: UserIndex(user) }, length, shape).unwrap()
    }

    proptest! {
        #[test]
        fn a_sample_is_ordered_in_range_and_never_sees_the_future(
            length in 2_u32..300, user: u32, epoch in 0_u32..50, window in 0_u32..20, nearest: bool,
        ) {
            let stage_one = if nearest { StageOne::Nearest } else { StageOne::Uniform };
            let shape = SamplingShape { window, stage_one, ..SHAPE };
            let s = draw(user, epoch, length, &shape);
            prop_assert_eq!(&s, &draw(user, epoch, length, &shape));
            let ascending = |values: &[u32], bound: usize| {
                values.windows(2).all(|pair| pair[0] < pair[1]) && values.iter().all(|&v| (v as usize) < bound)
            };
            prop_assert!(ascending(&s.history, length as usize) && ascending(&s.targets, length as usize));
            prop_assert!(ascending(&s.user_positions, s.history.len()));
            prop_assert!(ascending(&s.item_positions, s.targets.len()));
            prop_assert!(s.history.last().unwrap() < s.targets.first().unwrap());
            prop_assert!((1..=40).contains(&s.history.len()) && (1..=20).contains(&s.targets.len()));
            prop_assert_eq!(s.user_positions.len(), s.history.len().min(10));
            prop_assert_eq!(s.item_positions.len(), s.targets.len().min(10));
            let size = sample_size(SampleKey { seed: 1, epoch, user: UserIndex(user) }, length, &shape).unwrap();
            prop_assert_eq!((size.history, size.targets), (s.history.len() as u32, s.targets.len() as u32));
            prop_assert_eq!(size.pairs, (s.user_positions.len() * s.item_positions.len()) as u64);
            if nearest {
                let together: Vec<u32> = s.history.iter().chain(&s.targets).copied().collect();
                prop_assert!(together.windows(2).all(|pair| pair[0] + 1 == pair[1]), "a run without gaps");
            }
            if window > 0 {
                prop_assert!(s.targets.last().unwrap() - s.targets.first().unwrap() < window);
            }
        }
    }

    proptest! {
        #[test]
        fn next_pairs_follow_each_other_at_the_end_of_the_sequence(
            length in 2_u32..120, user: u32, epoch in 0_u32..9, history in 1_u32..60, user_positions in 1_u32..70,
        ) {
            let shape = SamplingShape { pairs: Pairs::Next, history, user_positions, ..SHAPE };
            let s = draw(user, epoch, length, &shape);
            prop_assert_eq!(&s, &draw(user, epoch, length, &shape));
            prop_assert_eq!(s.history.len() as u32, (length - 1).min(history));
            prop_assert_eq!(s.history.last(), Some(&(length - 2)));
            prop_assert!(s.history.windows(2).all(|pair| pair[0] + 1 == pair[1]), "a run without gaps");
            prop_assert!(s.user_positions.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert_eq!(s.user_positions.len(), s.history.len().min(user_positions as usize));
            for (nth, (&position, &target)) in s.user_positions.iter().zip(&s.targets).enumerate() {
                prop_assert_eq!(target, s.history[position as usize] + 1);
                prop_assert_eq!(s.item_positions[nth], nth as u32);
            }
            prop_assert_eq!(s.item_positions.len(), s.user_positions.len());
            let size = sample_size(SampleKey { seed: 1, epoch, user: UserIndex(user) }, length, &shape).unwrap();
            prop_assert_eq!((size.history, size.targets), (s.history.len() as u32, s.targets.len() as u32));
            prop_assert_eq!(size.pairs, s.targets.len() as u64);
            if user_positions >= history {
                prop_assert_eq!(s.targets.len() as u32, (length - 1).min(history), "every position is trained");
            }
        }
    }

    #[test]
    fn recent_positions_are_drawn_more_often() {
        let mut old = 0;
        let mut recent = 0;
        for user in 0..4000 {
            let mut draws = Draws::new(&[user]);
            for position in recent_positions(&mut draws, 40, 10, &SHAPE) {
                old += u32::from(position < 5);
                recent += u32::from(position >= 35);
            }
        }
        // weights: ln(10)..ln(1033) for the oldest five, ln(8985)..ln(10000) for the newest five
        assert!(f64::from(recent) > 1.25 * f64::from(old), "{recent} against {old}");
        assert!(f64::from(recent) < 2.2 * f64::from(old), "{recent} against {old}");
    }

    #[test]
    fn uniform_items_cover_the_catalogue_and_differ_by_step() {
        let drawn = uniform_items(5, 3, 10, 2_000);
        let counts = (0..10).map(|item| drawn.iter().filter(|&&one| one == item).count());
        // 200 expected with a standard deviation of 13
        assert!(counts.clone().all(|count| (140..260).contains(&count)), "{:?}", counts.collect::<Vec<_>>());
        assert_eq!(drawn, uniform_items(5, 3, 10, 2_000));
        assert_ne!(drawn, uniform_items(5, 4, 10, 2_000));
        assert!(uniform_items(5, 3, 10, 0).is_empty());
    }

    #[test]
    fn the_weight_is_the_documented_formula() {
        assert!((recency_weight(0, 5, 10.0, 10_000.0) - 10_f64.ln()).abs() < 1e-12);
        assert!((recency_weight(4, 5, 10.0, 10_000.0) - 10_000_f64.ln()).abs() < 1e-12);
        assert!((recency_weight(0, 1, 10.0, 10_000.0) - 10_000_f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn every_cut_happens_and_short_sequences_are_refused() {
        let cuts: std::collections::BTreeSet<u32> = (0..200).map(|user| draw(user, 0, 6, &SHAPE).targets[0]).collect();
        assert_eq!(cuts, (1..6).collect());
        assert_eq!(sample(SampleKey { seed: 1, epoch: 0, user: UserIndex(0) }, 1, &SHAPE), None);
    }
}
