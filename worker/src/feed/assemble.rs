//! From a rank's share of a step to the arrays of its forward passes.
//!
//! Input: the share's users with their histories, targets and sampled positions, as item indices. Output: per
//! micro-batch, the unique items and packed sequences of indices into them, with the time gaps of their items if there are
//! times. Pure; no tensor, no network.

use std::collections::HashMap;

use learn_domain::config::{ObjectiveConfig, ObjectiveKind};
use learn_domain::packing::{Packing, Run};
use learn_domain::plan::contiguous_part;
use learn_domain::sampling::{Pairs, SampleKey, SamplingShape, sample, sample_size};
use learn_domain::time_gap;

/// One user of a share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserShare {
    /// Row of the dataset's training sequences.
    pub user: u32,
    /// Place in the global batch; the InfoNCE mask compares it.
    pub place: u32,
    /// Item indices, oldest first, never empty.
    pub history: Vec<u32>,
    /// Item indices, oldest first, never empty.
    pub targets: Vec<u32>,
    /// Sampled positions of the history, ascending.
    pub user_positions: Vec<u32>,
    /// Sampled positions of the targets, ascending.
    pub item_positions: Vec<u32>,
    /// Times of `history`, if the ticket asked for them.
    pub history_times: Vec<i64>,
    /// Times of `targets`, likewise.
    pub target_times: Vec<i64>,
    /// Labels of `targets`, 1 = converted, if the dataset has labels.
    pub target_labels: Vec<u8>,
}

/// Items that a tower sees, oldest first, and when they were; no times for a model that does not read them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen<'a> {
    pub items: &'a [u32],
    pub times: &'a [i64],
}

impl Seen<'_> {
    /// The latest `most` items.
    #[must_use]
    pub fn newest(self, most: usize) -> Self {
        Self {
            items: &self.items[self.items.len().saturating_sub(most)..],
            times: &self.times[self.times.len().saturating_sub(most)..],
        }
    }
}

/// A sequence and the sampled positions in it.
#[derive(Clone, Copy, Debug)]
struct Sequence<'a> {
    seen: Seen<'a>,
    positions: &'a [u32],
}

impl UserShare {
    /// The sample of a whole sequence and its number of trained pairs, with the user's number as its place; `None` if the
    /// sequence is too short.
    #[must_use]
    pub fn draw(whole: Seen<'_>, key: SampleKey, shape: &SamplingShape) -> Option<(Self, u64)> {
        let length = whole.items.len() as u32;
        let (size, drawn) = (sample_size(key, length, shape)?, sample(key, length, shape)?);
        let items = |indices: &[u32]| indices.iter().map(|&index| whole.items[index as usize]).collect();
        let times =
            |indices: &[u32]| indices.iter().filter_map(|&index| whole.times.get(index as usize).copied()).collect();
        let share = Self {
            user: key.user.0,
            place: key.user.0,
            history: items(&drawn.history),
            targets: items(&drawn.targets),
            history_times: times(&drawn.history),
            target_times: times(&drawn.targets),
            user_positions: drawn.user_positions,
            item_positions: drawn.item_positions,
            ..Self::default()
        };
        Some((share, size.pairs))
    }

    fn history_sequence(&self) -> Sequence<'_> {
        let seen = Seen { items: &self.history, times: &self.history_times };
        Sequence { seen, positions: &self.user_positions }
    }

    fn target_sequence(&self) -> Sequence<'_> {
        let seen = Seen { items: &self.targets, times: &self.target_times };
        Sequence { seen, positions: &self.item_positions }
    }
}

/// Sequences without padding, in the layout of [`Packing`], and the sampled positions in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedSequences {
    /// `[T]`: indices into the unique items.
    pub items: Vec<i64>,
    pub runs: Vec<Run>,
    /// `[R]`: places in `items`, by user, then by position.
    pub positions: Vec<i64>,
    /// `[T]`: [`time_gap::buckets`]. Empty without times, and for items alone.
    pub gaps: Vec<i64>,
}

