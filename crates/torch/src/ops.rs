//! Operators of libtorch that its Rust binding leaves out.
//!
//! Input: tensors. Output: a tensor with its graph, or tensors changed in place. The C++ that calls them is `shim/ops.cpp`;
//! what libtorch throws comes back as an error.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::{Stored, TorchError, cuda};

unsafe extern "C" {
    fn learn_torch_free(text: *mut c_char);
    fn learn_cuda_loaded() -> *mut c_char;
    fn learn_packed_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        bounds: *const C_tensor,
        longest: i64,
        dropout: f64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn learn_fused_adamw(
        values: *const *const C_tensor,
        gradients: *const *const C_tensor,
        first: *const *const C_tensor,
        second: *const *const C_tensor,
        count: usize,
        step: *const C_tensor,
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        epsilon: f64,
    ) -> *mut c_char;
    fn learn_tensor_over(
        start: *mut f32,
        count: i64,
        holder: *mut c_void,
        release: unsafe extern "C" fn(*mut c_void),
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn learn_page_locked(count: i64, kind: c_int, out: *mut *mut C_tensor) -> *mut c_char;
    fn learn_copy_begin(host: *const C_tensor, ordinal: c_int, copy: *mut *mut c_void) -> *mut c_char;
    fn learn_copy_end(copy: *mut c_void, out: *mut *mut C_tensor) -> *mut c_char;
    fn learn_copy_drop(copy: *mut c_void);
    fn learn_gpu_tensors(ordinal: c_int, reset: bool, now: *mut i64, most: *mut i64) -> *mut c_char;
}

/// Sequences that lie one behind the other.
#[derive(Debug)]
pub struct SequenceBounds {
    /// `[B + 1]` i32 on the device: where each begins, and the end of the last.
    pub bounds: Tensor,
    /// The length of the longest.
    pub longest: i64,
}

/// AdamW's settings for a group of tensors.
#[derive(Clone, Copy, Debug)]
pub struct FusedAdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub epsilon: f64,
}

/// A parameter, its gradient and its moments.
#[derive(Debug)]
pub struct AdamWTensors {
    pub values: Tensor,
    pub gradient: Tensor,
    pub first: Tensor,
    pub second: Tensor,
}

/// Chooses among libtorch's CUDA kernels, which have been loaded.
///
/// # Errors
/// As libtorch has them.
pub(crate) fn choose_kernels() -> Result<(), TorchError> {
    // SAFETY: no arguments; gives an error or none.
    checked(unsafe { learn_cuda_loaded() })
}

/// Whether [`packed_attention`] can take heads of this width in this kind there: on a GPU, and flash attention on Ampere
/// or newer.
#[must_use]
pub fn can_pack(device: Device, kind: Kind, width: i64) -> bool {
    let Device::Cuda(ordinal) = device else { return false };
    let kernels = match kind {
        Kind::Float | Kind::Half => true,
        Kind::BFloat16 => cuda::compute_capability(ordinal as c_int).is_some_and(|major| major >= AMPERE),
        _ => false,
    };
    kernels && width % 8 == 0 && width <= 256
}

/// The first compute capability with flash attention.
const AMPERE: c_int = 8;
/// Sequences that one launch takes.
pub const MOST_SEQUENCES: usize = 65_535;

/// Causal attention of each sequence on itself on a GPU: query, key and value `[T, heads, width]` to `[T, heads, width]`.
/// bf16 goes through flash attention, f16 and f32 through the memory-efficient kernels.
///
/// # Errors
/// As libtorch has them: the tensors are on the CPU, of another kind or shape.
pub fn packed_attention(
    (query, key, value): (&Tensor, &Tensor, &Tensor),
    sequences: &SequenceBounds,
    dropout: f64,
) -> Result<Tensor, TorchError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: all are tensors that outlive the call, which writes one tensor of its own to `out` or gives an error.
    checked(unsafe {
        learn_packed_attention(
            query.as_ptr(),
            key.as_ptr(),
            value.as_ptr(),
            sequences.bounds.as_ptr(),
            sequences.longest,
            dropout,
            &mut out,
        )
    })?;
    // SAFETY: a tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

impl FusedAdamW {
    /// The update of this number, counted from 1, in one pass.
    ///
    /// # Errors
    /// As libtorch has them: tensors differ in device, kind or shape.
    pub fn update(&self, all: &[AdamWTensors], step: u64) -> Result<(), TorchError> {
        let Some(one) = all.first() else { return Ok(()) };
        let step = Tensor::full([0_i64; 0], step as f64, (Kind::Float, one.values.device()));
        let list = |of: fn(&AdamWTensors) -> &Tensor| -> Vec<*const C_tensor> {
            all.iter().map(|tensors| of(tensors).as_ptr()).collect()
        };
        let (values, gradients) = (list(|of| &of.values), list(|of| &of.gradient));
        let (first, second) = (list(|of| &of.first), list(|of| &of.second));
        // SAFETY: four lists of as many tensors, and one more, which all outlive the call.
        checked(unsafe {
            learn_fused_adamw(
                values.as_ptr(),
                gradients.as_ptr(),
                first.as_ptr(),
                second.as_ptr(),
                all.len(),
                step.as_ptr(),
                self.learning_rate,
                self.beta1,
                self.beta2,
                self.weight_decay,
                self.epsilon,
            )
        })
    }
}

