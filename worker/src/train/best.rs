//! The best checkpoint: which one it is, and that it is there.
//!
//! Input: evaluations on valid, and what the first rank sees on disk. Output: the same best on every rank. Invariant: an
//! evaluation is compared with one whose checkpoint is on disk or still on its way there, so that what beats the best of all
//! that can be had is kept.

use learn_domain::Step;
use learn_domain::event::Happening;
use learn_domain::report::Evaluation;
use learn_domain::run_dir::RunDir;

use super::{Exchange, Trainer};
use crate::checkpoint::{self, Best, Writer};
use crate::error::WorkerError;
use crate::session::Turn;

impl Trainer<'_> {
    /// Whether this evaluation of the last finished step is the best so far, which it then is from here on. Every rank comes to
    /// the same verdict, because the evaluation is summed over ranks.
    pub(super) fn note_best(&mut self, turn: &mut Turn, evaluation: &Evaluation) -> Result<bool, WorkerError> {
        let config = self.config;
        if !config.checkpoint.keep_best {
            return Ok(false);
        }
        self.mend_best(turn)?;
        let metric = &config.checkpoint.metric;
        let missing = !evaluation.metrics.contains_key(metric);
        let told = std::mem::replace(&mut self.metric_missing, missing);
        if missing && !told && turn.is_first() {
            let happening = Happening::MetricMissing { step: evaluation.step, metric: metric.clone() };
            turn.member.report_event(&happening)?;
        }
        let Some(best) = better(evaluation, metric, self.best.as_ref()) else { return Ok(false) };
        self.best = Some(best);
        Ok(true)
    }

    /// Sees to it that the best is one that is on disk, or on its way there.
    pub(super) fn mend_best(&mut self, turn: &mut Turn) -> Result<(), WorkerError> {
        let run = self.session.run_dir();
        mend(&mut turn.exchange, (&run, self.writer.as_mut()), &mut self.best, self.finished)
    }
}

/// What an evaluation is as the best, if it beats the best so far; one that cannot tell the metric beats none.
fn better(evaluation: &Evaluation, metric: &str, best: Option<&Best>) -> Option<Best> {
    let value = *evaluation.metrics.get(metric)?;
    // the same evaluation again, after a generation that did not bring what follows it to its end, is the best still
    let beats = |best: &Best| best.metric != metric || value > best.value || best.step == evaluation.step;
    best.is_none_or(beats).then(|| Best { step: evaluation.step, metric: metric.to_owned(), value })
}

/// Said in place of a step.
const LOST: i64 = -1;

/// Brings all ranks to the best of the first one, whatever a shared disk shows each of them: only it has a writer. If that
/// best is lost (whoever wrote it was lost, or the disk was full), it is the one on disk; that of the last finished step is
/// written again instead.
fn mend(
    exchange: &mut Exchange,
    (run, writer): (&RunDir, Option<&mut Writer>),
    best: &mut Option<Best>,
    finished: Step,
) -> Result<(), WorkerError> {
    let lost = match (&*best, writer) {
        (Some(best), Some(writer)) => writer.misses(run, best) && best.step != finished,
        _ => false,
    };
    // no checkpoint is of step 0
    let mut mine = [if lost { LOST } else { best.as_ref().map_or(0, |best| best.step.0 as i64) }];
    let all = exchange.gather_i64(&mut mine, &vec![1; exchange.world_size()])?;
    if all[0] != LOST && all.iter().all(|step| *step == all[0]) {
        return Ok(());
    }
    let first = if lost { checkpoint::best_there(run) } else { best.clone() };
    let found = exchange.broadcast_json(0, &first)?;
    if *best != found {
        tracing::warn!(so_far = ?best, now = ?found, "the best checkpoint so far is not to be had; another one is the best now");
        *best = found;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use learn_collective::{MemoryRendezvous, connect_tcp};
    use learn_domain::Config;
    use learn_domain::report::Split;
    use learn_telemetry::WorkerMetrics;

    use super::*;
    use crate::bench::synthetic::{Seat, exchange, group};
    use crate::checkpoint::Pace;

    fn best(step: u64, value: f64) -> Best {
        Best { step: Step(step), metric: "mrr".into(), value }
    }

    #[test]
    fn an_evaluation_without_the_metric_beats_none() {
        let evaluation = |metrics: &[(&str, f64)]| Evaluation {
            split: Split::Valid,
            step: Step(20),
            epoch: 0,
            users: 9,
            metrics: metrics.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
            seconds: 1.0,
            segments: Vec::new(),
            comparisons: Vec::new(),
        };
        let so_far = best(10, 0.5);
        let told = |value: f64| evaluation(&[("auc", 0.9), ("mrr", value)]);
        let untold = evaluation(&[("auc", 0.9)]);
        assert_eq!(better(&untold, "mrr", None), None);
        assert_eq!(better(&untold, "mrr", Some(&so_far)), None);
        assert_eq!(better(&told(0.1), "mrr", None), Some(best(20, 0.1)));
        assert_eq!(better(&told(0.5), "mrr", Some(&so_far)), None, "of equals the first");
        assert_eq!(better(&told(0.6), "mrr", Some(&so_far)), Some(best(20, 0.6)));
        assert_eq!(better(&told(0.4), "mrr", Some(&best(20, 0.5))), Some(best(20, 0.4)), "it is that one");
        let other = Best { metric: "ndcg@10".into(), ..so_far };
        assert_eq!(better(&told(0.1), "mrr", Some(&other)), Some(best(20, 0.1)), "of another kind");
    }

    /// What each of two ranks takes for the best after `finished` steps, if it was `so_far` to each.
    fn mended(run: &RunDir, so_far: [&Best; 2], finished: u64) -> [Option<Best>; 2] {
        let store = MemoryRendezvous::default();
        std::thread::scope(|scope| {
            let ranks = [0, 1].map(|rank| {
                let store = store.clone();
                scope.spawn(move || {
                    let seat = Seat { rank, world_size: 2 };
                    let ring = connect_tcp(group(seat, &Config::default()), &store).unwrap();
                    let mut others = exchange(ring, WorkerMetrics::new());
                    let mut writer = (rank == 0).then(|| Writer::start(run.clone(), 1, Pace::Plain, || (), |_| true));
                    let mut best = Some(so_far[rank].clone());
                    mend(&mut others, (run, writer.as_mut()), &mut best, Step(finished)).unwrap();
                    best
                })
            });
            ranks.map(|rank| rank.join().unwrap())
        })
    }

    #[test]
    fn all_ranks_take_the_best_on_disk_for_one_that_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        fs::create_dir_all(run.checkpoint(Step(10))).unwrap();
        let (kept, lost) = (best(10, 0.25), best(20, 0.5));
        fs::write(run.best(), serde_json::to_vec(&kept).unwrap()).unwrap();
        let both = |best: &Best| [Some(best.clone()), Some(best.clone())];
        assert_eq!(mended(&run, [&lost, &lost], 30), both(&kept));
        assert_eq!(mended(&run, [&kept, &kept], 30), both(&kept));
        assert_eq!(mended(&run, [&lost, &lost], 20), both(&lost), "it is written again");
        // a generation may have broken before all heard of it
        assert_eq!(mended(&run, [&kept, &lost], 30), both(&kept));
        fs::remove_dir(run.checkpoint(Step(10))).unwrap();
        assert_eq!(mended(&run, [&lost, &lost], 30), [None, None]);
    }
}
