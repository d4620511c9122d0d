//! `learn-worker doctor`: what libtorch, CUDA and NCCL say on this machine.

use serde::Serialize;

/// Facts that only a process with libtorch can find out.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    pub libtorch: learn_torch::Facts,
    pub nccl: Option<String>,
    /// Why NCCL cannot be used.
    pub nccl_reason: Option<String>,
    pub protocol: u32,
    pub version: &'static str,
}

/// Looks; never fails, because a missing part is an answer.
#[must_use]
pub fn facts() -> Facts {
    let nccl = learn_collective::nccl_version();
    Facts {
        libtorch: learn_torch::describe(),
        nccl_reason: nccl.as_ref().err().map(ToString::to_string),
        nccl: nccl.ok(),
        protocol: learn_proto::PROTOCOL,
        version: env!("CARGO_PKG_VERSION"),
    }
}
