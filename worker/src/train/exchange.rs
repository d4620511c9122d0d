//! Tensors over the collective.
//!
//! Input: this rank's tensors. Output: the same on every rank, or this rank's part. Invariant: every rank calls the
//! same operations in the same order with the same counts, which [`Exchange::announce`] has made known.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use learn_collective::{Aborter, Buffer, Collective, CollectiveError, CommonVector, RowsOffer, TheirRows};
use learn_domain::Phase;
use learn_model::parameters::Bucket;
use learn_model::{Milestone, Parameters, RowGradient};
use learn_proto::convert::AfterStep;
use learn_telemetry::WorkerMetrics;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::Tensor;

use super::step::PhaseClock;
use crate::control::Progress;
use crate::error::WorkerError;

/// What a rank tells the others before a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Announcement {
    /// Sampled history positions of its share (`R` of this rank).
    pub rows: i64,
    /// Sampled targets and further negatives of its share (`M` of this rank).
    pub targets: i64,
    pub tokens: i64,
    pub encoded_rows: i64,
    /// Sampled targets with a label.
    pub exposures: i64,
    /// What it was asked to do before this step.
    pub after: AfterStep,
    /// Steps of the run whose loss or gradient was not finite, as it has counted them.
    pub non_finite: i64,
}

/// While nothing comes to be summed, the collective is looked after so often.
const LOOK: Duration = Duration::from_millis(50);

/// Numbers of an [`Announcement`].
const SAID: usize = 7;

/// The tensor side of a collective.
pub struct Exchange {
    collective: Box<dyn Collective>,
    metrics: WorkerMetrics,
    progress: Arc<Progress>,
    /// The memory of all ranks in which their gradients lie, if they share it.
    gradients: Option<Arc<CommonVector>>,
    counted_bytes: u64,
    waited: Duration,
}

impl Exchange {
    #[must_use]
    pub fn new(collective: Box<dyn Collective>, metrics: WorkerMetrics, progress: Arc<Progress>) -> Self {
        Self { collective, metrics, progress, gradients: None, counted_bytes: 0, waited: Duration::ZERO }
    }

    /// Time that the training thread was inside collectives so far.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Runs one operation; that it was entered can be seen from outside while it waits.
    fn run(
        &mut self,
        operation: impl FnOnce(&mut dyn Collective) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        self.progress.enter_collective();
        let entered = Instant::now();
        let result = operation(&mut *self.collective);
        self.left(entered);
        result
    }

    /// Counts what the training thread has waited inside a collective since then, and what has been sent.
    fn left(&mut self, entered: Instant) {
        let inside = entered.elapsed();
        self.waited += inside;
        self.metrics.collective_seconds_total.inc_by(inside.as_secs_f64());
        self.progress.leave_collective();
        let moved = self.collective.bytes_moved();
        self.metrics.collective_bytes_total.inc_by(moved - self.counted_bytes);
        self.counted_bytes = moved;
    }

    #[must_use]
    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    #[must_use]
    pub fn world_size(&self) -> usize {
        self.collective.world_size()
    }

    /// Between two collectives, in long work that needs no other rank.
    ///
    /// # Errors
    /// If this collective was aborted.
    pub fn check(&self) -> Result<(), CollectiveError> {
        self.collective.aborter().check()
    }

