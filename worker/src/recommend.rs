//! `learn-worker recommend`: the best items for users of the dataset.
//!
//! Input: user ids as in the original data. Output: per user the `k` items of the highest score (cosine), with titles;
//! items that the user already had are left out unless asked for.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use learn_dataset::{Progress, Unit};
use learn_domain::Phase;
use learn_domain::run_dir::RunDir;
use serde::Serialize;
use tch::Tensor;

use crate::error::WorkerError;
use crate::offline::{Histories, Offline};
use crate::panic;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct RecommendSettings {
    pub run: PathBuf,
    pub checkpoint: Option<String>,
    /// Where the run's data lie now; none = where its configuration says.
    pub dataset: Option<PathBuf>,
    /// At least one.
    pub users: Vec<String>,
    pub k: usize,
    /// Recommend items of the user's history too.
    pub with_history: bool,
}

/// One user's list.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recommendation {
    pub user: String,
    pub items: Vec<RecommendedItem>,
}

/// One entry of a list.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RecommendedItem {
    pub rank: usize,
    pub item: String,
    pub title: Option<String>,
    pub score: f64,
}

/// Recommends items.
///
/// # Errors
/// If the run cannot be read, a user is not in the dataset or has no history there, or memory runs out.
pub fn recommend(settings: &RecommendSettings, progress: &dyn Progress) -> Result<Vec<Recommendation>, WorkerError> {
    panic::caught(|| lists(settings, progress), || Phase::Recommend)
}

fn lists(settings: &RecommendSettings, progress: &dyn Progress) -> Result<Vec<Recommendation>, WorkerError> {
    let run = RunDir::new(&settings.run);
    let offline = Offline::open(&run, settings.checkpoint.as_deref(), settings.dataset.as_deref())?;
    progress.stage("find users", None, Unit::Rows);
    let numbers: HashMap<String, usize> =
        offline.dataset.user_ids()?.into_iter().enumerate().map(|(number, id)| (id, number)).collect();
    let histories = Histories::new(&offline.dataset);
    let mut sequences = Vec::new();
    for user in &settings.users {
        let number = numbers.get(user).ok_or_else(|| {
            WorkerError::Usage(format!(
                "user `{user}` is not in the dataset {}; ids are those of the original data",
                offline.config.data.dataset.display()
            ))
        })?;
        let history = histories.of(*number);
        sequences.push(history.ok_or_else(|| {
            WorkerError::Usage(format!(
                "no interaction of `{user}` lies before the held-out window, or too few: it has no history"
            ))
        })?);
    }
    let wanted = Some(sequences.len() as u64);
    progress.stage("embed users", wanted, Unit::Rows);
    let users = offline.users(&sequences, progress)?;
    progress.stage("embed items", Some(offline.dataset.manifest().counts.items.into()), Unit::Rows);
    let items = offline.items(progress)?;
    progress.stage("rank items", wanted, Unit::Rows);
    let scores = users.matmul(&items.transpose(0, 1));
    if scores.isfinite().all().int64_value(&[]) == 0 {
        return Err(WorkerError::NonFiniteScores);
    }
    let items = offline.dataset.items()?;
    let mut answer = Vec::new();
    for (row, (user, history)) in settings.users.iter().zip(&sequences).enumerate() {
        let seen: HashSet<u32> =
            if settings.with_history { HashSet::new() } else { history.items.iter().copied().collect() };
        let best = best_items(&scores.select(0, row as i64), settings.k, &seen)?;
        let listed = best.into_iter().enumerate().map(|(place, (item, score))| RecommendedItem {
            rank: place + 1,
            item: items[item as usize].id.clone(),
            title: items[item as usize].title.clone(),
            score,
        });
        answer.push(Recommendation { user: user.clone(), items: listed.collect() });
        progress.advance(1);
    }
    Ok(answer)
}

/// The `k` items of the highest score that are not in `seen`, best first.
fn best_items(scores: &Tensor, k: usize, seen: &HashSet<u32>) -> Result<Vec<(u32, f64)>, WorkerError> {
    let wanted = (k + seen.len()).min(scores.size()[0] as usize) as i64;
    let (values, indices) = scores.topk(wanted, 0, true, true);
    let (values, indices) = (Vec::<f32>::try_from(&values)?, Vec::<i64>::try_from(&indices)?);
    let unseen = indices.iter().zip(&values).map(|(&item, &score)| (item as u32, f64::from(score)));
    Ok(unseen.filter(|(item, _)| !seen.contains(item)).take(k).collect())
}

/// A table for people.
#[must_use]
pub fn table(recommendations: &[Recommendation]) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for one in recommendations {
        // writing into a String cannot fail
        let _ = writeln!(text, "user {}", one.user);
        for item in &one.items {
            let title = item.title.as_deref().unwrap_or("");
            let _ = writeln!(text, "{:>5}  {:>7.4}  {:<12} {title}", item.rank, item.score, item.item);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_unseen_items_come_in_order() {
        let scores = Tensor::from_slice(&[0.1_f32, 0.9, 0.5, 0.7]);
        let items = |k, seen: &[u32]| -> Vec<u32> {
            let best = best_items(&scores, k, &seen.iter().copied().collect()).unwrap();
            best.into_iter().map(|(item, _)| item).collect()
        };
        assert_eq!(items(2, &[]), [1, 3]);
        assert_eq!(items(2, &[1]), [3, 2]);
        assert_eq!(items(9, &[1, 0]), [3, 2], "the catalogue may be shorter than k");
    }
}
