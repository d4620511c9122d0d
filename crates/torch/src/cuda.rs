//! Loads libtorch's CUDA library at run time.
//!
//! Input: the libtorch that this process has loaded. Output: the number of GPUs, or why there is none. libtorch registers
//! its CUDA part when `libtorch_cuda.so` is loaded with global symbols, and looks for the registration the first time
//! that anyone asks about CUDA; both happen here, in this order, once per process.

use std::ffi::{CString, c_int};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::Cuda;

use crate::{GpuMemory, TorchError, ops};

/// Loaded in this order; the second registers CUDA with libtorch.
const LIBRARIES: [&str; 2] = ["libc10_cuda.so", "libtorch_cuda.so"];

/// The number of usable GPUs (at least 1), or why there is none and what to do.
pub fn available() -> Result<usize, String> {
    static ANSWER: OnceLock<Result<usize, String>> = OnceLock::new();
    ANSWER.get_or_init(probe).clone()
}

fn probe() -> Result<usize, String> {
    load().map_err(|error| {
        format!(
            "{error}. On a machine with a GPU install PyTorch 2.11 with all its CUDA packages (pip install torch==2.11.0) \
             and set LIBTORCH to its `torch` folder"
        )
    })?;
    if !Cuda::is_available() {
        return Err(
            "libtorch's CUDA library is loaded but sees no GPU; look at `nvidia-smi`, the driver's version (CUDA \
                    13 needs 580 or newer) and CUDA_VISIBLE_DEVICES"
                .into(),
        );
    }
    usize::try_from(Cuda::device_count())
        .ok()
        .filter(|count| *count > 0)
        .ok_or_else(|| "libtorch counts no GPU; look at CUDA_VISIBLE_DEVICES".into())
}

fn load() -> Result<(), TorchError> {
    let folder = libtorch_folder()?;
    for name in LIBRARIES {
        let path = folder.join(name);
        let failed = |reason: String| TorchError::Load { path: path.clone(), reason };
        if !path.is_file() {
            return Err(failed("there is no such file; this is a libtorch without CUDA".into()));
        }
        // SAFETY: the initialisers of these two libraries are the ones that any program linked with libtorch's CUDA
        // library runs at its start; they register operators and touch nothing of ours. The files lie beside the
        // libtorch_cpu.so that this process already runs, so they belong to the same build.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        // The registered operators point into the library, so it stays for the rest of the process.
        std::mem::forget(library.map_err(|error| failed(reason(&error)))?);
    }
    ops::choose_kernels()
}

/// What the dynamic linker said, for example which library is missing; it stands in the error's source.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The folder of the `libtorch_cpu.so` that this process runs, else the one that `LIBTORCH` names.
pub fn libtorch_folder() -> Result<PathBuf, TorchError> {
    loaded_folder()
        .or_else(|| std::env::var_os("LIBTORCH").map(|root| Path::new(&root).join("lib")).filter(|lib| lib.is_dir()))
        .ok_or(TorchError::NoLibtorch)
}

fn loaded_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    let library = path.into_iter().find(|path| path.file_name().is_some_and(|name| name == "libtorch_cpu.so"))?;
    library.parent().map(Path::to_owned)
}

/// libtorch's version as its stable C interface tells it; `None` if this libtorch has none.
pub fn libtorch_version() -> Option<String> {
    let name = CString::new("aoti_torch_abi_version").ok()?;
    let process = Library::this();
    // SAFETY: libtorch's stable C interface declares `uint64_t aoti_torch_abi_version()`; libtorch_cpu.so stays loaded
    // because this program is linked with it.
    let version =
        unsafe { process.get::<unsafe extern "C" fn() -> u64>(name.as_bytes_with_nul()).ok().map(|ask| ask()) }?;
    Some(format!("{}.{}.{}", version >> 56, (version >> 48) & 0xff, (version >> 40) & 0xff))
}

/// What CUDA's runtime says of the memory of a GPU, in the numbering of this process; the thread's current device stays as
/// it is.
pub fn memory(ordinal: c_int) -> Option<GpuMemory> {
    let process = Library::this();
    let (mut before, mut free, mut total) = (0, 0, 0);
    // SAFETY: `cudaError_t cudaGetDevice(int*)`, `cudaSetDevice(int)` and `cudaMemGetInfo(size_t*, size_t*)` are declared
    // like this by CUDA's runtime, which libtorch_cuda.so has brought into this process with global symbols and which is
    // never unloaded; the pointers are to values that live through the calls.
    let told = unsafe {
        let get = process.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cudaGetDevice\0").ok()?;
        let set = process.get::<unsafe extern "C" fn(c_int) -> c_int>(b"cudaSetDevice\0").ok()?;
        let ask = process.get::<unsafe extern "C" fn(*mut usize, *mut usize) -> c_int>(b"cudaMemGetInfo\0").ok()?;
        if get(&raw mut before) != 0 || set(ordinal) != 0 {
            return None;
        }
        let told = ask(&raw mut free, &raw mut total);
        set(before);
        told
    };
    (told == 0).then(|| GpuMemory { used: total.saturating_sub(free), total })
}

/// The major number of this GPU's compute capability, such as 8 for Ampere; `None` if CUDA's runtime does not say.
pub fn compute_capability(ordinal: c_int) -> Option<c_int> {
    /// `cudaDevAttrComputeCapabilityMajor`.
    const MAJOR: c_int = 75;
    let mut major = 0;
    // SAFETY: `cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int)` is declared like this; as in `memory`.
    let told = unsafe {
        let ask = Library::this()
            .get::<unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int>(b"cudaDeviceGetAttribute\0")
            .ok()?;
        ask(&raw mut major, MAJOR, ordinal)
    };
    (told == 0).then_some(major)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_loaded_libtorch_and_its_version() {
        tch::get_num_threads();
        assert!(libtorch_folder().unwrap().join("libtorch_cpu.so").is_file());
        assert!(libtorch_version().unwrap().starts_with("2."));
    }
}
