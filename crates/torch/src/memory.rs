//! How the memory of tensors on the CPU is asked for. Nothing here changes a result; where the system does not go along,
//! memory comes as it otherwise would.

use tch::{Device, Tensor};

use crate::raw::raw;

/// Size of a large page on x86-64.
const LARGE: usize = 2 << 20;

/// Keeps memory that tensors have given back for the tensors of the next step, instead of returning it to the system, which
/// would hand it out again page by page, zeroed.
pub fn keep_freed_memory() {
    // the most that glibc takes; larger tensors are few
    const LARGEST: libc::c_int = 32 << 20;
    // SAFETY: both calls set a number inside the allocator.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

/// Asks for large pages under a tensor that passes go over from end to end, and gives it back; best before it is written to.
pub fn in_large_pages(tensor: Tensor) -> Tensor {
    if let Ok(memory) = raw(&tensor)
        && memory.device == Device::Cpu
    {
        let start = memory.ptr.addr().next_multiple_of(LARGE);
        let end = (memory.ptr.addr() + memory.len * tensor.kind().elt_size_in_bytes()) / LARGE * LARGE;
        if start < end {
            let place = memory.ptr.with_addr(start);
            // SAFETY: the range lies inside the tensor's own memory, and the advice changes no byte of it.
            unsafe { libc::madvise(place, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    tensor
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn values_stay_what_they_are() {
        for count in [0, 1, 3 << 20] {
            let tensor = in_large_pages(Tensor::full([count], 7.0, (Kind::Float, Device::Cpu)));
            assert_eq!(tensor.sum(Kind::Double).double_value(&[]), 7.0 * count as f64);
        }
    }
}
