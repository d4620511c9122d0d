//! Work of our own on the threads of libtorch's operators.
//!
//! Input: numbered tasks. Output: each has been done once. libtorch's OpenMP threads spin for a while after each operator,
//! so threads of another pool would share the cores with them; here the same team does both.

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::os::unix::Library;

/// `GOMP_parallel` of GCC's OpenMP run-time: runs `body(data)` once on each thread of a team.
type ParallelRegion =
    unsafe extern "C" fn(body: unsafe extern "C" fn(*mut c_void), data: *mut c_void, threads: c_uint, flags: c_uint);

/// What the threads of one [`run_tasks`] share.
struct Shared<'a> {
    next: AtomicUsize,
    tasks: usize,
    task: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Threads of [`run_tasks`].
#[must_use]
pub fn task_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}

/// Does `task(0)` to `task(tasks - 1)`, each once, on as many threads as [`crate::set_threads`] has set.
///
/// # Panics
/// If a task does, with its message; the others are done nevertheless.
pub fn run_tasks(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    let threads = task_threads().min(tasks);
    let region = (threads > 1).then(region).flatten();
    let Some(region) = region else {
        (0..tasks).for_each(task);
        return;
    };
    let shared = Shared { next: AtomicUsize::new(0), tasks, task, panic: Mutex::default() };
    // SAFETY: the symbol has this signature since GCC 4.9 and is part of its ABI. It returns when every thread has returned
    // from `take_tasks`, so `shared` outlives them; it is `Sync`, and is used through a shared reference only.
    unsafe {
        region(take_tasks, std::ptr::from_ref(&shared).cast_mut().cast(), threads as c_uint, 0);
    }
    if let Some(panic) = shared.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

/// The run-time that libtorch is linked with, if it is GCC's.
fn region() -> Option<ParallelRegion> {
    static REGION: OnceLock<Option<ParallelRegion>> = OnceLock::new();
    *REGION.get_or_init(|| {
        // SAFETY: the signature is as documented at its use, and the run-time stays loaded as long as libtorch does.
        let found = unsafe { Library::this().get::<ParallelRegion>(b"GOMP_parallel\0").map(|symbol| *symbol) };
        let slow = |error: &libloading::Error| {
            tracing::warn!(%error, "this libtorch has not GCC's OpenMP, so kernels of our own run on one thread: use PyTorch's wheels");
        };
        found.inspect_err(slow).ok()
    })
}

/// One thread's part: tasks that no other has taken.
unsafe extern "C" fn take_tasks(data: *mut c_void) {
    // SAFETY: `run_tasks` passes a `Shared` that lives until all threads are back.
    let shared = unsafe { &*data.cast::<Shared<'_>>() };
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        if number >= shared.tasks {
            return;
        }
        // a panic must not leave through C
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (shared.task)(number))) {
            shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_brings_gccs_openmp() {
        assert!(region().is_some());
    }

    #[test]
    fn every_task_is_done_once_whatever_the_number_of_threads() {
        let before = tch::get_num_threads();
        for threads in [1, 2, 3] {
            crate::set_threads(threads);
            for tasks in [0, 1, 2, 1000] {
                let done: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                run_tasks(tasks, &|number| {
                    done[number].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    done.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
        tch::set_num_threads(before);
    }

    #[test]
    fn a_panic_of_a_task_comes_back() {
        let outcome = catch_unwind(|| run_tasks(100, &|number| assert_ne!(number, 57, "task 57")));
        let message = outcome.unwrap_err();
        assert!(message.downcast_ref::<String>().unwrap().contains("task 57"));
    }
}