/// What one forward pass needs besides the rows of its unique items.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Item indices whose content embeddings are needed, ascending, each once.
    pub unique_items: Vec<u32>,
    pub history: PackedSequences,
    pub targets: PackedSequences,
    /// Further items that are negatives for every user, each as a sequence of one.
    pub negatives: PackedSequences,
    /// `[R]`: place in the global batch of each sampled history position's user.
    pub row_user: Vec<i64>,
    /// `[M]`: item index of each sampled target, then of each negative.
    pub item_id: Vec<i64>,
    /// `[M]`: place in the global batch of each sampled target's user, [`NOBODY`] for a negative.
    pub item_user: Vec<i64>,
    pub exposures: Exposures,
    /// Real tokens of both towers.
    pub tokens: u64,
    /// Rows that the encoder computes for them.
    pub encoded_rows: u64,
}

/// The sampled targets with a label, each with its user's newest sampled history position, or, if each stands alone, with
/// the position that it follows; empty without labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exposures {
    /// `[K]`: row of the pass's user embeddings.
    pub user_row: Vec<i64>,
    /// `[K]`: row of the pass's item embeddings.
    pub item_row: Vec<i64>,
    /// `[K]`: 1 = converted.
    pub label: Vec<u8>,
}

impl Exposures {
    fn of(users: &[UserShare], targets: Targets) -> Self {
        let mut exposures = Self::default();
        let (mut rows, mut items) = (0, 0);
        for user in users {
            let newest = user.user_positions.len() as i64 - 1;
            for (nth, &position) in (0..).zip(&user.item_positions) {
                let row = if targets == Targets::Alone { nth } else { newest };
                if let Some(&label) = user.target_labels.get(position as usize)
                    && (0..=newest).contains(&row)
                    && targets != Targets::Named
                {
                    exposures.user_row.push(rows + row);
                    exposures.item_row.push(items);
                    exposures.label.push(label);
                }
                items += 1;
            }
            rows += newest + 1;
        }
        exposures
    }
}

/// The owner of an item that is nobody's target.
pub const NOBODY: i64 = -1;

/// How targets reach the item tower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Targets {
    /// One sequence per user.
    #[default]
    Sequence,
    /// A sequence of one each: a next item must not see the earlier ones, which the user's position sees too.
    Alone,
    /// Not at all: the objective embeds the catalogue and needs their names only.
    Named,
}

/// How a share is divided and laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub targets: Targets,
    /// Most users of a micro-batch; 0 = one micro-batch.
    pub micro_batch: u32,
    /// Newest history items of each user that become negatives.
    pub history_negatives: u32,
}

impl Layout {
    /// What an objective needs.
    #[must_use]
    pub fn new(objective: &ObjectiveConfig, micro_batch: u32) -> Self {
        let targets = match objective.pairs() {
            // the CVR head reads the targets' embeddings
            _ if objective.kind == ObjectiveKind::FullSoftmax && objective.cvr_head().is_none() => Targets::Named,
            Pairs::Next => Targets::Alone,
            Pairs::AllAction => Targets::Sequence,
        };
        Self { targets, micro_batch, history_negatives: objective.history_negatives }
    }
}

impl MicroBatch {
    /// Rows that the item tower gives: `M`, unless targets are only named.
    #[must_use]
    pub fn embedded_items(&self) -> usize {
        self.targets.positions.len() + self.negatives.positions.len()
    }
}

/// Divides a share and `further` items, which are negatives for every user, into micro-batches and lays each out.
#[must_use]
pub fn assemble(share: &[UserShare], further: &[u32], layout: Layout) -> Vec<MicroBatch> {
    let size = if layout.micro_batch == 0 { share.len().max(1) } else { layout.micro_batch as usize };
    let mut batches: Vec<&[UserShare]> = share.chunks(size).collect();
    if batches.is_empty() && !further.is_empty() {
        batches.push(&[]);
    }
    let count = batches.len();
    let part = |number| &further[contiguous_part(further.len(), number, count)];
    batches.into_iter().enumerate().map(|(number, users)| lay_out(users, part(number), layout)).collect()
}

