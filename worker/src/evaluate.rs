//! Full ranking over the catalogue on all workers.
//!
//! Input: a split and the parameters. Output: Recall@k, NDCG@k and MRR over all its users, the same on every rank.
//! Each rank embeds its part of the catalogue and of the users; item embeddings are gathered, metric sums added up.
//! The rank of a target counts every item of the catalogue (`learn_domain::ranking` has the rule for ties); items of
//! the history are left out if `evaluation.exclude_history` says so, the target never is. With a CVR head, its metrics on
//! the targets as exposures come with them.

use std::time::Instant;

use learn_domain::Step;
use learn_domain::config::EvaluationConfig;
use learn_domain::ranking::{RankTotals, rank};
use learn_domain::report::{Evaluation, Split};
use learn_model::{Forward, Parameters, Pch};
use learn_proto::flight::Ticket;
use learn_telemetry::WorkerMetrics;
use tch::{Device, IndexOp, Kind, Tensor};
use tokio::runtime::Handle;

use crate::checkpoint;
use crate::conversions::{Conversions, Place};
use crate::error::WorkerError;
use crate::feed::assemble::newest_positions;
use crate::feed::flight::{DataClient, HeldOutUser};
use crate::feed::{RowSettings, RowSource};
use crate::session::{Ended, Membership};
use crate::train::{Exchange, rows_tensor, sequences, shape};

/// Items whose content embeddings are fetched and embedded at once.
const ITEM_CHUNK: usize = 4096;
/// Scores that are in memory at once, for the users or their targets, whichever are more.
const SCORES: i64 = 1 << 24;

/// A model with parameters, as evaluation sees it.
#[derive(Clone, Copy)]
pub struct Catalogue<'a> {
    pub model: &'a Pch,
    pub parameters: &'a Parameters,
}

/// The evaluation side of a member.
pub struct Evaluator {
    handle: Handle,
    data: DataClient,
    rows: RowSource,
    settings: EvaluationConfig,
    forward: Forward,
    device: Device,
    dim: usize,
    items: usize,
    max_history: usize,
    metrics: WorkerMetrics,
}

/// Runs an evaluation task.
///
/// # Errors
/// If the checkpoint does not fit the dataset, or the job breaks.
pub fn run(
    membership: &Membership,
    mut exchange: Exchange,
    checkpoint: &str,
    split: Split,
) -> Result<Ended, WorkerError> {
    let admission = &membership.admission;
    let handle = membership.member.handle();
    let data = handle.block_on(DataClient::connect(&admission.data_locations, &membership.secret))?;
    let model = Pch::new(shape(&admission.config, admission.dataset.embedding_dim))?;
    let expected = checkpoint::Expected { dataset: &admission.dataset, signature: None };
    let snapshot = checkpoint::read(checkpoint.as_ref(), Some(&expected))?;
    let parameters = Parameters::load(model.shape(), snapshot.model, Kind::Float, membership.device)?;
    let mut evaluator = Evaluator::new(membership, data)?;
    let catalogue = Catalogue { model: &model, parameters: &parameters };
    let state = snapshot.state;
    let evaluation = evaluator.evaluate(&catalogue, &mut exchange, split, (state.step, state.epoch))?;
    if membership.member.is_first() {
        membership.member.report_evaluation(&evaluation)?;
    }
    Ok(Ended::Done)
}

impl Evaluator {
    /// # Errors
    /// If the data service refuses.
    pub fn new(membership: &Membership, data: DataClient) -> Result<Self, WorkerError> {
        let (config, dataset) = (&membership.admission.config, &membership.admission.dataset);
        let handle = membership.member.handle().clone();
        // the feed has the cache; evaluation reads past it
        let settings = RowSettings { dim: dataset.embedding_dim as usize, cache_bytes: 0 };
        let rows = handle.block_on(RowSource::open(&data, &settings, membership.metrics.clone()))?;
        Ok(Self {
            handle,
            data,
            rows,
            settings: config.evaluation.clone(),
            forward: Forward { train: false, precision: config.training.precision },
            device: membership.device,
            dim: settings.dim,
            items: dataset.items as usize,
            max_history: config.sampling.history as usize,
            metrics: membership.metrics.clone(),
        })
    }

