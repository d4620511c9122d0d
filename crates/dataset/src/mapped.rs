//! Files as memory: the one place of this crate with `unsafe`.
//!
//! Why here: a dataset is read by every worker of a host at once, and only a memory map shares its pages between
//! processes and with the page cache. Mapping is `unsafe` because someone else could change the file underneath.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use arrow_buffer::Buffer;
use memmap2::Mmap;

/// Maps a file read-only; it stays mapped as long as a slice of the buffer lives.
///
/// # Errors
/// When the file cannot be opened or mapped.
pub(crate) fn map(path: &Path) -> io::Result<Buffer> {
    let file = File::open(path)?;
    // SAFETY: the map is private to readers, and this program never writes into a dataset file: it writes aside and
    // renames, which leaves the mapped inode as it was. Should another program truncate the file, the operating
    // system ends the process (SIGBUS) instead of handing out other memory. Contents are validated by the callers.
    let map = unsafe { Mmap::map(&file) }?;
    Ok(Buffer::from(bytes::Bytes::from_owner(map)))
}
