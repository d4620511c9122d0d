//! The built-in comparisons: scorers that need no training, ranked on the path that the model takes.
//!
//! Input: the training interactions of each item and the content embeddings of the catalogue. Output: scorers, each with
//! item vectors `[N, d]` and user vectors `[B, d]` of the same histories that the model sees.
//!
//! - `popularity`: training interactions, the same for everybody;
//! - `last_item`: cosine with the newest item's content embedding;
//! - `decayed_mean`: cosine with the mean of the history's content embeddings, each weighing `evaluation.decay` of the
//!   next newer one. With a decay of 0 it is `last_item`.
//!
//! Content embeddings are centred: less their mean over the catalogue, then normalised again. What a text encoder gives
//! to all items alike would drown the differences.

use tch::{Device, Kind, Tensor};

use crate::feed::assemble::Seen;

/// A scorer without parameters.
pub struct Comparison {
    pub name: &'static str,
    /// `[N, d]`
    pub items: Tensor,
    users: Users,
}

enum Users {
    /// The same vector for all: `[1]`.
    Everybody,
    /// The history's item vectors, weighted by age.
    Pooled { decay: f64 },
}

/// All comparisons over the catalogue; those of content only if there is some (`[N, E]`, overwritten).
#[must_use]
pub fn comparisons(counts: &[u32], content: Option<Tensor>, decay: f64, device: Device) -> Vec<Comparison> {
    let mut all = vec![Comparison {
        name: "popularity",
        items: Tensor::from_slice(&places(counts)).view([-1, 1]).to_device(device),
        users: Users::Everybody,
    }];
    if let Some(content) = content.map(centred) {
        for (name, decay) in [("last_item", 0.0), ("decayed_mean", decay)] {
            let users = Users::Pooled { decay };
            all.push(Comparison { name, items: content.shallow_clone(), users });
        }
    }
    all
}

impl Comparison {
    /// User vectors `[B, d]` of histories, none of them empty.
    pub fn users(&self, histories: &[Seen<'_>]) -> Tensor {
        match self.users {
            Users::Everybody => Tensor::ones([histories.len() as i64, 1], (Kind::Float, self.items.device())),
            Users::Pooled { decay } => self.pooled(histories, decay),
        }
    }

    /// The length of a user's vector does not change the order of the items, so the sum stands for the mean.
    fn pooled(&self, histories: &[Seen<'_>], decay: f64) -> Tensor {
        let (mut users, mut items, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (row, history) in (0_i64..).zip(histories) {
            for (age, &item) in (0..).zip(history.items.iter().rev()) {
                let weight = decay.powi(age);
                // an age whose weight f32 cannot tell from nothing, and all older ones
                if weight < f64::from(f32::EPSILON) {
                    break;
                }
                users.push(row);
                items.push(i64::from(item));
                weights.push(weight as f32);
            }
        }
        let on_device = |values: &[i64]| Tensor::from_slice(values).to_device(self.items.device());
        let weights = Tensor::from_slice(&weights).to_device(self.items.device()).unsqueeze(1);
        let rows = self.items.index_select(0, &on_device(&items)) * weights;
        let zero = Tensor::zeros([histories.len() as i64, self.items.size()[1]], (Kind::Float, self.items.device()));
        zero.index_add(0, &on_device(&users), &rows)
    }
}

/// Content embeddings less their mean, each of length 1 again; in place, because they can be most of the memory.
fn centred(mut content: Tensor) -> Tensor {
    let mean = content.mean_dim(0, true, Kind::Float);
    let _ = content.subtract_(&mean);
    let length = content.norm_scalaropt_dim(2, 1, true).clamp_min(1e-12);
    let _ = content.divide_(&length);
    content
}

/// Each count's place among the different counts: the same order and ties, and exact in f32 where large counts are not.
fn places(counts: &[u32]) -> Vec<f32> {
    let mut different = counts.to_vec();
    different.sort_unstable();
    different.dedup();
    counts.iter().map(|count| different.partition_point(|other| other < count) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Tensor {
        // the common part (7, 0, 0) says nothing
        Tensor::from_slice(&[8.0_f32, 0.0, 0.0, 7.0, 2.0, 0.0, 7.0, -2.0, 0.0, 6.0, 0.0, 0.0]).view([4, 3])
    }

    fn scores(comparison: &Comparison, history: &[u32]) -> Vec<f32> {
        let scores = comparison.users(&[Seen { items: history, times: &[] }]).matmul(&comparison.items.transpose(0, 1));
        Vec::<f32>::try_from(scores.view([-1])).unwrap()
    }

    #[test]
    fn popularity_is_an_order_with_ties() {
        let all = comparisons(&[u32::MAX, 3, u32::MAX - 1, 3], None, 0.7, Device::Cpu);
        assert_eq!(all.len(), 1, "without content there is nothing else");
        assert_eq!(scores(&all[0], &[2]), [2.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn content_is_centred_and_pooled_by_age() {
        let all = comparisons(&[1; 4], Some(content()), 0.5, Device::Cpu);
        let names: Vec<_> = all.iter().map(|comparison| comparison.name).collect();
        assert_eq!(names, ["popularity", "last_item", "decayed_mean"]);
        let close = |found: &[f32], wanted: &[f32]| {
            assert!(found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?} against {wanted:?}");
        };
        // centred rows: (1, 0, 0), (0, 1, 0), (0, -1, 0), (-1, 0, 0)
        close(&scores(&all[1], &[0, 1]), &[0.0, 1.0, -1.0, 0.0]);
        close(&scores(&all[2], &[0, 1]), &[0.5, 1.0, -1.0, -0.5]);
        close(&scores(&all[2], &[0, 0, 1]), &[0.75, 1.0, -1.0, -0.75]);
    }
}
