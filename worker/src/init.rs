//! Weights of an earlier run or of a file as the start of a new training.
//!
//! Input: a run directory (its best checkpoint, else its last), a checkpoint directory, or a `.safetensors` file in the
//! layout of the published LEARN checkpoints. Output: values in the parameters; optimizer, step and plan start anew.
//! Invariants: strict unless asked otherwise, but for a CVR head; item vectors are taken only for the dataset that they
//! were trained on, because a row means an item of that dataset.

use std::fs;
use std::path::{Path, PathBuf};

use learn_dataset::Dataset;
use learn_dataset::files::{Sha256, hash_file};
use learn_domain::Config;
use learn_domain::run_dir::RunDir;
use learn_model::objective::cvr;
use learn_model::parameters::{Mismatch, mismatch};
use learn_model::pch::ID_EMBEDDING;
use learn_model::{Parameters, PchShape, safetensors};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::checkpoint;
use crate::error::WorkerError;
use crate::train::shape;

/// Where a run's first weights came from; a checkpoint records it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub path: PathBuf,
    pub sha256: String,
}

/// Weights that are there.
pub struct Weights {
    pub origin: Origin,
    tensors: Vec<(String, Tensor)>,
    /// Fingerprint of the dataset that they were trained on; a file alone does not say.
    dataset: Option<String>,
}

/// What a start made of weights.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Used {
    pub taken: Vec<String>,
    /// In the source, but not used, with the reason.
    pub unused: Vec<String>,
    /// Not in the source: these start as without one.
    pub fresh: Vec<String>,
}

impl Weights {
    /// Reads weights.
    ///
    /// # Errors
    /// If there are none, they are damaged, or the file is a pickle (the message says how to convert it).
    pub fn open(path: &Path) -> Result<Self, WorkerError> {
        let failed = |path: &Path, reason: String| WorkerError::File { path: path.display().to_string(), reason };
        let run = RunDir::new(path);
        let (file, state) = if run.config().is_file() {
            checkpoint::model_file(&checkpoint::resolve(&run, None)?).map(|(file, state)| (file, Some(state)))?
        } else if path.is_dir() {
            checkpoint::model_file(path).map(|(file, state)| (file, Some(state)))?
        } else {
            (path.to_owned(), None)
        };
        let tensors = safetensors::read(&file).map_err(|error| WorkerError::Usage(error.to_string()))?;
        let hashed = hash_file::<Sha256>(&file).map_err(|error| failed(&file, error.to_string()))?;
        let file = fs::canonicalize(&file).map_err(|error| failed(&file, error.to_string()))?;
        Ok(Self {
            origin: Origin { path: file, sha256: hashed.checksum },
            tensors,
            dataset: state.map(|state| state.fingerprint),
        })
    }

    /// What a model of this shape on this dataset would make of them, without making it.
    ///
    /// # Errors
    /// Unless `partial`, if they are not exactly the model's.
    pub fn check(mut self, shape: &PchShape, dataset: &str, partial: bool) -> Result<Used, WorkerError> {
        let foreign = self.set_foreign_vectors_aside(dataset);
        let fit = mismatch(shape, &self.tensors);
        self.used(fit, foreign, partial, shape)
    }

    /// Puts them into the parameters.
    ///
    /// # Errors
    /// As [`Weights::check`]; then nothing was changed.
    pub fn apply(
        mut self,
        parameters: &mut Parameters,
        (shape, dataset): (&PchShape, &str),
        partial: bool,
    ) -> Result<Used, WorkerError> {
        let foreign = self.set_foreign_vectors_aside(dataset);
        let used = self.used(mismatch(shape, &self.tensors), foreign, partial, shape)?;
        let tensors = std::mem::take(&mut self.tensors);
        parameters.assign_fitting(&tensors);
        Ok(used)
    }

