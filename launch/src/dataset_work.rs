//! Long work of this process on a dataset: how far it is, and how it is ended.
//!
//! Input: stages and amounts of [`learn_dataset::Progress`], from several threads, and requests to stop this process. Output:
//! the command's own progress, and what the work comes to. Invariant: the work ends itself at the first request; a second one
//! does not wait for that.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use learn_domain::report::exit;
use learn_telemetry::stdio;

use crate::output::{Progress, Unit};
use crate::system;

/// Pause between two looks at the requests to stop.
const POLL: Duration = Duration::from_millis(100);

/// Does `work`. Requests to stop are to be caught already; who asks a second time reads `killed`, and this process ends.
pub fn run<T>(progress: Progress, killed: &str, work: impl FnOnce(&dyn learn_dataset::Progress) -> T) -> T {
    let stages = Stages(Mutex::new(progress));
    let (working, ended) = mpsc::channel::<()>();
    let done = std::thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) {
                if system::stop_requests() > 1 {
                    stdio::say(format_args!("learn-launch: {killed}"));
                    std::process::exit(exit::FAILED);
                }
            }
        });
        // dropped however the work ends
        let _working = working;
        work(&stages)
    });
    stages.lock().finish();
    done
}

/// The progress of work in several threads.
struct Stages(Mutex<Progress>);

impl Stages {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl learn_dataset::Progress for Stages {
    fn stage(&self, name: &str, total: Option<u64>, unit: learn_dataset::Unit) {
        let mut progress = self.lock();
        progress.count_in(match unit {
            learn_dataset::Unit::Bytes => Unit::Bytes,
            learn_dataset::Unit::Rows => Unit::Count,
        });
        progress.stage(name, total);
        if total.is_none() {
            // nothing more will be heard of it
            progress.doing(String::new());
        }
    }

    fn advance(&self, amount: u64) {
        self.lock().advance(amount);
    }

    fn stopped(&self) -> bool {
        system::stop_requests() > 0
    }
}
