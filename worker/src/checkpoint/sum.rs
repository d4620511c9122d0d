//! Size and checksum of a checkpoint's file.
//!
//! XXH3 with 128 bits: it is far quicker than SHA-256, whose processor time training would miss, and is to find damage, not
//! forgery.

use std::io;
use std::path::Path;

use learn_dataset::files::{Checksum, Sha256, hash_file};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

/// A file as `state.json` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSum {
    pub bytes: u64,
    #[serde(flatten)]
    sum: Sum,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Sum {
    #[serde(rename = "xxh3_128")]
    Xxh3(String),
    /// Of earlier checkpoints.
    #[serde(rename = "sha256")]
    Sha256(String),
}

impl FileSum {
    /// Of a new file.
    pub(super) fn of(bytes: u64, sum: Xxh3) -> Self {
        Self { bytes, sum: Sum::Xxh3(sum.finish()) }
    }

    /// What the file at `path` has instead, if it differs.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(super) fn mismatch(&self, path: &Path) -> io::Result<Option<String>> {
        let (name, wanted, found) = match &self.sum {
            Sum::Xxh3(wanted) => ("XXH3", wanted, hash_file::<Xxh3>(path)?),
            Sum::Sha256(wanted) => ("SHA-256", wanted, hash_file::<Sha256>(path)?),
        };
        Ok((found.bytes != self.bytes || found.checksum != *wanted).then(|| {
            format!("it has {} bytes, {name} {}, and not {} bytes, {wanted}", found.bytes, found.checksum, self.bytes)
        }))
    }
}

/// The checksum that is written.
#[derive(Default)]
pub(super) struct Xxh3(XxHash3_128);

impl Checksum for Xxh3 {
    fn update(&mut self, piece: &[u8]) {
        self.0.write(piece);
    }

    /// As `xxh128sum` prints it.
    fn finish(self) -> String {
        format!("{:032x}", self.0.finish_128())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `xxh128sum` and `sha256sum` print.
    #[test]
    fn sums_are_those_of_the_usual_tools() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "learn").unwrap();
        for sum in [
            r#"{"bytes": 5, "xxh3_128": "f2be082101928731508919c71a7b5fb3"}"#,
            r#"{"bytes": 5, "sha256": "6a8da52e920664ef15b3c36c0edb24e27e6604bb2dc2f6c7c1f1f5076ff28ee9"}"#,
        ] {
            let sum: FileSum = serde_json::from_str(sum).unwrap();
            assert_eq!(sum.mismatch(&path).unwrap(), None);
            std::fs::write(folder.path().join("other"), "lear_").unwrap();
            let told = sum.mismatch(&folder.path().join("other")).unwrap().unwrap();
            assert!(told.starts_with("it has 5 bytes, "), "{told}");
        }
    }
}
