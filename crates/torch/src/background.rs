//! Threads that must not take time from tensor operations.

/// Has the calling thread, and no other, give way to whatever else wants to run; whether the system agreed.
///
/// It runs in the gaps that operations leave, and when all processors are busy it gets about a sixtieth of one.
pub fn give_way() -> bool {
    // SAFETY: setpriority touches no memory; on Linux process 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) == 0 }
}

#[cfg(test)]
mod tests {
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
}
