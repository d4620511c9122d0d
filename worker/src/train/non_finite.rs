//! A step whose loss or gradient is not a finite number.
//!
//! Input: the step's reduced numbers, which every rank has alike. Output: an event with the users, and what
//! `training.non_finite` says: an error, or a trainer that goes on behind the step. Invariants: every rank does the same,
//! because the policy, the count (the largest that a rank announced) and the numbers are shared; a checkpoint never
//! holds parameters that are not finite.

use learn_domain::config::NonFinite;
use learn_domain::event::{Happening, MAX_NAMED_USERS};
use learn_domain::progress::Work;
use learn_domain::{Step, UserIndex};
use tch::Tensor;

use super::passes::{Embeddings, Share};
use super::{Exchange, Need, Trainer, on_cpu};
use crate::control::FinishedStep;
use crate::error::WorkerError;
use crate::feed::PreparedStep;
use crate::session::Turn;

/// A step that was not applied.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFiniteStep {
    pub loss: f64,
    /// None if the loss is not finite already.
    pub gradient_norm: Option<f64>,
    /// Such steps of the run before this one.
    pub before: u32,
    /// Users of this rank whose embeddings, or whose targets' embeddings, are not finite.
    pub suspects: Vec<u32>,
}

/// Parameters and moments that a rollback goes back to, on the CPU.
pub struct Held {
    model: Vec<(String, Tensor)>,
    optimizer: Vec<(String, Tensor)>,
    optimizer_step: u64,
}

/// The users of a share with a row that is not finite.
pub fn suspects(share: &Share, embeddings: &Embeddings, prepared: &PreparedStep) -> Vec<u32> {
    let owners = |rows: &Tensor, owner: &Tensor| -> Vec<i64> {
        // without rows of its own (an objective that embeds the catalogue instead) there is nothing to look at
        if rows.size()[0] != owner.size()[0] || rows.numel() == 0 {
            return Vec::new();
        }
        let bad = rows.isfinite().all_dim(1, false).logical_not();
        // a vector of its own kind cannot fail
        Vec::try_from(owner.masked_select(&bad).to_device(tch::Device::Cpu)).unwrap_or_default()
    };
    let mut places = owners(&embeddings.user, &share.row_user);
    places.extend(owners(&embeddings.item, &share.item_user));
    let users = prepared.users.iter().zip(&prepared.places);
    users.filter(|(_, place)| places.contains(&i64::from(**place))).map(|(user, _)| *user).collect()
}

impl Trainer<'_> {
    /// Keeps a copy of the state for a rollback, if the policy asks for one.
    pub(super) fn hold(&mut self) {
        if self.config.training.non_finite == NonFinite::Rollback && self.finite() {
            self.held = Some(Held {
                model: on_cpu(self.stepper.parameters.iter().map(|(name, tensor)| (name.to_owned(), tensor.detach()))),
                optimizer: on_cpu(self.stepper.optimizer.state(&self.stepper.parameters)),
                optimizer_step: self.stepper.optimizer.steps(),
            });
        }
    }

    /// Whether the parameters are finite numbers, as an update with a finite gradient can leave them not to be.
    pub(super) fn finite(&self) -> bool {
        let parameters = &self.stepper.parameters;
        let mut tensors = std::iter::once(parameters.flat()).chain(parameters.item_vectors());
        tensors.all(|tensor| tensor.isfinite().all().int64_value(&[]) != 0)
    }

    /// Does what the policy says about a step that was not applied.
    ///
    /// # Errors
    /// [`WorkerError::NonFiniteStep`] if the training stops here; a checkpoint of the steps before is durable then, if it
    /// can be written.
    pub(super) fn not_finite(
        &mut self,
        turn: &mut Turn,
        prepared: PreparedStep,
        step: NonFiniteStep,
    ) -> Result<(), WorkerError> {
        let training = &self.config.training;
        let action = training.non_finite.action(step.before, training.non_finite_budget);
        self.tell(turn, &prepared, &step, action)?;
        // counted when all know: a step whose generation breaks here is done again
        self.non_finite = step.before.saturating_add(1);
        match action {
            NonFinite::Stop => {
                if self.finished.0 > 0 && self.finite() {
                    self.save(turn, Need::Kept)?;
                    match self.finish(turn) {
                        Err(error) if error.reach().passes() => return Err(error),
                        // all ranks end for the same reason, which is the step
                        Err(error) => tracing::error!(%error, "the checkpoint from before the step was not written"),
                        Ok(()) => {}
                    }
                }
                let what = if step.loss.is_finite() { "gradient" } else { "loss" };
                return Err(WorkerError::NonFiniteStep { step: Step(self.finished.0 + 1), what });
            }
            NonFinite::Skip => {}
            NonFinite::Rollback => {
                if let Some(held) = &self.held {
                    let copy = |tensors: &[(String, Tensor)]| -> Vec<(String, Tensor)> {
                        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
                    };
                    self.stepper.parameters.assign(copy(&held.model))?;
                    let parameters = &self.stepper.parameters;
                    self.stepper.optimizer.load_state(parameters, copy(&held.optimizer), held.optimizer_step)?;
                }
            }
        }
        // its users have had their turn; it has no numbers that a record could hold
        self.finished.0 += 1;
        self.followed_up = false;
        self.session.progress.finished(self.finished);
        turn.member.report_step(FinishedStep {
            step: self.finished,
            epoch: prepared.meta.epoch,
            users: prepared.users.into_iter().map(UserIndex).collect(),
            // its work was not measured to the end
            work: Work::default(),
            record: None,
        })?;
        self.after_step(turn)
    }

    /// Gathers the users from all ranks; the first one reports.
    fn tell(
        &self,
        turn: &mut Turn,
        prepared: &PreparedStep,
        step: &NonFiniteStep,
        action: NonFinite,
    ) -> Result<(), WorkerError> {
        let mut users = gather_users(&mut turn.exchange, &step.suspects)?;
        let suspected = !users.is_empty();
        if !suspected {
            users = gather_users(&mut turn.exchange, &prepared.users)?;
        }
        if !turn.is_first() {
            return Ok(());
        }
        let user_count = users.len() as u64;
        users.truncate(MAX_NAMED_USERS);
        turn.member.report_event(&Happening::NonFinite {
            step: Step(self.finished.0 + 1),
            loss: Some(step.loss).filter(|loss| loss.is_finite()),
            gradient_norm: step.gradient_norm.filter(|norm| norm.is_finite()),
            action,
            users,
            user_count,
            suspected,
        })?;
        Ok(())
    }
}

