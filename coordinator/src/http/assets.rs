//! The page's own files, part of this program: nothing is loaded from elsewhere, and a browser is told to see to it.

use axum::Router;
use axum::http::HeaderValue;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{Html, Response};
use axum::routing::get;

const PAGE: &str = include_str!("../../page/index.html");
const LOGIN: &str = include_str!("../../page/login.html");
const FILES: [(&str, &str, &str); 5] = [
    ("/page/page.css", "text/css; charset=utf-8", include_str!("../../page/page.css")),
    ("/page/page.js", "text/javascript; charset=utf-8", include_str!("../../page/page.js")),
    ("/page/charts.js", "text/javascript; charset=utf-8", include_str!("../../page/charts.js")),
    ("/page/format.js", "text/javascript; charset=utf-8", include_str!("../../page/format.js")),
    ("/page/icon.svg", "image/svg+xml", include_str!("../../page/icon.svg")),
];
/// A browser runs, shows and asks nothing but what comes from here.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// The status page.
pub async fn page() -> Html<&'static str> {
    Html(PAGE)
}

/// A form that asks for the token.
pub fn login() -> Html<&'static str> {
    Html(LOGIN)
}

/// Files that say nothing of the job.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.into_iter().fold(Router::new(), |routes, (path, kind, text)| {
        routes.route(path, get(move || async move { ([(CONTENT_TYPE, kind)], text) }))
    })
}

/// What every answer says.
pub async fn guarded(mut answer: Response) -> Response {
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // the address may have the token in it
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ] {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_names_another_place_and_nothing_is_inline() {
        let files = FILES.iter().map(|(path, _, text)| (*path, *text));
        for (name, text) in files.chain([("index", PAGE), ("login", LOGIN)]) {
            // the one address is the name of SVG's elements
            let text = text.replace("http://www.w3.org/2000/svg", "");
            for outside in ["http://", "https://", "//cdn", "@import", "eval(", "innerHTML", " style=", " onclick="] {
                assert!(!text.contains(outside), "{name} has {outside}");
            }
        }
        for asked in ["page.css", "page.js", "icon.svg"] {
            assert!(PAGE.contains(&format!("/page/{asked}")), "{asked}");
        }
    }
}
