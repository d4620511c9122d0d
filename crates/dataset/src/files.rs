//! Writing files so that a kill never leaves a half-written one under its final name, and hashing them.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::DatasetError;
use crate::manifest::FileEntry;

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        text.push(char::from(b"0123456789abcdef"[usize::from(byte >> 4)]));
        text.push(char::from(b"0123456789abcdef"[usize::from(byte & 15)]));
        text
    })
}

/// The name of a path inside the directory of the dataset, with `/` on every system.
pub(crate) fn relative(folder: &str, name: &str) -> String {
    format!("{folder}/{name}")
}

/// SHA-256 of a file and its size, read in pieces.
pub(crate) fn hash_file(path: &Path, mut seen: impl FnMut(u64)) -> io::Result<(String, u64)> {
    let mut file = File::open(path)?;
    let mut piece = vec![0; 1 << 20];
    let (mut digest, mut bytes) = (Sha256::new(), 0);
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            return Ok((hex(&digest.finalize()), bytes));
        }
        digest.update(&piece[..read]);
        bytes += read as u64;
        seen(read as u64);
    }
}

/// Checks the SHA-256 of a file.
pub(crate) fn verify(path: &Path, entry: &FileEntry) -> Result<(), DatasetError> {
    verify_with(path, entry, |_| ())
}

/// [`verify`], telling the bytes of each piece.
pub(crate) fn verify_with(path: &Path, entry: &FileEntry, seen: impl FnMut(u64)) -> Result<(), DatasetError> {
    let (found, _) = hash_file(path, seen).map_err(DatasetError::io(path))?;
    if found != entry.sha256 {
        let problem = format!("its SHA-256 is {found}, dataset.json says {}", entry.sha256);
        return Err(DatasetError::damaged(path, problem));
    }
    Ok(())
}

/// A new file that hashes what is written to it.
pub(crate) struct HashingFile {
    file: BufWriter<File>,
    digest: Sha256,
    bytes: u64,
    relative: String,
}

impl HashingFile {
    /// Creates `root/relative`, whose folder exists.
    pub(crate) fn create(root: &Path, relative: String) -> io::Result<Self> {
        let file = BufWriter::with_capacity(1 << 18, File::create(root.join(&relative))?);
        Ok(Self { file, digest: Sha256::new(), bytes: 0, relative })
    }

    /// Makes the file durable and describes it.
    pub(crate) fn finish(self, rows: u64) -> io::Result<FileEntry> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(FileEntry { path: self.relative, bytes: self.bytes, sha256: hex(&self.digest.finalize()), rows })
    }
}

impl Write for HashingFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.file.write(data)?;
        self.digest.update(&data[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The name beside `path` that a writer of this process uses until the file is whole.
pub(crate) fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.tmp-{}", std::process::id()))
}

/// Writes a file aside, syncs it and renames it: afterwards it is there whole, or as it was before.
pub(crate) fn write_atomically(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let aside = aside(path);
    let written = (|| {
        let mut file = File::create(&aside)?;
        write(&mut file)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    })();
    if written.is_err() {
        // The first error is the one to report; a file that stays behind under this name is never read.
        let _ = fs::remove_file(&aside);
    }
    written?;
    path.parent().map_or(Ok(()), sync_directory)
}
