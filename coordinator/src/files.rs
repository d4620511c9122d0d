//! Files of a run that survive a kill: written aside, synced and renamed, or appended line by line.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
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

/// Replaces a file as a whole: a reader, or a kill, sees the old or the new text.
///
/// # Errors
/// If the directory is not writable.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(write_error("make the directory", folder))?;
    let mut aside = path.as_os_str().to_owned();
    aside.push(".tmp");
    let aside = PathBuf::from(aside);
    let write = || {
        let mut file = File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(write_error("write", &aside))?;
    fs::rename(&aside, path).map_err(write_error("replace", path))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(write_error("sync", folder))
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

/// Values of a [`JsonLines`] file; none if there is no file. A last line that a kill has cut is left out.
///
/// # Errors
/// If the file cannot be read or another line is damaged.
pub fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, FileError> {
    Ok(texts_and_values(path)?.into_iter().map(|(_, value)| value).collect())
}

/// As [`read_lines`], each value beside its line.
fn texts_and_values<T: DeserializeOwned>(path: &Path) -> Result<Vec<(String, T)>, FileError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(read_error(path)(error)),
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(index, line): (usize, &str)| match serde_json::from_str(line) {
        Ok(value) => Ok((line.to_owned(), value)),
        Err(source) => Err(FileError::Line { path: path.to_owned(), line: index + 1, source }),
    };
    whole.lines().enumerate().map(parse).collect()
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
    let mut lines: Vec<(String, T)> = texts_and_values(path)?;
    lines.retain(|(_, value)| keep(value));
    let text: String = lines.iter().flat_map(|(text, _)| [text.as_str(), "\n"]).collect();
    write_atomic(path, text.as_bytes())
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
        fs::write(&path, "1\nx\n").unwrap();
        assert!(read_lines::<u32>(&path).unwrap_err().to_string().contains("line 2"));
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
