//! Mutual TLS: where the certificates come from.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Where the certificates of control and data come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TlsMode {
    /// Calls are not encrypted; the job's secret is all that they prove.
    #[default]
    Off,
    /// A certificate authority of the run, made when it starts, and one certificate for all its processes, in the run
    /// directory.
    Auto,
    /// The files that `ca`, `certificate` and `key` name.
    Files,
}

/// Mutual TLS between the processes of a job, for control and data; see `docs/security.md`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    pub mode: TlsMode,
    /// Certificates (PEM) of the authorities that every process's certificate must come from.
    pub ca: Option<PathBuf>,
    /// Certificate chain (PEM) of a process, good for servers and clients; read by each process on its own machine.
    pub certificate: Option<PathBuf>,
    /// Private key (PEM) of `certificate`.
    pub key: Option<PathBuf>,
    /// Name that the coordinator's certificate is made out to; unset = the host of its address.
    pub server_name: Option<String>,
}

impl TlsConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let files = [
            ("cluster.tls.ca", &self.ca),
            ("cluster.tls.certificate", &self.certificate),
            ("cluster.tls.key", &self.key),
        ];
        for (key, file) in files {
            match (self.mode, file) {
                (TlsMode::Files, None) => {
                    let problem = "must name a file, because cluster.tls.mode is \"files\"; or set that to \"auto\"";
                    return Err(ConfigError { key, problem: problem.into() });
                }
                (TlsMode::Off | TlsMode::Auto, Some(_)) => {
                    let problem = "is only read with cluster.tls.mode = \"files\"";
                    return Err(ConfigError { key, problem: problem.into() });
                }
                _ => {}
            }
        }
        if self.server_name.is_some() && self.mode != TlsMode::Files {
            let problem = "is only read with cluster.tls.mode = \"files\"".into();
            return Err(ConfigError { key: "cluster.tls.server_name", problem });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_when_they_are_read_and_only_then() {
        let key = |config: &TlsConfig| config.validate().err().map(|error| error.key);
        let file = || Some(PathBuf::from("x.pem"));
        let mut config = TlsConfig::default();
        assert_eq!(key(&config), None);
        config.ca = file();
        assert_eq!(key(&config), Some("cluster.tls.ca"));
        config.mode = TlsMode::Files;
        assert_eq!(key(&config), Some("cluster.tls.certificate"));
        config = TlsConfig { certificate: file(), key: file(), server_name: Some("a".into()), ..config };
        assert_eq!(key(&config), None);
        config = TlsConfig { mode: TlsMode::Auto, server_name: config.server_name, ..TlsConfig::default() };
        assert_eq!(key(&config), Some("cluster.tls.server_name"));
    }
}
