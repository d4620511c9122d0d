//! Trying again what a coordinator or data service that is away could not answer.
//!
//! Input: a call, and what its failure says. Output: its first answer, or the failure when it will not pass or patience is
//! over. Pauses grow exponentially and are drawn from the whole range below their bound ("full jitter"), so that the
//! workers of a job do not come back to a restarted coordinator all at once. Invariant: patience counts from the first
//! failure of a call, not from its last answer.

use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use learn_domain::random::Draws;
use learn_proto::connect::may_pass;
use learn_proto::tls::is_refusal;
use tokio::time::Instant;

/// Bound of the pause after the first failure.
const FIRST: Duration = Duration::from_millis(20);
/// Bound of any pause.
const LONGEST: Duration = Duration::from_secs(1);
/// Patience of a worker that was told to end.
const HURRIED: Duration = Duration::from_secs(5);

/// A failure that says whether trying again can help.
pub trait Passing {
    /// The other side was not there or went away; it has not refused.
    fn may_pass(&self) -> bool;
}

impl Passing for tonic::Status {
    fn may_pass(&self) -> bool {
        may_pass(self)
    }
}

impl Passing for tonic::transport::Error {
    /// Nobody listens (yet), unless it is the certificates.
    fn may_pass(&self) -> bool {
        !is_refusal(self)
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// A row of failures of one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outage {
    began: Option<Duration>,
    failures: u32,
}

impl Outage {
    /// A try has failed at `now`: the pause before the next one, or `None` when `patience` is over. `draw` is uniform in
    /// 0..1. The last pause ends when patience does.
    pub fn failed(&mut self, now: Duration, patience: Duration, draw: f64) -> Option<Duration> {
        let left = patience.checked_sub(now.saturating_sub(*self.began.get_or_insert(now)))?;
        if left.is_zero() {
            return None;
        }
        let bound = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures += 1;
        // a pause of nothing would be no pause
        Some(bound.mul_f64(draw).max(Duration::from_millis(1)).min(left))
    }
}

/// How patient the calls of one worker are. Clones share it.
#[derive(Clone, Debug)]
pub struct Patience {
    limit_millis: Arc<AtomicU64>,
    hurried: Arc<AtomicBool>,
}

impl Patience {
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self { limit_millis: Arc::new(AtomicU64::new(millis(limit))), hurried: Arc::default() }
    }

    /// From now on the limit is this one.
    pub fn set(&self, limit: Duration) {
        self.limit_millis.store(millis(limit), Ordering::Relaxed);
    }

    /// The worker was told to end: from now on it waits for nobody for long.
    pub fn hurry(&self) {
        self.hurried.store(true, Ordering::Relaxed);
    }

    /// How long to wait for somebody who is away.
    #[must_use]
    pub fn limit(&self) -> Duration {
        let limit = Duration::from_millis(self.limit_millis.load(Ordering::Relaxed));
        if self.hurried.load(Ordering::Relaxed) { limit.min(HURRIED) } else { limit }
    }

    /// A call that may be tried several times; `what` is for the log.
    #[must_use]
    pub fn trying(&self, what: &'static str) -> Trying {
        // keyed anew by the standard library for every value: other workers draw otherwise
        let draws = Draws::new(&[RandomState::new().hash_one(what)]);
        Trying { patience: self.clone(), what, started: Instant::now(), draws, outage: Outage::default() }
    }

