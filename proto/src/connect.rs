//! How every client of a job calls its servers: the secret, the certificates if there are any, deadlines.
//!
//! Input: the file of the job's secret, a server's URL. Output: an endpoint that is ready to connect, and what calls carry.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::auth::{AuthError, BearerInterceptor, Secret};
use crate::tls::{Tls, TlsError, is_refusal};

/// Longest wait for a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection whose peer answers no ping for this long, twice over, is broken: a frozen host ends every wait.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A client cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Secret(#[from] AuthError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{url} is no address of a server: {reason}")]
    Url { url: String, reason: String },
    #[error("{url} wants certificates, and there is no tls.json beside the job's secret; use the secret of this run")]
    NoCertificates { url: String },
    #[error("this job's calls are encrypted (cluster.tls), but {url} is not; is it this run's coordinator?")]
    NotEncrypted { url: String },
}

/// What a process needs to call the others of its job.
#[derive(Clone, Debug)]
pub struct Pass {
    secret: Secret,
    tls: Option<Tls>,
}

impl From<Secret> for Pass {
    /// Of a job without certificates.
    fn from(secret: Secret) -> Self {
        Self { secret, tls: None }
    }
}

impl Pass {
    /// Reads the run's `secret` file, and the certificates that belong to it.
    ///
    /// # Errors
    /// One of them cannot be read or used.
    pub fn read(secret_file: &Path) -> Result<Self, ConnectError> {
        Ok(Self { secret: Secret::read(secret_file)?, tls: Tls::beside(secret_file)? })
    }

    #[must_use]
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// The certificates, if the job has any.
    #[must_use]
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// What puts the secret on every call.
    ///
    /// # Errors
    /// If no header can carry it.
    pub fn bearer(&self) -> Result<BearerInterceptor, AuthError> {
        BearerInterceptor::try_from(&self.secret)
    }

    /// A server of the job; nothing is connected yet.
    ///
    /// # Errors
    /// If `url` is none, or one of encryption and certificates is there without the other.
    pub fn endpoint(&self, url: &str) -> Result<Endpoint, ConnectError> {
        let wrong = |reason: &dyn Error| ConnectError::Url { url: url.to_owned(), reason: chain(reason) };
        let endpoint = Channel::from_shared(url.to_owned())
            .map_err(|error| wrong(&error))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        match (&self.tls, endpoint.uri().scheme_str() == Some("https")) {
            (None, false) => Ok(endpoint),
            (Some(tls), true) => endpoint.tls_config(tls.client()).map_err(|error| wrong(&error)),
            (None, true) => Err(ConnectError::NoCertificates { url: url.to_owned() }),
            (Some(_), false) => Err(ConnectError::NotEncrypted { url: url.to_owned() }),
        }
    }
}

/// Whether a call that failed may be answered when it is made again: the other side was not there or went away, and has not
/// refused. A status with a source was made here, from a broken connection; of those that a server sends, `Unavailable`
/// says it, and `Cancelled` that it was told to end. Certificates that are refused once are refused again.
#[must_use]
pub fn may_pass(status: &Status) -> bool {
    let away = matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown);
    !is_refusal(status) && (away || status.source().is_some())
}

/// An error with all its causes in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let more = inner.to_string();
        // some errors say their cause themselves
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encryption_and_certificates_go_together() {
        let pass = Pass::from(Secret::new("secret").unwrap());
        pass.endpoint("http://127.0.0.1:1").unwrap();
        let error = pass.endpoint("https://127.0.0.1:1").unwrap_err().to_string();
        assert!(error.contains("tls.json"), "{error}");
        assert!(pass.endpoint("not a url").unwrap_err().to_string().contains("no address"));
    }

    #[test]
    fn a_refusal_does_not_pass_but_a_broken_connection_may() {
        for status in [Status::unavailable(""), Status::cancelled(""), Status::unknown("transport error")] {
            assert!(may_pass(&status), "{status}");
        }
        let from_here = Status::from_error(Box::new(std::io::Error::other("broken pipe")));
        assert!(may_pass(&from_here));
        for refusal in [Status::not_found(""), Status::failed_precondition(""), Status::unauthenticated("")] {
            assert!(!may_pass(&refusal), "{refusal}");
        }
        let certificate = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let refused = Status::from_error(Box::new(std::io::Error::other(certificate)));
        assert!(!may_pass(&refused), "{refused}");
    }

    #[test]
    fn an_error_is_told_with_its_causes_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer: {0}")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(chain(&error), "outer: inner");
    }
}
