//! The certificates of a run: made here, or named by the configuration.
//!
//! Input: `cluster.tls`. Output: `tls.json` beside the run's secret, which says where each process finds its certificates. With
//! `mode = "auto"` it also makes them: an authority of this run alone, whose key is forgotten at once, and one certificate for all
//! processes of the run, which share the run directory anyway. They do not expire, so clocks need not agree; they are
//! worth nothing to another run.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use learn_domain::config::{TlsConfig, TlsMode};
use learn_domain::run_dir::{RunDir, TlsFiles};
use learn_proto::tls::Tls;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

use crate::failure::Failure;

/// Name that the certificate of a run is made out to: wherever its coordinator comes to run.
const SERVER_NAME: &str = "coordinator.learn.internal";

/// Writes what the processes of a run need, before the first of them starts.
///
/// # Errors
/// Files of the configuration are missing or of no use, or the run directory cannot be written.
pub fn provide(run: &RunDir, config: &TlsConfig) -> Result<()> {
    let files = match config.mode {
        TlsMode::Off => {
            // of an earlier configuration of this run
            return match fs::remove_file(run.tls()) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(error).with_context(|| format!("cannot remove {}", run.tls().display()))
                }
                _ => Ok(()),
            };
        }
        TlsMode::Auto => make(&run.certificates())?,
        TlsMode::Files => named(config)?,
    };
    let text = serde_json::to_vec_pretty(&files)?;
    write(&run.tls(), &text)
}

/// Looks into the files of a configuration.
///
/// # Errors
/// One is missing or of no use.
pub fn check(config: &TlsConfig) -> Result<()> {
    if config.mode == TlsMode::Files { named(config).map(drop) } else { Ok(()) }
}

/// The files of the configuration, after a look into them.
fn named(config: &TlsConfig) -> Result<TlsFiles> {
    let path =
        |file: &Option<PathBuf>| -> Result<PathBuf> { Ok(std::path::absolute(file.clone().unwrap_or_default())?) };
    let files = TlsFiles {
        ca: path(&config.ca)?,
        certificate: path(&config.certificate)?,
        key: path(&config.key)?,
        server_name: config.server_name.clone(),
    };
    Tls::open(files.clone()).map_err(|error| Failure::Usage(format!("cluster.tls: {error}")))?;
    Ok(files)
}

/// Makes an authority and a certificate of it in `folder`.
fn make(folder: &Path) -> Result<TlsFiles> {
    let folder = &std::path::absolute(folder)?;
    let (authority, certificate, key) = issue().context("the certificates of the run cannot be made")?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let files = TlsFiles {
        ca: folder.join("ca.pem"),
        certificate: folder.join("certificate.pem"),
        key: folder.join("key.pem"),
        server_name: Some(SERVER_NAME.to_owned()),
    };
    for (path, text) in [(&files.ca, authority), (&files.certificate, certificate), (&files.key, key)] {
        write(path, text.as_bytes())?;
    }
    Ok(files)
}

/// PEM of an authority's certificate, of a certificate that it has signed, and of the latter's key.
fn issue() -> Result<(String, String, String), rcgen::Error> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority_key = KeyPair::generate()?;
    // a name of its own, so that one of another run is told apart before any signature is looked at
    let name: String =
        authority_key.public_key_raw().iter().skip(1).take(8).map(|byte| format!("{byte:02x}")).collect();
    authority.distinguished_name.push(DnType::CommonName, format!("LEARN run {name}"));
    let authority_certificate = authority.self_signed(&authority_key)?;
    let issuer = Issuer::new(authority, authority_key);

    let mut process = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    process.distinguished_name.push(DnType::CommonName, "LEARN process");
    process.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    process.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let certificate = process.signed_by(&key, &issuer)?;
    Ok((authority_certificate.pem(), certificate.pem(), key.serialize_pem()))
}

/// A file for its owner's eyes, in the place of an earlier one.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let aside = path.with_extension("tmp");
    let written = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside);
    written
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&aside, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn run() -> (tempfile::TempDir, RunDir) {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        (folder, run)
    }

    #[test]
    fn a_run_gets_certificates_of_its_own_that_only_its_owner_reads() {
        let auto = TlsConfig { mode: TlsMode::Auto, ..TlsConfig::default() };
        let (_folder, first) = run();
        provide(&first, &auto).unwrap();
        assert!(Tls::beside(&first.secret()).unwrap().is_some());
        for name in ["ca.pem", "certificate.pem", "key.pem"] {
            let mode = fs::metadata(first.certificates().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let (_other, second) = run();
        provide(&second, &auto).unwrap();
        let ca = |run: &RunDir| fs::read(run.certificates().join("ca.pem")).unwrap();
        assert_ne!(ca(&first), ca(&second));
        provide(&first, &TlsConfig::default()).unwrap();
        assert!(Tls::beside(&first.secret()).unwrap().is_none());
    }

    #[test]
    fn files_that_do_not_go_together_are_refused_by_name() {
        let auto = TlsConfig { mode: TlsMode::Auto, ..TlsConfig::default() };
        let ((_one, first), (_two, second)) = (run(), run());
        provide(&first, &auto).unwrap();
        provide(&second, &auto).unwrap();
        let of = |run: &RunDir, name: &str| Some(run.certificates().join(name));
        let mut files = TlsConfig {
            mode: TlsMode::Files,
            ca: of(&first, "ca.pem"),
            certificate: of(&first, "certificate.pem"),
            key: of(&first, "key.pem"),
            server_name: Some("a.b".into()),
        };
        let (_three, third) = run();
        provide(&third, &files).unwrap();
        files.key = of(&second, "key.pem");
        let error = provide(&third, &files).unwrap_err().to_string();
        assert!(error.contains("cluster.tls") && error.contains("does not go with the key"), "{error}");
        files.key = of(&second, "none.pem");
        assert!(provide(&third, &files).unwrap_err().to_string().contains("none.pem"));
        files.key = of(&first, "ca.pem");
        assert!(provide(&third, &files).unwrap_err().to_string().contains("no private key"));
    }
}
