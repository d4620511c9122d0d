//! Threads that must not take time from tensor operations.

use std::time::Duration;

/// Has the calling thread, and no other, give way to whatever else wants to run; whether the system agreed.
///
/// It runs in the gaps that operations leave, and when all processors are busy it gets about a three-hundredth of one.
/// Nothing that others wait for should be done by such a thread.
pub fn give_way() -> bool {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: a structure of numbers, for which 0 is valid
        let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
        // SAFETY: the call reads the structure; on Linux process 0 is the calling thread
        unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    {
        false
    }
}

/// Processor time that the calling thread has taken.
#[must_use]
pub fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the structure
    let told = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    // a clock that is not there has told nothing
    if told == 0 {
        Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
    } else {
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> i32 {
        // SAFETY: the call touches no memory; on Linux process 0 is the calling thread
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn only_the_thread_that_asks_gives_way() {
        let before = policy();
        let other = std::thread::spawn(|| (give_way(), policy())).join().unwrap();
        assert_eq!((other, policy()), ((true, libc::SCHED_IDLE), before));
    }

    #[test]
    fn sleeping_takes_no_processor_time() {
        let (before, started) = (processor_time(), std::time::Instant::now());
        std::thread::sleep(Duration::from_millis(50));
        let slept = processor_time() - before;
        while started.elapsed() < Duration::from_millis(100) {}
        assert!(slept < Duration::from_millis(50) && processor_time() > before + slept);
    }
}
