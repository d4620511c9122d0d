//! The memory of a tensor, for a collective.

use std::ffi::c_void;

use learn_collective::{Buffer, DType, Place};
use tch::{Device, Kind, Tensor};

use crate::TorchError;

/// Where a contiguous tensor's elements lie. Valid while the tensor lives; whoever dereferences it proves that.
#[derive(Clone, Copy, Debug)]
pub struct RawTensor {
    pub ptr: *mut c_void,
    /// Elements, not bytes.
    pub len: usize,
    pub kind: Kind,
    pub device: Device,
}

/// The memory of a contiguous tensor.
///
/// # Errors
/// The tensor is not contiguous or not defined.
pub fn raw(tensor: &Tensor) -> Result<RawTensor, TorchError> {
    let kind = tensor.f_kind()?;
    if !tensor.is_contiguous() {
        return Err(TorchError::NotContiguous(tensor.size()));
    }
    Ok(RawTensor { ptr: tensor.data_ptr(), len: tensor.numel(), kind, device: tensor.device() })
}

/// A contiguous tensor's elements as the buffer of a collective operation; f32, f64, i64 and bytes.
///
/// # Errors
/// The tensor is not contiguous, or of a kind that collectives do not carry.
pub fn buffer(tensor: &mut Tensor) -> Result<Buffer<'_>, TorchError> {
    let RawTensor { ptr, len, kind, device } = raw(tensor)?;
    let dtype = match kind {
        Kind::Float => DType::F32,
        Kind::Double => DType::F64,
        Kind::Int64 => DType::I64,
        Kind::Uint8 => DType::U8,
        other => return Err(TorchError::NotCarried(other)),
    };
    let place = match device {
        Device::Cuda(ordinal) => Place::Cuda { ordinal: i32::try_from(ordinal).unwrap_or(i32::MAX) },
        _ => Place::Host,
    };
    // SAFETY: `raw` has checked that these are the `len` contiguous elements of a defined tensor, and the buffer borrows
    // the tensor exclusively, so they stay in place while it lives. Another handle on the same storage is the caller's to
    // avoid, as with every in-place operation of tch.
    Ok(unsafe { Buffer::from_raw(ptr, len, dtype, place) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_a_buffer_of_its_own_elements() {
        let mut tensor = Tensor::arange(6, (Kind::Int64, Device::Cpu)).view([2, 3]);
        let made = buffer(&mut tensor).unwrap();
        assert_eq!((made.len(), made.dtype(), made.place()), (6, DType::I64, Place::Host));
        assert!(buffer(&mut tensor.tr()).is_err());
        assert!(buffer(&mut tensor.to_kind(Kind::Half)).unwrap_err().to_string().contains("Half"));
    }

    #[test]
    fn only_contiguous_tensors_have_an_address() {
        let tensor = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let memory = raw(&tensor).unwrap();
        assert_eq!((memory.len, memory.kind, memory.device), (6, Kind::Float, Device::Cpu));
        assert_eq!(memory.ptr, tensor.data_ptr());
        assert!(raw(&tensor.tr()).unwrap_err().to_string().contains("contiguous"));
        assert!(raw(&Tensor::new()).is_err());
        assert_eq!(raw(&Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))).unwrap().len, 0);
    }
}
