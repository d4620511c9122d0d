//! One GPU through the CUDA driver: its primary context (the one libtorch uses too), memory for staging, a stream and an
//! event.
//!
//! What another kernel needs at once runs on the legacy default stream (null), which is libtorch's default stream. So a
//! collective starts after the kernels that produced its input and ends before the kernels that use its output, without
//! further events. What may run beside later kernels has a stream of its own, which waits for the kernels so far.

use std::ffi::c_void;

use cudarc::driver::result::{self as cuda, DriverError};
use cudarc::driver::sys;

use crate::CollectiveError;

/// libtorch's.
const DEFAULT: sys::CUstream = std::ptr::null_mut();
const REMEDY: &str = "install NVIDIA's driver (580 or newer for CUDA 13) and check that nvidia-smi lists the GPU, or use \
     the tcp backend on the CPU";

/// Loads and initialises the driver.
///
/// # Errors
/// `Unavailable` when there is no driver or no GPU.
pub(super) fn driver() -> Result<(), CollectiveError> {
    let unavailable = |what| CollectiveError::Unavailable { what, remedy: REMEDY };
    // SAFETY: it loads libcuda and nothing else. It has to come first, because cudarc panics when libcuda is absent.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable("the CUDA driver library (libcuda.so.1) is not there".to_owned()));
    }
    cuda::init().map_err(|error| unavailable(format!("the CUDA driver does not start: {error}")))
}

pub(super) fn count() -> Result<usize, CollectiveError> {
    driver()?;
    let count = cuda::device::get_count().map_err(|error| device("gpu_count", error))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn device(op: &'static str, error: DriverError) -> CollectiveError {
    CollectiveError::Device { op, reason: error.to_string() }
}

/// Where work is enqueued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// Between the kernels before and those after it.
    Default,
    /// After the kernels before [`Gpu::branch`], beside those after it.
    Side,
}

/// A retained primary context, a stream, and an event to wait for.
pub(super) struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    side: sys::CUstream,
    event: sys::CUevent,
}

// SAFETY: driver handles may be used from any thread as long as the context is current there, which `enter` sees to.
unsafe impl Send for Gpu {}

impl Gpu {
    pub(super) fn open(ordinal: i32) -> Result<Self, CollectiveError> {
        driver()?;
        let failed = |error| device("connect", error);
        let device = cuda::device::get(ordinal).map_err(|error| CollectiveError::Unavailable {
            what: format!("there is no cuda:{ordinal}: {error}"),
            remedy: "check CUDA_VISIBLE_DEVICES and the worker's ordinal",
        })?;
        // SAFETY: the device comes from the driver; the context is released once, in `drop`.
        let context = unsafe { cuda::primary_ctx::retain(device) }.map_err(failed)?;
        let mut gpu = Self { device, context, side: std::ptr::null_mut(), event: std::ptr::null_mut() };
        gpu.enter("connect")?;
        // one that blocks would wait for the default stream, and that for it
        gpu.side = cuda::stream::create(cuda::stream::StreamKind::NonBlocking).map_err(failed)?;
        gpu.event = cuda::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
        Ok(gpu)
    }

    /// Makes the GPU current in this thread, for the driver, for NCCL and for the CUDA runtime alike.
    pub(super) fn enter(&self, op: &'static str) -> Result<(), CollectiveError> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { cuda::ctx::set_current(self.context) }.map_err(|error| device(op, error))
    }

    pub(super) fn stream(&self, lane: Lane) -> sys::CUstream {
        match lane {
            Lane::Default => DEFAULT,
            Lane::Side => self.side,
        }
    }

    /// Marks the end of what the lane has been given so far.
    pub(super) fn record(&self, op: &'static str, lane: Lane) -> Result<(), CollectiveError> {
        // SAFETY: event and stream were created in this context and live as long as `self`.
        unsafe { cuda::event::record(self.event, self.stream(lane)) }.map_err(|error| device(op, error))
    }

    /// Lets the side lane wait for what the default one has been given so far.
    pub(super) fn branch(&self, op: &'static str) -> Result<(), CollectiveError> {
        self.record(op, Lane::Default)?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as in `record`; a stream waits for the latest record before this call, whatever is recorded later.
        unsafe { cuda::stream::wait_event(self.side, self.event, flags) }.map_err(|error| device(op, error))
    }

