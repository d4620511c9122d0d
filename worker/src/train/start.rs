//! A start with the weights of another run.
//!
//! The first rank reads them and the others take them over from it, so only its host needs the files.

use std::path::Path;

use learn_domain::run_dir::RunDir;
use learn_model::Parameters;
use learn_model::objective::cvr;

use crate::checkpoint;
use crate::error::WorkerError;

/// Replaces the parameters by those of a run or a checkpoint directory. A CVR head that only one of the two has is left
/// as it is, or left out.
///
/// # Errors
/// If there is no whole checkpoint, or its towers have other names or shapes.
pub fn from_run(parameters: &mut Parameters, path: &Path) -> Result<(), WorkerError> {
    let run = RunDir::new(path);
    let checkpoint = if run.checkpoints().is_dir() { checkpoint::resolve(&run, None)? } else { path.to_owned() };
    let mut tensors = checkpoint::read(&checkpoint, None)?.model;
    tensors.retain(|(name, _)| !cvr::owns(name) || parameters.find(name).is_some());
    let missing = |name: &str| cvr::owns(name) && !tensors.iter().any(|(given, _)| given == name);
    let own: Vec<_> = parameters
        .iter()
        .filter(|(name, _)| missing(name))
        .map(|(name, leaf)| (name.to_owned(), leaf.detach().copy()))
        .collect();
    tensors.extend(own);
    parameters.assign(tensors)?;
    tracing::info!(checkpoint = %checkpoint.display(), "starting with the weights of another run");
    Ok(())
}
