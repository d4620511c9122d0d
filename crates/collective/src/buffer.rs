//! Memory that a collective reads and writes: contiguous elements of one type in one place.
//!
//! Host memory from Rust comes through safe constructors; memory that libtorch owns through [`Buffer::from_raw`].

use std::ffi::c_void;
use std::marker::PhantomData;

use crate::CollectiveError;

/// The type of the elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    F32,
    F64,
    I64,
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 | Self::I64 => 8,
            Self::U8 => 1,
        }
    }
}

/// Where the memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Host,
    Cuda { ordinal: i32 },
}

/// Contiguous elements, borrowed for the length of an operation.
#[derive(Debug)]
pub struct Buffer<'a> {
    ptr: *mut c_void,
    len: usize,
    dtype: DType,
    place: Place,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: a buffer stands for an exclusive borrow of elements whose four types are all `Send`; that it is exclusive is what
// whoever makes one from a raw address vouches for. On a GPU the address is only computed with.
unsafe impl Send for Buffer<'_> {}

macro_rules! from_slice {
    ($($element:ty => $dtype:ident),*) => {$(
        impl<'a> From<&'a mut [$element]> for Buffer<'a> {
            fn from(slice: &'a mut [$element]) -> Self {
                Self {
                    ptr: slice.as_mut_ptr().cast(),
                    len: slice.len(),
                    dtype: DType::$dtype,
                    place: Place::Host,
                    memory: PhantomData,
                }
            }
        }

        impl<'a> From<&'a mut Vec<$element>> for Buffer<'a> {
            fn from(elements: &'a mut Vec<$element>) -> Self {
                elements.as_mut_slice().into()
            }
        }
    )*};
}
from_slice!(f32 => F32, f64 => F64, i64 => I64, u8 => U8);

impl<'a> Buffer<'a> {
    pub fn f32(slice: &'a mut [f32]) -> Self {
        slice.into()
    }

    pub fn f64(slice: &'a mut [f64]) -> Self {
        slice.into()
    }

    pub fn i64(slice: &'a mut [i64]) -> Self {
        slice.into()
    }

    pub fn u8(slice: &'a mut [u8]) -> Self {
        slice.into()
    }

    /// A buffer over memory that someone else owns, such as a contiguous tensor's.
    ///
    /// # Safety
    /// For `'a`, `ptr` points to `len` initialised elements of `dtype` in `place`, aligned for `dtype`, and nothing else
    /// reads or writes them, another buffer of the same operation included. `ptr` may be null when `len` is 0.
    pub unsafe fn from_raw(ptr: *mut c_void, len: usize, dtype: DType, place: Place) -> Self {
        Self { ptr, len, dtype, place, memory: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn place(&self) -> Place {
        self.place
    }

    pub(crate) fn as_ptr(&self) -> *mut c_void {
        self.ptr
    }

    /// Number of bytes; the memory exists, so the product is in range.
    pub(crate) fn byte_len(&self) -> usize {
        self.len * self.dtype.size()
    }

    pub(crate) fn host_bytes(&mut self, op: &'static str) -> Result<&mut [u8], CollectiveError> {
        match self.place {
            Place::Host if self.len == 0 => Ok(&mut []),
            // SAFETY: whoever made the buffer vouched for `byte_len` initialised bytes at `ptr` for `'a`, and that nothing
            // else uses them; any bytes are valid elements of the four types; the borrow of `self` limits the slice's life.
            Place::Host => Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr.cast::<u8>(), self.byte_len()) }),
            Place::Cuda { ordinal } => Err(CollectiveError::Usage {
                op,
                reason: format!(
                    "the buffer is on cuda:{ordinal} but the tcp backend works on host memory; copy it to the host or use nccl"
                ),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_knows_its_bytes_and_its_place() {
        let mut values = [1i64, 2];
        let mut buffer = Buffer::i64(&mut values);
        assert_eq!((buffer.len(), buffer.byte_len(), buffer.place()), (2, 16, Place::Host));
        buffer.host_bytes("test").unwrap()[0] = 7;
        assert_eq!(values, [7, 2]);
    }

    #[test]
    fn device_memory_is_never_read_as_host_memory() {
        // SAFETY: nothing reads the pointer; that is what the test shows.
        let mut buffer = unsafe { Buffer::from_raw(8 as *mut c_void, 4, DType::F32, Place::Cuda { ordinal: 1 }) };
        let error = buffer.host_bytes("broadcast").unwrap_err();
        assert!(error.to_string().contains("cuda:1"), "{error}");
    }

    #[test]
    fn an_empty_buffer_may_be_null() {
        // SAFETY: no elements, so a null pointer is allowed.
        let mut buffer = unsafe { Buffer::from_raw(std::ptr::null_mut(), 0, DType::F64, Place::Host) };
        assert!(buffer.is_empty() && buffer.host_bytes("test").unwrap().is_empty());
    }
}
