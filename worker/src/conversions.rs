//! How good the CVR head is on held-out exposures, over all ranks.
//!
//! Input: embeddings of users and items, batch by batch. Output: the metrics of `learn_domain::conversion`, by name.
//! An exposure is a held-out target with its label; every rank gathers all of them (32 bytes each) in the order of the
//! split's rows, so that the metrics are the same on every rank and for any number of ranks. A group is a part of the
//! split that gets metrics of its own, like a segment of the items.

use std::collections::BTreeMap;

use learn_domain::conversion::{ConversionQuality, Exposure};
use learn_model::Parameters;
use learn_model::objective::cvr;
use tch::{Kind, Tensor};

use crate::error::WorkerError;
use crate::feed::flight::HeldOutUser;
use crate::train::Exchange;

/// Values of an exposure on its way between ranks: row of the split, bits of the logit, label, groups.
const WIDTH: usize = 4;

/// Where an exposure belongs.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its user's row of the split.
    pub row: usize,
    /// A bit per group.
    pub groups: u64,
}

/// Collects a rank's exposures.
#[derive(Debug, Default)]
pub struct Conversions {
    mine: Vec<i64>,
}

/// The exposures of all ranks.
#[derive(Debug)]
pub struct Gathered {
    exposures: Vec<(Exposure, u64)>,
}

impl Conversions {
    /// Adds the targets of users `[B, d]` among items `[N, d]`; `place` is asked with the place of a user in the batch and
    /// one of its targets. Users without labels add nothing.
    ///
    /// # Errors
    /// If a logit is not finite.
    pub fn add(
        &mut self,
        parameters: &Parameters,
        (users, items): (&Tensor, &Tensor),
        batch: &[HeldOutUser],
        place: impl Fn(usize, u32) -> Place,
    ) -> Result<(), WorkerError> {
        let pairs: Vec<(usize, u32, u8)> = batch
            .iter()
            .enumerate()
            .flat_map(|(at, user)| {
                let labelled = user.targets.iter().zip(&user.target_labels);
                labelled.map(move |(&target, &label)| (at, target, label))
            })
            .collect();
        if pairs.is_empty() {
            return Ok(());
        }
        let index = |values: Vec<i64>| Tensor::from_slice(&values).to_device(users.device());
        let user = users.index_select(0, &index(pairs.iter().map(|pair| pair.0 as i64).collect()));
        let item = items.index_select(0, &index(pairs.iter().map(|pair| i64::from(pair.1)).collect()));
        let logits: Vec<f64> = Vec::try_from(&cvr::logits(parameters, &user, &item).to_kind(Kind::Double))?;
        for ((at, target, label), logit) in pairs.into_iter().zip(logits) {
            if !logit.is_finite() {
                return Err(WorkerError::NonFiniteScores);
            }
            let Place { row, groups } = place(at, target);
            let logit = logit.to_bits().cast_signed();
            self.mine.extend([row as i64, logit, i64::from(label), groups.cast_signed()]);
        }
        Ok(())
    }

    /// Brings the exposures of all ranks together.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn gather(mut self, exchange: &mut Exchange) -> Result<Gathered, WorkerError> {
        let counts = exchange.gather_i64(&mut [self.mine.len() as i64], &vec![1; exchange.world_size()])?;
        let counts: Vec<usize> = counts.into_iter().map(|count| count as usize).collect();
        let all = exchange.gather_i64(&mut self.mine, &counts)?;
        let exposure = |values: &[i64]| {
            let logit = f64::from_bits(values[1].cast_unsigned());
            (Exposure { user: values[0].cast_unsigned(), logit, converted: values[2] != 0 }, values[3].cast_unsigned())
        };
        let mut exposures: Vec<(Exposure, u64)> = all.chunks_exact(WIDTH).map(exposure).collect();
        // a user lies on one rank, so the order of its targets stays
        exposures.sort_by_key(|(exposure, _)| exposure.user);
        Ok(Gathered { exposures })
    }
}

impl Gathered {
    /// The metrics of a group, named `cvr.auc` and so on; none if it has no exposures.
    #[must_use]
    pub fn metrics(&self, group: usize) -> BTreeMap<String, f64> {
        let inside = self.exposures.iter().filter(|(_, groups)| (groups >> group) & 1 == 1);
        let quality = ConversionQuality::of(&inside.map(|(exposure, _)| *exposure).collect::<Vec<_>>());
        let metrics = quality.iter().flat_map(ConversionQuality::metrics);
        metrics.map(|(name, value)| (format!("cvr.{name}"), value)).collect()
    }
}
