//! What is told of a step besides its loss: how many operations it took, and how its embeddings lie.
//!
//! Input: a rank's share of the step, as the step has it anyway. Output: numbers for the metrics. Invariant: nothing here
//! changes the step, and it costs less than a hundredth of it: embeddings are looked at in a sample, every
//! [`LOOK_EVERY`] steps.

use learn_domain::config::{ItemTower, ModelConfig};
use learn_domain::flops::Work;
use learn_domain::sampling::Pairs;
use learn_model::PchShape;
use learn_model::objective::pair_indices;
use tch::{Kind, Tensor};

use super::objective::Objective;
use super::passes::{Embeddings, Share};
use crate::feed::PreparedStep;
use crate::feed::assemble::{MicroBatch, PackedSequences};

/// Steps between two looks at the embeddings.
const LOOK_EVERY: u64 = 10;
/// Rows of each tower that are looked at.
const SAMPLE: i64 = 256;

/// Whether the step after `finished` ones is looked at closely.
pub(super) fn looks(finished: u64) -> bool {
    finished.is_multiple_of(LOOK_EVERY)
}

/// Rows of all ranks.
#[derive(Clone, Copy, Debug)]
pub(super) struct GlobalRows {
    pub users: u64,
    pub items: u64,
}

/// Floating-point operations that the model needs for this rank's share.
pub(super) fn flops(shape: &PchShape, prepared: &PreparedStep, objective: &Objective, global: GlobalRows) -> f64 {
    let model = &shape.model;
    let mut work = Work::default();
    let mut own_rows = 0;
    for (batch, _) in &prepared.micro_batches {
        add_batch(&mut work, model, batch);
        own_rows += batch.row_user.len() as u64;
    }
    let catalogue = objective.catalogue_items();
    if catalogue > 0 {
        work.unique_items += catalogue;
        // each item alone, which a causal tower sees as one that reads items one by one
        let alone = if model.item_tower == ItemTower::Content { ItemTower::Content } else { ItemTower::PerItem };
        work.add_items(alone, catalogue, std::iter::empty());
    }
    work.scores = match objective {
        Objective::InBatch(_) => own_rows * global.items,
        Objective::FullSoftmax(_) => global.users * catalogue,
        Objective::Frozen => 0,
    };
    let input_dim = u32::try_from(shape.input_dim).unwrap_or(0);
    if objective.trains_towers() { work.trained(model, input_dim) } else { work.forward(model, input_dim) }
}

fn add_batch(work: &mut Work, model: &ModelConfig, batch: &MicroBatch) {
    work.unique_items += batch.unique_items.len() as u64;
    lengths(&batch.history).for_each(|length| work.add_sequence(length));
    work.embeddings += batch.row_user.len() as u64;
    let items = lengths(&batch.targets).chain(lengths(&batch.negatives));
    work.add_items(model.item_tower, batch.embedded_items() as u64, items);
}

fn lengths(sequences: &PackedSequences) -> impl Iterator<Item = u64> {
    sequences.runs.iter().flat_map(|run| std::iter::repeat_n(run.length as u64, run.count))
}

/// How a sample of a step's embeddings lies on the unit sphere (Wang and Isola, "Understanding contrastive representation
/// learning through alignment and uniformity on the hypersphere", ICML 2020).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Geometry {
    /// Mean squared distance of the trained pairs of a user and a target; none without any.
    pub alignment: Option<f64>,
    /// `ln mean exp(-2 d^2)` over pairs of rows of two users, and of two items; 0 = all lie on one point.
    pub user_uniformity: Option<f64>,
    pub item_uniformity: Option<f64>,
}

/// The geometry of the step after `finished` ones, if it is its turn and the towers learn; `dim` leaves further dimensions
/// out, which are no part of what the towers learn.
pub(super) fn geometry(
    finished: u64,
    (share, embeddings): (&Share, &Embeddings),
    objective: &Objective,
    dim: i64,
) -> Option<Geometry> {
    let pairing = objective.pairing().filter(|_| looks(finished))?;
    let sample = Sample {
        user: embeddings.user.narrow(1, 0, dim),
        item: embeddings.item.narrow(1, 0, dim),
        row_user: &share.row_user,
        item_user: &share.item_user,
        item_id: &share.item_id,
    };
    Some(tch::no_grad(|| sample.geometry(pairing)))
}

