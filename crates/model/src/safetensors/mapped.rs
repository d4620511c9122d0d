//! A safetensors file whose tensors are made one at a time, so that a model needs no second copy of its weights.

use std::path::{Path, PathBuf};

use ::safetensors::tensor::Metadata;
use learn_torch::MappedFile;
use tch::Tensor;

use super::SafetensorsError;

/// A memory-mapped file, its header checked.
#[derive(Debug)]
pub struct MappedTensors {
    path: PathBuf,
    file: MappedFile,
    header: Metadata,
    start: usize,
}

impl MappedTensors {
    /// Maps a file and checks its header against its size.
    ///
    /// # Errors
    /// As [`super::read`].
    pub fn open(path: &Path) -> Result<Self, SafetensorsError> {
        let file = MappedFile::open(path).map_err(|source| SafetensorsError::Io { path: path.into(), source })?;
        let (start, header) = super::header(path, &file)?;
        Ok(Self { path: path.into(), file, header, start })
    }

    /// The shape of a tensor, if the file has it.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.header.info(name).map(super::shape)
    }

    /// A copy of a tensor on the CPU, in the file's kind; `None` if the file has not got it.
    ///
    /// # Errors
    /// The kind is not known here, or there is no memory.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor>, SafetensorsError> {
        let make = |info| super::tensor(&self.path, name, info, &self.file[self.start..]);
        self.header.info(name).map(make).transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn tensors_are_those_of_the_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let numbers = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
        let written = [("b".to_owned(), numbers.to_kind(Kind::BFloat16)), ("a".to_owned(), numbers.tr())];
        super::super::write(&mut std::fs::File::create(&path).unwrap(), &path, &written, &BTreeMap::new()).unwrap();
        let file = MappedTensors::open(&path).unwrap();
        for (name, wanted) in &written {
            let found = file.tensor(name).unwrap().unwrap();
            assert_eq!((found.kind(), Some(found.size())), (wanted.kind(), file.shape(name)));
            assert_eq!(found, *wanted);
        }
        assert!(file.tensor("c").unwrap().is_none() && file.shape("c").is_none());
    }

    #[test]
    fn damaged_files_and_pickles_are_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = [("t".to_owned(), Tensor::ones([64], (Kind::Float, Device::Cpu)))];
        super::super::write(&mut std::fs::File::create(&path).unwrap(), &path, &tensor, &BTreeMap::new()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 7, 30, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(matches!(MappedTensors::open(&path), Err(SafetensorsError::Invalid { .. })), "{cut}");
        }
        // A shape that promises more than the file holds, with a header of the same length.
        let text = String::from_utf8_lossy(&whole[..whole.len() - 256]).replace("[64]", "[99]");
        std::fs::write(&path, [text.as_bytes(), &whole[whole.len() - 256..]].concat()).unwrap();
        assert!(matches!(MappedTensors::open(&path), Err(SafetensorsError::Invalid { .. })));
        std::fs::write(&path, b"PK\x03\x04rest").unwrap();
        assert!(matches!(MappedTensors::open(&path), Err(SafetensorsError::Pickle { .. })));
    }
}