    /// Whether everything before the mark is done.
    pub(super) fn reached(&self, op: &'static str) -> Result<bool, CollectiveError> {
        // SAFETY: as in `record`.
        match unsafe { cuda::event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(device(op, error)),
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the process's end frees all of it.
        let _ = self.enter("drop");
        // SAFETY: the event, if it was made, is destroyed once and not used again.
        let _ = (!self.event.is_null()).then(|| unsafe { cuda::event::destroy(self.event) });
        // SAFETY: as the event; what it was given is done or aborted.
        let _ = (!self.side.is_null()).then(|| unsafe { cuda::stream::destroy(self.side) });
        // SAFETY: matches the `retain` of `open`.
        let _ = unsafe { cuda::primary_ctx::release(self.device) };
    }
}

/// Device memory that a host buffer passes through; it grows when a larger one comes.
#[derive(Default)]
pub(super) struct Staging {
    memory: sys::CUdeviceptr,
    bytes: usize,
}

impl Staging {
    /// At least `bytes` of device memory (and never none), valid until the next call.
    pub(super) fn room(&mut self, op: &'static str, bytes: usize) -> Result<*mut c_void, CollectiveError> {
        let bytes = bytes.max(256);
        if self.bytes < bytes {
            self.free();
            // SAFETY: plain allocation in the current context; freed by `free`.
            self.memory = unsafe { cuda::malloc_sync(bytes) }.map_err(|error| device(op, error))?;
            self.bytes = bytes;
        }
        Ok(self.memory as *mut c_void)
    }

    pub(super) fn upload(&mut self, op: &'static str, bytes: &[u8]) -> Result<*mut c_void, CollectiveError> {
        let room = self.room(op, bytes.len())?;
        if !bytes.is_empty() {
            // SAFETY: `room` has at least `bytes.len()` bytes; the copy is over when the call returns.
            unsafe { cuda::memcpy_htod_sync(self.memory, bytes) }.map_err(|error| device(op, error))?;
        }
        Ok(room)
    }

    /// Copies the first bytes back; the work that wrote them must be done.
    pub(super) fn download(&self, op: &'static str, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        debug_assert!(bytes.len() <= self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: `upload` or `room` made at least this many bytes for the same operation; the copy is synchronous.
        unsafe { cuda::memcpy_dtoh_sync(bytes, self.memory) }.map_err(|error| device(op, error))
    }

    /// Frees the memory in the current context.
    pub(super) fn free(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated by `room` and not freed before; `bytes` is set to 0 at once.
            let _ = unsafe { cuda::free_sync(self.memory) };
            self.bytes = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-collective --run-ignored only"]
    fn what_is_beside_later_kernels_comes_after_earlier_ones() {
        let gpu = Gpu::open(0).unwrap();
        let (mut written, mut copied) = (Staging::default(), Staging::default());
        let bytes = 1 << 28;
        let from = written.room("test", bytes).unwrap() as sys::CUdeviceptr;
        let to = copied.room("test", bytes).unwrap() as sys::CUdeviceptr;
        for round in 1..=8_u8 {
            // long enough for the copy to come first, if it does not wait
            for value in 0..=50 * u32::from(round) % 251 {
                // SAFETY: so many bytes of memory that lives until the end
                unsafe { sys::cuMemsetD8Async(from, value as u8, bytes, DEFAULT) }.result().unwrap();
            }
            let last = (50 * u32::from(round) % 251) as u8;
            gpu.branch("test").unwrap();
            let side = gpu.stream(Lane::Side);
            // SAFETY: as above, for both
            unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, side) }.result().unwrap();
            gpu.record("test", Lane::Side).unwrap();
            while !gpu.reached("test").unwrap() {
                std::hint::spin_loop();
            }
            let mut seen = vec![0; bytes];
            copied.download("test", &mut seen).unwrap();
            assert!(seen.iter().all(|&byte| byte == last), "round {round}");
        }
        written.free();
        copied.free();
    }
}
