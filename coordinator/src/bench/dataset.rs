//! A dataset to measure with, made here.
//!
//! Input: how many users and items, how popularity falls, the dimension. Output: a dataset directory as `prepare` and `embed`
//! make it. Invariant: the same shape gives the same interactions.

use std::fmt::Write as _;
use std::path::Path;

use half::f16;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore};
use learn_dataset::{Dataset, DatasetError, PrepareError};
use learn_domain::config::{Config, Precision};
use learn_domain::random::Draws;

/// Items of a file of content embeddings.
const SHARD_ITEMS: usize = 1 << 13;

/// Interactions of a user.
#[derive(Clone, Copy, Debug)]
pub enum Lengths {
    All(u32),
    /// As in reviews of a large shop: half of the users have at most 7, few have many.
    Shop,
}

/// Quantiles of [`Lengths::Shop`]: share of the users, and how many interactions they have at most.
const SHOP: [(f64, f64); 6] = [(0.0, 5.0), (0.1, 5.0), (0.5, 7.0), (0.9, 15.0), (0.99, 40.0), (1.0, 60.0)];

impl Lengths {
    /// `share` is uniform in 0..1.
    fn draw(self, share: f64) -> u32 {
        match self {
            Self::All(length) => length,
            Self::Shop => {
                let above = SHOP.partition_point(|&(reached, _)| reached <= share).clamp(1, SHOP.len() - 1);
                let ((from, least), (to, most)) = (SHOP[above - 1], SHOP[above]);
                (least + (most - least) * (share - from) / (to - from)).round() as u32
            }
        }
    }
}

/// What a measurement's dataset looks like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub users: u32,
    /// Items to draw from; those that nobody drew are not in the catalogue.
    pub items: u32,
    /// The r-th item is drawn as often as r to the power of this is small: 0 = all alike, 1 = Zipf's law.
    pub skew: f64,
    pub lengths: Lengths,
    pub dim: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum MakingError {
    #[error("cannot write {path}: {source}")]
    Write { path: std::path::PathBuf, source: std::io::Error },
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
}

/// Draws an item by popularity.
struct Popularity {
    /// Sums of the weights up to each item.
    sums: Vec<f64>,
}

impl Popularity {
    fn new(items: u32, skew: f64) -> Self {
        let mut sum = 0.0;
        let weights = (1..=items).map(|rank| {
            sum += f64::from(rank).powf(-skew);
            sum
        });
        Self { sums: weights.collect() }
    }

    fn draw(&self, draws: &mut Draws) -> usize {
        let place = draws.unit() * self.sums.last().copied().unwrap_or_default();
        self.sums.partition_point(|&sum| sum < place).min(self.sums.len().saturating_sub(1))
    }
}

fn interactions(shape: &Shape) -> String {
    let popularity = Popularity::new(shape.items, shape.skew);
    let mut csv = String::from("user_id,item_id,timestamp\n");
    let mut next = 0;
    for user in 0..shape.users {
        let mut draws = Draws::new(&[u64::from(user)]);
        let length = shape.lengths.draw(draws.unit());
        for time in 0..length {
            // without skew the items come in turn, so that each of them is there
            let item = if shape.skew == 0.0 { next % shape.items as usize } else { popularity.draw(&mut draws) };
            next += 1;
            // writing to a string does not fail
            let _ = writeln!(csv, "u{user},i{item},{}", 1_000_000 + time);
        }
    }
    csv
}

/// A row of values as large as those of a normalised vector.
fn row(item: u64, dim: usize) -> impl Iterator<Item = f16> {
    let mut draws = Draws::new(&[item]);
    let scale = (dim as f64).sqrt().recip();
    (0..dim).map(move |_| f16::from_f64((2.0 * draws.unit() - 1.0) * scale))
}

/// Makes it in `out`, which must not exist; `scratch` is for what is not kept.
///
/// # Errors
/// If it cannot be written.
pub fn make(shape: &Shape, out: &Path, scratch: &Path) -> Result<Dataset, MakingError> {
    let input = scratch.join("interactions.csv");
    let wrong = |source| MakingError::Write { path: input.clone(), source };
    if let Some(parent) = out.parent() {
        std::fs::create_dir_all(parent).map_err(wrong)?;
    }
    std::fs::write(&input, interactions(shape)).map_err(wrong)?;
    let mut config = Config::default().prepare;
    config.interactions.files = vec![input.clone()];
    learn_dataset::prepare(&config, "bench", out, &())?;
    std::fs::remove_file(&input).map_err(wrong)?;
    let dataset = Dataset::open(out)?;
    let spec = EmbeddingSpec {
        dim: shape.dim,
        model_fingerprint: "bench".into(),
        precision: Precision::F32,
        shard_items: SHARD_ITEMS,
    };
    let texts = vec![String::new(); dataset.manifest().counts.items as usize];
    let store = EmbeddingStore::new(&dataset, spec, &texts)?;
    for shard in store.shards() {
        let rows: Vec<f16> = shard.items.clone().flat_map(|item| row(item as u64, shape.dim)).collect();
        store.write_shard(shard.index, &rows)?;
    }
    store.commit("bench")?;
    Ok(Dataset::open(out)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_a_shop_have_its_quantiles() {
        let mut draws = Draws::new(&[1]);
        let mut lengths: Vec<u32> = (0..10_000).map(|_| Lengths::Shop.draw(draws.unit())).collect();
        lengths.sort_unstable();
        assert_eq!([0, 1000, 5000].map(|at| lengths[at]), [5, 5, 7]);
        assert!((14..=16).contains(&lengths[9000]) && (36..=46).contains(&lengths[9900]), "{}", lengths[9900]);
    }

    #[test]
    fn a_made_dataset_is_one_that_a_job_can_read() {
        let folder = tempfile::tempdir().unwrap();
        let shape = Shape { users: 30, items: 40, skew: 1.0, lengths: Lengths::Shop, dim: 8 };
        let dataset = make(&shape, &folder.path().join("made"), folder.path()).unwrap();
        dataset.verify(&()).unwrap();
        let embeddings = dataset.embeddings().unwrap();
        assert_eq!((embeddings.dim(), embeddings.rows()), (8, dataset.manifest().counts.items as usize));
        assert!((0..embeddings.rows()).all(|item| embeddings.row(item).iter().any(|value| value.to_f32() != 0.0)));
        let popularity = dataset.popularity();
        assert!(popularity.iter().max() > popularity.iter().min());
    }
}
