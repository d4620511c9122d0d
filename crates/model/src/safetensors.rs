//! Tensors to and from safetensors files.
//!
//! Input: a path. Output: named tensors on the CPU, or a file. Invariants: nothing that is read is executed; names,
//! kinds, shapes and offsets are checked against the file's size before any tensor is made.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use ::safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use tch::{Kind, Tensor};

mod mapped;

pub use mapped::MappedTensors;

/// A file starts with the length of its header in so many bytes.
const LENGTH_BYTES: usize = 8;

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: not a whole safetensors file ({reason}); copy or write it again", path.display())]
    Invalid { path: PathBuf, reason: String },
    #[error(
        "{}: this is a pickle, which could run any code when it is read. Convert it where you trust it: python3 -c \
         \"import sys, torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() for k, v in \
         torch.load(sys.argv[1], map_location='cpu', weights_only=True).items()}}, sys.argv[2])\" {} {}",
        path.display(), path.display(), path.with_extension("safetensors").display()
    )]
    Pickle { path: PathBuf },
    #[error("{}: tensor {name} has the kind {kind}; f16, bf16, f32, f64 and i64 are read", path.display())]
    Kind { path: PathBuf, name: String, kind: String },
    #[error("{}: tensor {name}: {source}", path.display())]
    Torch { path: PathBuf, name: String, source: tch::TchError },
}

/// A whole file.
#[derive(Debug)]
pub struct Contents {
    /// Sorted by name, on the CPU.
    pub tensors: Vec<(String, Tensor)>,
    /// The header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// The tensors of a file, sorted by name, on the CPU.
///
/// # Errors
/// The file cannot be read, is not a whole safetensors file, is a pickle, or holds a kind that is not known here.
pub fn read(path: &Path) -> Result<Vec<(String, Tensor)>, SafetensorsError> {
    read_all(path).map(|contents| contents.tensors)
}

/// As [`read`], with the metadata.
///
/// # Errors
/// As [`read`].
pub fn read_all(path: &Path) -> Result<Contents, SafetensorsError> {
    let bytes = fs::read(path).map_err(|source| SafetensorsError::Io { path: path.into(), source })?;
    let (start, header) = header(path, &bytes)?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let read =
        |(name, info): (String, &TensorInfo)| tensor(path, &name, info, &bytes[start..]).map(|read| (name, read));
    let mut tensors = header.tensors().into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
    Ok(Contents { tensors, metadata })
}

/// Where the data starts and what it is. Kinds, shapes and offsets fill the file exactly, without gaps.
fn header(path: &Path, bytes: &[u8]) -> Result<(usize, Metadata), SafetensorsError> {
    let (length, header) = SafeTensors::read_metadata(bytes).map_err(|error| match is_pickle(bytes) {
        true => SafetensorsError::Pickle { path: path.into() },
        false => SafetensorsError::Invalid { path: path.into(), reason: error.to_string() },
    })?;
    Ok((LENGTH_BYTES + length, header))
}

/// One tensor of a file's data, on the CPU.
fn tensor(path: &Path, name: &str, info: &TensorInfo, data: &[u8]) -> Result<Tensor, SafetensorsError> {
    let kind = kind_of(info.dtype).ok_or_else(|| SafetensorsError::Kind {
        path: path.into(),
        name: name.to_owned(),
        kind: format!("{:?}", info.dtype),
    })?;
    let (from, to) = info.data_offsets;
    Tensor::f_from_data_size(&data[from..to], &shape(info), kind).map_err(|source| SafetensorsError::Torch {
        path: path.into(),
        name: name.to_owned(),
        source,
    })
}

fn shape(info: &TensorInfo) -> Vec<i64> {
    info.shape.iter().map(|&size| size as i64).collect()
}

/// Writes tensors of any device to `out`, the file `path`: a header of names, kinds, shapes and offsets, filled up to a
/// multiple of eight bytes, and the data, the widest kinds first.
///
/// # Errors
/// The file cannot be written, a name is given twice, or a tensor has a kind that is not known here.
pub fn write(
    out: &mut impl Write,
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<(), SafetensorsError> {
    let mut stored = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = HostTensor::of(path, name, tensor)?;
        if stored.insert(name.clone(), tensor).is_some() {
            let reason = format!("two tensors are named {name}");
            return Err(SafetensorsError::Invalid { path: path.into(), reason });
        }
    }
    let mut stored: Vec<(String, HostTensor<'_>)> = stored.into_iter().collect();
    stored.sort_by_key(|(_, tensor)| Reverse(tensor.dtype));
    let mut end = 0;
    let mut info = |(name, tensor): &(String, HostTensor<'_>)| {
        let start = end;
        end += tensor.bytes.len();
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) };
        (name.clone(), info)
    };
    let invalid = |reason: String| SafetensorsError::Invalid { path: path.into(), reason };
    let metadata = (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
    let header = Metadata::new(metadata, stored.iter().map(&mut info).collect());
    let header = header.map_err(|error| invalid(error.to_string()))?;
    let mut header = serde_json::to_vec(&header).map_err(|error| invalid(error.to_string()))?;
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    let mut write =
        |bytes: &[u8]| out.write_all(bytes).map_err(|source| SafetensorsError::Io { path: path.into(), source });
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    stored.iter().try_for_each(|(_, tensor)| write(&tensor.bytes))
}

/// How zip archives (`torch.save` since 1.6) and bare pickles start.
fn is_pickle(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || matches!(bytes, [0x80, 2..=5, ..])
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F32 => Some(Kind::Float),
        Dtype::F64 => Some(Kind::Double),
        Dtype::I64 => Some(Kind::Int64),
        _ => None,
    }
}

