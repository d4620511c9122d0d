//! The machine: system, cores, memory, disk, shared memory, open files, ports.

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use learn_domain::Config;
use learn_domain::config::DeviceKind;

use super::Check;
use crate::render::bytes;
use crate::{crew, system};

/// Below this a run may fill the disk with its checkpoints.
const MIN_DISK: u64 = 5 << 30;
/// Below this NCCL may fail to set up its shared memory.
const MIN_SHM: u64 = 512 << 20;
/// A coordinator and its workers hold sockets and mapped files.
const MIN_FILES: u64 = 1024;

pub(super) fn checks(config: &Config) -> Vec<Check> {
    let mut checks = vec![system_check(), cores(config)];
    checks.extend(std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| memory(&text, config)));
    checks.push(disk(&config.job.runs_dir));
    checks.extend(shared_memory(config));
    checks.extend(system::open_file_limit().map(open_files));
    checks.push(ports(config));
    checks
}

fn system_check() -> Check {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let found = format!(
        "learn {} on {} {} {}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        kernel.trim(),
        std::env::consts::ARCH
    );
    Check::ok("version", found)
}

fn cores(config: &Config) -> Check {
    let (cores, workers) = (crew::cores(), config.cluster.workers as usize);
    let found =
        format!("{cores}, {} for each of {workers} workers", crew::threads_per_worker(config, config.cluster.workers));
    if config.cluster.device != DeviceKind::Cuda && workers > cores {
        Check::warning("cores", found, format!("workers share cores: set cluster.workers to at most {cores}"))
    } else {
        Check::ok("cores", found)
    }
}

/// From the text of `/proc/meminfo`.
fn memory(meminfo: &str, config: &Config) -> Option<Check> {
    let kib = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let (total, available) = (kib("MemTotal:")? * 1024, kib("MemAvailable:")? * 1024);
    let found = format!("{} free of {}", bytes(available), bytes(total));
    // a device that is a CPU keeps its rows in the same memory
    let on_device = if config.cluster.device == DeviceKind::Cpu { config.cluster.device_row_cache.0 } else { 0 };
    let on_host = config.cluster.row_cache.0.saturating_add(config.cluster.evaluation_row_cache().0);
    let cache = on_host.saturating_add(on_device);
    let caches = cache.saturating_mul(config.cluster.workers.into());
    Some(if caches > available {
        let text = format!("the workers' row caches may take {}: lower cluster.row_cache", bytes(caches));
        Check::warning("memory", found, text)
    } else {
        Check::ok("memory", found)
    })
}

/// The nearest folder of a path that exists.
fn existing(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_default();
    path.ancestors().find(|folder| folder.exists()).map_or("/".into(), Path::to_owned)
}

fn disk(runs_dir: &Path) -> Check {
    let folder = existing(runs_dir);
    match system::free_bytes(&folder) {
        Ok(free) => {
            let found = format!("{} free in {}", bytes(free), folder.display());
            if free < MIN_DISK {
                Check::warning("disk", found, "checkpoints may not fit: free some space, or set job.runs_dir elsewhere")
            } else {
                Check::ok("disk", found)
            }
        }
        Err(error) => Check::missing(
            "disk",
            format!("{}: {error}", folder.display()),
            "set job.runs_dir to a folder you can write",
        ),
    }
}

fn shared_memory(config: &Config) -> Option<Check> {
    let free = system::free_bytes(Path::new("/dev/shm")).ok()?;
    let found = format!("{} free in /dev/shm", bytes(free));
    Some(if free < MIN_SHM && config.cluster.device != DeviceKind::Cpu {
        Check::warning("shared memory", found, "NCCL between GPUs may fail: in a container, give it `--shm-size=1g`")
    } else {
        Check::ok("shared memory", found)
    })
}

fn open_files(limit: u64) -> Check {
    if limit < MIN_FILES {
        Check::warning(
            "open files",
            format!("at most {limit}"),
            format!("`ulimit -n {}` before training", 4 * MIN_FILES),
        )
    } else {
        Check::ok("open files", if limit == u64::MAX { "no limit".into() } else { format!("at most {limit}") })
    }
}

pub(super) fn ports(config: &Config) -> Check {
    let cluster = &config.cluster;
    for (key, port) in [("cluster.grpc_port", cluster.grpc_port), ("cluster.http_port", cluster.http_port)] {
        if let Err(error) = TcpListener::bind((cluster.bind.as_str(), port)) {
            let found = format!("cannot listen on {}:{port}: {error}", cluster.bind);
            return Check::missing(
                "ports",
                found,
                format!(
                    "end what listens there, or set {key}=0 for any free port and cluster.bind to an address of this machine"
                ),
            );
        }
    }
    let shown = |port: u16| if port == 0 { "any".to_owned() } else { port.to_string() };
    let found = format!("{}: gRPC {}, HTTP {}", cluster.bind, shown(cluster.grpc_port), shown(cluster.http_port));
    Check::ok("ports", found)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn memory_is_compared_with_the_caches() {
        let text = "MemTotal:       8000000 kB\nMemFree: 1 kB\nMemAvailable:    4000000 kB\n";
        let config = Config::default();
        assert_eq!(memory(text, &config).unwrap().verdict, Verdict::Ok);
        let mut greedy = config.clone();
        greedy.cluster.workers = 8;
        let check = memory(text, &greedy).unwrap();
        assert!(check.verdict == Verdict::Warning && check.remedy.unwrap().contains("10.00 GiB"));
        assert!(memory("nonsense", &config).is_none());
    }

    #[test]
    fn a_port_in_use_is_missing() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut config = Config::default();
        assert_eq!(ports(&config).verdict, Verdict::Ok);
        config.cluster.http_port = taken.local_addr().unwrap().port();
        let check = ports(&config);
        assert!(check.verdict == Verdict::Missing && check.remedy.unwrap().contains("cluster.http_port=0"));
        config.cluster.bind = "203.0.113.7".into();
        assert_eq!(ports(&config).verdict, Verdict::Missing);
    }

    #[test]
    fn few_open_files_are_a_warning() {
        assert_eq!(open_files(256).verdict, Verdict::Warning);
        assert_eq!(open_files(4096).verdict, Verdict::Ok);
    }

    #[test]
    fn the_disk_is_asked_at_the_nearest_folder() {
        assert_eq!(existing(Path::new("/no/such/folder")), Path::new("/"));
        assert!(disk(Path::new("no/such/folder")).found.contains("free in"));
    }
}
