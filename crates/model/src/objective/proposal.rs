//! How often an item is met as a negative, for the logQ correction (Bengio and Senécal, 2008; Yi et al., RecSys 2019).
//!
//! Of the negatives of a step, `in_batch` come as often as their item is popular and `uniform` are drawn from the catalogue
//! of N items, so item i is expected `in_batch * share_i + uniform / N` times. Its score is lowered by the logarithm of
//! that. Here without `log(in_batch)`, which is the same for all items and cancels: `log(share_i + uniform / (N in_batch))`.

use tch::{Device, Kind, Tensor};

/// The popularity of a catalogue.
#[derive(Debug)]
pub struct Proposal {
    /// `[N]` f64: logarithm of each item's share of the training interactions.
    log_share: Tensor,
}

impl Proposal {
    /// `popularity` are the training interactions of each item; an item without any counts as having one.
    #[must_use]
    pub fn new(popularity: &[u32], device: Device) -> Self {
        let total: f64 = popularity.iter().map(|&count| f64::from(count.max(1))).sum();
        let shares: Vec<f64> = popularity.iter().map(|&count| (f64::from(count.max(1)) / total).ln()).collect();
        Self { log_share: Tensor::from_slice(&shares).to_device(device) }
    }

    /// `[M]` f64: what to subtract from the scores of items `[M]` i64.
    pub fn correction(&self, item_id: &Tensor, in_batch: i64, uniform: i64) -> Tensor {
        let log_share = self.log_share.index_select(0, item_id);
        if uniform == 0 {
            return log_share;
        }
        let items = self.log_share.size()[0];
        let drawn = uniform as f64 / (items as f64 * in_batch.max(1) as f64);
        log_share.logaddexp(&Tensor::full([1], drawn.ln(), (Kind::Double, self.log_share.device())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_logarithm_of_the_expected_count_but_for_a_constant() {
        let proposal = Proposal::new(&[3, 0, 4], Device::Cpu);
        let of = |in_batch, uniform| -> Vec<f64> {
            let all = proposal.correction(&Tensor::from_slice(&[0_i64, 1, 2, 1]), in_batch, uniform);
            Vec::try_from(&(all.exp() * in_batch as f64)).unwrap()
        };
        let near = |ours: Vec<f64>, theirs: [f64; 4]| ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(near(of(8, 0), [3.0, 1.0, 4.0, 1.0]));
        assert!(near(of(8, 6), [5.0, 3.0, 6.0, 3.0]));
    }
}