    /// Takes item vectors of another or an unknown dataset out and returns why.
    fn set_foreign_vectors_aside(&mut self, dataset: &str) -> Option<String> {
        if self.dataset.as_deref() == Some(dataset) || !self.tensors.iter().any(|(name, _)| name == ID_EMBEDDING) {
            return None;
        }
        self.tensors.retain(|(name, _)| name != ID_EMBEDDING);
        Some(match &self.dataset {
            Some(other) => {
                format!("{ID_EMBEDDING} belongs to the items of the dataset {other}, not to those of {dataset}")
            }
            None => format!("{ID_EMBEDDING} belongs to the items of a dataset that a file alone does not name"),
        })
    }

    fn used(
        &self,
        fit: Mismatch,
        foreign: Option<String>,
        partial: bool,
        shape: &PchShape,
    ) -> Result<Used, WorkerError> {
        let names = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        // a head that only one of the two has is a stage of training, not a mistake
        let heads = |names: &[String]| names.iter().all(|name| cvr::owns(name));
        let whole = heads(&fit.missing) && heads(&fit.unexpected) && fit.misshaped.is_empty() && foreign.is_none();
        let unused: Vec<String> = [&fit.unexpected[..], &fit.misshaped].concat().into_iter().chain(foreign).collect();
        let fresh = fit.missing;
        if !(partial || whole) {
            return Err(WorkerError::Usage(format!(
                "{} does not fit the model. Missing: {}; not usable: {}. Use the [model] settings that it was made with, or \
                 --init-partial (training.init_partial) to take what fits and start the rest anew",
                self.origin.path.display(),
                names(&fresh),
                names(&unused)
            )));
        }
        let all = shape.specs().into_iter().map(|spec| spec.name);
        let misshaped = |name: &String| fit.misshaped.iter().any(|one| one.starts_with(&format!("{name} is ")));
        let (mut taken, mut fresh_too): (Vec<String>, Vec<String>) =
            all.partition(|name| !fresh.contains(name) && !misshaped(name));
        taken.sort();
        fresh_too.sort();
        if taken.is_empty() {
            return Err(WorkerError::Usage(format!(
                "nothing in {} fits the model; is it a LEARN checkpoint?",
                self.origin.path.display()
            )));
        }
        Ok(Used { taken, unused, fresh: fresh_too })
    }
}

impl std::fmt::Display for Used {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} parameters taken", self.taken.len())?;
        for (title, names) in [("not used", &self.unused), ("start anew", &self.fresh)] {
            if !names.is_empty() {
                write!(f, "; {title}: {}", names.join(", "))?;
            }
        }
        Ok(())
    }
}

