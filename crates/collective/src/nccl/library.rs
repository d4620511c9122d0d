//! NCCL's functions, found at run time.
//!
//! The types are cudarc's. Its loader is not used: it looks for `libnccl.so` only and panics when that is absent, whereas
//! the Python package that comes with PyTorch has `libnccl.so.2` and nothing else. Result codes are read as plain
//! integers, because a newer NCCL may return codes that cudarc's enumeration does not know.

use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclUniqueId};
use libloading::Library;

use crate::CollectiveError;

type Code = c_uint;
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;
/// What NCCL answers when another rank or the network to it has failed: by the transport `ncclSystemError`,
/// `ncclInternalError` or `ncclRemoteError`. The first two also have causes on this machine, such as a full `/dev/shm`; the
/// recoveries that come of those without a finished step are counted.
const OF_OTHERS: [Code; 3] = [2, 3, 6];

/// In the order in which they are tried; a copy that libtorch has already loaded is found by the first name.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
const REMEDY: &str = "install NCCL 2.18 or newer (it comes with PyTorch for CUDA as the package nvidia-nccl-cu13, and as \
     libnccl2 from NVIDIA's apt repository) and put its directory on LD_LIBRARY_PATH, or use the tcp backend on the CPU";

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The loaded library. The function pointers are valid as long as `_library`, which is never dropped.
        pub(super) struct Nccl {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            _library: Library,
        }

        impl Nccl {
            fn from_library(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: the names and signatures are those of nccl.h, stable since NCCL 2.18.
                Ok(unsafe { Self { $($field: *library.get(concat!($symbol, "\0").as_bytes())?,)* _library: library } })
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion": fn(*mut c_int) -> Code;
    get_unique_id = "ncclGetUniqueId": fn(*mut ncclUniqueId) -> Code;
    init_rank = "ncclCommInitRankConfig": fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> Code;
    async_error = "ncclCommGetAsyncError": fn(ncclComm_t, *mut Code) -> Code;
    finalize = "ncclCommFinalize": fn(ncclComm_t) -> Code;
    destroy = "ncclCommDestroy": fn(ncclComm_t) -> Code;
    abort = "ncclCommAbort": fn(ncclComm_t) -> Code;
    group_start = "ncclGroupStart": fn() -> Code;
    group_end = "ncclGroupEnd": fn() -> Code;
    all_reduce = "ncclAllReduce":
        fn(*const c_void, *mut c_void, usize, c_uint, c_uint, ncclComm_t, cudaStream_t) -> Code;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_uint, ncclComm_t, cudaStream_t) -> Code;
    reduce_scatter = "ncclReduceScatter":
        fn(*const c_void, *mut c_void, usize, c_uint, c_uint, ncclComm_t, cudaStream_t) -> Code;
    reduce = "ncclReduce":
        fn(*const c_void, *mut c_void, usize, c_uint, c_uint, c_int, ncclComm_t, cudaStream_t) -> Code;
    broadcast = "ncclBroadcast":
        fn(*const c_void, *mut c_void, usize, c_uint, c_int, ncclComm_t, cudaStream_t) -> Code;
    error_string = "ncclGetErrorString": fn(Code) -> *const c_char;
    last_error = "ncclGetLastError": fn(ncclComm_t) -> *const c_char;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    /// A communicator that does not block has taken the call and works on it.
    InProgress,
}

impl Nccl {
    /// # Errors
    /// `Unavailable` with what to install.
    pub(super) fn load() -> Result<&'static Self, CollectiveError> {
        static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        LOADED.get_or_init(Self::open).as_ref().map_err(|reason| CollectiveError::Unavailable {
            what: format!("NCCL cannot be loaded: {reason}"),
            remedy: REMEDY,
        })
    }

    fn open() -> Result<Self, String> {
        let mut reasons = Vec::new();
        for name in NAMES {
            // SAFETY: loading runs the library's initialisers; NCCL's have no preconditions.
            match unsafe { Library::new(name) }.and_then(Self::from_library) {
                Ok(nccl) => return Ok(nccl),
                // What the dynamic linker says is in the error's source.
                Err(error) => {
                    let detail = error.source().map_or_else(|| error.to_string(), |source| source.to_string());
                    reasons.push(format!("{name}: {detail}"));
                }
            }
        }
        Err(reasons.join("; "))
    }

    pub(super) fn version(&self) -> Result<String, CollectiveError> {
        let mut code = 0;
        // SAFETY: NCCL writes one int.
        self.check("nccl_version", unsafe { (self.get_version)(&mut code) })?;
        Ok(format!("{}.{}.{}", code / 10_000, code / 100 % 100, code % 100))
    }

    pub(super) fn check(&self, op: &'static str, code: Code) -> Result<Progress, CollectiveError> {
        match code {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::InProgress),
            _ => Err(failed(op, code, self.describe(code))),
        }
    }

    fn describe(&self, code: Code) -> String {
        // SAFETY: both functions return a static or thread-local C string or null, and accept any code and a null
        // communicator.
        let texts = unsafe { [(self.error_string)(code), (self.last_error)(std::ptr::null_mut())] };
        let texts = texts.iter().filter(|text| !text.is_null());
        // SAFETY: not null, and NCCL ends its texts with a zero; they are copied at once.
        let texts: Vec<_> = texts.map(|text| unsafe { CStr::from_ptr(*text) }.to_string_lossy().into_owned()).collect();
        format!("NCCL error {code}: {}", texts.join(": ").trim_end_matches([':', ' ']))
    }
}

fn failed(op: &'static str, code: Code, reason: String) -> CollectiveError {
    if OF_OTHERS.contains(&code) {
        let reason =
            format!("{reason}; if no other rank has failed, look at this machine's network interfaces and /dev/shm");
        CollectiveError::PeerLost { op, peer: None, reason }
    } else {
        CollectiveError::Device { op, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_or_the_network_have_done_ends_a_generation_and_not_this_worker() {
        let passes = |code| failed("all_reduce", code, "x".into()).passes();
        // ncclUnhandledCudaError, ncclSystemError, ncclInternalError, ncclInvalidArgument, ncclInvalidUsage, ncclRemoteError
        assert_eq!([1, 2, 3, 4, 5, 6].map(passes), [false, true, true, false, false, true]);
        let text = failed("all_reduce", 6, "x".into()).to_string();
        assert!(text.starts_with("all_reduce: lost another rank: x; if no other rank has failed, look at"), "{text}");
    }
}
