//! The memory of a tensor, for a collective and for kernels of our own.

use std::ffi::c_void;
use std::sync::Arc;

use half::{bf16, f16};
use learn_collective::{Buffer, CommonVector, DType, OwnVector, Place};
use tch::{Device, Kind, Tensor};

use crate::{TorchError, ops};

/// A type of Rust that elements of a kind are in memory. (`tch` takes bf16 for f16.)
pub trait Stored: Copy {
    const KIND: Kind;
}

impl Stored for f32 {
    const KIND: Kind = Kind::Float;
}

impl Stored for f64 {
    const KIND: Kind = Kind::Double;
}

impl Stored for f16 {
    const KIND: Kind = Kind::Half;
}

impl Stored for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

impl Stored for i32 {
    const KIND: Kind = Kind::Int;
}

impl Stored for i64 {
    const KIND: Kind = Kind::Int64;
}

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

/// A tensor `[n]` f32 over memory that other ranks read. The memory is there as long as any tensor over it.
pub fn over(memory: &Arc<OwnVector>) -> Tensor {
    // SAFETY: as many elements, aligned, as long as the vector is there
    unsafe { ops::over(memory.start(), memory.len(), Arc::clone(memory)) }
}

/// Tensors over the parts of a sum. The memory is there as long as any tensor over it; it holds the sum as long as the ranks
/// to which it belongs leave it as it is. To be read only: who writes to what another rank owns is ended by the system.
#[must_use]
pub fn parts_of(sum: &Arc<CommonVector>) -> Vec<Tensor> {
    // SAFETY: as many elements, aligned, as long as all vectors of the sum are mapped
    sum.parts().map(|(start, len)| unsafe { ops::over(start.cast_mut(), len, Arc::clone(sum)) }).collect()
}

/// The elements of a contiguous tensor on the CPU, row by row.
///
/// # Panics
/// The tensor is of another kind, lies elsewhere or is not contiguous, as libtorch's operators panic for tensors that
/// they cannot take.
#[must_use]
pub fn values<T: Stored>(tensor: &Tensor) -> &[T] {
    let (ptr, len) = elements(tensor);
    // SAFETY: `elements` has checked kind, place and layout; the borrow keeps the tensor alive. Another handle on the
    // same storage is the caller's to avoid, as in `buffer`.
    unsafe { std::slice::from_raw_parts(ptr, len) }
}

/// The bytes of a tensor, row by row, as they lie in memory; `None` if it lies elsewhere or is not contiguous.
#[must_use]
pub fn bytes(tensor: &Tensor) -> Option<&[u8]> {
    let RawTensor { ptr, len, kind, device } = raw(tensor).ok()?;
    match (device, len) {
        (Device::Cpu, 0) => Some(&[]),
        // SAFETY: a defined and contiguous tensor on the CPU has so many elements of so many bytes; the borrow keeps it
        // alive. Other handles are as in `values`.
        (Device::Cpu, _) => Some(unsafe { std::slice::from_raw_parts(ptr.cast(), len * kind.elt_size_in_bytes()) }),
        _ => None,
    }
}

/// As [`values`], to write.
///
/// # Panics
/// As [`values`].
#[must_use]
pub fn values_mut<T: Stored>(tensor: &mut Tensor) -> &mut [T] {
    let (ptr, len) = elements(tensor);
    // SAFETY: as in `values`, and the tensor is borrowed exclusively.
    unsafe { std::slice::from_raw_parts_mut(ptr, len) }
}

/// The elements of a matrix whose rows, or columns, lie one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a, T> {
    /// From its first element to its last.
    pub values: &'a [T],
    /// As it lies in memory.
    pub rows: usize,
    pub columns: usize,
    /// Elements from one row to the next.
    pub pitch: usize,
    /// The tensor has as columns what lies in memory as rows.
    pub transposed: bool,
}

/// A matrix on the CPU as it lies in memory; `None` if the tensor is of another kind, lies elsewhere, or neither its
/// rows nor its columns are contiguous.
#[must_use]
pub fn strided<T: Stored>(tensor: &Tensor) -> Option<Strided<'_, T>> {
    let (rows, columns) = tensor.size2().ok()?;
    if tensor.device() != Device::Cpu || tensor.kind() != T::KIND {
        return None;
    }
    let strides = tensor.stride();
    let (down, right) = (strides[0], strides[1]);
    let (rows, columns, pitch, transposed) = match () {
        () if right == 1 && (down >= columns || rows < 2) => (rows, columns, down, false),
        () if down == 1 && (right >= rows || columns < 2) => (columns, rows, right, true),
        () => return None,
    };
    let (rows, columns, pitch) = (rows as usize, columns as usize, pitch.max(1) as usize);
    let values = match rows * columns {
        0 => &[][..],
        // SAFETY: a defined tensor on the CPU with elements of this type; with these strides its elements lie between
        // the first and the last one, which are in its storage. The borrow keeps it alive; other handles are as in
        // `values`.
        _ => unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), (rows - 1) * pitch + columns) },
    };
    Some(Strided { values, rows, columns, pitch, transposed })
}

fn elements<T: Stored>(tensor: &Tensor) -> (*mut T, usize) {
    match raw(tensor) {
        Ok(RawTensor { ptr, len, kind, device: Device::Cpu }) if kind == T::KIND => match len {
            0 => (std::ptr::NonNull::dangling().as_ptr(), 0),
            _ => (ptr.cast(), len),
        },
        Ok(RawTensor { kind, device, .. }) => {
            panic!("{kind:?} values on {device:?} instead of {:?} on the CPU", T::KIND)
        }
        Err(error) => panic!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_tensor_and_go_back_into_it() {
        let mut tensor = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        values_mut::<f32>(&mut tensor)[4] = 9.0;
        assert_eq!(values::<f32>(&tensor), [0.0, 1.0, 2.0, 3.0, 9.0, 5.0]);
        assert!(values::<bf16>(&Tensor::empty([0, 3], (Kind::BFloat16, Device::Cpu))).is_empty());
    }

    #[test]
    #[should_panic(expected = "Float values")]
    fn values_of_another_kind_are_refused() {
        let _ = values::<f64>(&Tensor::zeros([2], (Kind::Float, Device::Cpu)));
    }

    #[test]
    fn a_matrix_is_found_in_memory_as_it_lies() {
        let tensor = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
        let found = |tensor: &Tensor| {
            let Strided { values, rows, columns, pitch, transposed } = strided::<f32>(tensor).unwrap();
            (values.to_vec(), (rows, columns), pitch, transposed)
        };
        let all: Vec<f32> = (0..12_u8).map(f32::from).collect();
        assert_eq!(found(&tensor), (all.clone(), (3, 4), 4, false));
        assert_eq!(found(&tensor.tr()), (all.clone(), (3, 4), 4, true));
        assert_eq!(found(&tensor.narrow(1, 1, 2)), (all[1..11].to_vec(), (3, 2), 4, false));
        assert_eq!(found(&tensor.narrow(1, 1, 2).tr()), (all[1..11].to_vec(), (3, 2), 4, true));
        assert_eq!(found(&tensor.narrow(0, 1, 0)).1, (0, 4));
        assert!(strided::<f64>(&tensor).is_none());
        assert!(strided::<f32>(&tensor.view([12])).is_none());
        assert!(strided::<f32>(&tensor.slice(1, 0, 4, 2)).is_none());
        assert!(strided::<f32>(&tensor.narrow(0, 0, 1).expand([3, 4], false)).is_none());
    }

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
