//! The weights of an encoder: where they lie, and tensors by name on the device.
//!
//! Input: `model.safetensors`, or the shards that `model.safetensors.index.json` names; what must be in them. Output:
//! tensors by name; what an encoder does not need (heads, poolers, buffers) is left out. Invariants: files are mapped
//! and tensors made one by one, so that the most memory is the model and one tensor; every name is there with its shape
//! before the first tensor is made, so a pass over a loaded model cannot miss one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use learn_model::safetensors::MappedTensors;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::EncoderError;
use super::directory::read_json;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Pickles that Hugging Face directories hold, alone or as the first of several.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
/// Most names that an error lists.
const LISTED: usize = 5;

/// Which file of a directory holds which tensor.
#[derive(Clone, Debug)]
pub struct WeightFiles {
    folder: PathBuf,
    /// File by tensor, where there are several files.
    index: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct IndexFile {
    weight_map: BTreeMap<String, String>,
}

/// A tensor that an encoder needs.
pub(super) struct Wanted {
    pub name: String,
    pub shape: Vec<i64>,
    /// What it is kept as.
    pub kind: Kind,
}

impl WeightFiles {
    /// Finds the files; none is read yet, but each is there.
    ///
    /// # Errors
    /// There are none, a shard is missing or lies elsewhere, or the weights are a pickle.
    pub(super) fn find(folder: &Path) -> Result<Self, EncoderError> {
        let found = |index| Ok(Self { folder: folder.into(), index });
        if folder.join(SINGLE).is_file() {
            return found(None);
        }
        let path = folder.join(INDEX);
        let invalid = |path: PathBuf, problem| Err(EncoderError::Invalid { path, problem });
        if path.is_file() {
            let index = read_json::<IndexFile>(&path)?.weight_map;
            for file in index.values() {
                let plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
                if !plain || !file.ends_with(".safetensors") {
                    return invalid(path, format!("names {file:?}, which is not a safetensors file beside it"));
                }
                if !folder.join(file).is_file() {
                    return invalid(path, format!("names {file:?}, which is missing; copy it again"));
                }
            }
            return found(Some(index));
        }
        let problem = match PICKLES.into_iter().find(|name| folder.join(name).is_file()) {
            Some(pickle) => pickle_problem(folder, pickle),
            None => format!("has neither {SINGLE} nor {INDEX}"),
        };
        invalid(folder.into(), problem)
    }

    /// The files, in the order of their names.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        let Some(index) = &self.index else { return vec![self.folder.join(SINGLE)] };
        let names: std::collections::BTreeSet<&String> = index.values().collect();
        names.into_iter().map(|name| self.folder.join(name)).collect()
    }

    /// Where the names come from, for messages.
    fn source(&self) -> PathBuf {
        self.folder.join(if self.index.is_some() { INDEX } else { SINGLE })
    }
}

/// The line that converts reads tensors only and needs no class of the model, so it works for every family, and for
/// one file as for several.
fn pickle_problem(folder: &Path, pickle: &str) -> String {
    format!(
        "only has {pickle}, a pickle, which can run code and is never opened here; convert it (PyTorch, safetensors): \
         python3 -c \"import glob, json, os, sys, torch, safetensors.torch as s; os.chdir(sys.argv[1]); m = {{}}; \
         [(s.save_file(t, f), m.update(dict.fromkeys(t, f))) for b in sorted(glob.glob('pytorch_model*.bin')) \
         for f in [b[:-3] + 'safetensors'] for t in [{{k: v.contiguous().clone() for k, v in \
         torch.load(b, map_location='cpu', weights_only=True).items()}}]]; \
         json.dump({{'weight_map': m}}, open('{INDEX}', 'w'))\" {}",
        folder.display()
    )
}