    /// Calls until there is an answer, a failure that will not pass, or no patience left.
    ///
    /// # Errors
    /// The last failure.
    pub async fn answer<T, E, F>(&self, what: &'static str, mut call: impl FnMut() -> F) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
        E: Passing + Display,
    {
        let mut trying = self.trying(what);
        loop {
            match call().await {
                Ok(answer) => {
                    trying.answered();
                    return Ok(answer);
                }
                Err(error) => trying.again(error).await?,
            }
        }
    }
}

/// The tries of one call.
#[derive(Debug)]
pub struct Trying {
    patience: Patience,
    what: &'static str,
    started: Instant,
    draws: Draws,
    outage: Outage,
}

impl Trying {
    /// A try has failed: comes back when it is time for the next one.
    ///
    /// # Errors
    /// The failure, if it will not pass or patience is over.
    pub async fn again<E: Passing + Display>(&mut self, error: E) -> Result<(), E> {
        if !error.may_pass() {
            return Err(error);
        }
        let first = self.outage.failures == 0;
        let draw = self.draws.unit();
        let Some(pause) = self.outage.failed(self.started.elapsed(), self.patience.limit(), draw) else {
            return Err(error);
        };
        if first {
            tracing::warn!(what = self.what, %error, patience = ?self.patience.limit(), "no answer; trying again");
        } else {
            tracing::debug!(what = self.what, %error, ?pause, "no answer; trying again");
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Waits as after a failure, but for as long as it takes.
    pub async fn pause(&mut self) {
        let draw = self.draws.unit();
        if let Some(pause) = self.outage.failed(Duration::ZERO, Duration::MAX, draw) {
            tokio::time::sleep(pause).await;
        }
    }

    /// There was an answer at last.
    pub fn answered(&self) {
        if self.outage.failures > 0 {
            let seconds = self.started.elapsed().as_secs_f64();
            tracing::info!(what = self.what, failures = self.outage.failures, seconds, "answered again");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use proptest::prelude::*;
    use tonic::Status;

    use super::*;

    proptest! {
        #[test]
        fn pauses_stay_below_their_bound_and_end_with_patience(
            patience_millis in 1_u64..120_000,
            draws in proptest::collection::vec(0.0_f64..1.0, 1..400),
            call_millis in 0_u64..3_000,
        ) {
            let patience = Duration::from_millis(patience_millis);
            let (mut outage, mut now) = (Outage::default(), Duration::from_secs(7));
            let began = now;
            for (failure, draw) in draws.into_iter().enumerate() {
                let Some(pause) = outage.failed(now, patience, draw) else {
                    prop_assert!(now - began >= patience, "it gave up early");
                    return Ok(());
                };
                prop_assert!(pause <= LONGEST && pause <= FIRST * 2_u32.pow(failure.min(10) as u32));
                now += pause;
                prop_assert!(now - began <= patience, "it would wait beyond its patience");
                now += Duration::from_millis(call_millis);
            }
        }
    }

    #[test]
    fn without_patience_there_is_no_second_try() {
        assert_eq!(Outage::default().failed(Duration::ZERO, Duration::ZERO, 0.5), None);
    }

    async fn count(patience: &Patience, answer: impl Fn(u32) -> Result<u32, Status>) -> (Result<u32, Status>, u32) {
        let calls = AtomicU32::new(0);
        let call = || {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            let answer = answer(call);
            async move { answer }
        };
        (patience.answer("test", call).await, calls.load(Ordering::Relaxed))
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_tried_until_it_is_answered_refused_or_patience_is_over() {
        let patience = Patience::new(Duration::from_secs(60));
        let away = |from: u32| move |call| if call < from { Err(Status::unavailable("away")) } else { Ok(call) };
        assert_eq!(count(&patience, away(9)).await.0.unwrap(), 9);
        let (refused, calls) = count(&patience, |_| Err(Status::not_found("who?"))).await;
        assert_eq!((refused.unwrap_err().code(), calls), (tonic::Code::NotFound, 1));

        let started = Instant::now();
        assert!(count(&patience, away(u32::MAX)).await.0.is_err());
        assert_eq!(started.elapsed().as_secs(), 60);
        patience.hurry();
        let started = Instant::now();
        assert!(count(&patience, away(u32::MAX)).await.0.is_err());
        assert_eq!(started.elapsed().as_secs(), 5, "who has to end does not wait");
    }
}