fn lay_out(users: &[UserShare], further: &[u32], layout: Layout) -> MicroBatch {
    let embedded = |user: &'_ UserShare| if layout.targets == Targets::Named { 0 } else { user.targets.len() };
    let sequences = users.iter().flat_map(|user| user.history.iter().chain(&user.targets[..embedded(user)]));
    let mut unique_items: Vec<u32> = sequences.chain(further).copied().collect();
    unique_items.sort_unstable();
    unique_items.dedup();
    let index: HashMap<u32, i64> = unique_items.iter().zip(0..).map(|(&item, row)| (item, row)).collect();
    let history = pack(users.iter().map(UserShare::history_sequence), &index);
    let targets = match layout.targets {
        Targets::Sequence => pack(users.iter().map(UserShare::target_sequence), &index),
        Targets::Alone => alone(users.iter().flat_map(sampled_targets), &index),
        Targets::Named => PackedSequences::default(),
    };
    let history_negatives = layout.history_negatives as usize;
    let newest = |user: &UserShare| user.history.len().saturating_sub(history_negatives)..user.history.len();
    let seen = users.iter().flat_map(|user| &user.history[newest(user)]);
    let negative_items: Vec<u32> = seen.chain(further).copied().collect();
    let negatives = alone(negative_items.iter().copied(), &index);
    let repeat = |user: &UserShare, count: usize| std::iter::repeat_n(i64::from(user.place), count);
    MicroBatch {
        row_user: users.iter().flat_map(|user| repeat(user, user.user_positions.len())).collect(),
        item_user: users
            .iter()
            .flat_map(|user| repeat(user, user.item_positions.len()))
            .chain(negative_items.iter().map(|_| NOBODY))
            .collect(),
        item_id: users.iter().flat_map(sampled_targets).chain(negative_items.iter().copied()).map(i64::from).collect(),
        exposures: Exposures::of(users, layout.targets),
        tokens: users.iter().map(|user| (user.history.len() + embedded(user)) as u64).sum(),
        encoded_rows: (history.items.len() + targets.items.len()) as u64,
        negatives,
        unique_items,
        history,
        targets,
    }
}

fn sampled_targets(user: &UserShare) -> impl Iterator<Item = u32> {
    user.item_positions.iter().map(|&position| user.targets[position as usize])
}

/// Each item as a sequence of one.
fn alone(items: impl Iterator<Item = u32>, index: &HashMap<u32, i64>) -> PackedSequences {
    let items: Vec<i64> = items.map(|item| index[&item]).collect();
    let count = items.len();
    PackedSequences {
        positions: (0..count as i64).collect(),
        runs: if count == 0 { Vec::new() } else { vec![Run { count, length: 1 }] },
        gaps: Vec::new(),
        items,
    }
}

fn pack<'a>(sequences: impl Iterator<Item = Sequence<'a>>, index: &HashMap<u32, i64>) -> PackedSequences {
    let sequences: Vec<Sequence<'_>> = sequences.collect();
    let packing = Packing::new(&sequences.iter().map(|sequence| sequence.seen.items.len()).collect::<Vec<_>>());
    let mut packed = PackedSequences { runs: packing.runs, ..PackedSequences::default() };
    for &number in &packing.order {
        let Seen { items, times } = sequences[number].seen;
        packed.items.extend(items.iter().map(|item| index[item]));
        packed.gaps.extend(time_gap::buckets(times).map(i64::from));
    }
    let places = |(sequence, start): (&Sequence<'_>, usize)| {
        let place = move |&position: &u32| start as i64 + i64::from(position);
        sequence.positions.iter().map(place).collect::<Vec<_>>()
    };
    packed.positions = sequences.iter().zip(packing.starts).flat_map(places).collect();
    packed
}