pub(super) struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// Loads what is wanted onto a device. A tensor may be stored below one of the `prefixes`: models with a head keep
    /// their encoder there.
    pub(super) fn load(
        files: &WeightFiles,
        prefixes: &[&str],
        wanted: Vec<Wanted>,
        device: Device,
    ) -> Result<Self, EncoderError> {
        let maps = files.paths().into_iter().map(|path| {
            let map = MappedTensors::open(&path)?;
            Ok((path, map))
        });
        let maps = maps.collect::<Result<Vec<_>, EncoderError>>()?;
        // An index that names another file than the one that has the tensor is as good as a missing tensor.
        let place = |stored: &str| match &files.index {
            None => maps.first(),
            Some(index) => {
                let path = files.folder.join(index.get(stored)?);
                maps.iter().find(|(held, _)| *held == path)
            }
        };
        let mut placed = Vec::with_capacity(wanted.len());
        let mut wrong = Vec::new();
        for tensor in wanted {
            let found = prefixes.iter().find_map(|prefix| {
                let stored = format!("{prefix}{}", tensor.name);
                let (_, map) = place(&stored)?;
                let shape = map.shape(&stored)?;
                Some((map, stored, shape))
            });
            match found {
                None => wrong.push(format!("{} is missing", tensor.name)),
                Some((_, _, shape)) if shape != tensor.shape => {
                    wrong.push(format!("{} has shape {shape:?} instead of {:?}", tensor.name, tensor.shape));
                }
                Some((map, stored, _)) => placed.push((tensor, map, stored)),
            }
        }
        if !wrong.is_empty() {
            let more = wrong.len().saturating_sub(LISTED);
            wrong.truncate(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let problem = format!("does not hold what config.json describes: {}{more}", wrong.join("; "));
            return Err(EncoderError::Invalid { path: files.source(), problem });
        }
        let mut tensors = BTreeMap::new();
        for (Wanted { name, kind, .. }, map, stored) in placed {
            let tensor = map.tensor(&stored)?.ok_or(EncoderError::NoTensor(stored))?;
            tensors.insert(name, tensor.f_to_device(device)?.f_to_kind(kind)?);
        }
        Ok(Self { tensors })
    }

    pub(super) fn get(&self, name: &str) -> Result<&Tensor, EncoderError> {
        self.find(name).ok_or_else(|| EncoderError::NoTensor(name.to_owned()))
    }

    pub(super) fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Takes a tensor out.
    pub(super) fn take(&mut self, name: &str) -> Result<Tensor, EncoderError> {
        self.tensors.remove(name).ok_or_else(|| EncoderError::NoTensor(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use learn_model::safetensors;

    use super::*;

    fn tensor(name: &str) -> (String, Tensor) {
        (name.to_owned(), Tensor::ones([2, 3], (Kind::BFloat16, Device::Cpu)))
    }

    fn wanted(names: &[&str]) -> Vec<Wanted> {
        let one = |name: &&str| Wanted { name: (*name).to_owned(), shape: vec![2, 3], kind: Kind::Float };
        names.iter().map(one).collect()
    }

    /// `a` and `head.b` in two shards, with this index.
    fn sharded(index: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (file, name) in [("one.safetensors", "a"), ("two.safetensors", "head.b")] {
            let path = folder.path().join(file);
            safetensors::write(&mut std::fs::File::create(&path).unwrap(), &path, &[tensor(name)], &BTreeMap::new())
                .unwrap();
        }
        std::fs::write(folder.path().join(INDEX), format!(r#"{{"metadata": {{}}, "weight_map": {index}}}"#)).unwrap();
        folder
    }

    fn refusal(index: &str) -> String {
        WeightFiles::find(sharded(index).path()).unwrap_err().to_string()
    }

    #[test]
    fn shards_are_one_model() {
        let folder = sharded(r#"{"a": "one.safetensors", "head.b": "two.safetensors"}"#);
        let files = WeightFiles::find(folder.path()).unwrap();
        assert_eq!(files.paths().len(), 2);
        let weights = Weights::load(&files, &["", "head."], wanted(&["a", "b"]), Device::Cpu).unwrap();
        assert_eq!((weights.get("b").unwrap().kind(), weights.get("b").unwrap().size()), (Kind::Float, vec![2, 3]));
        assert!(weights.find("head.b").is_none() && weights.get("c").is_err());
        let error = Weights::load(&files, &[""], wanted(&["a", "b"]), Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("index.json") && error.contains("b is missing"), "{error}");
    }

    #[test]
    fn an_index_that_lies_is_refused() {
        for (elsewhere, why) in
            [("../one.safetensors", "beside it"), ("/etc/passwd", "beside it"), ("a.bin", "beside it")]
        {
            let error = refusal(&format!(r#"{{"a": "{elsewhere}"}}"#));
            assert!(error.contains(why) && error.contains(elsewhere), "{error}");
        }
        assert!(refusal(r#"{"a": "three.safetensors"}"#).contains("missing; copy it again"));
        assert!(refusal("[]").contains("index.json"));
        let swapped = sharded(r#"{"a": "two.safetensors", "head.b": "two.safetensors"}"#);
        let files = WeightFiles::find(swapped.path()).unwrap();
        let error = Weights::load(&files, &["head.", ""], wanted(&["a", "b"]), Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("a is missing"), "{error}");
    }

    #[test]
    fn a_pickle_is_refused_with_the_line_that_converts_it() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = || WeightFiles::find(folder.path()).unwrap_err().to_string();
        assert!(refusal().contains("has neither model.safetensors"));
        for pickle in PICKLES {
            std::fs::write(folder.path().join(pickle), "").unwrap();
            let error = refusal();
            assert!(error.contains(pickle) && error.contains("weights_only=True"), "{error}");
            std::fs::remove_file(folder.path().join(pickle)).unwrap();
        }
    }
}
