//! What is said to an embeddings server, and what it may answer. Pure.
//!
//! Invariants: an answer's vectors are put in the order of their `index`, whatever the order they come in; a vector too
//! few or too many, of another length, with NaN or without a direction is an error, never a guess; lengths are scaled to 1.

use std::time::{Duration, SystemTime};

use half::f16;
use serde::{Deserialize, Serialize};

use crate::vectors::unit_row;

/// Longest message of a server that is passed on, in characters.
const MESSAGE: usize = 300;

#[derive(Serialize)]
pub(super) struct Request<'a> {
    pub model: &'a str,
    pub input: &'a [String],
    pub encoding_format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<u32>,
}

#[derive(Deserialize)]
struct Answer {
    data: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    index: usize,
    embedding: Vec<f32>,
}

/// The vectors of an answer, one per text in the order of the texts.
fn in_order(body: &[u8], texts: usize) -> Result<Vec<Vec<f32>>, String> {
    let answer: Answer =
        serde_json::from_slice(body).map_err(|error| format!("is not a list of embeddings as floats: {error}"))?;
    if answer.data.len() != texts {
        return Err(format!("has {} vectors for {texts} texts", answer.data.len()));
    }
    let mut vectors = vec![Vec::new(); texts];
    for entry in answer.data {
        match vectors.get_mut(entry.index) {
            Some(place) if place.is_empty() => *place = entry.embedding,
            Some(_) => return Err(format!("has index {} twice", entry.index)),
            None => return Err(format!("has index {} for {texts} texts", entry.index)),
        }
    }
    Ok(vectors)
}

/// The length of the one vector of an answer.
///
/// # Errors
/// The answer is not one vector.
pub(super) fn dimension(body: &[u8]) -> Result<usize, String> {
    match in_order(body, 1)?.first().map_or(0, Vec::len) {
        0 => Err("has an empty vector".into()),
        dim => Ok(dim),
    }
}

/// The unit-length rows of an answer, `[texts, dim]`.
///
/// # Errors
/// What is wrong with the answer.
pub(super) fn rows(body: &[u8], texts: usize, dim: usize) -> Result<Vec<f16>, String> {
    let mut rows = Vec::with_capacity(texts * dim);
    for (text, vector) in in_order(body, texts)?.iter().enumerate() {
        if vector.len() != dim {
            return Err(format!(
                "has a vector of dimension {} where all before had {dim}: the server's model has changed, or \
                 embed.endpoint.dimensions is not what it gives; serve one model and start again",
                vector.len()
            ));
        }
        unit_row(vector, &mut rows).map_err(|problem| format!("has a vector for text {text} that {problem}"))?;
    }
    Ok(rows)
}

/// What a server says about a refusal, in one line and without the key.
pub(super) fn message(body: &[u8], key: Option<&str>) -> String {
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let told = json.as_ref().and_then(|json| {
        ["/error/message", "/message", "/error", "/detail"].iter().find_map(|place| json.pointer(place)?.as_str())
    });
    let text = told.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    let text = match key {
        Some(key) if !key.is_empty() => text.replace(key, "[key]"),
        _ => text,
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MESSAGE) {
        Some((cut, _)) => format!("{}…", &line[..cut]),
        None => line,
    }
}

/// The pause of a `Retry-After` header: seconds, or a date.
pub(super) fn retry_after(header: &str, now: SystemTime) -> Option<Duration> {
    let header = header.trim();
    if let Ok(seconds) = header.parse() {
        return Some(Duration::from_secs(seconds));
    }
    httpdate::parse_http_date(header).ok().map(|date| date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(vectors: &[(usize, &str)]) -> Vec<u8> {
        let entry = |(index, vector): &(usize, &str)| format!(r#"{{"index": {index}, "embedding": {vector}}}"#);
        format!(r#"{{"data": [{}]}}"#, vectors.iter().map(entry).collect::<Vec<_>>().join(",")).into_bytes()
    }

    #[test]
    fn rows_come_in_the_order_of_their_index_at_unit_length() {
        let rows = rows(&answer(&[(1, "[0, 5]"), (0, "[-3, 4]")]), 2, 2).unwrap();
        assert_eq!(rows, [-0.6, 0.8, 0.0, 1.0].map(f16::from_f32));
        assert_eq!(dimension(&answer(&[(0, "[1, 2, 3]")])), Ok(3));
    }

    #[test]
    fn what_is_no_row_per_text_is_refused() {
        for (vectors, problem) in [
            (&[(0, "[1, 2]")][..], "1 vectors for 2 texts"),
            (&[(0, "[1, 2]"), (0, "[1, 2]")], "index 0 twice"),
            (&[(0, "[1, 2]"), (2, "[1, 2]")], "index 2 for 2 texts"),
            (&[(0, "[1, 2]"), (1, "[1, 2, 3]")], "dimension 3 where all before had 2"),
            (&[(0, "[1, 2]"), (1, "[0, 0]")], "text 1 that is all zeros"),
            (&[(0, "[1, 2]"), (1, "[1e39, 0]")], "text 1 that holds NaN or infinity"),
            (&[(0, "[1, 2]"), (1, "[NaN, 0]")], "not a list of embeddings"),
            (&[(0, "[1, 2]"), (1, "[null, 0]")], "not a list of embeddings"),
            (&[(0, "[1, 2]"), (1, "\"zczMPc3M\"")], "not a list of embeddings"),
        ] {
            let found = rows(&answer(vectors), 2, 2).unwrap_err();
            assert!(found.contains(problem), "{found}");
        }
        assert!(dimension(&answer(&[(0, "[]")])).is_err());
    }

    #[test]
    fn a_servers_message_is_one_line_without_the_key() {
        let said = |body: &str| message(body.as_bytes(), Some("sk-1"));
        assert_eq!(said(r#"{"error": {"message": "bad key sk-1"}}"#), "bad key [key]");
        assert_eq!(said(r#"{"error": "too\nlong"}"#), "too long");
        assert_eq!(said("<h1>no\n  gateway</h1>"), "<h1>no gateway</h1>");
        assert_eq!(said(&"é".repeat(1000)).chars().count(), MESSAGE + 1);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        let then = httpdate::parse_http_date(date).unwrap();
        assert_eq!(retry_after("7", then), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(date, then - Duration::from_secs(9)), Some(Duration::from_secs(9)));
        assert_eq!(retry_after(date, then + Duration::from_secs(9)), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", then), None);
    }
}
