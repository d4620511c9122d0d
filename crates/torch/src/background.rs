//! Threads that must not take time from tensor operations.

use std::time::Duration;

/// Has the calling thread, and no other, give way to whatever else wants to run; whether the system agreed.
///
/// It runs in the gaps that operations leave, and when all processors are busy it gets about a sixtieth of one.
pub fn give_way() -> bool {
    // SAFETY: setpriority touches no memory; on Linux process 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) == 0 }
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
    use std::sync::mpsc::channel;

    use super::*;

    fn niceness() -> i32 {
        // SAFETY: getpriority touches no memory; on Linux process 0 is the calling thread.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    #[test]
    fn only_the_thread_that_asks_gives_way() {
        let before = niceness();
        let other = std::thread::spawn(|| (give_way(), niceness())).join().unwrap();
        assert_eq!((other, niceness()), ((true, 19), before));
    }

    #[test]
    fn processor_time_is_that_of_one_thread_and_not_of_its_waits() {
        let (done, wait) = channel::<()>();
        let waiting = std::thread::spawn(move || {
            let before = processor_time();
            wait.recv().unwrap();
            processor_time() - before
        });
        let before = processor_time();
        while processor_time() < before + Duration::from_millis(20) {}
        done.send(()).unwrap();
        assert!(waiting.join().unwrap() < Duration::from_millis(20));
    }
}
