//! Adding received terms to a buffer, element by element.

use crate::buffer::DType;

/// `into += terms`; both hold elements of `dtype`, aligned for it. I64 wraps, as NCCL's does.
///
/// # Panics
/// On U8, which the checks before every operation refuse; if there are fewer terms.
pub(crate) fn add(dtype: DType, into: &mut [u8], terms: &[u8]) {
    assert!(terms.len() >= into.len(), "{} bytes of terms for {}", terms.len(), into.len());
    // SAFETY: there are as many bytes, which nobody changes while they are borrowed; the caller has aligned them.
    unsafe { add_from(dtype, into, terms.as_ptr()) }
}

/// As [`add`], of terms that another process may see.
///
/// # Safety
/// As many bytes as `into` has can be read from `terms` on.
///
/// # Panics
/// As [`add`]; if memory is not aligned for `dtype`.
pub(crate) unsafe fn add_from(dtype: DType, into: &mut [u8], terms: *const u8) {
    // An empty slice need not be aligned.
    if into.is_empty() {
        return;
    }
    // SAFETY: that of this function
    unsafe {
        match dtype {
            DType::F32 => each::<f32>(into, terms, |a, b| a + b),
            DType::F64 => each::<f64>(into, terms, |a, b| a + b),
            DType::I64 => each::<i64>(into, terms, i64::wrapping_add),
            DType::U8 => unreachable!("sums of U8 are refused before anything is sent"),
        }
    }
}

/// # Safety
/// As [`add_from`].
unsafe fn each<T: bytemuck::Pod>(into: &mut [u8], terms: *const u8, add: impl Fn(T, T) -> T) {
    let terms = terms.cast::<T>();
    assert!(terms.is_aligned(), "terms are not aligned for their type");
    for (index, sum) in bytemuck::cast_slice_mut::<u8, T>(into).iter_mut().enumerate() {
        // SAFETY: the index is below the number of elements of `into`, of which there are as many terms, aligned as asserted;
        // any bytes are a value of these types
        *sum = add(*sum, unsafe { terms.add(index).read() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_each_type_and_wraps_integers() {
        let mut floats = [1f32, 2.0];
        add(DType::F32, bytemuck::cast_slice_mut(&mut floats), bytemuck::cast_slice(&[0.5f32, -2.0]));
        assert_eq!(floats, [1.5, 0.0]);
        let mut doubles = [1e-300f64];
        add(DType::F64, bytemuck::cast_slice_mut(&mut doubles), bytemuck::cast_slice(&[1f64]));
        assert_eq!(doubles, [1.0]);
        let mut integers = [i64::MAX];
        add(DType::I64, bytemuck::cast_slice_mut(&mut integers), bytemuck::cast_slice(&[1i64]));
        assert_eq!(integers, [i64::MIN]);
    }
}