/// The users that all ranks name, ascending.
fn gather_users(exchange: &mut Exchange, mine: &[u32]) -> Result<Vec<UserIndex>, WorkerError> {
    let world = exchange.world_size();
    let counts = exchange.gather_i64(&mut [mine.len() as i64], &vec![1; world])?;
    let counts: Vec<usize> = counts.into_iter().map(|count| count.max(0) as usize).collect();
    let mut mine: Vec<i64> = mine.iter().map(|&user| user.into()).collect();
    let all = exchange.gather_i64(&mut mine, &counts)?;
    let mut users: Vec<UserIndex> = all.into_iter().map(|user| UserIndex(user as u32)).collect();
    users.sort_unstable();
    Ok(users)
}

#[cfg(test)]
mod tests {
    use learn_torch::HostRows;
    use tch::Device;

    use super::*;
    use crate::feed::assemble::MicroBatch;
    use crate::train::DeviceRows;
    use crate::train::passes::Seeds;

    #[test]
    fn the_users_of_rows_that_are_not_finite_are_named() {
        let batch = MicroBatch {
            row_user: vec![4, 4, 9],
            item_id: vec![0; 3],
            item_user: vec![4, 9, -1],
            ..MicroBatch::default()
        };
        let share = {
            let mut table = DeviceRows::new((0, 0), Device::Cpu);
            Share::load(&[(batch.clone(), HostRows::from(&[][..]).into())], &mut table, Seeds { dropout: 0, items: 0 })
        };
        let meta =
            learn_proto::flight::BatchMeta { step: 0, epoch: 0, global_users: 2, global_pairs: 3, part: 0, parts: 1 };
        let prepared = PreparedStep { meta, users: vec![70, 80], places: vec![4, 9], micro_batches: vec![] };
        let rows = |values: [f32; 6]| Tensor::from_slice(&values).view([3, 2]);
        let sound = [0.5; 6];
        let named = |user, item| suspects(&share, &Embeddings { user: rows(user), item: rows(item) }, &prepared);
        assert_eq!(named(sound, sound), Vec::<u32>::new());
        assert_eq!(named([0.5, f32::NAN, 0.5, 0.5, 0.5, 0.5], sound), [70]);
        assert_eq!(named(sound, [0.5, 0.5, f32::INFINITY, 0.5, 0.5, 0.5]), [80]);
        assert_eq!(named(sound, [0.5, 0.5, 0.5, 0.5, f32::NAN, 0.5]), Vec::<u32>::new(), "a negative is nobody's");
        let nothing = Embeddings { user: rows(sound), item: Tensor::zeros([0, 2], (tch::Kind::Float, Device::Cpu)) };
        assert_eq!(suspects(&share, &nothing, &prepared), Vec::<u32>::new());
    }
}
