//! Waiting until sockets are ready: a safe face of `poll(2)`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

pub(super) fn readable(fd: BorrowedFd<'_>) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }
}

pub(super) fn writable(fd: BorrowedFd<'_>) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 }
}

/// An entry that `poll` skips.
pub(super) fn nothing() -> libc::pollfd {
    libc::pollfd { fd: -1, events: 0, revents: 0 }
}

/// Returns when an entry is ready (or has failed) or `until` has passed, and early on a signal; so callers loop.
pub(super) fn wait(entries: &mut [libc::pollfd], until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    // Rounded up, so that a caller does not spin through the last millisecond.
    let millis = i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
    // SAFETY: the pointer and the length describe `entries`, which is borrowed for the call; `poll` only writes `revents`.
    let count = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, millis) };
    match count {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        },
    }
}
