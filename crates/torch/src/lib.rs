//! What is unsafe or process-wide about libtorch, behind safe functions.
//!
//! Input: a wish for a device, a seed, tensors, files. Output: a [`tch::Device`] that works, raw views for a collective,
//! host copies, files as memory, threads that give way, operators that the binding leaves out. Invariants: libtorch's CUDA
//! library is loaded at run time, at most once, and before the first question that libtorch answers about CUDA; nothing here
//! links it. So a process calls [`device`] first, then [`seed`].

#![allow(unsafe_code)]

mod background;
mod cuda;
mod facts;
mod host;
mod mapped;
mod memory;
mod ops;
mod parallel;
mod raw;
mod rows;

use std::path::PathBuf;

pub use learn_collective::OwnVector;
use learn_domain::config::{DeviceKind, Precision};
use tch::{Cuda, Device, Kind};

pub use background::{give_way, processor_time};
pub use facts::{Facts, describe};
pub use host::{from_host, to_host};
pub use mapped::MappedFile;
pub use memory::{in_large_pages, keep_freed_memory};
pub use ops::{
    AdamWTensors, FusedAdamW, MOST_SEQUENCES, SequenceBounds, TensorMemory, can_pack, packed_attention, tensor_memory,
};
pub use parallel::{run_tasks, task_threads};
pub use raw::{RawTensor, Stored, Strided, buffer, bytes, over, parts_of, raw, strided, values, values_mut};
pub use rows::{HostRows, on_device};

/// Something about libtorch that does not work, with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum TorchError {
    #[error("CUDA cannot be used: {0}; or set device = \"cpu\"")]
    NoCuda(String),
    #[error("there is no GPU {ordinal}: libtorch sees {count} of them (numbered from 0, after CUDA_VISIBLE_DEVICES)")]
    NoSuchGpu { ordinal: usize, count: usize },
    #[error("the directory of libtorch was not found; set LIBTORCH to the `torch` folder of PyTorch 2.11")]
    NoLibtorch,
    #[error("{} could not be loaded: {reason}", path.display())]
    Load { path: PathBuf, reason: String },
    #[error("a tensor of shape {0:?} is not contiguous; call `contiguous()` before taking its address")]
    NotContiguous(Vec<i64>),
    #[error("a tensor of kind {0:?} cannot be sent; collectives carry f32, f64, i64 and u8, so convert it first")]
    NotCarried(Kind),
    #[error("{values} values do not fill a tensor of shape {shape:?}")]
    WrongShape { values: usize, shape: Vec<i64> },
    #[error(
        "{bytes} bytes of page-locked memory of the host are not to be had ({reason}); lower cluster.prefetch_steps or \
         training.global_batch"
    )]
    PageLocked { bytes: usize, reason: String },
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

/// The device that a setting asks for; `ordinal` is the number of the GPU. `Auto` takes the GPU if there is one that
/// works, else the CPU.
///
/// Call it before [`seed`] and before tensors are made: libtorch looks for its CUDA library once.
///
/// # Errors
/// `Cuda` was asked for and cannot be had, or (also with `Auto`) there are GPUs but none of this number.
pub fn device(kind: DeviceKind, ordinal: usize) -> Result<Device, TorchError> {
    if kind == DeviceKind::Cpu {
        return Ok(Device::Cpu);
    }
    match (cuda::available(), kind) {
        (Ok(count), _) if ordinal < count => Ok(Device::Cuda(ordinal)),
        (Ok(count), _) => Err(TorchError::NoSuchGpu { ordinal, count }),
        (Err(_), DeviceKind::Auto) => Ok(Device::Cpu),
        (Err(reason), _) => Err(TorchError::NoCuda(reason)),
    }
}

/// The kind of the matrix products; `None` is that of the parameters, which may be f64 where a test wants it.
#[must_use]
pub const fn product_kind(precision: Precision) -> Option<Kind> {
    match precision {
        Precision::F32 => None,
        Precision::Bf16 => Some(Kind::BFloat16),
        Precision::F16 => Some(Kind::Half),
    }
}

/// Threads of one operation on the CPU.
pub fn set_threads(count: usize) {
    tch::set_num_threads(i32::try_from(count.max(1)).unwrap_or(i32::MAX));
}

/// Seeds libtorch's generators, those of every GPU included; dropout draws from them.
pub fn seed(seed: u64) {
    tch::manual_seed(seed.cast_signed());
}

/// Memory of a GPU in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuMemory {
    /// By whomever, this process and others.
    pub used: usize,
    pub total: usize,
}

/// How full the GPU is; `None` on the CPU, or if the driver does not say.
#[must_use]
pub fn gpu_memory(device: Device) -> Option<GpuMemory> {
    match device {
        Device::Cuda(ordinal) => cuda::memory(i32::try_from(ordinal).ok()?),
        _ => None,
    }
}

/// Waits until the device has done what was asked of it.
pub fn synchronize(device: Device) {
    if let Device::Cuda(ordinal) = device {
        Cuda::synchronize(i64::try_from(ordinal).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    #[test]
    fn the_cpu_is_always_there() {
        assert_eq!(device(DeviceKind::Cpu, 3).unwrap(), Device::Cpu);
        assert_eq!(gpu_memory(Device::Cpu), None);
        synchronize(Device::Cpu);
    }

    #[test]
    fn auto_takes_what_is_there_and_cuda_says_what_is_missing() {
        match cuda::available() {
            Ok(_) => assert_eq!(device(DeviceKind::Auto, 0).unwrap(), Device::Cuda(0)),
            Err(_) => {
                assert_eq!(device(DeviceKind::Auto, 0).unwrap(), Device::Cpu);
                let error = device(DeviceKind::Cuda, 0).unwrap_err().to_string();
                assert!(error.contains("device = \"cpu\""), "{error}");
            }
        }
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-torch --run-ignored only"]
    fn cuda_is_loaded_at_run_time() {
        let gpu = device(DeviceKind::Cuda, 0).unwrap();
        let sum = Tensor::ones([8, 8], (Kind::Float, gpu)).sum(Kind::Float);
        synchronize(gpu);
        assert_eq!(sum.double_value(&[]), 64.0);
        assert_eq!(raw(&sum).unwrap().device, gpu);
        let before = gpu_memory(gpu).unwrap();
        let _gibibyte = Tensor::zeros([1 << 28], (Kind::Float, gpu));
        let after = gpu_memory(gpu).unwrap();
        assert_eq!(before.total, after.total);
        assert!(after.used >= before.used + (1 << 30) && after.used <= after.total, "{before:?} {after:?}");
        assert!(device(DeviceKind::Cuda, 4096).unwrap_err().to_string().contains("4096"));
    }

    #[test]
    fn a_seed_repeats_the_draws() {
        let draw = |number| {
            seed(number);
            Tensor::rand([16], (Kind::Float, Device::Cpu))
        };
        let (first, again, other) = (draw(u64::MAX), draw(u64::MAX), draw(1));
        assert_eq!(first, again);
        assert_ne!(first, other);
    }
}
