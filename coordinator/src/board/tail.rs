//! The lines of a file that grows.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

/// Bytes that are read in one go.
const CHUNK: usize = 1 << 20;
/// A line that is longer is none of ours.
const LONGEST: usize = 16 << 20;

/// A place in a file.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    file: Option<File>,
    /// Bytes of a line whose end is still to come.
    rest: Vec<u8>,
    buffer: Vec<u8>,
}

impl Tail {
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None, rest: Vec::new(), buffer: Vec::new() }
    }

    /// Whether another file has taken the place of the one that was read so far; it is read from its start then.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub fn is_replaced(&mut self) -> io::Result<bool> {
        let Some(file) = &self.file else { return Ok(false) };
        let there = match fs::metadata(&self.path) {
            Ok(there) => there,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let read = file.metadata()?;
        let replaced = (read.dev(), read.ino()) != (there.dev(), there.ino());
        if replaced {
            self.file = None;
            self.rest.clear();
        }
        Ok(replaced)
    }

    /// Gives the whole lines of the next part of the file to `take`; `false` at its end, and as long as there is no file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn next_lines(&mut self, mut take: impl FnMut(&[u8])) -> io::Result<bool> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        let Some(file) = &mut self.file else { return Ok(false) };
        self.buffer.resize(CHUNK, 0);
        let read = file.read(&mut self.buffer)?;
        let Some(end) = self.buffer[..read].iter().rposition(|&byte| byte == b'\n') else {
            self.rest.extend_from_slice(&self.buffer[..read]);
            if self.rest.len() > LONGEST {
                self.rest.clear();
            }
            return Ok(read > 0);
        };
        for (place, line) in self.buffer[..end].split(|&byte| byte == b'\n').enumerate() {
            if place == 0 && !self.rest.is_empty() {
                self.rest.extend_from_slice(line);
                take(&self.rest);
                self.rest.clear();
            } else {
                take(line);
            }
        }
        self.rest.extend_from_slice(&self.buffer[end + 1..read]);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn lines(tail: &mut Tail) -> Vec<String> {
        let mut lines = Vec::new();
        while tail.next_lines(|line| lines.push(String::from_utf8(line.to_vec()).unwrap())).unwrap() {}
        lines
    }

    #[test]
    fn whole_lines_come_once_however_they_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        let mut tail = Tail::new(path.clone());
        assert_eq!(lines(&mut tail), [""; 0], "there is no file yet");
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(b"one\ntwo\nth").unwrap();
        assert_eq!(lines(&mut tail), ["one", "two"]);
        assert_eq!(lines(&mut tail), [""; 0]);
        file.write_all(b"re").unwrap();
        assert_eq!(lines(&mut tail), [""; 0]);
        file.write_all(b"e\nfour\n").unwrap();
        assert_eq!(lines(&mut tail), ["three", "four"]);
        let long = "x".repeat(CHUNK + 7);
        file.write_all(format!("{long}\nend\n").as_bytes()).unwrap();
        assert_eq!(lines(&mut tail), [long.as_str(), "end"]);
    }

    #[test]
    fn a_file_that_takes_the_place_of_another_is_read_from_its_start() {
        let folder = tempfile::tempdir().unwrap();
        let (path, aside) = (folder.path().join("x.jsonl"), folder.path().join("aside"));
        let mut tail = Tail::new(path.clone());
        fs::write(&path, "one\ntwo\nth").unwrap();
        assert!(!tail.is_replaced().unwrap(), "nothing was read yet");
        assert_eq!(lines(&mut tail), ["one", "two"]);
        assert!(!tail.is_replaced().unwrap());
        fs::write(&aside, "one\n").unwrap();
        fs::rename(&aside, &path).unwrap();
        assert_eq!(lines(&mut tail), [""; 0]);
        assert!(tail.is_replaced().unwrap() && !tail.is_replaced().unwrap());
        assert_eq!(lines(&mut tail), ["one"]);
    }
}
