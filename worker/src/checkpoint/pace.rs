//! How a checkpoint is written beside a training.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tch::Device;

/// What a write may cost the training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// As little as possible of the processors, which the training needs: past the page cache, with rests between the pieces.
    Sparing(Rests),
    /// Whatever makes it durable soon.
    Plain,
}

/// The rests of a write that nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rests {
    /// What the write takes of one processor.
    pub share: f64,
    /// No more rests once it has lasted so long: until it is durable, what it saves can be lost.
    pub at_most: Duration,
}

impl Pace {
    /// Beside a training on this device.
    #[must_use]
    pub fn beside(device: Device) -> Self {
        match device {
            Device::Cpu => Self::Sparing(Rests { share: 0.005, at_most: Duration::from_secs(30) }),
            _ => Self::Plain,
        }
    }
}

impl Rests {
    /// The rest after a piece that took `processor` of the time `piece`, when the write had lasted `before` it.
    pub(super) fn after(self, processor: Duration, piece: Duration, before: Duration) -> Duration {
        let wanted = processor.div_f64(self.share).saturating_sub(piece);
        wanted.min(self.at_most.saturating_sub(before + piece))
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
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_rest_makes_up_for_what_the_piece_took() {
        let rests = Rests { share: 0.005, at_most: 1000 * MOMENT };
        assert_eq!(rests.after(MOMENT, MOMENT, Duration::ZERO), 199 * MOMENT);
        assert_eq!(rests.after(MOMENT, 150 * MOMENT, 400 * MOMENT), 50 * MOMENT, "the disk took its time");
        assert_eq!(rests.after(MOMENT, 300 * MOMENT, 400 * MOMENT), Duration::ZERO);
        assert_eq!(rests.after(MOMENT, MOMENT, 899 * MOMENT), 100 * MOMENT, "what is left for rests");
        assert_eq!(rests.after(MOMENT, MOMENT, 1001 * MOMENT), Duration::ZERO);
    }

    #[test]
    fn nobody_is_kept_waiting_by_a_rest() {
        let demand = Arc::new(Demand::default());
        let waits: [fn(&Demand, bool); 2] = [Demand::training_waits, |demand, waits| match waits {
            true => demand.snapshot_waits(),
            false => demand.snapshot_is_taken(),
        }];
        for waits in waits {
            let (rested, end) = channel();
            std::thread::spawn({
                let demand = demand.clone();
                move || {
                    demand.rest(10 * LONG);
                    rested.send(())
                }
            });
            assert!(end.recv_timeout(MOMENT).is_err(), "nobody waits yet");
            waits(&demand, true);
            end.recv_timeout(LONG).expect("the rest ends when somebody waits");
            demand.rest(10 * LONG);
            waits(&demand, false);
            let started = Instant::now();
            demand.rest(MOMENT);
            assert!(started.elapsed() >= MOMENT, "nobody waits any more");
        }
    }
}
