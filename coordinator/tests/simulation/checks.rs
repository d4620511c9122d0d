//! What holds at the end of every history, and of every committed checkpoint.

use learn_domain::Step;
use learn_domain::ledger::Ledger;
use learn_domain::membership::{Outcome, StopCause};

use crate::world::World;

impl World {
    pub fn check_ledger(&self, step: Step, ledger: &Ledger) {
        let summary = ledger.summary();
        let planned: u64 = (1..=step.0).map(|step| self.planned(step).1.len() as u64).sum();
        let seen: u64 = summary.epochs.iter().map(|epoch| u64::from(epoch.seen)).sum();
        assert!(summary.exact && seen == planned, "ledger of step {step}: {summary:?}, {planned} planned");
    }

    pub fn check_end(&mut self, outcome: &Outcome) {
        let status = self.job.status(self.time());
        assert!(status.ledger.exact, "{:?}", status.ledger);
        assert!(self.commits.is_empty(), "{:?}", self.commits);
        let lost = self.fired.losses.values().sum::<u64>() > 0;
        assert!(self.weather.faults || *outcome == Outcome::Finished, "nothing disturbed it: {outcome:?}");
        match outcome {
            Outcome::Finished => {
                assert_eq!(self.journal.len() as u64, self.total_steps);
                let epochs = (self.total_steps / self.steps_per_epoch) as usize;
                assert!(status.ledger.epochs.len() == epochs && status.ledger.epochs.iter().all(|epoch| epoch.exact()));
                assert_eq!(self.committed.0, self.total_steps, "the last step has its checkpoint");
                // one of each epoch on valid, one at the end on test
                assert_eq!(status.evaluations.len(), epochs + 1);
            }
            Outcome::Stopped(StopCause::Operator) => {
                assert!(self.fired.operator_stops + self.fired.signals > 0 || self.weather.operator_stop);
            }
            Outcome::Stopped(StopCause::NoProgress { recoveries, .. }) => {
                assert!(self.generation.0 >= u64::from(*recoveries), "each ended a generation");
            }
            Outcome::Stopped(StopCause::Lost(_)) => assert!(lost),
            // newcomers that hold nothing are left, or too few
            Outcome::Stopped(StopCause::Failed { message, .. }) => {
                assert!(lost && message.contains("cannot go on from step"), "{message}");
            }
            Outcome::Stopped(StopCause::JoinDeadline { .. }) => {}
            Outcome::Stopped(cause @ (StopCause::GaveUp { .. } | StopCause::NeverJoined { .. })) => panic!("{cause}"),
        }
    }
}
