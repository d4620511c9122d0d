//! How far an export or a recommendation is, for the program that has started it.
//!
//! Input: stages and amounts of [`Progress`]. Output: lines of [`Told`] on stderr, since stdout is for results: counts at the
//! beginning and the end of a stage, and at most every [`INTERVAL`] between.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use learn_dataset::{Progress, Unit};
use learn_domain::told::{INTERVAL, Told};
use learn_telemetry::stdio;

/// Progress in lines, each told by `T`.
pub struct Lines<T> {
    tell: T,
    stage: Mutex<Stage>,
}

struct Stage {
    done: u64,
    /// None: nobody counts it.
    total: Option<u64>,
    told: Instant,
}

impl Lines<fn(&Told)> {
    /// Lines on stderr.
    #[must_use]
    pub fn on_stderr() -> Self {
        Self::new(say)
    }
}

impl<T: Fn(&Told)> Lines<T> {
    fn new(tell: T) -> Self {
        Self { tell, stage: Mutex::new(Stage { done: 0, total: None, told: Instant::now() }) }
    }

    fn count(&self, stage: &mut Stage) {
        stage.told = Instant::now();
        if let Some(total) = stage.total {
            (self.tell)(&Told::Counts { done: stage.done, total });
        }
    }
}

impl<T: Fn(&Told) + Send + Sync> Progress for Lines<T> {
    fn stage(&self, name: &str, total: Option<u64>, _unit: Unit) {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        (self.tell)(&Told::Stage { stage: name.to_owned() });
        (stage.done, stage.total) = (0, total);
        self.count(&mut stage);
    }

    fn advance(&self, amount: u64) {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        stage.done += amount;
        if stage.total == Some(stage.done) || stage.told.elapsed() >= INTERVAL {
            self.count(&mut stage);
        }
    }
}

fn say(told: &Told) {
    // numbers and texts can always be written as JSON
    let _written = serde_json::to_string(told).map(stdio::say);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_told_from_its_beginning_to_its_end() {
        let told = Mutex::new(Vec::new());
        let lines = Lines::new(|line: &Told| told.lock().unwrap().push(line.clone()));
        lines.stage("find users", None, Unit::Rows);
        lines.stage("embed items", Some(3), Unit::Rows);
        lines.advance(1);
        lines.advance(2);
        let told = told.lock().unwrap();
        let stage = |name: &str| Told::Stage { stage: name.into() };
        let begun = [stage("find users"), stage("embed items"), Told::Counts { done: 0, total: 3 }];
        assert_eq!(told[..3], begun);
        assert_eq!(told.last(), Some(&Told::Counts { done: 3, total: 3 }));
    }
}
