//! Full ranking over the catalogue on all workers.
//!
//! Input: a split and the parameters. Output: Recall@k, NDCG@k, HR@k, MRR and AUC over all its users, the same on every
//! rank; on request for each segment with intervals, and beside them what the built-in comparisons reach.
//! Each rank embeds its part of the catalogue and of the users; item embeddings are gathered, metric sums added up.
//! The rank of a target counts every item of the catalogue (`learn_domain::ranking` has the rule for ties); items of
//! the history are left out if `evaluation.exclude_history` says so, the target never is. Memory grows with the
//! catalogue and a batch of users, besides the users' histories and a cache of rows; not with resamples times users.
//! An item that a user takes more than once in the split is one target of it. With a CVR head, its metrics on the targets
//! as exposures come with them; each exposure counts there.

mod comparisons;
mod rank;

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use learn_domain::config::{ByteSize, EvaluationConfig};
use learn_domain::plan::contiguous_part;
use learn_domain::ranking::{Metrics, Placement};
use learn_domain::report::{Comparison, Estimate, Evaluation, SegmentResult, Split};
use learn_domain::resampling::{Share, Totals};
use learn_domain::segments::{Segment, Segments};
use learn_domain::{Phase, Step};
use learn_model::{Forward, ItemInputs, Parameters, Pch, Tape};
use learn_proto::flight::Ticket;
use learn_telemetry::WorkerMetrics;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

use crate::checkpoint;
use crate::conversions::{Conversions, Place};
use crate::error::WorkerError;
use crate::feed::assemble::{Seen, newest_positions};
use crate::feed::flight::{DataClient, HeldOutUser};
use crate::feed::{RowSettings, RowSource};
use crate::session::{Ended, Session, Turn};
use crate::train::{Exchange, rows_tensor, sequences, shape};

/// Items whose content embeddings are fetched and embedded at once.
const ITEM_CHUNK: usize = 4096;

/// A model with parameters, as evaluation sees it.
#[derive(Clone, Copy)]
pub struct Catalogue<'a> {
    pub model: &'a Pch,
    pub parameters: &'a Parameters,
}

/// What to evaluate.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub split: Split,
    /// Step and epochs of the parameters.
    pub step: Step,
    pub epoch: u32,
    /// Segments, intervals and comparisons too.
    pub full: bool,
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
    /// The model reads when interactions were.
    times: bool,
    metrics: WorkerMetrics,
}

/// Runs an evaluation task.
///
/// # Errors
/// If the checkpoint does not fit the dataset, or the job breaks.
pub fn run(session: &Session, turn: &mut Turn, checkpoint: &str, split: Split) -> Result<Ended, WorkerError> {
    session.progress.enter(Phase::Evaluation);
    let admission = &session.admission;
    let handle = session.handle();
    let patience = session.control.patience();
    let data = handle.block_on(DataClient::of(admission, &session.pass, patience))?;
    let model = Pch::new(shape(&admission.config, &admission.dataset))?;
    let expected = checkpoint::Expected { dataset: &admission.dataset, signature: None };
    let (state, weights) = checkpoint::read_model(checkpoint.as_ref(), Some(&expected))?;
    let parameters = Parameters::load(model.shape(), weights, Kind::Float, session.device)?;
    // nothing trains beside it
    let mut evaluator = Evaluator::new(session, data, admission.config.cluster.row_cache)?;
    let catalogue = Catalogue { model: &model, parameters: &parameters };
    let request = Request { split, step: state.step, epoch: state.epoch, full: true };
    let evaluation = evaluator.evaluate(&catalogue, &mut turn.exchange, &request)?;
    if turn.is_first() {
        turn.member.report_evaluation(&evaluation)?;
        turn.member.flush()?;
    }
    // a rank that is done speaks for all
    turn.exchange.barrier()?;
    Ok(Ended::Done)
}

