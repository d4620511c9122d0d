//! What this process's libtorch is and can do, for `doctor` and logs.

use serde::Serialize;

use crate::cuda;

/// What [`describe`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// For example `2.11.0`; `unknown` if this libtorch does not tell.
    pub libtorch_version: String,
    /// Where `libtorch_cpu.so` lies.
    pub libtorch_folder: String,
    pub cuda_available: bool,
    /// Why there is no CUDA and what to do about it; empty if there is.
    pub cuda_reason: String,
    /// Number of usable GPUs.
    pub devices: usize,
    /// Threads of one operation on the CPU.
    pub threads: usize,
    /// Vector instructions that libtorch's kernels use on this CPU.
    pub cpu_capability: String,
}

/// Asks libtorch about itself; loads its CUDA library if there is one.
#[must_use]
pub fn describe() -> Facts {
    let gpus = cuda::available();
    Facts {
        libtorch_version: cuda::libtorch_version().unwrap_or_else(|| "unknown".into()),
        libtorch_folder: cuda::libtorch_folder().map(|path| path.display().to_string()).unwrap_or_default(),
        cuda_available: gpus.is_ok(),
        devices: *gpus.as_ref().unwrap_or(&0),
        cuda_reason: gpus.err().unwrap_or_default(),
        threads: usize::try_from(tch::get_num_threads()).unwrap_or_default(),
        cpu_capability: cpu_capability(),
    }
}

/// libtorch's own rule: `ATEN_CPU_CAPABILITY` if set, else the widest that the CPU has.
fn cpu_capability() -> String {
    if let Ok(forced) = std::env::var("ATEN_CPU_CAPABILITY") {
        return forced.to_uppercase();
    }
    #[cfg(target_arch = "x86_64")]
    {
        let has_512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        let has_fma = is_x86_feature_detected!("fma");
        if has_512 && has_fma {
            return "AVX512".into();
        }
        if is_x86_feature_detected!("avx2") && has_fma {
            return "AVX2".into();
        }
    }
    "DEFAULT".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_can_be_used_and_the_rest_has_a_reason() {
        let facts = describe();
        let gpu = crate::device(learn_domain::config::DeviceKind::Cuda, 0);
        assert_eq!(facts.cuda_available, gpu.is_ok(), "{facts:?}");
        if let Err(error) = gpu {
            assert!(!facts.cuda_reason.is_empty() && error.to_string().contains(&facts.cuda_reason), "{error}");
        }
        assert_eq!(facts.threads as i64, i64::from(tch::get_num_threads()));
    }
}
