//! The parts of LEARN: its binaries, libtorch, CUDA, NCCL, and the dataset of the configuration.

use std::process::{Command, Stdio};

use learn_dataset::{Dataset, Unsuitable};
use learn_domain::Config;
use learn_domain::config::DeviceKind;
use serde::Deserialize;

use super::Check;
use crate::settings::Given;
use crate::{encoder, made_from, process, render, system};

/// How to get libtorch.
const GET_LIBTORCH: &str = "`cargo xtask setup` gets libtorch 2.11 (in an unpacked archive: `install`); or export LIBTORCH=/path/to/libtorch and \
     build again";

/// What `learn-worker doctor --json` prints.
#[derive(Debug, Deserialize)]
struct WorkerFacts {
    version: String,
    libtorch: Libtorch,
    nccl: Option<String>,
    nccl_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Libtorch {
    libtorch_version: String,
    libtorch_folder: String,
    cuda_available: bool,
    cuda_reason: String,
    devices: usize,
    threads: usize,
    cpu_capability: String,
}

pub(super) fn checks(config: &Config, given: &Given) -> Vec<Check> {
    let mut checks = vec![binaries()];
    checks.extend(devices(config));
    checks.push(encoder(config));
    checks.push(dataset(config, given));
    checks
}

/// What libtorch is and finds, as a worker says.
pub(super) fn devices(config: &Config) -> Vec<Check> {
    match worker_facts() {
        Ok(facts) => facts_checks(&facts, config),
        Err(problem) => vec![Check::missing("libtorch", problem, GET_LIBTORCH)],
    }
}

fn binaries() -> Check {
    for name in ["learn-coordinator", "learn-worker", "learn-embed"] {
        if let Err(error) = process::sibling(name) {
            return Check::missing("binaries", error.to_string(), "`cargo build --release`");
        }
    }
    Check::ok("binaries", "learn-coordinator, learn-worker and learn-embed stand beside learn-launch")
}

fn worker_facts() -> Result<WorkerFacts, String> {
    let binary = process::sibling("learn-worker").map_err(|error| error.to_string())?;
    let mut command = Command::new(binary);
    command.args(["doctor", "--json"]).env("LEARN_LOG", "error").stdin(Stdio::null());
    system::end_with_parent(&mut command);
    let answer = command.output().map_err(|error| format!("learn-worker does not start: {error}"))?;
    if !answer.status.success() {
        let said = String::from_utf8_lossy(&answer.stderr);
        let how = process::describe(answer.status);
        return Err(format!("learn-worker does not start ({how}): {}", said.lines().last().unwrap_or_default()));
    }
    serde_json::from_slice(&answer.stdout).map_err(|error| format!("learn-worker doctor is not understood: {error}"))
}

fn facts_checks(facts: &WorkerFacts, config: &Config) -> Vec<Check> {
    let mut checks = Vec::new();
    if facts.version != env!("CARGO_PKG_VERSION") {
        let found = format!("learn-worker is {}, learn-launch {}", facts.version, env!("CARGO_PKG_VERSION"));
        checks.push(Check::missing("versions", found, "`cargo build --release`"));
    }
    let torch = &facts.libtorch;
    let found = format!(
        "{} in {} ({}, {} threads)",
        torch.libtorch_version, torch.libtorch_folder, torch.cpu_capability, torch.threads
    );
    checks.push(if torch.libtorch_version.starts_with("2.11") {
        Check::ok("libtorch", found)
    } else {
        Check::warning("libtorch", found, format!("2.11 is what LEARN is built for: {GET_LIBTORCH}"))
    });
    let device = config.cluster.device;
    let need_gpus = config.cluster.workers as usize;
    checks.push(match (torch.cuda_available, device) {
        (true, DeviceKind::Cuda) if torch.devices < need_gpus => Check::missing(
            "CUDA",
            format!("{} GPUs for {need_gpus} workers", torch.devices),
            format!("set cluster.workers={}", torch.devices),
        ),
        (true, _) => Check::ok("CUDA", format!("{} GPUs", torch.devices)),
        (false, DeviceKind::Cuda) => {
            Check::missing("CUDA", torch.cuda_reason.clone(), "mend that, or set cluster.device=cpu")
        }
        (false, _) => Check::ok("CUDA", format!("not used: {}", torch.cuda_reason)),
    });
    let gpus = torch.cuda_available && device != DeviceKind::Cpu;
    let reason = || facts.nccl_reason.clone().unwrap_or_else(|| "not found".into());
    checks.push(match &facts.nccl {
        Some(version) => Check::ok("NCCL", version.clone()),
        None if gpus => {
            let remedy =
                "install NCCL 2.24 or later (`pip install nvidia-nccl-cu13`) where the loader finds libnccl.so.2";
            Check::missing("NCCL", reason(), remedy)
        }
        None => Check::ok("NCCL", format!("not used on the CPU: {}", reason())),
    });
    checks
}

/// An encoder that is not there keeps nobody from preparing a dataset, nor from training on one that is embedded.
fn encoder(config: &Config) -> Check {
    let unusable = match encoder::find(&config.embed) {
        Ok(found) => return Check::ok("encoder", found),
        Err(unusable) => unusable,
    };
    let dataset = Dataset::open(&config.data.dataset);
    let waits = dataset.is_ok_and(|dataset| dataset.manifest().embeddings.is_none());
    if waits && config.model.item_input.has_content() {
        Check::missing("encoder", unusable.found, unusable.remedy)
    } else {
        Check::warning("encoder", unusable.found, unusable.remedy)
    }
}

fn dataset(config: &Config, given: &Given) -> Check {
    let folder = &config.data.dataset;
    match Dataset::open(folder) {
        Err(error) => Check::warning("dataset", error.to_string(), "`learn-launch prepare CONFIG` makes it"),
        Ok(dataset) => {
            let counts = &dataset.manifest().counts;
            let found = format!(
                "{}: {} users, {} items",
                folder.display(),
                render::count(counts.users),
                render::count(counts.items.into())
            );
            if let Some(contradiction) = made_from::contradiction(&dataset, config, given) {
                return Check::missing("dataset", found, contradiction);
            }
            match (dataset.suits(config), dataset.embeddings()) {
                // what only its later embeddings will tell
                (Err(Unsuitable::Dataset(error)), _) | (Ok(()), Err(error)) => {
                    Check::warning("dataset", found, error.to_string())
                }
                (Err(unsuitable), _) => Check::missing("dataset", found, unsuitable.to_string()),
                (Ok(()), Ok(embeddings)) => Check::ok("dataset", format!("{found}, {} dimensions", embeddings.dim())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn facts(gpus: usize, nccl: Option<&str>) -> WorkerFacts {
        let json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "protocol": 1,
            "nccl": nccl,
            "nccl_reason": nccl.is_none().then_some("libnccl.so.2 not found"),
            "libtorch": {
                "libtorch_version": "2.11.0", "libtorch_folder": "/t", "cuda_available": gpus > 0,
                "cuda_reason": if gpus > 0 { "" } else { "no driver" }, "devices": gpus, "threads": 2,
                "cpu_capability": "AVX2"
            }
        });
        serde_json::from_value(json).unwrap()
    }

    fn verdicts(facts: &WorkerFacts, device: DeviceKind, workers: u32) -> Vec<(&'static str, Verdict)> {
        let mut config = Config::default();
        (config.cluster.device, config.cluster.workers) = (device, workers);
        facts_checks(facts, &config).into_iter().map(|check| (check.name, check.verdict)).collect()
    }

    #[test]
    fn the_cpu_needs_neither_cuda_nor_nccl() {
        for device in [DeviceKind::Cpu, DeviceKind::Auto] {
            assert!(verdicts(&facts(0, None), device, 2).iter().all(|(_, verdict)| *verdict == Verdict::Ok));
        }
    }

    #[test]
    fn gpus_need_both() {
        let all = verdicts(&facts(0, None), DeviceKind::Cuda, 1);
        assert!(all.contains(&("CUDA", Verdict::Missing)));
        let all = verdicts(&facts(2, None), DeviceKind::Auto, 2);
        assert!(all.contains(&("CUDA", Verdict::Ok)) && all.contains(&("NCCL", Verdict::Missing)));
        let all = verdicts(&facts(2, Some("2.27.3")), DeviceKind::Cuda, 4);
        assert!(all.contains(&("CUDA", Verdict::Missing)) && all.contains(&("NCCL", Verdict::Ok)));
    }

    #[test]
    fn another_version_is_named() {
        let mut old = facts(0, None);
        old.version = "0.0.1".into();
        old.libtorch.libtorch_version = "2.4.0".into();
        let all = verdicts(&old, DeviceKind::Cpu, 1);
        assert!(all.contains(&("versions", Verdict::Missing)) && all.contains(&("libtorch", Verdict::Warning)));
    }
}