    /// Evaluates one split on all ranks; `at` is the step and the epochs done.
    ///
    /// # Errors
    /// If data or collective fail, or the scores are not finite.
    pub fn evaluate(
        &mut self,
        catalogue: &Catalogue<'_>,
        exchange: &mut Exchange,
        split: Split,
        (step, epoch): (Step, u32),
    ) -> Result<Evaluation, WorkerError> {
        let started = Instant::now();
        let items = tch::no_grad(|| self.embed_items(catalogue, exchange))?;
        let ticket = Ticket::Evaluation {
            split,
            rank: exchange.rank() as u32,
            world_size: exchange.world_size() as u32,
            times: false,
        };
        let users = self.handle.block_on(self.data.held_out(&ticket))?;
        let indices: usize = users.iter().map(|user| user.history.len() + user.targets.len()).sum();
        self.metrics.received_bytes_total.with_label_values(&["evaluation"]).inc_by(4 * indices as u64);
        let mut totals = RankTotals::new(&self.settings.cutoffs);
        let mut conversions = catalogue.model.shape().cvr_hidden.map(|_| Conversions::default());
        let (rank, world_size) = (exchange.rank(), exchange.world_size());
        for (number, batch) in users.chunks(self.settings.batch_users as usize).enumerate() {
            let _no_grad = tch::no_grad_guard();
            let embedded = self.embed_users(catalogue, batch)?;
            rank_batch(&embedded, &items, batch, &self.settings, &mut totals)?;
            if let Some(conversions) = &mut conversions {
                // the service deals the split's rows out by turns
                let first = number * self.settings.batch_users as usize;
                let place = |at: usize, _| Place { row: rank + (first + at) * world_size, groups: 1 };
                conversions.add(catalogue.parameters, (&embedded, &items), batch, place)?;
            }
        }
        exchange.sum(totals.sums_mut())?;
        let mut metrics = totals.metrics();
        if let Some(conversions) = conversions {
            metrics.extend(conversions.gather(exchange)?.metrics(0));
        }
        let seconds = started.elapsed().as_secs_f64();
        Ok(Evaluation { split, step, epoch, users: totals.users(), metrics, seconds })
    }

    /// Content embeddings `[S, input_dim]` of at most `count` items, evenly spread over the catalogue: the same on every
    /// rank and for any number of them.
    ///
    /// # Errors
    /// If they cannot be fetched.
    pub fn sample_items(&mut self, count: usize) -> Result<Tensor, WorkerError> {
        let stride = self.items.div_ceil(count).max(1);
        let sample: Vec<u32> = (0..self.items as u32).step_by(stride).collect();
        let rows = self.handle.block_on(self.rows.fetch(&sample))?;
        Ok(rows_tensor(&rows, self.dim, self.device))
    }

    /// All item embeddings `[N, d]`, each rank having embedded an equal part.
    fn embed_items(&mut self, catalogue: &Catalogue<'_>, exchange: &mut Exchange) -> Result<Tensor, WorkerError> {
        let world = exchange.world_size();
        let bound = |rank: usize| self.items * rank / world;
        let counts: Vec<usize> = (0..world).map(|rank| bound(rank + 1) - bound(rank)).collect();
        let mine: Vec<u32> = (bound(exchange.rank()) as u32..bound(exchange.rank() + 1) as u32).collect();
        let mut parts = vec![Tensor::zeros([0, catalogue.model.output_dim()], (Kind::Float, self.device))];
        for chunk in mine.chunks(ITEM_CHUNK) {
            let rows = self.handle.block_on(self.rows.fetch(chunk))?;
            let rows = rows_tensor(&rows, self.dim, self.device);
            parts.push(catalogue.model.catalogue(catalogue.parameters, &rows, &self.forward));
        }
        exchange.gather_rows(&Tensor::cat(&parts, 0), &counts)
    }

