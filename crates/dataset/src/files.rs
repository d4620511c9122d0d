//! Writing files so that a kill never leaves a half-written one under its final name, and hashing them.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;
use sha2::Digest;
pub use sha2::Sha256;

use crate::error::{DatasetError, MadeBy};
use crate::manifest::FileEntry;
use crate::progress::Progress;

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

/// What a file is read and written by: little enough to be hashed and copied while it is in the processor's cache.
const PIECE: usize = 1 << 18;

/// A checksum of bytes that come in pieces.
pub trait Checksum: Default {
    fn update(&mut self, piece: &[u8]);

    /// In lower-case hexadecimal.
    fn finish(self) -> String;
}

impl Checksum for Sha256 {
    fn update(&mut self, piece: &[u8]) {
        Digest::update(self, piece);
    }

    fn finish(self) -> String {
        hex(&self.finalize())
    }
}

/// Size and checksum of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDigest {
    pub bytes: u64,
    pub checksum: String,
}

impl FileDigest {
    /// As the dataset lists the file; the checksum is SHA-256.
    pub(crate) fn entry(self, path: String, rows: u64) -> FileEntry {
        FileEntry { path, bytes: self.bytes, sha256: self.checksum, rows }
    }
}

/// Reads a file in pieces for its size and checksum.
///
/// # Errors
/// If it cannot be read.
pub fn hash_file<C: Checksum>(path: &Path) -> io::Result<FileDigest> {
    let (mut checksum, mut bytes) = (C::default(), 0);
    read_pieces(path, |piece| {
        checksum.update(piece);
        bytes += piece.len() as u64;
        true
    })?;
    Ok(FileDigest { bytes, checksum: checksum.finish() })
}

/// Reads a file in pieces until `each` wants no more.
fn read_pieces(path: &Path, mut each: impl FnMut(&[u8]) -> bool) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut piece = vec![0; PIECE];
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 || !each(&piece[..read]) {
            return Ok(());
        }
    }
}

/// Checks the SHA-256 of a file, with progress in bytes.
pub(crate) fn verify(
    made_by: MadeBy,
    path: &Path,
    entry: &FileEntry,
    progress: &dyn Progress,
) -> Result<(), DatasetError> {
    let (mut checksum, mut stopped) = (Sha256::default(), false);
    let read = read_pieces(path, |piece| {
        Checksum::update(&mut checksum, piece);
        progress.advance(piece.len() as u64);
        stopped = progress.stopped();
        !stopped
    });
    read.map_err(DatasetError::io(path))?;
    if stopped {
        return Err(DatasetError::Stopped);
    }
    let found = Checksum::finish(checksum);
    if found != entry.sha256 {
        let problem = format!("its SHA-256 is {found}, dataset.json says {}", entry.sha256);
        return Err(DatasetError::damaged(made_by, path, problem));
    }
    Ok(())
}

/// A new file that hashes what is written to it, by SHA-256.
pub(crate) struct HashingFile {
    file: BufWriter<File>,
    checksum: Sha256,
    bytes: u64,
}

impl HashingFile {
    /// Creates it in a folder that exists.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = BufWriter::with_capacity(PIECE, File::create(path)?);
        Ok(Self { file, checksum: Sha256::default(), bytes: 0 })
    }

    /// Makes the file durable and describes it.
    pub(crate) fn finish(self) -> io::Result<FileDigest> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(FileDigest { bytes: self.bytes, checksum: Checksum::finish(self.checksum) })
    }
}

impl Write for HashingFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.file.write(&data[..data.len().min(PIECE)])?;
        Checksum::update(&mut self.checksum, &data[..written]);
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

/// Exchanges the names of two directories, at one moment where the file system can do so. Elsewhere what was `target`
/// is called `between` for a moment, in which nothing is called `target`.
///
/// # Errors
/// The file system refuses. Both are then called as before, unless it has refused that, too: what was `target` is then
/// `between`.
pub fn exchange(aside: &Path, target: &Path, between: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, aside, CWD, target, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            exchange_by_names(aside, target, between, |from: &Path, to: &Path| fs::rename(from, to))
        }
        exchanged => exchanged.map_err(Into::into),
    }
}

