//! Who may look at the page and the API: whoever has the run's token, or the job's secret.
//!
//! Input: a request's head. Output: a verdict, and a cookie for a browser that has shown the token once. Invariants:
//! comparisons take the same time wherever two values of one length differ; a cookie opens nothing that changes the job;
//! the secret opens in a header alone, since addresses are kept in histories and cookies go to every port of a host;
//! where the job's calls are encrypted, nothing is changed over HTTP, which is not; neither token nor secret is in an
//! answer, a log or an error, besides the token in the cookie itself.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use axum::extract::{Query, Request, State};
use axum::http::header::{AUTHORIZATION, COOKIE, SET_COOKIE, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};
use learn_proto::auth::{AuthError, Secret};
use learn_telemetry::server::Visitor;
use serde::Deserialize;

use super::assets;

const SCHEME: &str = "Bearer ";
/// What somebody reads who comes without a token, or with another one.
const REFUSAL: &str = "this needs the run's token: send `Authorization: Bearer TOKEN`, or open `/?token=TOKEN` once in a \
                       browser. The token is in the file `token` of the run directory; `learn-launch status RUN` shows the \
                       page's address.\n";

/// What opens the page, the API and the operator's calls of one job.
#[derive(Clone, Debug)]
pub struct Access {
    secret: Secret,
    token: Option<Secret>,
    /// Of the cookie: another for each run, because a browser sends cookies to all ports of a host.
    cookie: String,
    /// The job's calls are encrypted (`cluster.tls`).
    encrypted: bool,
}

/// Why a request may not change the job.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Secret(#[from] AuthError),
    #[error(
        "nothing is stopped or scaled over HTTP, which is not encrypted, in a job whose calls are (cluster.tls): use \
         `learn-launch stop RUN` or `learn-launch scale RUN --workers N`"
    )]
    InPlainText,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Secret(_) => StatusCode::UNAUTHORIZED,
            Self::InPlainText => StatusCode::FORBIDDEN,
        };
        (status, format!("{self}\n")).into_response()
    }
}

/// The part of a query, or of a form, that this is about.
#[derive(Deserialize)]
struct Shown {
    token: Option<String>,
}

impl Access {
    /// `encrypted`: the job's calls are.
    #[must_use]
    pub fn new(secret: Secret, token: Option<Secret>, encrypted: bool) -> Self {
        let mut hasher = DefaultHasher::new();
        token.as_ref().unwrap_or(&secret).as_bytes().hash(&mut hasher);
        Self { secret, token, cookie: format!("learn-{:016x}", hasher.finish()), encrypted }
    }

    /// Stopping and scaling: the job's secret alone, and only where all of the job is in plain text.
    ///
    /// # Errors
    /// It is missing or wrong, or the job's calls are encrypted.
    pub fn operates(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        if self.encrypted {
            return Err(Refusal::InPlainText);
        }
        Ok(self.secret.verify(headers.get(AUTHORIZATION).map(|value| value.as_bytes()))?)
    }

    fn is_token(&self, given: &[u8]) -> bool {
        self.token.as_ref().is_some_and(|token| token.is(given))
    }

