//! The crate as its users call it: from files to a dataset and back.
// In a test, unwrapping is asserting.
#![allow(clippy::unwrap_used)]

mod amazon_and_recbole;
mod bad_input;
mod builders;
mod damage;
mod embeddings;
mod formats;
mod labels;
mod progress;
mod rules;
mod versions;
