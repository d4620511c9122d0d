//! This crate's parsers as the fuzz targets call them: each takes bytes or a file that anybody may have made, and only has
//! to come back, with little memory. Not an interface for anything else.

use std::path::Path;

use learn_domain::config::{FileFormat, PrepareConfig};

use crate::manifest::Manifest;
use crate::prepare::drain;
use crate::sequences::{HeldOut, Sequences};
use crate::{FileEntry, embeddings};

/// `dataset.json`.
pub fn manifest(text: &[u8]) {
    drop(Manifest::parse(text, Path::new("dataset.json")));
}

/// An embedding shard of `dim` values a row.
pub fn embedding_shard(path: &Path, dim: usize) {
    drop(embeddings::values(path, dim));
}

/// A file of training sequences, and one of held-out rows, with and without times and labels.
pub fn sequences(dir: &Path, name: &str, rows: u64) {
    for (version, labels) in [(1, false), (2, false), (2, true)] {
        let columns = crate::sequences::Columns { held_out_times: version >= 2, labels };
        let entry = [FileEntry { path: name.into(), bytes: 0, sha256: String::new(), rows }];
        if let Ok(train) = Sequences::open(dir, entry.iter(), columns)
            && train.check(1 << 20, 1 << 20, &()).is_ok()
        {
            for row in 0..train.len() {
                let lengths = (train.items(row).len(), train.times(row).len());
                assert_eq!(lengths.0, lengths.1);
                assert!(train.labels(row).is_none_or(|labels| labels.len() == lengths.0));
                let _ = train.user(row);
            }
        }
        if let Ok(held_out) = HeldOut::open(dir, entry.iter(), columns)
            && held_out.check(1 << 20, 1 << 20, &()).is_ok()
        {
            for row in 0..held_out.len() {
                let lengths = (held_out.history(row).len(), held_out.targets(row).len());
                assert!(held_out.times(row).is_none_or(|(a, b)| (a.len(), b.len()) == lengths));
                assert!(held_out.labels(row).is_none_or(|(a, b)| (a.len(), b.len()) == lengths));
                let _ = held_out.user(row);
            }
        }
    }
}

/// A text file of interactions and of items, in a format or, with `Auto`, in the one that its name says.
pub fn text_table(path: &Path, format: FileFormat) {
    let mut config = PrepareConfig::default();
    config.interactions.format = format;
    config.items.format = format;
    drain(path, &config);
}