    /// The head of a request opens the page and the API.
    fn reads(&self, headers: &HeaderMap) -> bool {
        let bearer = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(SCHEME.as_bytes()));
        let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
        let mut cookies = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
        bearer.is_some_and(|given| {
            // both, whatever the first says
            let (secret, token) = (self.secret.is(given), self.is_token(given));
            secret | token
        }) || cookies.any(|(name, value)| name == self.cookie && self.is_token(value.as_bytes()))
    }

    /// The cookie for whoever shows the right token in `query`.
    fn admitted(&self, query: &str) -> Option<HeaderValue> {
        let uri: Uri = format!("/?{query}").parse().ok()?;
        let Query(Shown { token }) = Query::try_from_uri(&uri).ok()?;
        let token = token.filter(|token| self.is_token(token.trim().as_bytes()))?;
        let cookie = format!("{}={}; HttpOnly; SameSite=Strict; Path=/", self.cookie, token.trim());
        let mut value = HeaderValue::from_str(&cookie).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

/// Lets those through who may look, and gives a browser that shows the token a cookie.
pub async fn required(State(access): State<Access>, mut request: Request, next: Next) -> Response {
    let cookie = request.uri().query().and_then(|query| access.admitted(query));
    if cookie.is_none() && !access.reads(request.headers()) {
        return refused(request.uri());
    }
    if let Some(visitor) = request.extensions().get::<Visitor>() {
        visitor.is_known();
    }
    if let Some(rest) = without_token(request.uri()) {
        *request.uri_mut() = rest;
    }
    let mut answer = next.run(request).await;
    if let Some(cookie) = cookie {
        answer.headers_mut().append(SET_COOKIE, cookie);
    }
    answer
}

/// The address without what has served its purpose; none if that is not in it.
fn without_token(uri: &Uri) -> Option<Uri> {
    let of_others = |pair: &&str| pair.split('=').next() != Some("token");
    let rest: Vec<&str> = uri.query()?.split('&').filter(of_others).collect();
    let query = if rest.is_empty() { String::new() } else { format!("?{}", rest.join("&")) };
    format!("{}{query}", uri.path()).parse().ok()
}

/// A page with a form for people, a sentence for programs.
fn refused(uri: &Uri) -> Response {
    let challenge = [(WWW_AUTHENTICATE, "Bearer")];
    if uri.path() == "/" {
        (StatusCode::UNAUTHORIZED, challenge, assets::login()).into_response()
    } else {
        (StatusCode::UNAUTHORIZED, challenge, REFUSAL).into_response()
    }
}

/// `POST /token`: the form of somebody who has come without one.
pub async fn enter(State(access): State<Access>, form: String) -> Response {
    match access.admitted(&form) {
        Some(cookie) => ([(SET_COOKIE, cookie)], Redirect::to("/")).into_response(),
        None => refused(&Uri::from_static("/")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access() -> Access {
        Access::new(Secret::new("s3cret").unwrap(), Some(Secret::new("t0ken").unwrap()), false)
    }

    fn headers(pairs: &[(axum::http::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn token_and_secret_read_and_the_secret_alone_operates() {
        let access = access();
        for (given, reads, operates) in [
            ("Bearer t0ken", true, false),
            ("Bearer s3cret", true, true),
            ("Bearer t0ke", false, false),
            ("Bearer ", false, false),
            ("t0ken", false, false),
            ("Basic t0ken", false, false),
        ] {
            let headers = headers(&[(AUTHORIZATION, given)]);
            assert_eq!((access.reads(&headers), access.operates(&headers).is_ok()), (reads, operates), "{given}");
        }
        assert!(!access.reads(&HeaderMap::new()));
        let without = Access::new(Secret::new("s3cret").unwrap(), None, false);
        assert!(!without.reads(&headers(&[(AUTHORIZATION, "Bearer t0ken")])));
    }

    #[test]
    fn nothing_operates_in_plain_text_where_the_calls_are_encrypted() {
        let access = Access::new(Secret::new("s3cret").unwrap(), Some(Secret::new("t0ken").unwrap()), true);
        for given in ["Bearer s3cret", "Bearer t0ken", ""] {
            let refused = access.operates(&headers(&[(AUTHORIZATION, given)])).unwrap_err();
            let text = refused.to_string();
            assert!(text.contains("learn-launch stop") && text.contains("learn-launch scale"), "{text}");
            assert_eq!(refused.into_response().status(), StatusCode::FORBIDDEN, "{given}");
        }
        let wrong = Refusal::from(AuthError::Wrong).into_response();
        assert_eq!(wrong.status(), StatusCode::UNAUTHORIZED);
        assert!(access.reads(&headers(&[(AUTHORIZATION, "Bearer t0ken")])), "the page and the API stay open");
    }

    #[test]
    fn a_token_in_the_address_becomes_a_cookie_of_this_run() {
        let access = access();
        let cookie = access.admitted("x=1&token=t0ken").unwrap();
        assert!(cookie.is_sensitive() && cookie.to_str().unwrap().ends_with("; HttpOnly; SameSite=Strict; Path=/"));
        let pair = cookie.to_str().unwrap().split(';').next().unwrap();
        assert!(access.reads(&headers(&[(COOKIE, &format!("other=1; {pair}"))])));
        assert!(access.operates(&headers(&[(COOKIE, pair)])).is_err());
        assert!(!access.reads(&headers(&[(COOKIE, &format!("{}=s3cret", access.cookie))])), "a secret is no cookie");
        let other = Access::new(Secret::new("s3cret").unwrap(), Some(Secret::new("another").unwrap()), false);
        assert_ne!(other.cookie, access.cookie);
        assert!(!other.reads(&headers(&[(COOKIE, pair)])));
        for wrong in
            ["", "token=", "token=T0ken", "token=t0ken2", "tokens=t0ken", "token=t0ken%0d%0aX:1", "token=s3cret"]
        {
            assert!(access.admitted(wrong).is_none(), "{wrong}");
        }
        for (whole, rest) in
            [("/a?token=1", "/a"), ("/a?token=1&b=2", "/a?b=2"), ("/a?b=2&tokens=3", "/a?b=2&tokens=3")]
        {
            assert_eq!(without_token(&whole.parse().unwrap()).unwrap(), rest.parse::<Uri>().unwrap());
        }
    }
}
