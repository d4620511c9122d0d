//! Whether a dataset was made with the settings that somebody gives for it.
//!
//! Input: a dataset, a configuration, and where its keys were set. Output: the first setting that the dataset was not made
//! with, with its place: what a run would write down and not train on.

use learn_dataset::Dataset;
use learn_domain::Config;

use crate::failure::Failure;
use crate::settings::Given;

/// The first setting of the configuration that the dataset was not made with.
#[must_use]
pub fn contradiction(dataset: &Dataset, config: &Config, given: &Given) -> Option<String> {
    let found = dataset.contradiction(config, |key| given.origin(key).is_some())?;
    let origin = given.origin(found.key).map(ToString::to_string).unwrap_or_default();
    Some(format!("{origin}: {found}"))
}

/// # Errors
/// The dataset was not made with these settings.
pub fn refuse(dataset: &Dataset, config: &Config, given: &Given) -> Result<(), Failure> {
    contradiction(dataset, config, given).map_or(Ok(()), |found| Err(Failure::Usage(found)))
}
