//! Copies between host memory and tensors, whole blocks at a time.

use tch::kind::Element;
use tch::{Device, Tensor};

use crate::TorchError;

/// A tensor of this shape on `device` from row-major values (`f16` rows become a `Half` tensor).
///
/// # Errors
/// The shape does not hold exactly `values`, or the device is out of memory.
pub fn from_host<T: Element>(values: &[T], shape: &[i64], device: Device) -> Result<Tensor, TorchError> {
    let wanted = shape.iter().try_fold(1_i64, |product, &size| product.checked_mul(size).filter(|_| size >= 0));
    if wanted.and_then(|count| usize::try_from(count).ok()) != Some(values.len()) {
        return Err(TorchError::WrongShape { values: values.len(), shape: shape.to_vec() });
    }
    Ok(Tensor::f_from_slice(values)?.f_view(shape)?.f_to_device(device)?)
}

/// The elements of a tensor in row-major order, converted to `T` on its device if they are of another kind.
///
/// # Errors
/// libtorch could not convert or copy.
pub fn to_host<T: Element>(tensor: &Tensor) -> Result<Vec<T>, TorchError> {
    let converted = tensor.f_detach()?.f_to_kind(T::KIND)?;
    let mut values = vec![T::ZERO; converted.numel()];
    let count = values.len();
    converted.f_copy_data(&mut values, count)?;
    Ok(values)
}

#[cfg(test)]
mod tests {
    use half::f16;
    use tch::Kind;

    use super::*;

    #[test]
    fn values_survive_the_round_trip() {
        let values: Vec<f16> = (0..6).map(|n| f16::from_f32(n as f32 / 4.0)).collect();
        let tensor = from_host(&values, &[2, 3], Device::Cpu).unwrap();
        assert_eq!((tensor.kind(), tensor.size()), (Kind::Half, vec![2, 3]));
        assert_eq!(to_host::<f16>(&tensor).unwrap(), values);
        assert_eq!(to_host::<f32>(&tensor.tr()).unwrap(), [0.0, 0.75, 0.25, 1.0, 0.5, 1.25]);
        assert!(to_host::<i64>(&from_host::<i64>(&[], &[0, 4], Device::Cpu).unwrap()).unwrap().is_empty());
    }

    #[test]
    fn a_shape_that_does_not_fit_is_refused() {
        for shape in [[2, 2], [-1, -5], [i64::MAX, 4]] {
            let error = from_host(&[1.0_f32; 5], &shape, Device::Cpu).unwrap_err();
            assert!(matches!(error, TorchError::WrongShape { values: 5, .. }), "{error}");
        }
    }
}