/// Says what a training with this configuration would make of `training.init`; `None` without one.
///
/// # Errors
/// If the weights or the dataset cannot be used.
pub fn check(config: &Config) -> Result<Option<(Origin, Used)>, WorkerError> {
    let Some(path) = &config.training.init else { return Ok(None) };
    let facts = Dataset::open(&config.data.dataset)?.facts().seen_by(&config.model);
    let weights = Weights::open(path)?;
    let origin = weights.origin.clone();
    let used = weights.check(&shape(config, &facts), &facts.fingerprint, config.training.init_partial)?;
    Ok(Some((origin, used)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use learn_domain::config::{ItemInput, ModelConfig};
    use tch::{Device, Kind};

    use super::*;

    fn shape(item_input: ItemInput, output_dim: u32) -> PchShape {
        let model = ModelConfig { layers: 1, heads: 2, hidden: 8, output_dim, item_input, ..ModelConfig::default() };
        PchShape { input_dim: 6, items: 5, model, max_history: 4, cvr_hidden: None }
    }

    /// Weights of a model of this shape in a file.
    fn file(folder: &Path, shape: &PchShape) -> (PathBuf, Parameters) {
        let parameters = Parameters::init(shape, 7, Device::Cpu);
        let path = folder.join("w.safetensors");
        let tensors: Vec<_> = parameters.iter().map(|(name, tensor)| (name.to_owned(), tensor.detach())).collect();
        safetensors::write(&mut fs::File::create(&path).unwrap(), &path, &tensors, &BTreeMap::new()).unwrap();
        (path, parameters)
    }

    #[test]
    fn the_same_model_is_taken_whole() {
        let folder = tempfile::tempdir().unwrap();
        let shape = shape(ItemInput::Id, 4);
        let shape = PchShape { input_dim: 0, ..shape };
        let (path, parameters) = file(folder.path(), &shape);
        let mut other = Parameters::init(&shape, 8, Device::Cpu);
        assert_ne!(other.flat(), parameters.flat());
        let weights = Weights { dataset: Some("data".into()), ..Weights::open(&path).unwrap() };
        assert_eq!(weights.origin.sha256.len(), 64);
        let used = weights.apply(&mut other, (&shape, "data"), false).unwrap();
        assert_eq!((other.flat(), other.item_vectors()), (parameters.flat(), parameters.item_vectors()));
        assert!(used.unused.is_empty() && used.fresh.is_empty() && used.taken.contains(&ID_EMBEDDING.to_owned()));
    }

    #[test]
    fn what_does_not_fit_is_refused_or_named() {
        let folder = tempfile::tempdir().unwrap();
        let (path, source) = file(folder.path(), &shape(ItemInput::Content, 4));
        let wanted = PchShape {
            model: ModelConfig { learn_logit_scale: true, ..shape(ItemInput::Content, 6).model },
            ..shape(ItemInput::Content, 6)
        };
        let mut parameters = Parameters::init(&wanted, 8, Device::Cpu);
        let before = parameters.flat().copy();
        let error = Weights::open(&path).unwrap().apply(&mut parameters, (&wanted, "data"), false).unwrap_err();
        let error = error.to_string();
        for part in ["Missing: logit_scale", "mlp.0.bias is [4] instead of [6]", "--init-partial"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(*parameters.flat(), before, "nothing was changed");

        let used = Weights::open(&path).unwrap().apply(&mut parameters, (&wanted, "data"), true).unwrap();
        assert_eq!(used.fresh, ["logit_scale", "mlp.0.bias", "mlp.0.weight"]);
        assert_eq!(used.unused.len(), 2);
        assert_eq!(parameters.get("adaptor.weight"), source.get("adaptor.weight"));
        assert_eq!(parameters.get("logit_scale").double_value(&[]) as f32, 20_f64.ln() as f32);
        assert!(used.to_string().contains("start anew: logit_scale"), "{used}");
    }

    #[test]
    fn item_vectors_of_another_dataset_never_match() {
        let folder = tempfile::tempdir().unwrap();
        let shape = shape(ItemInput::ContentId, 4);
        for dataset in [None, Some("other")] {
            let (path, _) = file(folder.path(), &shape);
            let open = || Weights { dataset: dataset.map(Into::into), ..Weights::open(&path).unwrap() };
            let error = open().check(&shape, "data", false).unwrap_err().to_string();
            assert!(error.contains("belongs to the items of"), "{error}");
            let mut parameters = Parameters::init(&shape, 8, Device::Cpu);
            let used = open().apply(&mut parameters, (&shape, "data"), true).unwrap();
            assert_eq!(used.fresh, [ID_EMBEDDING]);
            assert_eq!(parameters.item_vectors().unwrap().abs().max().double_value(&[]), 0.0);
        }
    }

    #[test]
    fn a_pickle_and_a_stranger_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pytorch_model.bin");
        fs::write(&path, b"PK\x03\x04rest").unwrap();
        let error = Weights::open(&path).err().unwrap().to_string();
        assert!(error.contains("weights_only=True"), "{error}");
        let path = folder.path().join("w.safetensors");
        let stranger = [("x".to_owned(), Tensor::zeros([2], (Kind::Float, Device::Cpu)))];
        safetensors::write(&mut fs::File::create(&path).unwrap(), &path, &stranger, &BTreeMap::new()).unwrap();
        let error = Weights::open(&path).unwrap().check(&shape(ItemInput::Content, 4), "data", true).unwrap_err();
        assert!(error.to_string().contains("nothing in"), "{error}");
    }
}
