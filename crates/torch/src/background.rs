//! Threads that must not take time from tensor operations.

use std::fs;
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

/// Time that the calling thread has been ready to run while others had the processors; zero where the kernel does not
/// count it.
#[must_use]
pub fn queued_time() -> Duration {
    let told = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    // processor time, time in the queue, turns
    let nanoseconds = told.split_whitespace().nth(1).and_then(|field| field.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn niceness() -> i32 {
        // SAFETY: getpriority touches no memory; on Linux process 0 is the calling thread.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    /// The first one that the calling thread may use.
    fn pin_to_one_processor() {
        // SAFETY: both calls are given a set of the size that they are told, which zeros make an empty one
        unsafe {
            let size = size_of::<libc::cpu_set_t>();
            let mut allowed: libc::cpu_set_t = std::mem::zeroed();
            assert_eq!(libc::sched_getaffinity(0, size, &raw mut allowed), 0);
            let first = (0..libc::CPU_SETSIZE as usize).find(|&one| libc::CPU_ISSET(one, &allowed)).unwrap();
            let mut only: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(first, &mut only);
            assert_eq!(libc::sched_setaffinity(0, size, &raw const only), 0);
        }
    }

    #[test]
    fn only_the_thread_that_asks_gives_way() {
        let before = niceness();
        let other = std::thread::spawn(|| (give_way(), niceness())).join().unwrap();
        assert_eq!((other, niceness()), ((true, 19), before));
    }

    /// Two threads that want one processor, as `taskset` would confine them, cannot both have it.
    #[test]
    fn queued_time_is_what_a_thread_waits_for_a_processor() {
        let busy = |until: Duration| {
            pin_to_one_processor();
            let before = queued_time();
            while processor_time() < until {}
            queued_time() - before
        };
        let spend = Duration::from_millis(200);
        let other = std::thread::spawn(move || busy(spend));
        let one = std::thread::spawn(move || busy(spend)).join().unwrap();
        assert!(one + other.join().unwrap() > spend / 4);
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
