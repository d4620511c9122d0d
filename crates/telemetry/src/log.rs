//! The one tracing set-up of every binary: lines (or JSON) on stderr, so that stdout stays for results.

use tracing_subscriber::EnvFilter;

/// The filter when neither `LEARN_LOG` nor `RUST_LOG` is set.
const DEFAULT_FILTER: &str = "info";

/// Starts logging to stderr; the first record names the `role`, the process and the version.
///
/// The filter is `LEARN_LOG`, else `RUST_LOG`, else `info`. A second call changes nothing.
pub fn init(role: &str, json: bool) {
    init_at(role, json, DEFAULT_FILTER);
}

/// As [`init`], with another filter than `info` when the environment has none.
pub fn init_at(role: &str, json: bool, default_filter: &str) {
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter(default_filter))
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let started = if json { builder.json().try_init() } else { builder.try_init() };
    if started.is_ok() {
        tracing::info!(role, pid = std::process::id(), version = env!("CARGO_PKG_VERSION"), "started");
    }
}

fn filter(default_filter: &str) -> EnvFilter {
    let wanted = ["LEARN_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()));
    EnvFilter::new(wanted.as_deref().unwrap_or(default_filter))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_second_start_is_harmless() {
        super::init("test", false);
        super::init("test", true);
    }
}
