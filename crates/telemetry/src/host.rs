//! This machine, as other machines know it.

use std::net::IpAddr;

/// The name of this machine.
#[must_use]
pub fn name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "localhost".into() } else { name.trim().into() }
}

/// The host that others dial to reach what listens on `bind`: this machine's name if that is all its interfaces.
#[must_use]
pub fn advertised(bind: &str) -> String {
    match bind.parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() => name(),
        _ => bind.to_owned(),
    }
}

/// `host` as a URL has it: addresses with colons in brackets.
#[must_use]
pub fn in_url(host: &str) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_dial_what_is_bound() {
        for (bind, dialled, url) in [
            ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
            ("fd00::1", "fd00::1", "[fd00::1]"),
            ("node1", "node1", "node1"),
            ("0.0.0.0", &name(), &name()),
            ("::", &name(), &name()),
        ] {
            assert_eq!((advertised(bind).as_str(), in_url(&advertised(bind)).as_str()), (dialled, url), "{bind}");
        }
        assert_eq!(in_url("[fd00::1]"), "[fd00::1]");
    }
}
