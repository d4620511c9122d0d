//! Files of a run that survive a kill: written aside, synced and renamed, or appended line by line.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Take, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most bytes of a line that a kill has cut.
const MEND_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot {action} {path}: {source}; is the disk full, or the directory not writable?")]
    Write { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path}, line {line}: {source}; the file was changed or is of another version")]
    Line { path: PathBuf, line: usize, source: serde_json::Error },
    #[error("{path}: {source}; the file was changed or is of another version")]
    Json { path: PathBuf, source: serde_json::Error },
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> FileError {
    move |source| FileError::Read { path: path.to_owned(), source }
}

fn write_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    move |source| FileError::Write { action, path: path.to_owned(), source }
}

/// What is to take the place of a file, beside it.
struct Aside {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Aside {
    fn create(of: &Path) -> Result<Self, FileError> {
        let folder = folder_of(of);
        fs::create_dir_all(folder).map_err(write_error("make the directory", folder))?;
        let mut path = of.as_os_str().to_owned();
        path.push(".tmp");
        let path = PathBuf::from(path);
        let file = File::create(&path).map_err(write_error("write", &path))?;
        Ok(Self { path, file: BufWriter::new(file) })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file.write_all(bytes).map_err(write_error("write", &self.path))
    }

    /// As a whole: a reader, or a kill, sees the old or the new text.
    fn replace(self, path: &Path) -> Result<(), FileError> {
        let Self { path: aside, file } = self;
        let synced = file.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all());
        synced.map_err(write_error("write", &aside))?;
        fs::rename(&aside, path).map_err(write_error("replace", path))?;
        let folder = folder_of(path);
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(write_error("sync", folder))
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

/// Replaces a file as a whole: a reader, or a kill, sees the old or the new text.
///
/// # Errors
/// If the directory is not writable.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut aside = Aside::create(path)?;
    aside.write(bytes)?;
    aside.replace(path)
}

/// [`write_atomic`] of a value as JSON.
///
/// # Errors
/// If the directory is not writable, or the value is not JSON.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(json_error(path))?;
    text.push(b'\n');
    write_atomic(path, &text)
}

/// # Errors
/// If the file cannot be read or is not the JSON of a `T`.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let bytes = fs::read(path).map_err(read_error(path))?;
    serde_json::from_slice(&bytes).map_err(json_error(path))
}

fn json_error(path: &Path) -> impl FnOnce(serde_json::Error) -> FileError {
    move |source| FileError::Json { path: path.to_owned(), source }
}

/// A file of one JSON value a line that only grows.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// # Errors
    /// If the file can be neither made nor extended.
    pub fn open(path: PathBuf) -> Result<Self, FileError> {
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(write_error("open", &path))?;
        Ok(Self { path, file })
    }

    /// Appends one line with one write.
    ///
    /// # Errors
    /// If the file cannot be extended.
    pub fn append<T: Serialize>(&mut self, value: &T) -> Result<(), FileError> {
        let line = serde_json::to_string(value).map_err(json_error(&self.path))?;
        self.append_line(&line)
    }

    /// Appends one line, which is JSON already, with one write.
    ///
    /// # Errors
    /// If the file cannot be extended.
    pub fn append_line(&mut self, line: &str) -> Result<(), FileError> {
        let line = format!("{line}\n");
        self.file.write_all(line.as_bytes()).map_err(write_error("append to", &self.path))
    }
}

/// A file as it is now, whatever is appended to it, or takes its place, later.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    /// With its length; none if there is no file.
    file: Option<(File, u64)>,
}

impl Snapshot {
    /// # Errors
    /// If the file cannot be read.
    pub fn take(path: &Path) -> Result<Self, FileError> {
        let file = match File::open(path) {
            Ok(file) => {
                let length = file.metadata().map_err(read_error(path))?.len();
                Some((file, length))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(read_error(path)(error)),
        };
        Ok(Self { path: path.to_owned(), file })
    }

    /// Its values, from the first on; one such pass must be over before the next.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn lines<T>(&mut self) -> Result<Lines<T>, FileError> {
        let file = match &self.file {
            Some((file, length)) => {
                let mut file = file.try_clone().map_err(read_error(&self.path))?;
                file.rewind().map_err(read_error(&self.path))?;
                Some(BufReader::new(file.take(*length)))
            }
            None => None,
        };
        Ok(Lines { path: self.path.clone(), file, text: Vec::new(), number: 0, values: PhantomData })
    }
}