/// The sequences of users whose embedding is wanted at their newest item only (evaluation, export, recommendation).
#[must_use]
pub fn newest_positions(histories: &[Seen<'_>]) -> (Vec<u32>, PackedSequences) {
    let users: Vec<UserShare> = histories
        .iter()
        .map(|history| UserShare {
            history: history.items.to_vec(),
            history_times: history.times.to_vec(),
            user_positions: vec![history.items.len() as u32 - 1],
            ..UserShare::default()
        })
        .collect();
    let batch = lay_out(&users, &[], Layout::default());
    (batch.unique_items, batch.history)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share() -> Vec<UserShare> {
        let user =
            |place, history: &[u32], targets: &[u32], user_positions: &[u32], item_positions: &[u32]| UserShare {
                user: place + 100,
                place,
                history: history.to_vec(),
                targets: targets.to_vec(),
                user_positions: user_positions.to_vec(),
                item_positions: item_positions.to_vec(),
                ..UserShare::default()
            };
        vec![user(0, &[7, 3], &[9], &[0, 1], &[0]), user(4, &[3, 3, 5], &[7, 2], &[2], &[0, 1])]
    }

    #[test]
    fn a_batch_by_hand() {
        let batches = assemble(&share(), &[], Layout::default());
        let [batch] = &batches[..] else { panic!("one micro-batch") };
        assert_eq!(batch.unique_items, [2, 3, 5, 7, 9]);
        assert_eq!(batch.history.items, [3, 1, 1, 1, 2]);
        assert_eq!(batch.history.runs, [2, 3].map(|length| Run { count: 1, length }));
        assert_eq!(batch.history.positions, [0, 1, 4]);
        assert_eq!(batch.targets.items, [4, 3, 0]);
        assert_eq!(batch.targets.positions, [0, 1, 2]);
        assert_eq!((&batch.row_user[..], &batch.item_user[..]), (&[0, 0, 4][..], &[0, 4, 4][..]));
        assert_eq!(batch.item_id, [9, 7, 2]);
        assert_eq!((batch.tokens, batch.encoded_rows), (8, 8));
    }

    #[test]
    fn exposures_pair_targets_with_the_newest_sampled_position() {
        let mut users = share();
        assert_eq!(assemble(&users, &[], Layout::default())[0].exposures, Exposures::default(), "nobody has a label");
        users[0].target_labels = vec![1];
        users[1].target_labels = vec![0, 1];
        let exposures = &assemble(&users, &[], Layout { history_negatives: 1, ..Layout::default() })[0].exposures;
        assert_eq!((&exposures.user_row[..], &exposures.item_row[..]), (&[1, 2, 2][..], &[0, 1, 2][..]));
        assert_eq!(exposures.label, [1, 0, 1]);
        users[1].item_positions = vec![1];
        let exposures = &assemble(&users, &[], Layout { micro_batch: 1, ..Layout::default() })[1].exposures;
        assert_eq!(
            (&exposures.user_row[..], &exposures.item_row[..], &exposures.label[..]),
            (&[0][..], &[0][..], &[1][..])
        );
        users[1].user_positions = vec![0, 2];
        users[1].item_positions = vec![0, 1];
        let of = |targets| assemble(&users, &[], Layout { targets, ..Layout::default() }).remove(0).exposures;
        assert_eq!((of(Targets::Alone).user_row, of(Targets::Alone).item_row), (vec![0, 2, 3], vec![0, 1, 2]));
        assert_eq!(of(Targets::Named), Exposures::default());
    }

    #[test]
    fn micro_batches_hold_the_same_users_and_an_empty_share_is_empty() {
        let batches = assemble(&share(), &[], Layout { micro_batch: 1, ..Layout::default() });
        assert_eq!(batches.len(), 2);
        assert_eq!(batches[1].unique_items, [2, 3, 5, 7]);
        assert_eq!(batches.iter().map(|batch| batch.tokens).sum::<u64>(), 8);
        assert!(assemble(&[], &[], Layout::default()).is_empty());
    }

    #[test]
    fn the_newest_history_items_become_nobodys_items() {
        let batches = assemble(&share(), &[], Layout { history_negatives: 2, ..Layout::default() });
        let batch = &batches[0];
        assert_eq!(batch.item_id, [9, 7, 2, 7, 3, 3, 5]);
        assert_eq!(batch.item_user, [0, 4, 4, NOBODY, NOBODY, NOBODY, NOBODY]);
        assert_eq!(batch.negatives.runs, [Run { count: 4, length: 1 }]);
        assert_eq!(batch.negatives.items, [3, 1, 1, 2]);
        assert_eq!(batch.negatives.positions, [0, 1, 2, 3]);
    }

    #[test]
    fn next_items_stand_alone() {
        let batches = assemble(&share(), &[], Layout { targets: Targets::Alone, ..Layout::default() });
        let targets = &batches[0].targets;
        assert_eq!((&targets.items[..], &targets.runs[..]), (&[4, 3, 0][..], &[Run { count: 3, length: 1 }][..]));
        assert_eq!(targets.positions, [0, 1, 2]);
        assert_eq!((&batches[0].item_id[..], &batches[0].item_user[..]), (&[9, 7, 2][..], &[0, 4, 4][..]));
        assert_eq!(batches[0].encoded_rows, 8);
    }

    #[test]
    fn further_negatives_are_spread_over_the_passes_and_need_no_user() {
        let batches = assemble(&share(), &[3, 8, 8], Layout { micro_batch: 1, ..Layout::default() });
        let named = |batch: &MicroBatch| (batch.item_id.clone(), batch.item_user.clone());
        assert_eq!(named(&batches[0]), (vec![9, 3], vec![0, NOBODY]));
        assert_eq!(named(&batches[1]), (vec![7, 2, 8, 8], vec![4, 4, NOBODY, NOBODY]));
        assert_eq!(batches[1].unique_items, [2, 3, 5, 7, 8]);
        let alone = assemble(&[], &[6, 1], Layout::default());
        assert_eq!(alone.len(), 1);
        assert_eq!((&alone[0].unique_items[..], &alone[0].negatives.items[..]), (&[1, 6][..], &[1, 0][..]));
    }

    #[test]
    fn named_targets_are_not_embedded() {
        let batches = assemble(&share(), &[], Layout { targets: Targets::Named, ..Layout::default() });
        let batch = &batches[0];
        assert_eq!((&batch.unique_items[..], &batch.item_id[..]), (&[3, 5, 7][..], &[9, 7, 2][..]));
        assert_eq!((batch.embedded_items(), batch.tokens, batch.encoded_rows), (0, 5, 5));
    }

    #[test]
    fn newest_position_is_the_last_real_one() {
        let seen = |items| Seen { items, times: &[] };
        let (unique, packed) = newest_positions(&[seen(&[4, 8, 6]), seen(&[4])]);
        assert_eq!(unique, [4, 6, 8]);
        assert_eq!((packed.items, packed.positions), (vec![0, 0, 2, 1], vec![3, 0]));
        assert!(packed.gaps.is_empty(), "nobody said when");
    }

    #[test]
    fn a_long_history_is_cut_to_its_newest_items() {
        let all = Seen { items: &[1, 2, 3], times: &[10, 20, 30] };
        assert_eq!(all.newest(2), Seen { items: &[2, 3], times: &[20, 30] });
        assert_eq!(all.newest(9), all);
        assert_eq!(Seen { times: &[], ..all }.newest(1), Seen { items: &[3], times: &[] });
    }

    #[test]
    fn times_become_gaps_to_the_item_before() {
        let mut users = share();
        (users[0].history_times, users[0].target_times) = (vec![100, 104], vec![107]);
        (users[1].history_times, users[1].target_times) = (vec![0, 0, 1], vec![3, 5]);
        let gaps = |layout| {
            let batch = assemble(&users, &[], layout).remove(0);
            (batch.history.gaps, batch.targets.gaps)
        };
        assert_eq!(gaps(Layout::default()), (vec![0, 4, 0, 1, 2], vec![0, 0, 3]));
        let alone = Layout { targets: Targets::Alone, ..Layout::default() };
        assert_eq!(gaps(alone).1, [0_i64; 0], "an item alone has none before it");
        let (_, packed) = newest_positions(&[Seen { items: &[7, 3], times: &[100, 104] }]);
        assert_eq!(packed.gaps, [0, 4]);
    }
}
