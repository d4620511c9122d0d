//! What libtorch says when it cannot go on, in words that help.
//!
//! Input: the task of a worker. Output: its result, or an error for a panic: tch's operators panic with libtorch's
//! message, which would end the process without a word to the coordinator. A message that memory ran out becomes an advice on
//! what to lower ([`advice`], a pure function).

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use learn_domain::Phase;

use crate::error::WorkerError;

/// Runs `task`; a panic in it is an error.
///
/// # Errors
/// Those of the task, and [`WorkerError::Memory`] or [`WorkerError::Panic`]. `phase` is asked when the task has panicked.
pub fn caught<T>(task: impl FnOnce() -> Result<T, WorkerError>, phase: impl Fn() -> Phase) -> Result<T, WorkerError> {
    // what the task was changing is not used again: the worker leaves
    let ended = catch_unwind(AssertUnwindSafe(task)).unwrap_or_else(|payload| {
        let message = message(payload.as_ref());
        Err(WorkerError::Panic(message))
    });
    ended.map_err(|error| match advice(&error.to_string(), phase()) {
        Some(advice) => WorkerError::Memory(advice),
        None => error,
    })
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message").to_owned()
}

/// What to lower, if `message` says that memory ran out while the worker was in `phase`.
fn advice(message: &str, phase: Phase) -> Option<String> {
    let of_gpu = ["CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "NVML_ERROR_MEMORY"];
    let of_host = ["can't allocate memory", "not enough memory: you tried to allocate"];
    let device = if of_gpu.iter().any(|known| message.contains(known)) {
        "GPU memory"
    } else if of_host.iter().any(|known| message.contains(known)) {
        "host memory"
    } else {
        return None;
    };
    let lower = match phase {
        Phase::Evaluation => {
            "lower evaluation.batch_users (the metrics stay the same), or evaluation.content_memory, which goes without the \
             comparisons by content"
        }
        Phase::Checkpoint => "a checkpoint is copied to host memory first: lower cluster.row_cache",
        Phase::Export => "run it where more memory is free; with CUDA_VISIBLE_DEVICES=N it takes another GPU",
        Phase::Recommend => {
            "ask for fewer users at once, or run it where more memory is free; with CUDA_VISIBLE_DEVICES=N it takes another GPU"
        }
        _ => {
            "lower training.micro_batch (the gradient stays the same; half of a worker's share of the global batch is a \
             start), with the full softmax objective.catalogue_batch too, and cluster.device_row_cache, set \
             training.activation_checkpointing, or use more workers"
        }
    };
    let facts = facts(message).map(|facts| format!(" ({facts})")).unwrap_or_default();
    Some(format!("{device} ran out in the phase {phase}{facts}; {lower}"))
}

/// The sentences of libtorch that say how much was wanted, and how much there is.
fn facts(message: &str) -> Option<String> {
    let wanted = message.find("Tried to allocate").or_else(|| message.find("you tried to allocate"))?;
    let rest = message[wanted..].lines().next()?;
    // the sentences after say which process holds what, and how libtorch's allocator can be set
    let end = rest.find(" is free").map_or_else(|| rest.find(". ").unwrap_or(rest.len()), |at| at + " is free".len());
    Some(rest[..end].trim_end_matches(['.', '"', '`']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    // messages of PyTorch 2.x: c10/cuda/CUDACachingAllocator.cpp, c10/core/impl/alloc_cpu.cpp
    const CUDA: &str = "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 2.44 GiB. \
        GPU 1 has a total capacity of 79.10 GiB of which 1.01 GiB is free. Including non-PyTorch memory, this process has \
        78.08 GiB memory in use. Of the allocated memory 70.12 GiB is allocated by PyTorch\")";
    const HOST: &str = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried \
        to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)";

    #[test]
    fn running_out_of_memory_says_what_to_lower() {
        let text = advice(CUDA, Phase::Backward).unwrap();
        let facts = "Tried to allocate 2.44 GiB. GPU 1 has a total capacity of 79.10 GiB of which 1.01 GiB is free";
        assert_eq!(text.split("; ").next(), Some(&*format!("GPU memory ran out in the phase backward ({facts})")));
        assert!(text.contains("training.micro_batch") && !text.contains("Torch("), "{text}");
        assert!(advice(CUDA, Phase::Evaluation).unwrap().contains("evaluation.batch_users"));
        for (phase, advised) in [(Phase::Export, "where more memory is free"), (Phase::Recommend, "fewer users")] {
            let text = advice(CUDA, phase).unwrap();
            assert!(text.contains(advised) && !text.contains("training."), "there is no training to change: {text}");
        }
        let text = advice(HOST, Phase::Forward).unwrap();
        assert!(
            text.starts_with("host memory ran out in the phase forward (you tried to allocate 400000000000 bytes);")
        );
        assert!(advice("CUDA error: out of memory", Phase::Reduce).unwrap().contains("phase reduce; lower training"));
        assert!(advice("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Phase::Forward).is_some());
        for other in ["CUDA error: an illegal memory access was encountered", "the row cache holds 7", "disk full"] {
            assert_eq!(advice(other, Phase::Forward), None, "{other}");
        }
    }

    #[test]
    fn what_libtorch_really_says_is_understood() {
        // a petabyte is refused by every allocator, and tch panics
        let huge = || {
            let tensor = tch::Tensor::zeros([1 << 50], (tch::Kind::Uint8, tch::Device::Cpu));
            Ok(tensor.size()[0])
        };
        let error = caught(huge, || Phase::Forward).unwrap_err();
        assert!(matches!(error, WorkerError::Memory(_)), "{error}");
        assert!(error.to_string().contains("1125899906842624 bytes"), "{error}");
    }

    #[test]
    fn a_panic_is_an_error_and_an_error_stays_what_it_is() {
        let panics = || -> Result<(), WorkerError> { panic!("shape {} is wrong", 7) };
        assert!(matches!(caught(panics, Phase::default), Err(WorkerError::Panic(said)) if said == "shape 7 is wrong"));
        let fails = || -> Result<(), WorkerError> { Err(WorkerError::Signature) };
        assert!(matches!(caught(fails, Phase::default), Err(WorkerError::Signature)));
        assert_eq!(caught(|| Ok(3), Phase::default).unwrap(), 3);
    }
}
