//! Whether a dataset and the configuration of a job go together.

use learn_domain::Config;
use learn_domain::config::ItemTower;

use crate::{Dataset, DatasetError};

/// What a configuration asks of a dataset in vain.
#[derive(Debug, thiserror::Error)]
pub enum Unsuitable {
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(
        "model.item_tower = \"content\" needs the dimension of the dataset's content embeddings, and model.output_dim is \
         {output_dim}: set model.output_dim={dim}"
    )]
    ContentTower { output_dim: u32, dim: usize },
    #[error(
        "objective.cvr_weight is {weight}, but the dataset has no conversion labels; name their column with \
         prepare.interactions.label and prepare it again, or set the weight to 0"
    )]
    NoLabels { weight: f64 },
    #[error(
        "model.time_embedding = \"gap\" needs times, but the dataset is of version 1, whose held-out rows have none; \
         prepare it again with `--replace`, then embed it, or set model.time_embedding to \"none\""
    )]
    NoTimes,
    #[error("the dataset has {users} training users but its sequences have {rows} rows; prepare it again")]
    Users { users: u32, rows: usize },
}

impl Unsuitable {
    /// Another configuration would do.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::ContentTower { .. } | Self::NoLabels { .. } | Self::NoTimes)
    }
}

impl Dataset {
    /// # Errors
    /// A job of this configuration needs something that the dataset does not have, for example content embeddings.
    pub fn suits(&self, config: &Config) -> Result<(), Unsuitable> {
        let dim = if config.model.item_input.has_content() { self.embeddings()?.dim() } else { 0 };
        let output_dim = config.model.output_dim;
        if config.model.item_tower == ItemTower::Content && output_dim as usize != dim {
            return Err(Unsuitable::ContentTower { output_dim, dim });
        }
        let weight = config.objective.cvr_weight;
        if weight > 0.0 && !self.has_labels() {
            return Err(Unsuitable::NoLabels { weight });
        }
        if config.model.reads_times() && !self.has_held_out_times() {
            return Err(Unsuitable::NoTimes);
        }
        let (users, rows) = (self.facts().train_users, self.train().len());
        if users as usize != rows {
            return Err(Unsuitable::Users { users, rows });
        }
        Ok(())
    }
}
