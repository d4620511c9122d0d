//! When a request that failed for a passing reason is sent again.
//!
//! Input: how often it has failed, how long it has been tried, what the server asked for. Output: the pause, or none when
//! patience is at its end. Pure.

use std::time::Duration;

/// Pause after the first failure; it doubles with each further one.
const FIRST: Duration = Duration::from_millis(250);
/// Longest pause that nobody asked for.
const LONGEST: Duration = Duration::from_secs(30);

/// A request that has failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    /// Failures in a row, this one included.
    pub failures: u32,
    /// Time since the first attempt.
    pub tried: Duration,
    /// The pause that the server asked for.
    pub asked: Option<Duration>,
}

impl Failed {
    /// How long to wait before the next attempt. `spread` in (0, 1) keeps requests that failed together from coming back
    /// together; what the server asked for is never undercut.
    #[must_use]
    pub fn pause(&self, patience: Duration, spread: f64) -> Option<Duration> {
        let factor = 1_u32.checked_shl(self.failures.saturating_sub(1)).unwrap_or(u32::MAX);
        let doubled = FIRST.saturating_mul(factor).min(LONGEST);
        let pause = doubled.mul_f64(0.5 + spread / 2.0).max(self.asked.unwrap_or_default());
        self.tried.checked_add(pause).is_some_and(|end| end <= patience).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pause(
        failures: u32,
        tried: Duration,
        patience: Duration,
        asked: Option<Duration>,
        spread: f64,
    ) -> Option<Duration> {
        Failed { failures, tried, asked }.pause(patience, spread)
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn pauses_double_up_to_a_limit() {
        let full = |failures| pause(failures, Duration::ZERO, HOUR, None, 1.0).unwrap();
        assert_eq!([1, 2, 3].map(full), [250, 500, 1000].map(Duration::from_millis));
        assert_eq!([9, 33, u32::MAX].map(full), [LONGEST; 3]);
    }

    #[test]
    fn what_the_server_asks_for_is_kept() {
        let asked = Duration::from_secs(90);
        assert_eq!(pause(1, Duration::ZERO, HOUR, Some(asked), 0.5), Some(asked));
        assert_eq!(pause(1, Duration::ZERO, Duration::from_secs(60), Some(asked), 0.5), None);
        assert_eq!(pause(1, FIRST, HOUR, Some(Duration::MAX), 0.5), None);
        assert!(pause(1, Duration::ZERO, HOUR, Some(Duration::ZERO), 0.5).unwrap() >= FIRST / 2);
    }

    proptest! {
        #[test]
        fn patience_ends_every_series(patience in 0_u64..2000, spread in 0.0..1.0_f64) {
            let patience = Duration::from_secs(patience);
            let (mut tried, mut failures) = (Duration::ZERO, 0);
            loop {
                failures += 1;
                let Some(wait) = pause(failures, tried, patience, None, spread) else { break };
                prop_assert!(wait >= FIRST / 2 && wait <= LONGEST);
                tried += wait;
                prop_assert!(tried <= patience);
            }
        }
    }
}
