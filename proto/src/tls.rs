//! Mutual TLS between the processes of a job: who may connect at all.
//!
//! Input: PEM files that `tls.json` beside the job's secret names. Output: what a server and a client need to prove who they
//! are and to check the other. Invariants: each side shows a certificate and refuses one that does not come from the job's
//! authority; private keys never show in `Debug` or errors.

use std::error::Error;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use learn_domain::run_dir::{RunDir, TlsFiles};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// HTTP/2, the only protocol that is spoken.
const ALPN: &[u8] = b"h2";

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}: {source}; it is named by cluster.tls or was made when the run started")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: {problem}")]
    Unusable { path: PathBuf, problem: String },
}

/// The certificates of this process.
#[derive(Clone)]
pub struct Tls {
    files: TlsFiles,
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Unreadable { path: path.to_owned(), source })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unusable = |problem: String| TlsError::Unusable { path: path.to_owned(), problem };
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(|error| unusable(format!("it is no PEM file of certificates ({error})")))?;
    if all.is_empty() { Err(unusable("it holds no certificate; it must be PEM".into())) } else { Ok(all) }
}

impl Tls {
    /// The certificates that belong to a secret; `None` if its job has none.
    ///
    /// # Errors
    /// A file cannot be read, or does not hold what it should.
    pub fn beside(secret: &Path) -> Result<Option<Self>, TlsError> {
        let path = RunDir::tls_beside(secret);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(TlsError::Unreadable { path, source }),
        };
        let files: TlsFiles = serde_json::from_slice(&text).map_err(|error| TlsError::Unusable {
            path,
            problem: format!("it does not name the certificates ({error}); start the job again"),
        })?;
        Self::open(files).map(Some)
    }

    /// # Errors
    /// As [`Tls::beside`].
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let (ca, certificate, key) = (read(&files.ca)?, read(&files.certificate)?, read(&files.key)?);
        let tls = Self { files, ca, certificate, key };
        // what makes a server makes a client, and tells now what is wrong
        tls.server().map(|_| tls)
    }

    /// What a server shows, and what it demands of its clients.
    ///
    /// # Errors
    /// The files do not go together.
    pub fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let TlsFiles { ca, certificate, key, .. } = &self.files;
        let unusable = |path: &Path, problem: String| TlsError::Unusable { path: path.to_owned(), problem };
        let mut roots = RootCertStore::empty();
        for root in certificates(ca, &self.ca)? {
            roots.add(root).map_err(|error| unusable(ca, format!("it is no certificate of an authority ({error})")))?;
        }
        let chain = certificates(certificate, &self.certificate)?;
        let private = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| unusable(key, format!("it holds no private key ({error}); it must be PEM")))?;
        let provider = Arc::new(default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(ca, error.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(certificate, error.to_string()))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, private)
            .map_err(|error| {
                unusable(certificate, format!("it does not go with the key {} ({error})", key.display()))
            })?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    /// What a client shows, and whom it takes for the coordinator.
    pub(crate) fn client(&self) -> ClientTlsConfig {
        let config = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca))
            .identity(Identity::from_pem(&self.certificate, &self.key));
        match &self.files.server_name {
            Some(name) => config.domain_name(name),
            None => config,
        }
    }
}

/// Whether something failed because one side does not take the other's certificate: trying again would not help.
#[must_use]
pub fn is_refusal(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let inside = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let of_tls = error.is::<rustls::Error>() || inside.is_some_and(|inner| inner.is::<rustls::Error>());
        // of an error on an open connection the HTTP/2 library keeps the text only
        if of_tls || error.to_string().contains("received fatal alert") {
            return true;
        }
        next = error.source();
    }
    false
}
