//! What every process says of itself, as the kernel knows it.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, Opts};

/// Host memory that this process holds, read when it is scraped; not exposed where `/proc` does not tell.
#[derive(Clone, Debug)]
pub(crate) struct ResidentMemory(Gauge);

impl ResidentMemory {
    pub(crate) fn new(opts: Opts) -> prometheus::Result<Self> {
        Gauge::with_opts(opts).map(Self)
    }
}

impl Collector for ResidentMemory {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        match resident_bytes(&status) {
            Some(bytes) => {
                self.0.set(bytes);
                self.0.collect()
            }
            None => Vec::new(),
        }
    }
}

/// `VmRSS` of a `/proc/PID/status`.
fn resident_bytes(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024.0)
}

/// The time of this call, which a process makes at its start, in seconds since 1970.
pub(crate) fn started() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read_in_bytes() {
        let status = "Name:\tlearn-worker\nVmHWM:\t  300 kB\nVmRSS:\t  204800 kB\nThreads:\t4\n";
        assert_eq!(resident_bytes(status), Some(204_800.0 * 1024.0));
        assert_eq!(resident_bytes("Name:\tkthread\n"), None);
    }

    #[test]
    fn this_process_holds_some_memory() {
        let text = crate::Exposition::new().render();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert!(value("learn_process_resident_memory_bytes") > 1e5, "{text}");
        assert!(value("learn_process_start_time_seconds") > 1.7e9, "{text}");
    }
}