fn exchange_by_names(
    aside: &Path,
    target: &Path,
    between: &Path,
    rename: impl Fn(&Path, &Path) -> io::Result<()>,
) -> io::Result<()> {
    rename(target, between)?;
    rename(aside, target).or_else(|error| rename(between, target).and(Err(error)))?;
    // The new one is in its place, which is what counts; the caller finds the other one where it is.
    let _ = rename(between, aside);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, Ordering};

    use tempfile::TempDir;

    use super::*;
    use crate::progress::Unit;

    /// What `aside`, `target` and `between` are, by what they were called before.
    type Found = [Option<&'static str>; 3];

    /// Two directories, and a name that is free.
    fn two() -> (TempDir, [PathBuf; 3]) {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["aside", "target", "between"].map(|name| folder.path().join(name));
        for path in &paths[..2] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("name"), path.file_name().unwrap().to_str().unwrap()).unwrap();
        }
        (folder, paths)
    }

    fn found(paths: &[PathBuf; 3]) -> Found {
        let names = ["aside", "target"];
        paths.each_ref().map(|path| {
            let text = fs::read_to_string(path.join("name")).ok()?;
            names.into_iter().find(|name| *name == text)
        })
    }

    #[test]
    fn directories_exchange_their_names() {
        let (_folder, paths) = two();
        let [aside, target, between] = &paths;
        exchange(aside, target, between).unwrap();
        assert_eq!(found(&paths), [Some("target"), Some("aside"), None]);
        exchange_by_names(aside, target, between, |from: &Path, to: &Path| fs::rename(from, to)).unwrap();
        assert_eq!(found(&paths), [Some("aside"), Some("target"), None]);
        let absent = aside.with_file_name("absent");
        assert!(exchange(&absent, target, between).is_err());
        assert_eq!(found(&paths), [Some("aside"), Some("target"), None], "what could not be replaced stays");
    }

    #[test]
    fn no_rename_that_fails_loses_a_directory() {
        // which of the renames fail, in their order; whether the new one is in place; what is where
        let cases: [([bool; 3], bool, Found); 4] = [
            ([true, false, false], false, [Some("aside"), Some("target"), None]),
            ([false, true, false], false, [Some("aside"), Some("target"), None]),
            ([false, true, true], false, [Some("aside"), None, Some("target")]),
            ([false, false, true], true, [None, Some("aside"), Some("target")]),
        ];
        for (failing, placed, expected) in cases {
            let (_folder, paths) = two();
            let [aside, target, between] = &paths;
            let calls = Cell::new(0);
            let rename = |from: &Path, to: &Path| -> io::Result<()> {
                let fails = failing[calls.replace(calls.get() + 1)];
                if fails { Err(io::ErrorKind::PermissionDenied.into()) } else { fs::rename(from, to) }
            };
            assert_eq!(exchange_by_names(aside, target, between, rename).is_ok(), placed, "{failing:?}");
            assert_eq!(found(&paths), expected, "{failing:?}");
        }
    }

    /// Asks to stop once something is done.
    #[derive(Default)]
    struct Done(AtomicU64);

    impl Progress for Done {
        fn stage(&self, _name: &str, _total: Option<u64>, _unit: Unit) {}

        fn advance(&self, amount: u64) {
            self.0.fetch_add(amount, Ordering::Relaxed);
        }

        fn stopped(&self) -> bool {
            self.0.load(Ordering::Relaxed) > 0
        }
    }

    #[test]
    fn a_stop_is_heard_in_the_midst_of_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large");
        fs::write(&path, vec![0; 3 * PIECE]).unwrap();
        let entry = hash_file::<Sha256>(&path).unwrap().entry("large".into(), 1);
        verify(MadeBy::Prepare, &path, &entry, &()).unwrap();
        let done = Done::default();
        let ended = verify(MadeBy::Prepare, &path, &entry, &done);
        assert!(matches!(ended, Err(DatasetError::Stopped)), "{ended:?}");
        assert_eq!(done.0.into_inner(), PIECE as u64);
    }
}