/// Values of a [`JsonLines`] file one by one, so that they need the room of one; none if there is no file. A last line that
/// a kill has cut is left out.
#[derive(Debug)]
pub struct Lines<T> {
    path: PathBuf,
    /// None behind its end.
    file: Option<BufReader<Take<File>>>,
    /// The last line that was read.
    text: Vec<u8>,
    number: usize,
    values: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// # Errors
    /// If the file cannot be read.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        Snapshot::take(path)?.lines()
    }

    fn value(&mut self) -> Result<Option<T>, FileError> {
        let Some(file) = &mut self.file else { return Ok(None) };
        let mut empty = None;
        loop {
            self.text.clear();
            file.read_until(b'\n', &mut self.text).map_err(read_error(&self.path))?;
            // behind the last line, or one that was cut; an empty line before it is none
            if self.text.pop() != Some(b'\n') {
                self.file = None;
                return Ok(None);
            }
            if let Some(error) = empty.take() {
                return Err(error);
            }
            self.number += 1;
            match serde_json::from_slice(&self.text) {
                Ok(value) => return Ok(Some(value)),
                Err(source) => {
                    let error = FileError::Line { path: self.path.clone(), line: self.number, source };
                    if !self.text.is_empty() {
                        return Err(error);
                    }
                    empty = Some(error);
                }
            }
        }
    }
}

impl<T: DeserializeOwned> Iterator for Lines<T> {
    type Item = Result<T, FileError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.value().transpose()
    }
}

/// All values of [`Lines`].
///
/// # Errors
/// If the file cannot be read or a line, but a cut last one, is damaged.
pub fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, FileError> {
    Lines::<T>::open(path)?.collect()
}

/// Makes `lines` the last of a file: a last line that a kill has cut goes, and those that are not there yet are appended.
///
/// # Errors
/// If the file cannot be read or extended.
pub fn mend_lines(path: &Path, lines: &[&str]) -> Result<(), FileError> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(write_error("open", path))?;
    let length = file.metadata().map_err(read_error(path))?.len();
    // some of the lines and a cut one are the last: no more than this has to be read, however long the file is
    let reach = 2 * lines.iter().map(|line| line.len() as u64 + 1).sum::<u64>() + MEND_BYTES;
    let mut tail = |from| -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let mut from = length.saturating_sub(reach);
    let mut bytes = tail(from).map_err(read_error(path))?;
    if !bytes.contains(&b'\n') {
        from = 0;
        bytes = tail(from).map_err(read_error(path))?;
    }
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let there: BTreeSet<&[u8]> = bytes[..whole].split(|&byte| byte == b'\n').collect();
    let missing = lines.iter().filter(|line| !there.contains(line.as_bytes()));
    let text: String = missing.flat_map(|line| [*line, "\n"]).collect();
    let end = from + whole as u64;
    let mut mend = || {
        file.set_len(end)?;
        file.seek(SeekFrom::Start(end))?;
        file.write_all(text.as_bytes())
    };
    mend().map_err(write_error("mend", path))
}

