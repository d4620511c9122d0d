//! The memory of a tensor, for a collective.

use std::ffi::c_void;

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

#[cfg(test)]
mod tests {
    use super::*;

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
