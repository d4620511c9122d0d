//! Files of JSON lines that somebody else writes, read while they grow.
//!
//! Input: a path. Output: the values of new lines. Invariants: a last line without its end is left for later; a file that
//! became shorter or another one (a resume rewrites it) is read from its start again, and the reader is told; a damaged
//! line is counted and passed over, because what can be shown is shown.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::marker::PhantomData;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use serde::de::DeserializeOwned;

/// Most bytes that one read takes: a file that is longer is read from here before its end.
const MOST: u64 = 256 << 20;

/// Where a file of JSON lines was read to.
#[derive(Debug)]
pub struct Follower<T> {
    path: PathBuf,
    inode: u64,
    offset: u64,
    /// Lines that are no `T`.
    pub damaged: usize,
    kind: PhantomData<fn() -> T>,
}

/// What a read has brought.
#[derive(Debug, PartialEq)]
pub struct Fresh<T> {
    pub values: Vec<T>,
    /// What was read before is not in the file any more.
    pub anew: bool,
}

impl<T: DeserializeOwned> Follower<T> {
    pub fn new(path: PathBuf) -> Self {
        Self { path, inode: 0, offset: 0, damaged: 0, kind: PhantomData }
    }

    /// The values of the lines that have come since the last read; none while there is no file.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn read(&mut self) -> io::Result<Fresh<T>> {
        let mut fresh = Fresh { values: Vec::new(), anew: false };
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(fresh),
            Err(error) => return Err(error),
        };
        let facts = file.metadata()?;
        if facts.ino() != self.inode || facts.len() < self.offset {
            fresh.anew = self.offset > 0;
            (self.inode, self.offset, self.damaged) = (facts.ino(), 0, 0);
        }
        let skipped = facts.len().saturating_sub(self.offset) > MOST;
        if skipped {
            self.offset = facts.len() - MOST;
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        self.offset += whole as u64;
        // the first line after a jump is a part of one
        for line in
            bytes[..whole].split(|&byte| byte == b'\n').skip(usize::from(skipped)).filter(|line| !line.is_empty())
        {
            match serde_json::from_slice(line) {
                Ok(value) => fresh.values.push(value),
                Err(_) => self.damaged += 1,
            }
        }
        Ok(fresh)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn new_lines_are_read_once_and_a_rewritten_file_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        let mut follower = Follower::<u32>::new(path.clone());
        let fresh = |values: &[u32], anew| Fresh { values: values.to_vec(), anew };
        assert_eq!(follower.read().unwrap(), fresh(&[], false), "no file yet");
        fs::write(&path, "1\n2\n3").unwrap();
        assert_eq!(follower.read().unwrap(), fresh(&[1, 2], false));
        fs::write(&path, "1\n2\n34\nx\n5\n").unwrap();
        assert_eq!(follower.read().unwrap(), fresh(&[34, 5], false), "a line that was cut is read when it is whole");
        assert_eq!(follower.damaged, 1);
        assert_eq!(follower.read().unwrap(), fresh(&[], false));
        let aside = folder.path().join("aside");
        fs::write(&aside, "1\n2\n34\nx\n5\n6\n").unwrap();
        fs::rename(&aside, &path).unwrap();
        assert_eq!(follower.read().unwrap(), fresh(&[1, 2, 34, 5, 6], true), "another file of that name");
        fs::write(&path, "7\n").unwrap();
        assert_eq!(follower.read().unwrap(), fresh(&[7], true), "a shorter one");
    }
}