    /// What every rank has to say about the next step, by rank.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn announce(&mut self, mine: Announcement) -> Result<Vec<Announcement>, WorkerError> {
        let Announcement { rows, targets, tokens, encoded_rows, exposures, after, non_finite } = mine;
        let mut send: [i64; SAID] = [rows, targets, tokens, encoded_rows, exposures, after as i64, non_finite];
        let all = self.gather_i64(&mut send, &vec![SAID; self.world_size()])?;
        Ok(all
            .chunks_exact(SAID)
            .map(|said| Announcement {
                rows: said[0],
                targets: said[1],
                tokens: said[2],
                encoded_rows: said[3],
                exposures: said[4],
                after: match said[5] {
                    0 => AfterStep::Continue,
                    1 => AfterStep::Regroup,
                    _ => AfterStep::Stop,
                },
                non_finite: said[6],
            })
            .collect())
    }

    /// Unequal parts of integers, by rank.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn gather_i64(&mut self, mine: &mut [i64], counts: &[usize]) -> Result<Vec<i64>, WorkerError> {
        let mut all = vec![0; counts.iter().sum()];
        self.run(|collective| collective.all_gather(counts, &mut Buffer::i64(mine), &mut Buffer::i64(&mut all)))?;
        Ok(all)
    }

    /// Element-wise sums of integers over the ranks, in place.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn sum_i64(&mut self, values: &mut [i64]) -> Result<(), WorkerError> {
        self.run(|collective| collective.all_reduce_sum(&mut Buffer::i64(values)))?;
        Ok(())
    }

    /// Element-wise sums over the ranks, in place.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn sum(&mut self, values: &mut [f64]) -> Result<(), WorkerError> {
        self.run(|collective| collective.all_reduce_sum(&mut Buffer::f64(values)))?;
        Ok(())
    }

    /// Lets gradients be collected where all ranks can read them, if all can; what was collected is gone. For the
    /// beginning of a generation, before anything is collected: what a rank that is still in an earlier one reads is
    /// not written to again.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn share_gradient_memory(&mut self, parameters: &mut Parameters) -> Result<(), WorkerError> {
        let mut gradients = None;
        let lengths: Vec<usize> = parameters.buckets().iter().map(|bucket| bucket.elements.len()).collect();
        self.run(|collective| {
            gradients = CommonVector::new(collective, parameters.can_place_gradient().then_some(&lengths))?;
            Ok(())
        })?;
        parameters.place_gradient(gradients.as_ref().map(|gradients| Arc::clone(gradients.own())));
        self.gradients = gradients.map(Arc::new);
        Ok(())
    }

    /// The rows that the other workers of this machine have in host memory, as far as they offer them and this one does.
    /// Every rank calls it, with an offer or without.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn meet_neighbours(&mut self, own: Option<&RowsOffer>) -> Result<Vec<TheirRows>, WorkerError> {
        let mut tables = Vec::new();
        self.run(|collective| {
            tables = TheirRows::meet(collective, own)?;
            Ok(())
        })?;
        Ok(tables)
    }

    /// Runs `backward`, which is to collect this rank's gradient and to say what it has passed, and gives the sum of every
    /// rank's gradient `[P]`, in parts one behind the other. They are to be read before the next step is announced, from
    /// when on the ranks in whose memory they lie collect new ones.
    ///
    /// Ranks that share memory wait for each other and add up what is there; others sum what is whole while `backward`
    /// goes on.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn sum_gradient(
        &mut self,
        parameters: &Parameters,
        clock: &mut PhaseClock,
        backward: impl FnOnce(&mut dyn FnMut(Milestone)),
    ) -> Result<Vec<Tensor>, WorkerError> {
        if self.world_size() > 1 && self.gradients.is_none() {
            return self.sum_meanwhile(parameters, clock, backward);
        }
        backward(&mut |_| ());
        clock.enter(Phase::Reduce);
        let flat = parameters.gradients_into_flat();
        let Some(gradients) = self.gradients.take() else {
            self.check()?;
            return Ok(vec![flat]);
        };
        assert!(
            flat.data_ptr() == gradients.own().start().cast(),
            "the gradient lies elsewhere than where it was placed"
        );
        let summed = self.run(|collective| gradients.sum(collective));
        let parts = learn_torch::parts_of(&gradients);
        // this rank's share of the others' gradients, and what it reads of their shares of the sum
        let (whole, own) = (flat.numel(), gradients.own_share());
        let read = ((self.world_size() - 1) * own + whole - own) * size_of::<f32>();
        self.metrics.collective_bytes_total.inc_by(read as u64);
        self.gradients = Some(gradients);
        Ok(summed.map(|()| parts)?)
    }

    /// Sums the parts of the gradient on a thread of their own, in the order in which a backward finishes them; on every
    /// rank the same, whatever its share of the step.
    fn sum_meanwhile(
        &mut self,
        parameters: &Parameters,
        clock: &mut PhaseClock,
        backward: impl FnOnce(&mut dyn FnMut(Milestone)),
    ) -> Result<Vec<Tensor>, WorkerError> {
        let view = |bucket| (bucket, parameters.bucket_gradient(bucket));
        let mut parts: Vec<(&Bucket, Tensor)> = parameters.buckets().iter().map(view).collect();
        parts.sort_by_key(|(bucket, _)| bucket.whole_at);
        let (progress, collective) = (Arc::clone(&self.progress), &mut *self.collective);
        let aborter = collective.aborter();
        let (result, entered) = std::thread::scope(|scope| {
            let (give, take) = mpsc::channel::<Buffer<'_>>();
            let summing = scope.spawn(move || collective.all_reduce_sums(&mut arriving(&take)));
            // a backward that panics is not to wait for other ranks
            let _guard = AbortOnPanic(aborter);
            let mut next = parts.iter_mut().peekable();
            let mut hand_over = |passed: Milestone| -> Result<(), WorkerError> {
                while let Some((bucket, part)) = next.next_if(|(bucket, _)| bucket.whole_at <= passed) {
                    parameters.collect_bucket(bucket);
                    // a thread that takes no more has failed, and says why at its end
                    let _ = give.send(learn_torch::buffer(part)?);
                }
                Ok(())
            };
            let mut handed = Ok(());
            backward(&mut |passed| {
                if handed.is_ok() {
                    handed = hand_over(passed);
                }
            });
            clock.enter(Phase::Reduce);
            let handed = handed.and_then(|()| hand_over(Milestone::End));
            drop(give);
            progress.enter_collective();
            let entered = Instant::now();
            let summed = summing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (handed.and(summed.map_err(WorkerError::from)), entered)
        });
        self.left(entered);
        let flat = parameters.close_gradient();
        result.map(|()| vec![flat])
    }

    /// Gathers rows `[m, d]` of every rank into `[sum of counts, d]`, in rank order; `counts` are rows. A rank that is
    /// alone gets its own back.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn gather_rows(&mut self, mine: &Tensor, counts: &[usize]) -> Result<Tensor, WorkerError> {
        if self.world_size() == 1 {
            self.check()?;
            return Ok(mine.contiguous());
        }
        let width = mine.size()[1];
        let rows: usize = counts.iter().sum();
        let mut all = Tensor::empty([rows as i64, width], (mine.kind(), mine.device()));
        let mut send = mine.contiguous();
        let elements = elements(counts, width);
        finish_own_work(&send);
        let (mut sent, mut received) = (learn_torch::buffer(&mut send)?, learn_torch::buffer(&mut all)?);
        self.run(|collective| collective.all_gather(&elements, &mut sent, &mut received))?;
        Ok(all)
    }

    /// Sums rows `[sum of counts, d]` over the ranks and returns this rank's part `[counts[rank], d]`.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn scatter_rows(&mut self, all: &Tensor, counts: &[usize]) -> Result<Tensor, WorkerError> {
        if self.world_size() == 1 {
            self.check()?;
            return Ok(all.contiguous());
        }
        let width = all.size()[1];
        let mut mine = Tensor::empty([counts[self.rank()] as i64, width], (all.kind(), all.device()));
        let mut send = all.contiguous();
        let elements = elements(counts, width);
        finish_own_work(&send);
        let (mut sent, mut received) = (learn_torch::buffer(&mut send)?, learn_torch::buffer(&mut mine)?);
        self.run(|collective| collective.reduce_scatter_sum(&elements, &mut sent, &mut received))?;
        Ok(mine)
    }

    /// The sum of every rank's gradient of item vectors: the rows of all ranks travel, one after the other in the order
    /// of ranks, and every rank adds them up in that order, so that all come to the same bits.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn merge_rows(&mut self, mine: RowGradient) -> Result<RowGradient, WorkerError> {
        let world = self.world_size();
        if world == 1 {
            return Ok(mine);
        }
        let counts = self.gather_i64(&mut [mine.items.size()[0]], &vec![1; world])?;
        let counts: Vec<usize> = counts.into_iter().map(|count| count.max(0) as usize).collect();
        let items = self.gather_rows(&mine.items.unsqueeze(1), &counts)?;
        let rows = self.gather_rows(&mine.rows, &counts)?;
        Ok(RowGradient::merge(&items.squeeze_dim(1), &rows))
    }

    /// Gives every rank the values of `source`, in place.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn broadcast(&mut self, source: usize, tensor: &mut Tensor) -> Result<(), WorkerError> {
        let mut buffer = learn_torch::buffer(tensor)?;
        self.run(|collective| collective.broadcast(source, &mut buffer))?;
        Ok(())
    }

    /// Gives every rank the bytes of `source`, however many those are.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn broadcast_bytes(&mut self, source: usize, mut bytes: Vec<u8>) -> Result<Vec<u8>, WorkerError> {
        let mut length = [bytes.len() as i64];
        self.run(|collective| collective.broadcast(source, &mut Buffer::i64(&mut length)))?;
        bytes.resize(length[0].max(0) as usize, 0);
        self.run(|collective| collective.broadcast(source, &mut Buffer::u8(&mut bytes)))?;
        Ok(bytes)
    }

    /// Gives every rank the value of `source`.
    ///
    /// # Errors
    /// If the collective fails; [`WorkerError::Defect`] if the value is none that JSON can say, or another kind of value came.
    pub fn broadcast_json<T: Serialize + DeserializeOwned>(
        &mut self,
        source: usize,
        value: &T,
    ) -> Result<T, WorkerError> {
        let failed = |error: serde_json::Error| {
            WorkerError::Defect(format!("{} between the ranks: {error}", std::any::type_name::<T>()))
        };
        let bytes = self.broadcast_bytes(source, serde_json::to_vec(value).map_err(failed)?)?;
        serde_json::from_slice(&bytes).map_err(failed)
    }

    /// Waits for every rank.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.run(|collective| collective.barrier())
    }
}

