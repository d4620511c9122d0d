//! Rows of f16 on the host, on their way to the device.
//!
//! Input: values, written in place. Output: a tensor on the device. For a GPU they lie in page-locked memory, from which it
//! copies by itself: beside its other work if the copy was begun before, else before what is enqueued next. The training
//! thread waits for neither.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use half::f16;
use tch::{Device, Kind, Tensor};

use crate::ops::Copying;
use crate::{Stored, TorchError, ops, values, values_mut};

/// Values of f16 in the host's memory.
#[derive(Debug)]
pub struct HostRows {
    /// `[n]`.
    values: Tensor,
    /// A copy that was begun and has not been asked for.
    copying: RefCell<Option<Copying>>,
}

impl HostRows {
    /// Room for so many values on their way to this device; what is in it is not known.
    ///
    /// # Errors
    /// There is too little memory of that kind.
    pub fn new(count: usize, device: Device) -> Result<Self, TorchError> {
        let values = match device {
            Device::Cuda(_) => ops::page_locked::<f16>(count)?,
            // no operator of libtorch fills it: on a thread of its own that would make threads of its own
            _ => Tensor::empty([count as i64], (Kind::Half, Device::Cpu)),
        };
        Ok(values.into())
    }

    /// Begins to copy them to the device beside its other work, where they take memory from now on; nothing is to be written
    /// here any more. Without memory there they are copied when they are asked for. On the CPU there is nothing to do.
    pub fn begin(&self, device: Device) {
        if let Device::Cuda(ordinal) = device {
            match Copying::begin(&self.values, ordinal) {
                Ok(copying) => drop(self.copying.replace(Some(copying))),
                Err(error) => tracing::debug!(%error, "rows are not copied ahead"),
            }
        }
    }

    /// As a tensor `[rows, dim]` on the device; on the CPU the same memory. Nothing is to be written here any more.
    ///
    /// # Panics
    /// libtorch cannot wait for a copy that was begun, as its operators panic without memory.
    pub fn on(&self, device: Device, (rows, dim): (usize, usize)) -> Tensor {
        let there = match self.copying.take() {
            Some(copying) => copying.end().unwrap_or_else(|error| panic!("{error}")),
            None => self.values.to_device_(device, Kind::Half, true, false),
        };
        there.view([rows as i64, dim as i64])
    }
}

/// Values `[n]` on the device; a GPU copies them by itself. For small arrays.
///
/// # Panics
/// There is no page-locked memory for them, as libtorch's operators panic without memory.
pub fn on_device<T: Stored + tch::kind::Element>(given: &[T], device: Device) -> Tensor {
    if !device.is_cuda() {
        return Tensor::from_slice(given);
    }
    let mut tensor = ops::page_locked::<T>(given.len()).unwrap_or_else(|error| panic!("{error}"));
    values_mut::<T>(&mut tensor).copy_from_slice(given);
    tensor.to_device_(device, <T as Stored>::KIND, true, false)
}

impl From<&[f16]> for HostRows {
    /// In ordinary memory.
    fn from(values: &[f16]) -> Self {
        Tensor::from_slice(values).into()
    }
}

impl From<Tensor> for HostRows {
    /// `[n]` f16 on the host.
    fn from(values: Tensor) -> Self {
        Self { values, copying: RefCell::default() }
    }
}

impl Deref for HostRows {
    type Target = [f16];

    fn deref(&self) -> &[f16] {
        values(&self.values)
    }
}

impl DerefMut for HostRows {
    fn deref_mut(&mut self) -> &mut [f16] {
        values_mut(&mut self.values)
    }
}

#[cfg(test)]
mod tests {
    use learn_domain::config::DeviceKind;

    use super::*;

    fn go_there_and_back(device: Device, most: usize) {
        for (count, ahead) in [0, 6, most, most].into_iter().zip([true, true, false, true]) {
            let given: Vec<f16> = (0..count).map(|number| f16::from_f32(number as f32 / 3.0)).collect();
            let mut rows = HostRows::new(count, device).unwrap();
            rows.copy_from_slice(&given);
            assert_eq!(*rows, given);
            // a GPU is busy for a while, so that the copy is still to come when the memory is given back and taken again
            let busy = Tensor::ones([4096, 4096], (Kind::Float, device));
            let _busy = (0..50 * usize::from(device.is_cuda())).fold(busy.shallow_clone(), |x, _| x.matmul(&busy));
            if ahead {
                rows.begin(device);
            }
            let there = rows.on(device, (count / 3, 3));
            if device.is_cuda() {
                drop(rows);
                HostRows::new(count, device).unwrap().fill(f16::NAN);
            }
            assert_eq!((there.size(), there.device()), (vec![count as i64 / 3, 3], device));
            assert_eq!(Vec::<f16>::try_from(there.reshape([-1]).to_device(Device::Cpu)).unwrap(), given);
        }
    }

    #[test]
    fn rows_are_a_tensor() {
        go_there_and_back(Device::Cpu, 600);
        let numbers = on_device(&[3_i64, 1], Device::Cpu);
        assert_eq!(Vec::<i64>::try_from(numbers).unwrap(), [3, 1]);
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-torch --run-ignored only"]
    fn copies_that_were_begun_wait_for_nobody_and_are_waited_for() {
        const COUNT: usize = 3 << 20;
        let gpu = crate::device(DeviceKind::Cuda, 0).unwrap();
        let of = |number: usize| vec![f16::from_f32(number as f32); COUNT];
        let mut before: Option<(usize, Tensor)> = None;
        // memory of one that is not used any more goes to the next copy while the GPU still reads it
        for number in 0..20 {
            let mut rows = HostRows::new(COUNT, gpu).unwrap();
            rows.copy_from_slice(&of(number));
            rows.begin(gpu);
            let busy = Tensor::ones([2048, 2048], (Kind::Float, gpu));
            let busy = (0..20).fold(busy.shallow_clone(), |x, _| x.matmul(&busy).clamp(0.0, 1.0));
            if let Some((number, before)) = before.take() {
                let (least, most) = (before.min(), before.max());
                drop(before);
                for end in [least, most] {
                    assert_eq!(end.double_value(&[]), number as f64);
                }
            }
            let there = rows.on(gpu, (COUNT, 1)) * busy.max().to_kind(Kind::Half);
            before = Some((number, there));
        }
        // and one that nobody asks for
        let rows = HostRows::new(COUNT, gpu).unwrap();
        rows.begin(gpu);
        rows.begin(gpu);
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-torch --run-ignored only"]
    fn a_gpu_copies_them() {
        let gpu = crate::device(DeviceKind::Cuda, 0).unwrap();
        go_there_and_back(gpu, 3 << 23);
        assert_eq!(Vec::<i64>::try_from(on_device(&[3_i64, 1], gpu).to_device(Device::Cpu)).unwrap(), [3, 1]);
    }
}