impl Evaluator {
    /// One that keeps so much of the content embeddings of histories from one evaluation to the next; the feed's cache is the
    /// feed's alone.
    ///
    /// # Errors
    /// If the data service refuses.
    pub fn new(session: &Session, data: DataClient, row_cache: ByteSize) -> Result<Self, WorkerError> {
        let (config, dataset) = (&session.admission.config, &session.admission.dataset);
        let handle = session.handle().clone();
        let settings = RowSettings {
            dim: dataset.embedding_dim as usize,
            cache_bytes: row_cache.0,
            items: dataset.items,
            streams: config.cluster.row_streams,
            ..RowSettings::default()
        };
        let rows = RowSource::new(&data, &settings, session.metrics.clone());
        Ok(Self {
            handle,
            data,
            rows,
            settings: config.evaluation.clone(),
            forward: Forward { train: false, precision: config.training.precision },
            device: session.device,
            dim: settings.dim,
            items: dataset.items as usize,
            max_history: config.sampling.history as usize,
            times: config.model.reads_times(),
            metrics: session.metrics.clone(),
        })
    }

    /// Evaluates one split on all ranks.
    ///
    /// # Errors
    /// If data or collective fail, or the scores are not finite.
    pub fn evaluate(
        &mut self,
        catalogue: &Catalogue<'_>,
        exchange: &mut Exchange,
        request: &Request,
    ) -> Result<Evaluation, WorkerError> {
        let started = Instant::now();
        let keep_content = request.full && self.content_fits(exchange.world_size());
        let (items, content) = tch::no_grad(|| self.embed_items(catalogue, exchange, keep_content))?;
        let (parts, comparisons) = if request.full {
            let counts = self.handle.block_on(self.data.popularity())?;
            let comparisons =
                tch::no_grad(|| comparisons::comparisons(&counts, content, self.settings.decay, self.device));
            (Parts::Segments(Segments::new(self.settings.segments.clone(), counts)), comparisons)
        } else {
            (Parts::Whole, Vec::new())
        };
        let users = self.held_out(request.split, exchange)?;
        let (metrics, exclude_history) = (Metrics::new(&self.settings.cutoffs), self.settings.exclude_history);
        let resamples = if request.full { self.settings.resamples } else { 0 };
        let empty = Totals::new(parts.segments().len(), metrics.names().len(), resamples);
        let mut conversions = catalogue.model.shape().cvr_hidden.map(|_| Conversions::default());
        // the model's, then those of the comparisons
        let mut totals = vec![empty; 1 + comparisons.len()];
        let mut score = || -> Result<(), WorkerError> {
            for batch in users.chunks(self.settings.batch_users as usize) {
                exchange.check()?;
                let histories: Vec<Seen<'_>> = batch.iter().map(|user| user.seen().newest(self.max_history)).collect();
                let mut add = |scorer: usize, users: &Tensor, items: &Tensor| -> Result<(), WorkerError> {
                    let placements = rank::place(users, items, batch, exclude_history)?;
                    totals[scorer].add(&shares(batch, &placements, &metrics, &parts));
                    Ok(())
                };
                let _no_grad = tch::no_grad_guard();
                let embedded = self.embed_users(catalogue, &histories)?;
                add(0, &embedded, &items)?;
                if let Some(conversions) = &mut conversions {
                    let place = |at: usize, target| Place {
                        row: batch[at].row as usize,
                        groups: parts.groups(batch[at].history.len(), target),
                    };
                    conversions.add(catalogue.parameters, (&embedded, &items), batch, place)?;
                }
                for (scorer, comparison) in (1..).zip(&comparisons) {
                    add(scorer, &comparison.users(&histories), &comparison.items)?;
                }
            }
            Ok(())
        };
        let diverged = match score() {
            Ok(()) => 0,
            Err(WorkerError::NonFiniteScores) => 1,
            Err(error) => return Err(error),
        };
        // all ranks come to the same, so that none waits for one that has left
        let mut diverged = [diverged];
        exchange.sum_i64(&mut diverged)?;
        if diverged != [0] {
            return Err(WorkerError::NonFiniteScores);
        }
        for totals in &mut totals {
            exchange.sum_i64(totals.sums_mut())?;
        }
        let compared = comparisons.iter().zip(&totals[1..]).map(|(comparison, totals)| Comparison {
            name: comparison.name.to_owned(),
            metrics: parts.whole(&metrics, totals),
            segments: parts.results(&metrics, totals),
        });
        let mut whole = parts.whole(&metrics, &totals[0]);
        let mut segments = parts.results(&metrics, &totals[0]);
        if let Some(conversions) = conversions {
            let gathered = conversions.gather(exchange)?;
            whole.extend(gathered.metrics(0));
            for (group, segment) in segments.iter_mut().enumerate() {
                let alone = |(name, value)| (name, Estimate { value, interval: None });
                segment.metrics.extend(gathered.metrics(group).into_iter().map(alone));
            }
        }
        Ok(Evaluation {
            split: request.split,
            step: request.step,
            epoch: request.epoch,
            users: totals[0].users(0),
            metrics: whole,
            segments,
            comparisons: compared.collect(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// This rank's users of a split.
    fn held_out(&self, split: Split, exchange: &Exchange) -> Result<Vec<HeldOutUser>, WorkerError> {
        let ticket = Ticket::Evaluation {
            split,
            rank: exchange.rank() as u32,
            world_size: exchange.world_size() as u32,
            times: self.times,
        };
        let (users, bytes) = self.handle.block_on(self.data.held_out(&ticket))?;
        self.metrics.received_bytes_total.with_label_values(&["evaluation"]).inc_by(bytes);
        Ok(users)
    }

    /// Whether the content embeddings of all items may be held at once.
    fn content_fits(&self, world_size: usize) -> bool {
        let bytes = content_peak(self.items, self.dim, world_size);
        let limit = self.settings.content_memory.0;
        if bytes > limit {
            tracing::warn!(bytes, limit, "no comparison by content: raise evaluation.content_memory for it");
        }
        (1..=limit).contains(&bytes)
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
        Ok(rows_tensor(&rows, (sample.len(), self.dim), self.device))
    }

    /// Content embeddings `[n, input_dim]` in f16 of this rank's part of the catalogue, on the device, and its first item.
    ///
    /// # Errors
    /// If they cannot be fetched.
    pub fn own_items(&mut self, exchange: &Exchange) -> Result<(Tensor, i64), WorkerError> {
        let part = contiguous_part(self.items, exchange.rank(), exchange.world_size());
        let mine: Vec<u32> = part.clone().map(|item| item as u32).collect();
        let all = Tensor::empty([mine.len() as i64, self.dim as i64], (Kind::Half, self.device));
        for (number, chunk) in mine.chunks(ITEM_CHUNK).enumerate() {
            exchange.check()?;
            let rows = self.handle.block_on(self.rows.fetch(chunk))?;
            all.narrow(0, (number * ITEM_CHUNK) as i64, chunk.len() as i64).copy_(&rows_tensor(
                &rows,
                (chunk.len(), self.dim),
                self.device,
            ));
        }
        Ok((all, part.start as i64))
    }

    /// All item embeddings `[N, d]`, each rank having embedded an equal part, and if they are to be kept the content
    /// embeddings `[N, input_dim]` they were made of.
    fn embed_items(
        &mut self,
        catalogue: &Catalogue<'_>,
        exchange: &mut Exchange,
        keep_content: bool,
    ) -> Result<(Tensor, Option<Tensor>), WorkerError> {
        let world = exchange.world_size();
        let part = |rank: usize| contiguous_part(self.items, rank, world);
        let counts: Vec<usize> = (0..world).map(|rank| part(rank).len()).collect();
        let mine: Vec<u32> = part(exchange.rank()).map(|item| item as u32).collect();
        let mut parts = vec![Tensor::zeros([0, catalogue.model.output_dim()], (Kind::Float, self.device))];
        // whole from the start: pieces would be there a second time while they become one
        let content =
            keep_content.then(|| Tensor::empty([mine.len() as i64, self.dim as i64], (Kind::Float, self.device)));
        for (number, chunk) in mine.chunks(ITEM_CHUNK).enumerate() {
            exchange.check()?;
            let rows = self.handle.block_on(self.rows.fetch(chunk))?;
            let rows = rows_tensor(&rows, (chunk.len(), self.dim), self.device);
            let inputs = ItemInputs { items: chunk, content: &rows, id_seed: None, tape: Some(&Tape::new(0)) };
            parts.push(catalogue.model.catalogue(catalogue.parameters, &inputs, &self.forward));
            if let Some(content) = &content {
                content.narrow(0, (number * ITEM_CHUNK) as i64, chunk.len() as i64).copy_(&rows);
            }
        }
        let items = exchange.gather_rows(&Tensor::cat(&parts, 0), &counts)?;
        let content = match content {
            Some(mine) if world > 1 => Some(exchange.gather_rows(&mine, &counts)?),
            all => all,
        };
        Ok((items, content))
    }

    /// User embeddings `[B, d]` at the newest item of each history.
    fn embed_users(&mut self, catalogue: &Catalogue<'_>, histories: &[Seen<'_>]) -> Result<Tensor, WorkerError> {
        let (unique, packed) = newest_positions(histories);
        let rows = self.handle.block_on(self.rows.rows(&unique))?;
        let rows = rows_tensor(&rows, (unique.len(), self.dim), self.device);
        let inputs = ItemInputs { items: &unique, content: &rows, id_seed: None, tape: Some(&Tape::new(0)) };
        Ok(embed_histories(catalogue, &inputs, &sequences(&packed, self.device), &self.forward))
    }
}

/// Most bytes that a rank holds of the catalogue's content embeddings in f32 at once: all of them, and while they are
/// gathered its own part as well.
fn content_peak(items: usize, dim: usize, world_size: usize) -> u64 {
    let own = if world_size > 1 { items.div_ceil(world_size) } else { 0 };
    4 * (items + own) as u64 * dim as u64
}

/// User embeddings `[B, d]` of packed histories over their unique items.
pub fn embed_histories(
    catalogue: &Catalogue<'_>,
    inputs: &ItemInputs<'_>,
    histories: &learn_model::Sequences,
    forward: &Forward,
) -> Tensor {
    let items = catalogue.model.items(catalogue.parameters, inputs, forward);
    catalogue.model.user(catalogue.parameters, &items, histories, forward)
}

/// Each user's values in each segment that holds some of its targets, each item among them once: whoever takes an item
/// twice wants one item, and it has one place in the ranking.
fn shares(batch: &[HeldOutUser], placements: &[Placement], metrics: &Metrics, parts: &Parts) -> Vec<Share> {
    let mut shares = Vec::new();
    let mut placements = placements.iter();
    for user in batch {
        let mut taken = HashSet::new();
        let placed = user.targets.iter().copied().zip(placements.by_ref().copied());
        let targets: Vec<(u32, Placement)> = placed.filter(|(target, _)| taken.insert(*target)).collect();
        for (group, segment) in parts.segments().iter().enumerate() {
            let inside = targets.iter().filter(|(target, _)| parts.contains(*segment, user.history.len(), *target));
            let inside: Vec<Placement> = inside.map(|(_, placement)| *placement).collect();
            if !inside.is_empty() {
                let (row, targets) = (user.row.into(), inside.len() as u32);
                shares.push(Share { row, group, targets, values: metrics.of(&inside) });
            }
        }
    }
    shares
}

/// What an evaluation is divided into.
enum Parts {
    Whole,
    Segments(Segments),
}

impl Parts {
    fn segments(&self) -> &'static [Segment] {
        match self {
            Self::Whole => &Segment::ALL[..1],
            Self::Segments(_) => &Segment::ALL,
        }
    }

    fn contains(&self, segment: Segment, history: usize, target: u32) -> bool {
        match self {
            Self::Whole => true,
            Self::Segments(segments) => segments.contains(segment, history, target),
        }
    }

    /// The segments that a target of a user belongs to, a bit each.
    fn groups(&self, history: usize, target: u32) -> u64 {
        let inside = |(group, segment): (usize, &Segment)| u64::from(self.contains(*segment, history, target)) << group;
        self.segments().iter().enumerate().map(inside).sum()
    }

    /// The means of one scorer over everything.
    fn whole(&self, metrics: &Metrics, totals: &Totals) -> BTreeMap<String, f64> {
        metrics.names().into_iter().enumerate().map(|(metric, name)| (name, totals.mean(0, metric).value)).collect()
    }

    /// The means of one scorer in each segment; none if there are no segments.
    fn results(&self, metrics: &Metrics, totals: &Totals) -> Vec<SegmentResult> {
        let Self::Segments(_) = self else { return Vec::new() };
        let result = |(group, segment): (usize, &Segment)| SegmentResult {
            segment: segment.name().to_owned(),
            users: totals.users(group),
            targets: totals.targets(group),
            metrics: metrics
                .names()
                .into_iter()
                .enumerate()
                .map(|(metric, name)| (name, totals.mean(group, metric)))
                .collect(),
        };
        self.segments().iter().enumerate().map(result).collect()
    }
}

#[cfg(test)]
mod tests {
    use learn_domain::config::SegmentsConfig;

    use super::*;

    #[test]
    fn the_own_part_lies_beside_all_content_while_it_is_gathered() {
        let float = 4;
        assert_eq!(content_peak(10, 3, 1), 10 * 3 * float, "alone nothing is gathered");
        assert_eq!(content_peak(10, 3, 2), (10 + 5) * 3 * float);
        assert_eq!(content_peak(10, 3, 4), (10 + 3) * 3 * float, "the largest part counts");
        assert_eq!(content_peak(10, 0, 2), 0);
        // beyond 32 bits
        assert_eq!(content_peak(10_000_000, 4096, 8), 11_250_000 * 4096 * float);
    }

    #[test]
    fn the_targets_of_a_user_are_divided_by_segments_of_items() {
        let user = HeldOutUser { row: 4, history: vec![0, 1], targets: vec![2, 3, 4], ..HeldOutUser::default() };
        let at = |higher| Placement { higher, equal: 0, competitors: 4 };
        let placements = [at(0), at(1), at(3)];
        let thresholds = SegmentsConfig { cold_items: 1, head_items: 0.2, cold_users: 2, active_users: 3 };
        let parts = Parts::Segments(Segments::new(thresholds, vec![3, 3, 9, 1, 0]));
        let found = shares(&[user], &placements, &Metrics::new(&[1]), &parts);
        let mrr = |share: &Share| share.values[0];
        let groups: Vec<_> = found.iter().map(|share| (share.group, share.targets, mrr(share))).collect();
        assert_eq!(groups, [(0, 3, 1.0), (1, 2, 0.5), (2, 2, 0.5), (3, 1, 1.0), (4, 3, 1.0)]);
        assert!(found.iter().all(|share| share.row == 4));

        let user = HeldOutUser { history: vec![0], targets: vec![2], ..HeldOutUser::default() };
        assert_eq!(shares(&[user], &[at(0)], &Metrics::new(&[1]), &Parts::Whole).len(), 1);
    }

    #[test]
    fn an_item_that_a_user_takes_twice_is_one_target() {
        let user = |row, targets: &[u32]| HeldOutUser {
            row,
            history: vec![0],
            targets: targets.to_vec(),
            ..HeldOutUser::default()
        };
        let at = |higher| Placement { higher, equal: 0, competitors: 4 };
        let batch = [user(0, &[2, 2, 3]), user(1, &[2])];
        let placements = [at(0), at(0), at(3), at(1)];
        let found = shares(&batch, &placements, &Metrics::new(&[1]), &Parts::Whole);
        let counted: Vec<_> = found.iter().map(|share| (share.row, share.targets)).collect();
        assert_eq!(counted, [(0, 2), (1, 1)], "the next user's placements are its own");
        // mrr, auc, recall@1, ndcg@1, hr@1
        assert_eq!(found[0].values, [1.0, (1.0 + 0.25) / 2.0, 0.5, 1.0, 1.0]);
        assert_eq!(found[1].values, [0.5, 0.75, 0.0, 0.0, 0.0]);
    }
}
