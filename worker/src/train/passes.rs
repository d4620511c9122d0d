//! A step's forward passes on the device.
//!
//! Input: prepared arrays. Output: tower embeddings with or without a graph. A share larger than
//! `training.micro_batch` is embedded twice: first without a graph to know every embedding that the loss needs, then
//! pass by pass with a graph, each fed with its part of the loss's gradient. The gradient equals that of one large
//! pass (Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", RepL4NLP 2021), and
//! dropout draws the same masks in both because each pass has a seed of its own.

use half::f16;
use learn_domain::random;
use learn_model::{ItemInputs, Milestone, Sequences, Tape};
use tch::{Device, Tensor};

use super::device_rows::DeviceRows;
use super::objective::Towers;
use crate::feed::PassRows;
use crate::feed::assemble::{MicroBatch, PackedSequences};

/// The tensors of one forward pass.
pub struct Pass {
    /// The unique items, U of them.
    items: Vec<u32>,
    /// Their content embeddings, `[U, input_dim]`.
    rows: Tensor,
    history: Sequences,
    targets: Sequences,
    /// Negatives that are nobody's targets, `[n, 1]`, if there are any.
    negatives: Option<Sequences>,
    seeds: Seeds,
    /// Embedded history positions, and embedded targets with negatives, of this pass.
    counts: (i64, i64),
}

/// What a step's loss is made of, on this rank.
pub struct Share {
    pub passes: Vec<Pass>,
    /// `[R]`: place in the global batch of each user row.
    pub row_user: Tensor,
    /// `[M]`: item index of each target and negative row.
    pub item_id: Tensor,
    /// `[M]`: place in the global batch of each target row's user.
    pub item_user: Tensor,
    pub exposures: Exposures,
    pub tokens: u64,
    pub encoded_rows: u64,
}

/// The sampled targets that have a label.
pub struct Exposures {
    /// `[K]`: user row and item row of each.
    pub user_row: Tensor,
    pub item_row: Tensor,
    /// `[K]`: 1 = converted.
    pub label: Tensor,
}

/// User rows `[R, d]` and item rows `[M, d]`.
#[derive(Debug)]
pub struct Embeddings {
    pub user: Tensor,
    pub item: Tensor,
}

/// Packed sequences as tensors.
#[must_use]
pub fn sequences(packed: &PackedSequences, device: Device) -> Sequences {
    let on_device = |values: &[i64]| learn_torch::on_device(values, device);
    Sequences {
        items: on_device(&packed.items),
        gaps: (!packed.gaps.is_empty()).then(|| on_device(&packed.gaps)),
        runs: packed.runs.clone(),
        positions: on_device(&packed.positions),
    }
}

/// Rows `[items, dim]` as a tensor.
pub fn rows_tensor(rows: &[f16], (items, dim): (usize, usize), device: Device) -> Tensor {
    Tensor::from_slice(rows).view([items as i64, dim as i64]).to_device(device)
}

/// Seeds of a step's draws.
#[derive(Clone, Copy, Debug)]
pub struct Seeds {
    /// Of dropout; of this rank.
    pub dropout: u64,
    /// Of the items whose learned vectors are left out; the same on every rank.
    pub items: u64,
}

impl Share {
    /// Moves a prepared step to the device of `table`, which has some of its rows.
    #[must_use]
    pub fn load(micro_batches: &[(MicroBatch, PassRows)], table: &mut DeviceRows, seeds: Seeds) -> Self {
        let device = table.device();
        let passes = micro_batches.iter().enumerate().map(|(number, (batch, rows))| Pass {
            rows: table.take(rows, batch.unique_items.len()),
            items: batch.unique_items.clone(),
            history: sequences(&batch.history, device),
            targets: sequences(&batch.targets, device),
            negatives: (!batch.negatives.items.is_empty()).then(|| sequences(&batch.negatives, device)),
            seeds: Seeds { dropout: random::key(&[seeds.dropout, number as u64]), ..seeds },
            counts: (batch.row_user.len() as i64, batch.embedded_items() as i64),
        });
        let passes = passes.collect();
        let joined = |part: fn(&MicroBatch) -> &[i64]| {
            let all: Vec<i64> = micro_batches.iter().flat_map(|(batch, _)| part(batch)).copied().collect();
            learn_torch::on_device(&all, device)
        };
        Self {
            exposures: Exposures::load(micro_batches, device),
            passes,
            row_user: joined(|batch| &batch.row_user),
            item_id: joined(|batch| &batch.item_id),
            item_user: joined(|batch| &batch.item_user),
            tokens: micro_batches.iter().map(|(batch, _)| batch.tokens).sum(),
            encoded_rows: micro_batches.iter().map(|(batch, _)| batch.encoded_rows).sum(),
        }
    }
}

