//! How fast a checkpoint is written beside a training.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tch::Device;

/// What the writer may take of the time of a training that needs every processor: it rests between pieces so that it takes
/// no more than this part of one processor.
const SHARE: f64 = 0.005;

/// Whether the writer rests between pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// While nobody waits for it.
    Resting,
    /// Never: as fast as the disk is.
    Full,
}

impl Pace {
    /// Beside a training on this device.
    #[must_use]
    pub fn beside(device: Device) -> Self {
        if device.is_cuda() { Self::Full } else { Self::Resting }
    }

    /// The rest after a piece that took `processor` of the time `elapsed`.
    pub(super) fn rest(self, processor: Duration, elapsed: Duration) -> Duration {
        match self {
            Self::Resting => processor.div_f64(SHARE).saturating_sub(elapsed),
            Self::Full => Duration::ZERO,
        }
    }
}

/// Who waits for the writer.
#[derive(Debug, Default)]
pub(super) struct Demand {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Snapshots behind the one that is written.
    snapshots: usize,
    /// Whether the training thread does.
    training: bool,
}

impl Demand {
    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    pub(super) fn snapshot_waits(&self) {
        self.change(|waiting| waiting.snapshots += 1);
    }

    pub(super) fn snapshot_is_taken(&self) {
        self.change(|waiting| waiting.snapshots -= 1);
    }

    pub(super) fn training_waits(&self, waits: bool) {
        self.change(|waiting| waiting.training = waits);
    }

    /// Rests so long, or until somebody waits.
    pub(super) fn rest(&self, duration: Duration) {
        let nobody = |waiting: &mut Waiting| waiting.snapshots == 0 && !waiting.training;
        drop(self.changed.wait_timeout_while(self.state(), duration, nobody));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);
    const ETERNITY: Duration = Duration::from_secs(1 << 30);

    #[test]
    fn a_rest_makes_up_for_what_the_piece_took() {
        assert_eq!(Pace::Resting.rest(MOMENT, MOMENT), 199 * MOMENT);
        assert_eq!(Pace::Resting.rest(MOMENT, 150 * MOMENT), 50 * MOMENT, "the disk took its time");
        assert_eq!(Pace::Resting.rest(MOMENT, 300 * MOMENT), Duration::ZERO);
        assert_eq!(Pace::Full.rest(MOMENT, MOMENT), Duration::ZERO);
    }

    #[test]
    fn nobody_is_kept_waiting_by_a_rest() {
        let demand = Arc::new(Demand::default());
        let waits: [fn(&Demand, bool); 2] = [Demand::training_waits, |demand, waits| match waits {
            true => demand.snapshot_waits(),
            false => demand.snapshot_is_taken(),
        }];
        for waits in waits {
            let resting = std::thread::spawn({
                let demand = demand.clone();
                move || demand.rest(ETERNITY)
            });
            waits(&demand, true);
            resting.join().unwrap();
            demand.rest(ETERNITY);
            waits(&demand, false);
        }
    }
}
