//! A new file of a checkpoint.
//!
//! Input: bytes in order. Output: a durable file, its size and checksum. One that is to spare the processors is written past
//! the kernel's page cache (`O_DIRECT`) where the file system agrees: a copy into the cache is most of the processor time of
//! a write, and there it would take the place of rows that training reads again. That is one piece after another, and on a
//! network file system slower than with the cache, so it is done only where the processors are what counts.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use learn_dataset::files::Checksum;
use rustix::fs::OFlags;

use super::FileSum;
use super::sum::Xxh3;

/// What is written at once.
const PIECE: usize = 1 << 20;

/// A write past the page cache begins at a multiple of this in memory and in the file, and has a multiple of it as its length.
const ALIGNMENT: usize = 4096;

/// What is hashed and copied at once, while it is in the processor's cache.
const PART: usize = 1 << 16;

const _: () = assert!(PIECE.is_multiple_of(ALIGNMENT));

pub(super) struct NewFile<'a> {
    path: PathBuf,
    file: File,
    /// Whether `file` is open for writes past the page cache.
    direct: bool,
    /// The next piece lies at `start`, the first aligned place.
    memory: Vec<u8>,
    start: usize,
    /// Bytes of the next piece so far.
    filled: usize,
    /// Bytes of the file so far, without it.
    written: u64,
    sum: Xxh3,
    before_piece: &'a dyn Fn(),
}

impl<'a> NewFile<'a> {
    /// Creates it, for writes past the page cache if these are wished and the file system knows them.
    pub(super) fn create(path: &Path, direct: bool, before_piece: &'a dyn Fn()) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        let past_cache = direct.then(|| options.clone().custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path));
        let (file, direct) = match past_cache {
            Some(Ok(file)) => (file, true),
            // a path that cannot be opened at all says so again
            _ => (options.open(path)?, false),
        };
        let memory = vec![0; PIECE + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        let (sum, path) = (Xxh3::default(), path.to_owned());
        Ok(Self { path, file, direct, memory, start, filled: 0, written: 0, sum, before_piece })
    }

    /// Makes the file durable and describes it.
    pub(super) fn finish(mut self) -> io::Result<FileSum> {
        if self.filled > 0 {
            self.write_piece()?;
        }
        // the last piece may have been filled up
        self.file.set_len(self.written)?;
        self.file.sync_all()?;
        Ok(FileSum::of(self.written, self.sum))
    }

    /// Writes what is there of the next piece; only the last one may be shorter than [`PIECE`].
    fn write_piece(&mut self) -> io::Result<()> {
        (self.before_piece)();
        if self.direct {
            let whole = self.start + self.filled.next_multiple_of(ALIGNMENT);
            if self.file.write_all_at(&self.memory[self.start..whole], self.written).is_err() {
                // what is wrong with the disk itself is told by the write below
                self.use_page_cache()?;
            }
        }
        if !self.direct {
            self.file.write_all_at(&self.memory[self.start..self.start + self.filled], self.written)?;
        }
        self.written += std::mem::take(&mut self.filled) as u64;
        Ok(())
    }

    /// Opens it anew: not every file system lets an open file change its way.
    fn use_page_cache(&mut self) -> io::Result<()> {
        self.file = OpenOptions::new().write(true).open(&self.path)?;
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
            self.write_piece()?;
        }
        Ok(part.len())
    }

    /// Nothing: what is not a whole piece waits for [`NewFile::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;

    use super::*;

    #[test]
    fn what_is_written_is_there_whatever_its_length_and_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let data: Vec<u8> = (0..2 * PIECE + 5000).map(|n| ((n * n) >> 7) as u8).collect();
        for length in [0, 1, ALIGNMENT, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, data.len()] {
            // the file system may refuse any piece: from which byte on it does
            for (direct, refused, part) in [
                (true, None, length),
                (true, None, 999),
                (false, None, PART),
                (true, Some(0), 999),
                (true, Some(PIECE), PIECE),
            ] {
                let pieces = Cell::new(0);
                let before_piece = || pieces.set(pieces.get() + 1);
                let mut file = NewFile::create(&path, direct, &before_piece).unwrap();
                assert_eq!(file.direct, direct && knows_direct(&path));
                let (first, rest) = data[..length].split_at(refused.unwrap_or(length).min(length));
                first.chunks(part.max(1)).for_each(|part| file.write_all(part).unwrap());
                if refused.is_some() {
                    file.use_page_cache().unwrap();
                }
                rest.chunks(part.max(1)).for_each(|part| file.write_all(part).unwrap());
                let sum = file.finish().unwrap();
                assert!(fs::read(&path).unwrap() == data[..length], "{length} bytes, {direct}, {refused:?}, {part}");
                assert_eq!((sum.bytes, sum.mismatch(&path).unwrap()), (length as u64, None));
                assert_eq!(pieces.get(), length.div_ceil(PIECE));
            }
        }
    }

    fn knows_direct(path: &Path) -> bool {
        OpenOptions::new().write(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path).is_ok()
    }

    #[test]
    fn a_refused_piece_goes_through_the_page_cache_and_so_do_those_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let data: Vec<u8> = (0..2 * PIECE + 5000).map(|n| (n % 251) as u8).collect();
        let mut file = NewFile::create(&path, true, &|| ()).unwrap();
        file.write_all(&data[..PIECE]).unwrap();
        let direct = file.direct;
        // memory that is not aligned is refused by those who look
        file.start += 1;
        file.write_all(&data[PIECE..]).unwrap();
        let sum = file.finish().unwrap();
        assert_eq!((direct, sum.mismatch(&path).unwrap()), (knows_direct(&path), None));
        assert!(fs::read(&path).unwrap() == data);
    }

    #[test]
    fn bytes_of_an_attempt_that_failed_are_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut file = NewFile::create(&path, true, &|| ()).unwrap();
        file.write_all(b"learn").unwrap();
        // what a write of the filled-up piece has left before it was refused
        fs::write(&path, [1; 3000]).unwrap();
        file.use_page_cache().unwrap();
        file.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"learn");
    }

    #[test]
    fn a_disk_that_is_full_is_told() {
        for direct in [true, false] {
            let mut file = NewFile::create(Path::new("/dev/full"), direct, &|| ()).unwrap();
            let error = file.write_all(&vec![0; PIECE]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
    }
}
