//! How many steps are prepared ahead: a rule without clocks.
//!
//! Input: how long the training thread waited for a step, how long it worked before, and whether all steps that may be were
//! ready or on their way. Output: how many steps may be. A wait as long as n steps shows that n more in store would have
//! hidden it. Memory goes with the depth, so what was not needed for long is given back.

use std::time::Duration;

/// The depth to begin with, and the least: one step that is ready, one that is being prepared.
const LEAST: u32 = 2;
/// A shorter wait is a thread that wakes up.
const WAKING: Duration = Duration::from_millis(1);
/// So many steps in a row found all of them there before one is given back.
const CALM: u32 = 1000;

/// The depth now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    steps: u32,
    most: u32,
    /// Steps in a row that found as many ready, or on their way, as may be.
    calm: u32,
}

/// How the training thread came by a step.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// For the step.
    pub waited: Duration,
    /// On what was taken before.
    pub worked: Duration,
    /// As many were ready, or on their way, as may be.
    pub full: bool,
}

impl Depth {
    /// `most` at least 1.
    #[must_use]
    pub fn new(most: u32) -> Self {
        Self { steps: LEAST.min(most), most, calm: 0 }
    }

    #[must_use]
    pub fn steps(self) -> u32 {
        self.steps
    }

    /// The depth after a step was taken.
    pub fn after(&mut self, taken: Taken) {
        let Taken { waited, worked, full } = taken;
        self.calm = if full { self.calm + 1 } else { 0 };
        if waited >= WAKING && waited.saturating_mul(100) >= worked {
            let hidden = waited.as_secs_f64() / worked.max(WAKING).as_secs_f64();
            // a float that is too large becomes the largest number
            self.steps = self.steps.saturating_add(hidden.ceil() as u32).min(self.most);
        } else if self.calm == CALM {
            self.calm = 0;
            self.steps = (self.steps - 1).max(LEAST.min(self.most));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(waited_millis: u64, full: bool) -> Taken {
        Taken { waited: Duration::from_millis(waited_millis), worked: Duration::from_millis(100), full }
    }

    fn after(depth: &mut Depth, taken: Taken) -> u32 {
        depth.after(taken);
        depth.steps()
    }

    #[test]
    fn a_wait_asks_for_as_many_steps_as_would_have_hidden_it() {
        let mut depth = Depth::new(8);
        assert_eq!(depth.steps(), 2);
        assert_eq!(after(&mut depth, taken(0, false)), 2, "no wait");
        assert_eq!(after(&mut depth, Taken { worked: Duration::from_secs(1), ..taken(5, false) }), 2, "half a percent");
        assert_eq!(after(&mut depth, taken(5, false)), 3);
        assert_eq!(after(&mut depth, taken(250, false)), 6);
        assert_eq!(after(&mut depth, taken(60_000, false)), 8, "no more than allowed");
        assert_eq!(after(&mut Depth::new(1), taken(250, false)), 1);
        let idle = Taken { waited: Duration::MAX, worked: Duration::ZERO, full: false };
        assert_eq!(after(&mut Depth::new(u32::MAX), idle), u32::MAX);
    }

    #[test]
    fn what_is_not_needed_for_long_is_given_back_one_by_one() {
        let mut depth = Depth::new(8);
        after(&mut depth, taken(100, false));
        after(&mut depth, taken(100, false));
        for expected in [4, 3, 2, 2] {
            assert_eq!(depth.steps(), expected);
            (0..CALM).for_each(|_| depth.after(taken(0, true)));
        }
        let mut depth = Depth::new(8);
        after(&mut depth, taken(100, false));
        for _ in 0..10 {
            (1..CALM).for_each(|_| depth.after(taken(0, true)));
            assert_eq!(after(&mut depth, taken(0, false)), 3, "once in a while it is needed");
        }
    }
}