/// A tensor `[count]` f32 on the CPU over memory that `holder` keeps, which is let go with the last tensor over it.
///
/// # Safety
/// From `start` on there are `count` elements, aligned, as long as `holder` is there.
///
/// # Panics
/// There is no memory for a tensor, as libtorch's operators panic without memory.
pub(crate) unsafe fn over<T: Send + Sync + 'static>(start: *mut f32, count: usize, holder: Arc<T>) -> Tensor {
    unsafe extern "C" fn release<T>(holder: *mut c_void) {
        // SAFETY: it is what `Arc::into_raw` gave, and comes back once.
        drop(unsafe { Arc::from_raw(holder.cast_const().cast::<T>()) });
    }
    let holder = Arc::into_raw(holder).cast_mut().cast::<c_void>();
    let mut out = std::ptr::null_mut();
    // SAFETY: the memory is there until `release` lets go of what keeps it, which it does once; writes one tensor of its own
    // to `out`, or gives an error.
    let made = checked(unsafe { learn_tensor_over(start, count as i64, holder, release::<T>, &mut out) });
    made.unwrap_or_else(|error| panic!("{error}"));
    // SAFETY: a tensor that nobody else owns.
    unsafe { Tensor::from_ptr(out) }
}

/// `[count]` values in memory of the host that a GPU reads by itself, beside what the host does.
///
/// # Errors
/// There is no GPU, or too little memory.
pub(crate) fn page_locked<T: Stored>(count: usize) -> Result<Tensor, TorchError> {
    // of c10::ScalarType
    let kind = match T::KIND {
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        other => return Err(TorchError::NotCarried(other)),
    };
    let mut out = std::ptr::null_mut();
    // SAFETY: writes one tensor of its own to `out`, or gives an error.
    let locked = checked(unsafe { learn_page_locked(count as i64, kind, &mut out) });
    let bytes = count * size_of::<T>();
    locked.map_err(|error| TorchError::PageLocked { bytes, reason: error.to_string() })?;
    // SAFETY: a tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// A tensor on its way from page-locked memory to a GPU, which copies it beside its other work.
#[derive(Debug)]
pub(crate) struct Copying {
    /// Of the shim; null when it has come to its end.
    copy: *mut c_void,
}

// SAFETY: a tensor and an event, which are used by one thread at a time.
unsafe impl Send for Copying {}

impl Copying {
    /// Begins to copy `host`, which nobody writes to until it is freed.
    ///
    /// # Errors
    /// The GPU has too little memory.
    pub(crate) fn begin(host: &Tensor, ordinal: usize) -> Result<Self, TorchError> {
        let mut copy = std::ptr::null_mut();
        // SAFETY: a tensor that outlives the call, which writes a copy of its own to `copy` or gives an error. The memory that
        // is copied from stays until the copy has ended, even if the tensor goes: libtorch sees to it.
        checked(unsafe { learn_copy_begin(host.as_ptr(), ordinal as c_int, &mut copy) })?;
        Ok(Self { copy })
    }

    /// The tensor on the GPU; what this thread has the GPU do from now on is done after the copy.
    ///
    /// # Errors
    /// As libtorch has them.
    pub(crate) fn end(mut self) -> Result<Tensor, TorchError> {
        let copy = std::mem::replace(&mut self.copy, std::ptr::null_mut());
        let mut out = std::ptr::null_mut();
        // SAFETY: what `begin` gave, once; writes one tensor of its own to `out`, or gives an error.
        checked(unsafe { learn_copy_end(copy, &mut out) })?;
        // SAFETY: a tensor that nobody else owns.
        Ok(unsafe { Tensor::from_ptr(out) })
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        if !self.copy.is_null() {
            // SAFETY: what `begin` gave, once.
            unsafe { learn_copy_drop(self.copy) };
        }
    }
}

/// Bytes of a device's memory that tensors hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMemory {
    pub now: u64,
    /// The most since it was reset.
    pub most: u64,
}

/// What tensors hold of a GPU's memory, after a reset or not; `None` on the CPU, which does not count.
///
/// # Errors
/// libtorch has no GPU.
pub fn tensor_memory(device: Device, reset: bool) -> Result<Option<TensorMemory>, TorchError> {
    let Device::Cuda(ordinal) = device else { return Ok(None) };
    let (mut now, mut most) = (0, 0);
    // SAFETY: writes two numbers, or gives an error.
    checked(unsafe { learn_gpu_tensors(ordinal as c_int, reset, &mut now, &mut most) })?;
    Ok(Some(TensorMemory { now: now.unsigned_abs(), most: most.unsigned_abs() }))
}