struct Sample<'a> {
    /// `[R, d]`.
    user: Tensor,
    /// `[M, d]`; empty if the objective embeds the catalogue instead.
    item: Tensor,
    /// `[R]`.
    row_user: &'a Tensor,
    /// `[M]`.
    item_user: &'a Tensor,
    item_id: &'a Tensor,
}

impl Sample<'_> {
    fn geometry(&self, pairing: Pairs) -> Geometry {
        let (rows, items) = (self.user.size()[0].min(SAMPLE), self.item.size()[0].min(SAMPLE));
        let unit = |all: &Tensor, count: i64| {
            let some = all.narrow(0, 0, count).to_kind(Kind::Float);
            &some / some.norm_scalaropt_dim(2.0, [-1_i64].as_slice(), true).clamp_min(1e-12)
        };
        let (user, item) = (unit(&self.user, rows), unit(&self.item, items));
        let first = |all: &Tensor, count| all.narrow(0, 0, count);
        let (row_user, item_user) = (first(self.row_user, rows), first(self.item_user, items));
        Geometry {
            alignment: alignment((&user, &row_user), (&item, &item_user), pairing),
            user_uniformity: uniformity(&user, &row_user),
            item_uniformity: uniformity(&item, &first(self.item_id, items)),
        }
    }
}

/// Rows `[R, d]` and `[M, d]` of length 1 with their users.
fn alignment(
    (user, row_user): (&Tensor, &Tensor),
    (item, item_user): (&Tensor, &Tensor),
    pairing: Pairs,
) -> Option<f64> {
    if user.size()[0] == 0 || item.size()[0] == 0 {
        return None;
    }
    let (row, target) = pair_indices(row_user, item_user, pairing);
    let apart = user.index_select(0, &row) - item.index_select(0, &target);
    (row.size()[0] > 0).then(|| (&apart * &apart).sum(Kind::Double).double_value(&[]) / row.size()[0] as f64)
}

/// Rows `[n, d]` of length 1; those of one `key` are not compared.
fn uniformity(rows: &Tensor, key: &Tensor) -> Option<f64> {
    let others = key.unsqueeze(1).not_equal_tensor(key).to_kind(Kind::Float);
    let pairs = others.sum(Kind::Double).double_value(&[]);
    // |a - b|^2 = 2 - 2 a.b
    let potential = (rows.matmul(&rows.tr()) * 4.0 - 4.0).exp() * others;
    (pairs > 0.0).then(|| (potential.sum(Kind::Double).double_value(&[]) / pairs).ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(user: &[[f32; 2]], item: &[[f32; 2]], pairing: Pairs) -> Geometry {
        let matrix = |rows: &[[f32; 2]]| Tensor::from_slice(rows.as_flattened()).view([rows.len() as i64, 2]);
        let numbers = |count: usize| Tensor::arange(count as i64, (Kind::Int64, tch::Device::Cpu));
        let (row_user, item_user) = (numbers(user.len()), numbers(item.len()));
        let (user, item) = (matrix(user), matrix(item));
        Sample { user, item, row_user: &row_user, item_user: &item_user, item_id: &item_user }.geometry(pairing)
    }

    fn near(value: Option<f64>, wanted: f64) {
        assert!(value.is_some_and(|value| (value - wanted).abs() < 1e-6), "{value:?} is not {wanted}");
    }

    #[test]
    fn collapsed_embeddings_are_aligned_and_not_uniform() {
        let here = [[3.0, 0.0], [0.5, 0.0]];
        let collapsed = geometry(&here, &here, Pairs::AllAction);
        near(collapsed.alignment, 0.0);
        near(collapsed.user_uniformity, 0.0);
        near(collapsed.item_uniformity, 0.0);
    }

    #[test]
    fn distances_are_those_on_the_unit_circle() {
        // users opposite to each other (4 apart, squared), each at a right angle to its item (2 apart, squared)
        let apart = geometry(&[[2.0, 0.0], [-1.0, 0.0]], &[[0.0, 1.0], [0.0, 5.0]], Pairs::AllAction);
        near(apart.alignment, 2.0);
        near(apart.user_uniformity, -8.0);
        near(apart.item_uniformity, 0.0);
    }

    #[test]
    fn what_is_not_there_is_not_told() {
        assert_eq!(geometry(&[], &[], Pairs::AllAction), Geometry::default());
        let alone = geometry(&[[1.0, 0.0]], &[], Pairs::Next);
        assert_eq!(alone, Geometry::default());
    }
}