/// What another thread hands over, until it drops its end; `None` while there is nothing for a while.
fn arriving<'a, 'b>(take: &'a mpsc::Receiver<Buffer<'b>>) -> impl Iterator<Item = Option<Buffer<'b>>> + use<'a, 'b> {
    std::iter::from_fn(|| match take.recv_timeout(LOOK) {
        Ok(buffer) => Some(Some(buffer)),
        Err(mpsc::RecvTimeoutError::Timeout) => Some(None),
        Err(mpsc::RecvTimeoutError::Disconnected) => None,
    })
}

/// Aborts a collective when it is dropped by a panic.
struct AbortOnPanic(Aborter);

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort();
        }
    }
}

/// Waits for what the tensor's device has yet to do, so that the gather is entered when the rank is there: whoever looks from
/// outside tells by this a GPU that hangs or lags in the forward from one that waits for the others.
fn finish_own_work(tensor: &Tensor) {
    learn_torch::synchronize(tensor.device());
}

fn elements(rows: &[usize], width: i64) -> Vec<usize> {
    rows.iter().map(|count| count * width as usize).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use learn_domain::Config;
    use learn_domain::report::exit;

    use super::*;
    use crate::bench::synthetic::alone;

    #[test]
    fn what_cannot_be_said_to_the_other_ranks_is_no_wrong_usage() {
        let mut exchange = alone(&Config::default(), WorkerMetrics::new()).unwrap();
        assert_eq!(exchange.broadcast_json(0, &Some(7)).unwrap(), Some(7));
        // JSON has no such keys
        let error = exchange.broadcast_json(0, &BTreeMap::from([((1, 2), 3)])).unwrap_err();
        assert_eq!(error.exit_code(), exit::FAILED, "{error}");
    }
}