    /// User embeddings `[B, d]` at the newest item of each history.
    fn embed_users(&mut self, catalogue: &Catalogue<'_>, users: &[HeldOutUser]) -> Result<Tensor, WorkerError> {
        let histories: Vec<&[u32]> = users.iter().map(|user| newest(&user.history, self.max_history)).collect();
        let (unique, padded) = newest_positions(&histories);
        let rows = self.handle.block_on(self.rows.fetch(&unique))?;
        let rows = rows_tensor(&rows, self.dim, self.device);
        Ok(embed_histories(catalogue, &rows, &sequences(&padded, self.device), &self.forward))
    }
}

/// The latest `most` items.
#[must_use]
pub fn newest(history: &[u32], most: usize) -> &[u32] {
    &history[history.len().saturating_sub(most)..]
}

/// User embeddings `[B, d]` of padded histories over rows `[U, input_dim]`.
pub fn embed_histories(
    catalogue: &Catalogue<'_>,
    rows: &Tensor,
    histories: &learn_model::Sequences,
    forward: &Forward,
) -> Tensor {
    let items = catalogue.model.items(catalogue.parameters, rows, forward);
    catalogue.model.user(catalogue.parameters, &items, histories, forward)
}

/// Ranks the targets of a batch of users `[B, d]` among all items `[N, d]`.
fn rank_batch(
    users: &Tensor,
    items: &Tensor,
    batch: &[HeldOutUser],
    settings: &EvaluationConfig,
    totals: &mut RankTotals,
) -> Result<(), WorkerError> {
    let pairs: Vec<(i64, i64)> = (0..)
        .zip(batch)
        .flat_map(|(row, user)| user.targets.iter().map(move |&target| (row, i64::from(target))))
        .collect();
    let pair_user = Tensor::from_slice(&pairs.iter().map(|pair| pair.0).collect::<Vec<_>>()).to_device(users.device());
    let pair_item = Tensor::from_slice(&pairs.iter().map(|pair| pair.1).collect::<Vec<_>>()).to_device(users.device());
    let count = pairs.len() as i64;
    let options = (Kind::Int64, users.device());
    let (mut higher, mut equal) = (Tensor::zeros([count], options), Tensor::zeros([count], options));
    let tile = (SCORES / count.max(batch.len() as i64).max(1)).max(1);
    let wanted = target_scores(users, items, (&pair_user, &pair_item), tile)?;
    for first in (0..items.size()[0]).step_by(tile as usize) {
        let mut scores = score_tile(users, items, first, tile)?;
        let width = scores.size()[1];
        if settings.exclude_history {
            exclude(&mut scores, batch, first);
        }
        let mut rows = scores.index_select(0, &pair_user);
        // a target does not compete with itself
        let own = Tensor::arange_start(first, first + width, options).unsqueeze(0).eq_tensor(&pair_item.unsqueeze(1));
        let _ = rows.masked_fill_(&own, f64::NEG_INFINITY);
        let wanted = wanted.unsqueeze(1);
        higher += rows.gt_tensor(&wanted).sum_dim_intlist(1, false, Kind::Int64);
        equal += rows.eq_tensor(&wanted).sum_dim_intlist(1, false, Kind::Int64);
    }
    let (higher, equal) = (Vec::<i64>::try_from(&higher)?, Vec::<i64>::try_from(&equal)?);
    let mut ranks = higher.iter().zip(&equal).map(|(&higher, &equal)| rank(higher as u64, equal as u64));
    for user in batch {
        totals.add(&ranks.by_ref().take(user.targets.len()).collect::<Vec<_>>());
    }
    Ok(())
}

fn score_tile(users: &Tensor, items: &Tensor, first: i64, tile: i64) -> Result<Tensor, WorkerError> {
    let width = tile.min(items.size()[0] - first);
    let scores = users.matmul(&items.narrow(0, first, width).transpose(0, 1));
    if scores.isfinite().all().int64_value(&[]) == 0 {
        return Err(WorkerError::NonFiniteScores);
    }
    Ok(scores)
}

