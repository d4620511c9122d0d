//! The few calls into the operating system that the standard library does not offer.
//!
//! The only `unsafe` of `learn-launch`: each block is one libc call over plain values.

#![allow(
    unsafe_code,
    reason = "prctl, kill, poll, sigaction, statvfs, getrlimit, setrlimit and wait4 have no safe form in std"
)]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};

pub use learn_telemetry::host::name as host_name;

static STOP_REQUESTS: AtomicUsize = AtomicUsize::new(0);

/// 1 once a scheduler has given notice.
static NOTICE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn take_notice(_signal: libc::c_int) {
    NOTICE.store(1, Ordering::Relaxed);
}

extern "C" fn count_stop_request(_signal: libc::c_int) {
    STOP_REQUESTS.fetch_add(1, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP are counted instead of ending this process, and SIGUSR1, by which a scheduler
/// gives notice before it ends a job, asks once: what follows it is the first request, not a second one. SIGHUP stays ignored
/// where it is: `nohup` asks for that.
pub fn catch_stop_signals() {
    let handler = |signal| if signal == libc::SIGUSR1 { take_notice } else { count_stop_request };
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1] {
        // SAFETY: a handler only sets an atomic, which is async-signal-safe; an all-zero sigaction is a valid one.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handler(signal) as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            let mut before: libc::sigaction = MaybeUninit::zeroed().assume_init();
            libc::sigaction(signal, &raw const action, &raw mut before);
            if signal == libc::SIGHUP && before.sa_sigaction == libc::SIG_IGN {
                libc::sigaction(signal, &raw const before, std::ptr::null_mut());
            }
        }
    }
}

/// How often somebody has asked this process to stop since [`catch_stop_signals`].
#[must_use]
pub fn stop_requests() -> usize {
    STOP_REQUESTS.load(Ordering::Relaxed).max(NOTICE.load(Ordering::Relaxed))
}

/// A scheduler has given notice since [`catch_stop_signals`].
#[must_use]
pub fn was_noticed() -> bool {
    NOTICE.load(Ordering::Relaxed) > 0
}

/// Somebody has asked to stop since [`catch_stop_signals`], a notice apart.
#[must_use]
pub fn was_asked_to_stop() -> bool {
    STOP_REQUESTS.load(Ordering::Relaxed) > 0
}

/// A request to another process to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// SIGTERM: finish what must be finished.
    Gracefully,
    /// SIGUSR1: as a scheduler gives notice; for those that take SIGTERM for an order to kill.
    Notice,
    /// SIGKILL.
    AtOnce,
}

impl End {
    fn signal(self) -> libc::c_int {
        match self {
            Self::Gracefully => libc::SIGTERM,
            Self::Notice => libc::SIGUSR1,
            Self::AtOnce => libc::SIGKILL,
        }
    }
}

/// Asks a process to end. A process that is already gone is no error.
pub fn end(pid: u32, how: End) {
    let signal = how.signal();
    if let Ok(pid) = libc::pid_t::try_from(pid) {
        // SAFETY: kill takes plain integers; the pid is positive, so exactly one process is meant.
        unsafe { libc::kill(pid, signal) };
    }
}

/// What a process and those that it waited for have used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Used {
    pub processor_seconds: f64,
    /// Of the largest of them.
    pub peak_memory_bytes: u64,
}

/// Waits for a child, which nobody else may wait for.
///
/// # Errors
/// It is none any more.
pub fn wait(child: &Child) -> io::Result<(ExitStatus, Used)> {
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    let (mut status, mut used) = (0, MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both places are valid for as long as the call takes; an all-zero rusage is a valid one.
    let used = unsafe {
        while libc::wait4(pid, &raw mut status, 0, used.as_mut_ptr()) != pid {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        used.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + 1e-6 * time.tv_usec as f64;
    let processor_seconds = seconds(used.ru_utime) + seconds(used.ru_stime);
    let peak_memory_bytes = 1024 * u64::try_from(used.ru_maxrss).unwrap_or_default();
    Ok((ExitStatus::from_raw(status), Used { processor_seconds, peak_memory_bytes }))
}

/// Returns when the terminal that is stdin has gone; whoever reads from it then waits for keys for ever.
pub fn wait_for_hangup() {
    let mut stdin = libc::pollfd { fd: libc::STDIN_FILENO, events: 0, revents: 0 };
    // SAFETY: the one pollfd is a valid one for as long as the call takes.
    while unsafe { libc::poll(&raw mut stdin, 1, -1) } < 0 {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// The child gets SIGTERM when this process ends, however it ends, and does not start if that has already happened.
///
/// Linux sends the signal when the *thread* that started the child ends: start children from the main thread.
pub fn end_with_parent(command: &mut Command) {
    tie_to_parent(command, End::Gracefully);
}

/// As [`end_with_parent`], with the signal of `how`.
pub fn tie_to_parent(command: &mut Command, how: End) {
    let signal = how.signal();
    let parent = std::process::id();
    // SAFETY: between fork and exec only prctl and getppid run, both async-signal-safe; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal) != 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid().unsigned_abs() != parent {
                return Err(io::Error::from_raw_os_error(libc::ECHILD));
            }
            Ok(())
        });
    }
}

/// Bytes that this user may still write on the file system of `path`.
///
/// # Errors
/// The path does not exist or cannot be asked about.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut facts = MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the path ends in NUL and lives through the call; `facts` is large enough and read only on success.
    let facts = unsafe {
        if libc::statvfs(path.as_ptr(), facts.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        facts.assume_init()
    };
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// How many files a process may hold open (soft limit).
#[must_use]
pub fn open_file_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    let answer = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    (answer == 0).then_some(limit.rlim_cur)
}

/// Lets this process, and those that it starts, hold `files` open.
///
/// # Errors
/// The hard limit is lower.
pub fn raise_open_file_limit(files: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer, and then a valid value.
    let answer = unsafe {
        let answer = libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        if answer != 0 || limit.rlim_cur >= files {
            answer
        } else {
            limit.rlim_cur = files;
            limit.rlim_max = limit.rlim_max.max(files);
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
        }
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// For a test that counts signals, which all tests of a process share: nobody else does meanwhile, and nothing was counted.
    pub(crate) fn count_alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        // one that has failed has counted all the same
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        catch_stop_signals();
        STOP_REQUESTS.store(0, Ordering::Relaxed);
        NOTICE.store(0, Ordering::Relaxed);
        alone
    }

    #[test]
    fn facts_about_this_machine_make_sense() {
        assert!(free_bytes(Path::new("/")).is_ok());
        assert!(free_bytes(Path::new("/no/such/place")).is_err());
        assert!(open_file_limit().is_some_and(|limit| limit > 0));
    }

    #[test]
    fn a_stop_request_is_counted_instead_of_obeyed() {
        let _alone = count_alone();
        let notice = || {
            // SAFETY: raise takes a plain integer; the handler is set.
            unsafe { libc::raise(libc::SIGUSR1) };
        };
        notice();
        assert_eq!(stop_requests(), 1, "a notice asks");
        for wanted in [1, 2] {
            let seen = STOP_REQUESTS.load(Ordering::Relaxed);
            end(std::process::id(), End::Gracefully);
            while STOP_REQUESTS.load(Ordering::Relaxed) == seen {
                std::thread::yield_now();
            }
            assert_eq!(stop_requests(), wanted, "what follows a notice is the first request");
        }
        notice();
        assert_eq!(stop_requests(), 2, "and a notice after a request changes nothing");
    }
}
