//! Text files, plain or gzip.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

use crate::prepare::error::PrepareError;

const PIECE: usize = 1 << 18;
/// A line longer than this is no row.
const MAX_LINE: u64 = 1 << 26;

/// Kinds of compression that are not read: their name, the ending of files, and what these begin with.
pub(super) const OTHERS: [(&str, &str, &[u8]); 4] = [
    ("Zstandard", "zst", &[0x28, 0xb5, 0x2f, 0xfd]),
    ("bzip2", "bz2", b"BZh91AY&SY"),
    ("ZIP", "zip", b"PK\x03\x04"),
    ("xz", "xz", &[0xfd, b'7', b'z', b'X', b'Z', 0]),
];

pub(super) fn compressed(path: &Path, how: &str) -> PrepareError {
    let problem =
        format!("it is compressed with {how}, and only gzip is read; decompress it, or compress it with gzip (.gz)");
    PrepareError::unreadable(path, problem)
}

/// A text file, decompressed, without byte-order mark.
pub(super) struct Source {
    pub(super) reader: Box<dyn BufRead + Send>,
    consumed: Arc<AtomicU64>,
    reported: u64,
}

struct Counting {
    file: File,
    consumed: Arc<AtomicU64>,
}

impl Read for Counting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.consumed.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

impl Source {
    /// Opens a file; compression is recognised by its first bytes.
    pub(super) fn open(path: &Path) -> Result<Self, PrepareError> {
        let consumed = Arc::new(AtomicU64::new(0));
        let file = File::open(path).map_err(PrepareError::io(path))?;
        let mut raw = BufReader::with_capacity(PIECE, Counting { file, consumed: consumed.clone() });
        let start = raw.fill_buf().map_err(PrepareError::io(path))?;
        let gzip = start.starts_with(&[0x1f, 0x8b]);
        if let Some((name, ..)) = OTHERS.iter().find(|(.., magic)| start.starts_with(magic)) {
            return Err(compressed(path, name));
        }
        if !gzip && path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gz")) {
            return Err(PrepareError::unreadable(
                path,
                "it is named .gz but is no gzip file; rename it or get it again",
            ));
        }
        let mut reader: Box<dyn BufRead + Send> =
            if gzip { Box::new(BufReader::with_capacity(PIECE, MultiGzDecoder::new(raw))) } else { Box::new(raw) };
        if reader.fill_buf().map_err(broken(path))?.starts_with(b"\xef\xbb\xbf") {
            reader.consume(3);
        }
        Ok(Self { reader, consumed, reported: 0 })
    }

    /// Compressed bytes read since the last call.
    pub(super) fn consumed(&mut self) -> u64 {
        progress(&self.consumed, &mut self.reported)
    }

    /// The reader, which ends with an error in a row that is longer than any row is; and what counts its bytes.
    pub(super) fn split(self) -> (Rowwise, Arc<AtomicU64>) {
        (Rowwise { reader: self.reader, row: 0, line: 0, at_start: true, ended: false }, self.consumed)
    }

    /// Reads one line into `line`, without its end; false at the end of the file.
    pub(super) fn line(&mut self, path: &Path, line: &mut Vec<u8>) -> Result<bool, PrepareError> {
        line.clear();
        let read = self.reader.by_ref().take(MAX_LINE).read_until(b'\n', line).map_err(broken(path))?;
        if read as u64 == MAX_LINE && line.last() != Some(&b'\n') {
            return Err(PrepareError::unreadable(path, "a line is longer than 64 MiB; is it one JSON object a line?"));
        }
        while matches!(line.last(), Some(b'\n' | b'\r')) {
            line.pop();
        }
        Ok(read > 0)
    }
}

/// A reader of rows whose ends only the one who reads knows: a quote that is never closed would make the whole file one.
/// Each read ends with a line at the latest, so that the line where a row ended is known; so does the last line of the file,
/// which makes a quote that is open the only reason to read past it.
pub(super) struct Rowwise {
    reader: Box<dyn BufRead + Send>,
    /// Decompressed bytes since the last row began.
    row: u64,
    /// The line, from 1, that the last read was of.
    line: u64,
    /// The next read begins a line.
    at_start: bool,
    /// The reader has asked for more than there is.
    ended: bool,
}

impl Rowwise {
    /// To be called at each row.
    pub(super) fn begin_row(&mut self) {
        self.row = 0;
    }

    /// The line in which the row that was read last ended.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    /// The file has ended; in the midst of a row if one was read.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }
}

impl Read for Rowwise {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let ready = self.reader.fill_buf()?;
        if ready.is_empty() && !self.at_start && !buffer.is_empty() {
            self.at_start = true;
            buffer[0] = b'\n';
            return Ok(1);
        }
        self.ended |= ready.is_empty();
        let most = ready.len().min(buffer.len());
        let end = ready[..most].iter().position(|&byte| byte == b'\n').map(|at| at + 1);
        let read = end.unwrap_or(most);
        buffer[..read].copy_from_slice(&ready[..read]);
        self.reader.consume(read);
        // the end of the file counts as an empty line: a quote may be open there
        self.line += u64::from(self.at_start);
        self.at_start = end.is_some();
        self.row += read as u64;
        if self.row > MAX_LINE {
            return Err(io::Error::other("a row is longer than 64 MiB; is a quote never closed?"));
        }
        Ok(read)
    }
}

/// What `consumed` grew by since `reported`.
pub(super) fn progress(consumed: &AtomicU64, reported: &mut u64) -> u64 {
    let now = consumed.load(Ordering::Relaxed);
    now - std::mem::replace(reported, now)
}

/// The error of a file that breaks off or is not what it looks like.
pub(super) fn broken(path: &Path) -> impl FnOnce(io::Error) -> PrepareError + '_ {
    move |error| PrepareError::unreadable(path, format!("it breaks off or is damaged ({error}); get the file again"))
}
