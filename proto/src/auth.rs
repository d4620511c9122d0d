//! The job's secret: `authorization: Bearer SECRET` on every call, control, Flight and the stop endpoint alike.
//!
//! Input: the text of the run's `secret` file, and a call's metadata. Output: metadata on the client's side, a verdict on
//! the server's. Invariants: the comparison takes the same time wherever two secrets of one length differ, and no
//! secret is ever shown by `Debug` or an error.

use std::fmt;
use std::path::{Path, PathBuf};

use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

const HEADER: &str = "authorization";
const SCHEME: &str = "Bearer ";

/// A secret that cannot be used, or a call that may not pass.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("cannot read the job's secret from {path}: {source}; name the `secret` file of the run directory")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("the job's secret is empty; start the job again, so that a new one is made")]
    Empty,
    #[error("the job's secret has characters that a header cannot carry; only visible ASCII is allowed")]
    NotAscii,
    #[error(
        "this call has no `authorization` header; send `authorization: Bearer SECRET` with the run's `secret` file"
    )]
    Missing,
    #[error("this call's `authorization` header is not `Bearer SECRET` with the secret of this run")]
    Wrong,
}

/// The shared secret of one job.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// White space around the text is not part of the secret.
    ///
    /// # Errors
    /// If nothing is left, or a header could not carry it.
    pub fn new(text: &str) -> Result<Self, AuthError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(AuthError::Empty);
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(AuthError::NotAscii);
        }
        Ok(Self(text.to_owned()))
    }

    /// Reads the run's `secret` file.
    ///
    /// # Errors
    /// If it cannot be read or holds no usable secret.
    pub fn read(path: &Path) -> Result<Self, AuthError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| AuthError::Unreadable { path: path.to_owned(), source })?;
        Self::new(&text)
    }

    /// The secret itself, for the collective's handshake.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Judges the value of an `authorization` header.
    ///
    /// # Errors
    /// [`AuthError::Missing`] or [`AuthError::Wrong`].
    pub fn verify(&self, header: Option<&[u8]>) -> Result<(), AuthError> {
        let header = header.ok_or(AuthError::Missing)?;
        let given = header.strip_prefix(SCHEME.as_bytes()).ok_or(AuthError::Wrong)?;
        if self.is(given) { Ok(()) } else { Err(AuthError::Wrong) }
    }

    /// Whether `given` is this secret.
    #[must_use]
    pub fn is(&self, given: &[u8]) -> bool {
        same(given, self.as_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Compares without an early end; only the length can be told from the time.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && std::hint::black_box(a.iter().zip(b).fold(0_u8, |seen, (x, y)| seen | (x ^ y))) == 0
}

/// Server side: refuses a call whose metadata does not carry the secret.
///
/// # Errors
/// `UNAUTHENTICATED`, with what to send.
pub fn check(metadata: &MetadataMap, secret: &Secret) -> Result<(), Status> {
    let header = metadata.get(HEADER).map(MetadataValue::as_encoded_bytes);
    secret.verify(header).map_err(|error| Status::unauthenticated(error.to_string()))
}

/// Client side: puts the secret on every call.
#[derive(Clone)]
pub struct BearerInterceptor(MetadataValue<Ascii>);

impl BearerInterceptor {
    /// # Errors
    /// If `secret` is not one.
    pub fn new(secret: &str) -> Result<Self, AuthError> {
        Self::try_from(&Secret::new(secret)?)
    }
}

impl TryFrom<&Secret> for BearerInterceptor {
    type Error = AuthError;

    fn try_from(secret: &Secret) -> Result<Self, AuthError> {
        let mut value: MetadataValue<Ascii> =
            format!("{SCHEME}{}", secret.0).parse().map_err(|_| AuthError::NotAscii)?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

impl Interceptor for BearerInterceptor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(HEADER, self.0.clone());
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(header: Option<&str>) -> Option<Status> {
        let mut metadata = MetadataMap::new();
        if let Some(header) = header {
            metadata.insert(HEADER, header.parse().unwrap());
        }
        check(&metadata, &Secret::new("s3cret\n").unwrap()).err()
    }

    #[test]
    fn the_clients_header_passes_and_nothing_else() {
        let sent = BearerInterceptor::new("s3cret").unwrap().call(Request::new(())).unwrap();
        check(sent.metadata(), &Secret::new("s3cret").unwrap()).unwrap();
        assert!(verdict(Some("Bearer s3cret")).is_none());
        for header in [None, Some(""), Some("s3cret"), Some("Bearer "), Some("Bearer s3cres"), Some("Bearer s3cret2")] {
            let status = verdict(header).unwrap();
            assert_eq!(status.code(), tonic::Code::Unauthenticated);
            assert!(status.message().contains("Bearer SECRET"), "{status}");
        }
    }

    #[test]
    fn a_secret_is_usable_and_never_shown() {
        assert!(matches!(Secret::new(" \n"), Err(AuthError::Empty)));
        assert!(matches!(Secret::new("a\nb"), Err(AuthError::NotAscii)));
        assert_eq!(format!("{:?}", Secret::new("abc").unwrap()), "Secret(..)");
        let sent = BearerInterceptor::new("abc").unwrap().call(Request::new(())).unwrap();
        assert!(!format!("{:?}", sent.metadata()).contains("abc"));
    }
}