/// The score of each (user, target) pair, from the same product that its competitors' scores come from: another
/// product could round differently and break ties by chance.
fn target_scores(
    users: &Tensor,
    items: &Tensor,
    (pair_user, pair_item): (&Tensor, &Tensor),
    tile: i64,
) -> Result<Tensor, WorkerError> {
    let mut wanted = Tensor::zeros(pair_user.size(), (users.kind(), users.device()));
    for first in (0..items.size()[0]).step_by(tile as usize) {
        let scores = score_tile(users, items, first, tile)?;
        let width = scores.size()[1];
        let column = pair_item - first;
        let inside = column.ge(0).logical_and(&column.lt(width));
        let picked = scores.index(&[Some(pair_user.shallow_clone()), Some(column.clamp(0, width - 1))]);
        wanted = picked.where_self(&inside, &wanted);
    }
    Ok(wanted)
}

/// Takes the items of each user's history out of a tile that starts at item `first`.
fn exclude(scores: &mut Tensor, batch: &[HeldOutUser], first: i64) {
    let width = scores.size()[1];
    for (row, user) in (0..).zip(batch) {
        let seen =
            user.history.iter().map(|&item| i64::from(item) - first).filter(|column| (0..width).contains(column));
        let columns: Vec<i64> = seen.collect();
        if !columns.is_empty() {
            let columns = Tensor::from_slice(&columns).to_device(scores.device());
            let _ = scores.i(row).index_fill_(0, &columns, f64::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(exclude_history: bool) -> EvaluationConfig {
        EvaluationConfig { cutoffs: vec![1, 3], exclude_history, ..EvaluationConfig::default() }
    }

    fn metrics(scores: &[f32], history: &[u32], target: u32, exclude_history: bool) -> (f64, f64) {
        // users [1, 1] and items [N, 1] make the scores the items themselves
        let items = Tensor::from_slice(scores).view([-1, 1]);
        let batch = [HeldOutUser { history: history.to_vec(), targets: vec![target], ..HeldOutUser::default() }];
        let mut totals = RankTotals::new(&[1, 3]);
        rank_batch(
            &Tensor::ones([1, 1], (Kind::Float, Device::Cpu)),
            &items,
            &batch,
            &settings(exclude_history),
            &mut totals,
        )
        .unwrap();
        (1.0 / totals.metrics()["mrr"], totals.metrics()["recall@3"])
    }

    #[test]
    fn ranks_by_hand() {
        assert_eq!(metrics(&[0.1, 0.9, 0.5, 0.7], &[], 2, false), (3.0, 1.0));
        assert_eq!(metrics(&[0.1, 0.9, 0.5, 0.7], &[1, 3], 2, true), (1.0, 1.0));
        assert_eq!(metrics(&[0.1, 0.9, 0.5, 0.7], &[1, 2], 2, true).0, 2.0, "the target itself is never left out");
        // five items of the same score: two of four others count as higher
        assert_eq!(metrics(&[0.5; 5], &[], 4, false).0, 3.0);
    }

    #[test]
    fn scores_that_are_not_numbers_are_refused() {
        let items = Tensor::from_slice(&[0.1_f32, f32::NAN]).view([-1, 1]);
        let batch = [HeldOutUser { history: vec![0], targets: vec![0], ..HeldOutUser::default() }];
        let users = Tensor::ones([1, 1], (Kind::Float, Device::Cpu));
        let ranked = rank_batch(&users, &items, &batch, &settings(false), &mut RankTotals::new(&[1]));
        assert!(matches!(ranked, Err(WorkerError::NonFiniteScores)));
    }

    #[test]
    fn a_long_history_is_cut_to_its_newest_items() {
        assert_eq!(newest(&[1, 2, 3], 2), [2, 3]);
        assert_eq!(newest(&[1], 2), [1]);
    }
}
