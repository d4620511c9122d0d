//! Which users form step `s` of epoch `e`, in which order (promise 1 of the design).
//!
//! Input: dataset fingerprint, seed, number of users, global batch size. Output: user indices. The plan is a pure
//! function with random access: no step needs an earlier one. Invariants, all property-tested: within an epoch every
//! user appears exactly once; workers, ranks and failures do not enter.

mod balance;
mod permutation;

pub use balance::{contiguous_part, split_by_tokens};
use permutation::Permutation;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::ids::{Step, UserIndex};
use crate::random;
use crate::report::DatasetFacts;

/// What the order of a job depends on, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanKey {
    /// Fingerprint of the dataset's content.
    pub fingerprint: String,
    pub seed: u64,
    /// Users with a training sequence.
    pub users: u32,
    /// Users of one step, over all ranks.
    pub global_batch: u32,
}

impl PlanKey {
    /// Of the job that trains as `config` says on this dataset.
    #[must_use]
    pub fn of(config: &Config, facts: &DatasetFacts) -> Self {
        Self {
            fingerprint: facts.fingerprint.clone(),
            seed: config.job.seed,
            users: facts.train_users,
            global_batch: config.training.global_batch,
        }
    }
}

/// The order of a whole job.
#[derive(Clone, Debug)]
pub struct Plan {
    key: PlanKey,
    order_key: u64,
}

/// A step's place in the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub epoch: u32,
    /// Step inside the epoch, from 0.
    pub step_in_epoch: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("the dataset has no user with a training sequence; prepare it with a lower minimum length")]
    NoUsers,
    #[error("training.global_batch is 0; set it to at least 1")]
    EmptyBatch,
}

impl Plan {
    /// # Errors
    /// If there are no users or the global batch is empty.
    pub fn new(key: PlanKey) -> Result<Self, PlanError> {
        if key.users == 0 {
            return Err(PlanError::NoUsers);
        }
        if key.global_batch == 0 {
            return Err(PlanError::EmptyBatch);
        }
        let order_key = random::key(&[random::text_key(&key.fingerprint), key.seed]);
        Ok(Self { key, order_key })
    }

    #[must_use]
    pub fn key(&self) -> &PlanKey {
        &self.key
    }

    /// Steps of one epoch; the last one may hold fewer users than the global batch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        u64::from(self.key.users).div_ceil(u64::from(self.key.global_batch))
    }

    /// The place of the update that follows `finished` finished steps.
    #[must_use]
    pub fn position(&self, finished: Step) -> Position {
        let steps = self.steps_per_epoch();
        Position { epoch: (finished.0 / steps) as u32, step_in_epoch: finished.0 % steps }
    }

    /// Users of one step over all ranks, in plan order; empty past the end of the epoch.
    #[must_use]
    pub fn users(&self, position: Position) -> Vec<UserIndex> {
        let permutation = Permutation::new(self.key.users, random::key(&[self.order_key, u64::from(position.epoch)]));
        let batch = u64::from(self.key.global_batch);
        let first = position.step_in_epoch.saturating_mul(batch).min(u64::from(self.key.users));
        let last = (first + batch).min(u64::from(self.key.users));
        (first..last).map(|place| UserIndex(permutation.apply(place as u32))).collect()
    }

    /// Seed of everything random inside an epoch besides the order (samples, dropout).
    #[must_use]
    pub fn draw_seed(&self) -> u64 {
        random::mix(self.order_key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(users: u32, global_batch: u32, seed: u64) -> Plan {
        Plan::new(PlanKey { fingerprint: "f".into(), seed, users, global_batch }).unwrap()
    }

    fn epoch(plan: &Plan, epoch: u32) -> Vec<u32> {
        (0..plan.steps_per_epoch())
            .flat_map(|step_in_epoch| plan.users(Position { epoch, step_in_epoch }))
            .map(|user| user.0)
            .collect()
    }

    proptest! {
        #[test]
        fn an_epoch_uses_each_user_exactly_once(users in 1_u32..3000, batch in 1_u32..400, seed: u64, number in 0_u32..9) {
            let mut seen = epoch(&plan(users, batch, seed), number);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..users).collect::<Vec<_>>());
        }

        #[test]
        fn the_order_does_not_depend_on_the_batch_size(users in 1_u32..500, a in 1_u32..90, b in 1_u32..90, seed: u64) {
            prop_assert_eq!(epoch(&plan(users, a, seed), 3), epoch(&plan(users, b, seed), 3));
        }

        #[test]
        fn any_step_is_reached_without_replaying(users in 1_u32..900, batch in 1_u32..90, seed: u64, step in 0_u64..1000) {
            let job = plan(users, batch, seed);
            let position = job.position(Step(step));
            let from_walk = epoch(&job, position.epoch);
            let first = (position.step_in_epoch * u64::from(batch)) as usize;
            let direct: Vec<u32> = job.users(position).iter().map(|user| user.0).collect();
            prop_assert_eq!(&from_walk[first..first + direct.len()], &direct[..]);
        }
    }

    #[test]
    fn epochs_seeds_and_datasets_differ() {
        let job = plan(500, 10, 1);
        assert_ne!(epoch(&job, 0), epoch(&job, 1));
        assert_ne!(epoch(&job, 0), epoch(&plan(500, 10, 2), 0));
        let other = Plan::new(PlanKey { fingerprint: "g".into(), ..job.key().clone() }).unwrap();
        assert_ne!(epoch(&job, 0), epoch(&other, 0));
    }

    #[test]
    fn the_order_is_a_stored_promise() {
        // A change here breaks the resume of every existing run: raise the plan's version instead.
        assert_eq!(epoch(&plan(8, 3, 1), 0), GOLDEN_ORDER);
    }
    const GOLDEN_ORDER: [u32; 8] = [1, 7, 4, 6, 2, 3, 0, 5];

    #[test]
    fn past_the_end_is_empty_and_nonsense_is_refused() {
        assert!(plan(10, 4, 1).users(Position { epoch: 0, step_in_epoch: 3 }).is_empty());
        let key = PlanKey { fingerprint: String::new(), seed: 1, users: 0, global_batch: 1 };
        assert_eq!(Plan::new(key.clone()).unwrap_err(), PlanError::NoUsers);
        assert_eq!(Plan::new(PlanKey { users: 1, global_batch: 0, ..key }).unwrap_err(), PlanError::EmptyBatch);
    }
}
