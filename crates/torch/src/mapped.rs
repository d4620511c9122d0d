//! Files as memory: weights are read from the page cache, one tensor at a time, without a second copy of the file.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

/// A file's bytes, mapped read-only.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a whole file.
    ///
    /// # Errors
    /// The file cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is private to readers, and nothing here writes into a file of weights: they are written aside
        // and renamed. Should another program truncate the file meanwhile, the operating system ends the process
        // (SIGBUS) instead of handing out other memory. Whoever reads the bytes checks them.
        unsafe { Mmap::map(&file) }.map(Self)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_holds_the_files_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        for bytes in [&b""[..], b"0123456789"] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(&*MappedFile::open(&path).unwrap(), bytes);
        }
        assert!(MappedFile::open(&folder.path().join("none")).is_err());
    }
}
