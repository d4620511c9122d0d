//! The most memory that something needs.
//!
//! Input: work. Output: bytes that were held at its peak beyond those before it: on the CPU what the kernel counts as
//! resident, on a GPU what tensors hold.

use std::fs;

use tch::Device;

/// The result of `work`, and its extra bytes at the peak; none where the machine does not tell.
pub fn peak<T>(device: Device, work: impl FnOnce() -> T) -> (T, Option<u64>) {
    if device != Device::Cpu {
        let held = |reset| learn_torch::tensor_memory(device, reset).ok().flatten();
        let before = held(true);
        let result = work();
        return (result, before.zip(held(false)).map(|(before, after)| after.most - before.now));
    }
    // 5 makes the peak that of now
    let reset = fs::write("/proc/self/clear_refs", "5").is_ok();
    let before = resident("VmRSS:");
    let result = work();
    let peak = resident("VmHWM:").filter(|_| reset);
    (result, before.zip(peak).map(|(before, peak)| peak.saturating_sub(before)))
}

/// A line of this process's status, in bytes.
#[must_use]
pub fn resident(name: &str) -> Option<u64> {
    line(&fs::read_to_string("/proc/self/status").ok()?, name)
}

fn line(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_status_is_bytes() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n";
        assert_eq!((line(status, "VmHWM:"), line(status, "VmRSS:")), (Some(2 << 20), Some(1 << 20)));
        assert_eq!(line(status, "VmSwap:"), None);
    }

    #[test]
    fn what_is_held_for_a_moment_is_seen() {
        let block = 64 << 20;
        let (length, bytes) = peak(Device::Cpu, || {
            let held = std::hint::black_box(vec![1_u8; block]);
            held.len()
        });
        assert_eq!(length, block);
        let bytes = bytes.unwrap();
        assert!((60 << 20..96 << 20).contains(&bytes), "{bytes}");
    }
}