/// What a function of the shim gives back.
fn checked(error: *mut c_char) -> Result<(), TorchError> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: a text that ends with 0 and is ours; it is copied, and then freed once.
    let text = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
    // SAFETY: as above.
    unsafe { learn_torch_free(error) };
    Err(TorchError::Torch(tch::TchError::Torch(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(lengths: &[i32], device: Device) -> SequenceBounds {
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        let bounds: Vec<i32> = std::iter::once(0).chain(ends).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0).into();
        SequenceBounds { bounds: Tensor::from_slice(&bounds).to_device(device), longest }
    }

    #[test]
    fn what_libtorch_throws_is_an_error() {
        let x = Tensor::zeros([3, 2, 8], (Kind::BFloat16, Device::Cpu));
        for kind in [Kind::BFloat16, Kind::Float] {
            let x = x.to_kind(kind);
            let error = packed_attention((&x, &x, &x), &sequences(&[1, 2], Device::Cpu), 0.0).unwrap_err().to_string();
            // the operator was found, and has no kernel for the CPU
            assert!(error.contains("attention_forward") && error.contains("CPU"), "{error}");
        }
    }

    #[test]
    fn memory_is_kept_as_long_as_there_is_a_tensor_over_it() {
        for count in [4, 0] {
            let memory = Arc::new([1.0_f32, 2.0, 3.0, 4.0]);
            let kept = Arc::downgrade(&memory);
            // SAFETY: so many elements; they are only read.
            let tensor = unsafe { over(memory.as_ptr().cast_mut(), count, memory) };
            let view = tensor.narrow(0, count as i64 / 2, count as i64 / 2);
            drop(tensor);
            assert_eq!(Vec::<f32>::try_from(&view).unwrap(), [3.0, 4.0][..count / 2]);
            assert_eq!(kept.strong_count(), 1);
            drop(view);
            assert_eq!(kept.strong_count(), 0);
        }
    }

    #[test]
    fn the_cpu_does_not_count_what_tensors_hold() {
        assert_eq!(tensor_memory(Device::Cpu, true).unwrap(), None);
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-torch --run-ignored only"]
    fn the_most_that_tensors_held_is_told() {
        let gpu = crate::device(learn_domain::config::DeviceKind::Cuda, 0).unwrap();
        let block = || Tensor::zeros([1 << 20], (Kind::Float, gpu));
        let kept = block();
        let before = tensor_memory(gpu, true).unwrap().unwrap();
        assert!(before.now >= 4 << 20 && before.most == before.now, "{before:?}");
        drop(block());
        let after = tensor_memory(gpu, false).unwrap().unwrap();
        assert_eq!((after.now, after.most), (before.now, before.now + (4 << 20)));
        drop(kept);
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-torch --run-ignored only"]
    fn packed_attention_is_that_of_each_sequence_alone() {
        let gpu = crate::device(learn_domain::config::DeviceKind::Cuda, 0).unwrap();
        crate::seed(1);
        let lengths = [2, 3, 3, 40];
        for (kind, error) in [(Kind::Float, 1e-3), (Kind::Half, 1e-2), (Kind::BFloat16, 5e-2)] {
            let leaf = || Tensor::randn([48, 4, 64], (Kind::Float, gpu)).to_kind(kind).set_requires_grad(true);
            let parts = [leaf(), leaf(), leaf()];
            let [query, key, value] = parts.each_ref();
            let packed = packed_attention((query, key, value), &sequences(&lengths, gpu), 0.0).unwrap();
            let mut start = 0;
            let alone = lengths.map(|length| {
                let cut = |x: &Tensor| x.narrow(0, start, length.into()).to_kind(Kind::Double).transpose(0, 1);
                let (query, key, value) = (cut(query), cut(key), cut(value));
                start += i64::from(length);
                let scores = query.matmul(&key.transpose(1, 2)) / 8.0;
                let later = Tensor::ones_like(&scores).triu(1).to_kind(Kind::Bool);
                scores.masked_fill(&later, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(&value).transpose(0, 1)
            });
            let alone = Tensor::cat(&alone, 0);
            let gap = |a: &Tensor, b: &Tensor| (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]);
            assert!(gap(&packed, &alone) < error, "{kind:?}");
            let cotangent = Tensor::randn_like(&alone);
            let gradients = |y: &Tensor| {
                Tensor::run_backward(&[(y.to_kind(Kind::Double) * &cotangent).sum(Kind::Double)], &parts, true, false)
            };
            for (ours, theirs) in gradients(&packed).iter().zip(gradients(&alone)) {
                assert!(gap(ours, &theirs.to_kind(Kind::Double)) < 10.0 * error, "{kind:?}");
            }
        }
    }
}
