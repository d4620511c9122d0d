//! A new file of a checkpoint.
//!
//! Input: bytes in order. Output: a durable file, its size and checksum. Where the file system agrees it is written past
//! the kernel's page cache (`O_DIRECT`): nobody reads it soon, a copy into the cache is most of the processor time of a
//! write, and there it would take the place of rows that training reads again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use learn_dataset::files::Checksum;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::FileSum;
use super::sum::Xxh3;

/// What the disk is given at once.
const PIECE: usize = 1 << 20;

/// Where memory, place and length of a piece must begin for a write past the page cache, on any usual disk.
const ALIGNMENT: usize = 4096;

/// What is hashed and copied at once, while it is in the processor's cache.
const PART: usize = 1 << 16;

const _: () = assert!(PIECE.is_multiple_of(ALIGNMENT));

pub(super) struct NewFile<'a> {
    file: File,
    /// Past the page cache.
    direct: bool,
    /// A piece, from `start` on.
    memory: Vec<u8>,
    start: usize,
    /// Bytes of the piece that are there.
    filled: usize,
    /// Bytes of the pieces before it.
    written: u64,
    sum: Xxh3,
    between: &'a dyn Fn(),
}

impl<'a> NewFile<'a> {
    /// Creates it; `between` is called before each piece that is written.
    pub(super) fn create(path: &Path, between: &'a dyn Fn()) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        let direct = options.clone().custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path);
        let (file, direct) = match direct {
            Err(error) if refuses_direct(&error) => (options.open(path)?, false),
            opened => (opened?, true),
        };
        let memory = vec![0; PIECE + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Ok(Self { file, direct, memory, start, filled: 0, written: 0, sum: Xxh3::default(), between })
    }

    /// Makes the file durable and describes it.
    pub(super) fn finish(mut self) -> io::Result<FileSum> {
        if self.filled > 0 {
            self.put()?;
        }
        self.file.sync_all()?;
        Ok(FileSum::of(self.written, self.sum))
    }

    /// Writes the piece, which only at the file's end may be a part of one.
    fn put(&mut self) -> io::Result<()> {
        (self.between)();
        let filled = std::mem::take(&mut self.filled);
        let end = self.written + filled as u64;
        if self.direct {
            let whole = filled.next_multiple_of(ALIGNMENT);
            match self.file.write_all_at(&self.memory[self.start..self.start + whole], self.written) {
                Err(error) if refuses_direct(&error) => self.use_page_cache()?,
                put => {
                    put?;
                    if whole > filled {
                        self.file.set_len(end)?;
                    }
                }
            }
        }
        if !self.direct {
            self.file.write_all_at(&self.memory[self.start..self.start + filled], self.written)?;
        }
        self.written = end;
        Ok(())
    }

    fn use_page_cache(&mut self) -> io::Result<()> {
        fcntl_setfl(&self.file, fcntl_getfl(&self.file)? - OFlags::DIRECT)?;
        self.direct = false;
        Ok(())
    }
}

impl Write for NewFile<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let part = &data[..data.len().min(PART).min(PIECE - self.filled)];
        let place = self.start + self.filled;
        self.memory[place..place + part.len()].copy_from_slice(part);
        self.sum.update(part);
        self.filled += part.len();
        if self.filled == PIECE {
            self.put()?;
        }
        Ok(part.len())
    }

    /// Nothing: what is not a whole piece waits for [`NewFile::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the file system cannot, or cannot with this alignment, write past the page cache.
fn refuses_direct(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::OPNOTSUPP].map(|errno| Some(errno.raw_os_error())).contains(&error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;

    use super::*;

    /// Writes `data` in parts of `part` bytes, past the page cache or through it.
    fn write(path: &Path, data: &[u8], part: usize, cached: bool) -> (FileSum, usize) {
        let pieces = Cell::new(0);
        let between = || pieces.set(pieces.get() + 1);
        let mut file = NewFile::create(path, &between).unwrap();
        if cached {
            file.use_page_cache().unwrap();
        }
        for part in data.chunks(part) {
            file.write_all(part).unwrap();
        }
        (file.finish().unwrap(), pieces.get())
    }

    #[test]
    fn what_is_written_is_there_whatever_its_length_and_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let data: Vec<u8> = (0..2 * PIECE + 5000).map(|n| ((n * n) >> 7) as u8).collect();
        for length in [0, 1, ALIGNMENT, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, data.len()] {
            for (part, cached) in [(data.len(), false), (999, false), (PIECE, true)] {
                let (sum, pieces) = write(&path, &data[..length], part, cached);
                assert!(fs::read(&path).unwrap() == data[..length], "{length} bytes in parts of {part}");
                assert_eq!((sum.bytes, sum.mismatch(&path).unwrap()), (length as u64, None));
                assert_eq!(pieces, length.div_ceil(PIECE));
            }
        }
    }

    #[test]
    fn a_disk_that_refuses_a_piece_is_told() {
        // as a full disk, which no write to it passes
        let between = || ();
        let mut file = NewFile::create(Path::new("/dev/full"), &between).unwrap();
        let error = file.write_all(&vec![0; PIECE]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