/// A tensor's bytes in host memory: its own, or a copy of what lies elsewhere.
struct HostTensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl<'a> HostTensor<'a> {
    fn of(path: &Path, name: &str, tensor: &'a Tensor) -> Result<Self, SafetensorsError> {
        let dtype = match tensor.kind() {
            Kind::Half => Dtype::F16,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Float => Dtype::F32,
            Kind::Double => Dtype::F64,
            Kind::Int64 => Dtype::I64,
            other => {
                let kind = format!("{other:?}");
                return Err(SafetensorsError::Kind { path: path.into(), name: name.to_owned(), kind });
            }
        };
        let bytes = match learn_torch::bytes(tensor) {
            Some(bytes) => Cow::Borrowed(bytes),
            None => {
                let count = tensor.numel();
                let mut bytes = vec![0; count * tensor.kind().elt_size_in_bytes()];
                tensor.detach().f_copy_data_u8(&mut bytes, count).map_err(|source| SafetensorsError::Torch {
                    path: path.into(),
                    name: name.to_owned(),
                    source,
                })?;
                Cow::Owned(bytes)
            }
        };
        // libtorch gives sizes as i64 that are never negative
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        Ok(Self { dtype, shape, bytes })
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn some() -> Vec<(String, Tensor)> {
        let numbers = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
        let kinds = [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double, Kind::Int64];
        let mut all: Vec<_> = kinds.iter().map(|kind| (format!("t.{kind:?}"), numbers.to_kind(*kind))).collect();
        all.push(("a.transposed".into(), numbers.tr()));
        all.push(("none".into(), Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))));
        all.push(("scalar".into(), Tensor::from(2.5_f32)));
        all
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write(&mut fs::File::create(&path).unwrap(), &path, &some(), &metadata).unwrap();
        let contents = read_all(&path).unwrap();
        assert_eq!(contents.metadata, metadata);
        assert_eq!(contents.tensors.len(), some().len());
        assert!(contents.tensors.is_sorted_by_key(|(name, _)| name.clone()));
        for (name, written) in some() {
            let (_, found) = contents.tensors.iter().find(|(found, _)| *found == name).unwrap();
            assert_eq!((found.kind(), found.size()), (written.kind(), written.size()), "{name}");
            assert_eq!(*found, written, "{name}");
        }
    }

    #[test]
    fn damaged_files_and_other_kinds_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write(&mut fs::File::create(&path).unwrap(), &path, &some(), &BTreeMap::new()).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in [0, 7, 40, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("x.safetensors") && error.contains("copy or write it again"), "{error}");
        }
        let flags = [("flags".to_owned(), Tensor::ones([2], (Kind::Bool, Device::Cpu)))];
        let error =
            write(&mut fs::File::create(&path).unwrap(), &path, &flags, &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("flags") && error.contains("Bool"), "{error}");
        let twice = [("t".to_owned(), Tensor::from(1.0)), ("t".to_owned(), Tensor::from(2.0))];
        assert!(
            write(&mut fs::File::create(&path).unwrap(), &path, &twice, &BTreeMap::new())
                .unwrap_err()
                .to_string()
                .contains("two tensors")
        );
        assert!(matches!(read(&folder.path().join("none")), Err(SafetensorsError::Io { .. })));
    }

    #[test]
    fn pickles_are_refused_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pytorch_model.bin");
        for start in [&b"PK\x03\x04rest"[..], &b"\x80\x02}q\x00."[..]] {
            fs::write(&path, start).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("weights_only=True") && error.contains("pytorch_model.safetensors"), "{error}");
        }
    }
}