/// Keeps the lines that `keep` names, as they are, in one atomic replacement.
///
/// # Errors
/// If the file cannot be read or replaced.
pub fn retain_lines<T: DeserializeOwned>(path: &Path, keep: impl Fn(&T) -> bool) -> Result<(), FileError> {
    let mut lines = Lines::<T>::open(path)?;
    let mut aside = Aside::create(path)?;
    while let Some(value) = lines.value()? {
        if keep(&value) {
            aside.write(&lines.text)?;
            aside.write(b"\n")?;
        }
    }
    aside.replace(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_appended_read_and_retained() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        assert_eq!(read_lines::<u32>(&path).unwrap(), Vec::<u32>::new());
        let mut lines = JsonLines::open(path.clone()).unwrap();
        (1..=4).for_each(|value| lines.append(&value).unwrap());
        fs::write(&path, fs::read_to_string(&path).unwrap() + "12").unwrap();
        assert_eq!(read_lines::<u32>(&path).unwrap(), [1, 2, 3, 4], "a cut line is left out");
        retain_lines::<u32>(&path, |&value| value <= 2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n");
        for damaged in ["1\nx\n", "1\n\n2\n", "1\n\n\n", "1\n\u{e9}\n3\n"] {
            fs::write(&path, damaged).unwrap();
            let error = read_lines::<u32>(&path).unwrap_err().to_string();
            assert!(error.contains("line 2"), "{error}");
            retain_lines::<u32>(&path, |_| true).unwrap_err();
            assert_eq!(fs::read_to_string(&path).unwrap(), damaged, "nothing is lost");
        }
        for whole in ["1\n2\n", "1\r\n2\r\n", "1\n2\n\n", "1\n2\n3", "1\n2\n\nx"] {
            fs::write(&path, whole).unwrap();
            assert_eq!(read_lines::<u32>(&path).unwrap(), [1, 2], "{whole:?}");
        }
        fs::write(&path, b"1\n\"\xc3").unwrap();
        assert_eq!(read_lines::<u32>(&path).unwrap(), [1], "cut within a letter");
    }

    #[test]
    fn lines_are_retained_as_they_stand_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        // more than any buffer holds
        let line = |number: u32| format!("[{number}, \"{}\"]\n", "\u{e9}".repeat(40));
        let text: String = (0..2000).map(line).collect();
        fs::write(&path, format!("{text}{}", line(2000).trim_end())).unwrap();
        let mut lines = Lines::<(u32, String)>::open(&path).unwrap();
        assert!((0..2000).all(|number| lines.next().unwrap().unwrap().0 == number));
        assert!(lines.next().is_none() && lines.next().is_none(), "the last one was cut");
        retain_lines::<(u32, String)>(&path, |(number, _)| number % 2 == 0).unwrap();
        let even: String = (0..2000).step_by(2).map(line).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), even);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left aside");
    }

    #[test]
    fn a_snapshot_sees_nothing_that_comes_later() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        let mut none = Snapshot::take(&path).unwrap();
        fs::write(&path, "1\n2\n").unwrap();
        assert_eq!(none.lines::<u32>().unwrap().count(), 0);
        let mut snapshot = Snapshot::take(&path).unwrap();
        JsonLines::open(path.clone()).unwrap().append(&3).unwrap();
        let values = |snapshot: &mut Snapshot| {
            snapshot.lines::<u32>().unwrap().collect::<Result<Vec<u32>, FileError>>().unwrap()
        };
        assert_eq!(values(&mut snapshot), [1, 2]);
        retain_lines::<u32>(&path, |&value| value > 2).unwrap();
        assert_eq!(values(&mut snapshot), [1, 2], "a second time, of a file that another has replaced");
        assert_eq!(read_lines::<u32>(&path).unwrap(), [3]);
    }

    #[test]
    fn lines_that_a_kill_kept_from_their_file_are_mended_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        mend_lines(&path, &["1", "2"]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n", "a file that was not there");
        for cut in ["1\n2\n3\n4", "1\n2\n3\n", "1\n2\n3\n44\n5", "1\n2\n3\n44\n55\n"] {
            fs::write(&path, cut).unwrap();
            mend_lines(&path, &["3", "44", "55"]).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n3\n44\n55\n", "from {cut:?}");
        }
        fs::write(&path, format!("{}\n1\ncu", "0".repeat(3 << 20))).unwrap();
        mend_lines(&path, &["1"]).unwrap();
        assert!(fs::read_to_string(&path).unwrap().ends_with("00\n1\n"), "only the end of a long file is read");
        mend_lines(&path, &[]).unwrap();
        assert!(fs::read_to_string(&path).unwrap().ends_with("00\n1\n"));
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("x.json");
        write_json(&path, &vec![1]).unwrap();
        write_json(&path, &vec![2]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), [2]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left aside");
        assert!(read_json::<Vec<String>>(&path).unwrap_err().to_string().contains("x.json"));
    }
}