impl Exposures {
    /// Those of all passes, with rows counted over the whole share.
    fn load(micro_batches: &[(MicroBatch, PassRows)], device: Device) -> Self {
        let (mut user_row, mut item_row, mut label) = (Vec::new(), Vec::new(), Vec::new());
        let (mut users, mut items) = (0, 0);
        for (batch, _) in micro_batches {
            user_row.extend(batch.exposures.user_row.iter().map(|row| users + row));
            item_row.extend(batch.exposures.item_row.iter().map(|row| items + row));
            label.extend(batch.exposures.label.iter().map(|&label| f32::from(label)));
            users += batch.row_user.len() as i64;
            items += batch.item_id.len() as i64;
        }
        let on_device = |values: &[i64]| learn_torch::on_device(values, device);
        Self {
            user_row: on_device(&user_row),
            item_row: on_device(&item_row),
            label: learn_torch::on_device(&label, device),
        }
    }

    /// K.
    pub fn count(&self) -> i64 {
        self.label.size()[0]
    }
}

impl Pass {
    /// Both towers, and the way back.
    pub fn embed(&self, towers: Towers<'_>) -> (Embeddings, Tape) {
        let Towers { model, parameters, forward, .. } = towers;
        let tape = towers.tape(self.seeds.dropout);
        let inputs =
            ItemInputs { items: &self.items, content: &self.rows, id_seed: Some(self.seeds.items), tape: Some(&tape) };
        let items = model.items(parameters, &inputs, forward);
        let item = |sequences| model.item(parameters, &items, sequences, forward);
        let targets = item(&self.targets);
        let embeddings = Embeddings {
            user: model.user(parameters, &items, &self.history, forward),
            item: match &self.negatives {
                Some(negatives) => Tensor::cat(&[targets, item(negatives)], 0),
                None => targets,
            },
        };
        (embeddings, tape)
    }
}

/// The embeddings of a share, and the way back if they are those of a single pass.
pub struct Forwarded {
    pub embeddings: Embeddings,
    tape: Option<Tape>,
}

impl Forwarded {
    /// The embeddings without a graph.
    #[must_use]
    pub fn detached(&self) -> Embeddings {
        Embeddings { user: self.embeddings.user.detach(), item: self.embeddings.item.detach() }
    }
}

/// Embeds a share: with the way back if it is one pass, without if it is several, empty if it has no user.
pub fn forward(share: &Share, towers: Towers<'_>) -> Forwarded {
    match &share.passes[..] {
        [] => {
            let none =
                || Tensor::zeros([0, towers.model.output_dim()], (towers.parameters.kind(), share.row_user.device()));
            Forwarded { embeddings: Embeddings { user: none(), item: none() }, tape: None }
        }
        [pass] => {
            let (embeddings, tape) = pass.embed(towers);
            Forwarded { embeddings, tape: Some(tape) }
        }
        passes => {
            let parts: Vec<Embeddings> = tch::no_grad(|| passes.iter().map(|pass| pass.embed(towers).0).collect());
            let join = |part: fn(&Embeddings) -> &Tensor| Tensor::cat(&parts.iter().map(part).collect::<Vec<_>>(), 0);
            Forwarded { embeddings: Embeddings { user: join(|e| &e.user), item: join(|e| &e.item) }, tape: None }
        }
    }
}

/// Brings the gradient of the loss with respect to the share's embeddings back to the parameters, and calls `passed` at
/// each milestone of the last pass.
pub fn backward(
    share: &Share,
    forwarded: Forwarded,
    gradient: &Embeddings,
    towers: Towers<'_>,
    passed: &mut dyn FnMut(Milestone),
) {
    if let Some(tape) = &forwarded.tape {
        let Embeddings { user, item } = &forwarded.embeddings;
        tape.backward(towers.parameters, &[(user, &gradient.user), (item, &gradient.item)], passed);
        return;
    }
    let (mut first_user, mut first_item) = (0, 0);
    for (number, pass) in share.passes.iter().enumerate() {
        let (users, items) = pass.counts;
        let (Embeddings { user, item }, tape) = pass.embed(towers);
        let (d_user, d_item) = (gradient.user.narrow(0, first_user, users), gradient.item.narrow(0, first_item, items));
        let is_last = number + 1 == share.passes.len();
        let mut passed = |milestone| {
            if is_last {
                passed(milestone)
            }
        };
        tape.backward(towers.parameters, &[(&user, &d_user), (&item, &d_item)], &mut passed);
        first_user += users;
        first_item += items;
    }
}
