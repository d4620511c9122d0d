//! Checkpoints that rank 0 has made durable, and the ledger that goes with each.
//!
//! Input: commits, as often as they are told. Output: the ledger as it was after the step, once all ranks have reported it.
//! Invariants: ledgers come in the order of their steps; one that cannot be made is told of once, and holds no later one
//! up.

use learn_domain::ledger::Ledger;
use learn_domain::{Generation, Step, WorkerId};

use super::{BooksError, Job, JobError, planned};

impl Job {
    /// Takes note that rank 0 has made the checkpoint of `step` durable; its ledger comes from
    /// [`Job::complete_commits`].
    ///
    /// # Errors
    /// If the message is stale, not from rank 0, a later checkpoint was committed before, or nobody can be so far.
    pub fn commit(&mut self, worker: WorkerId, generation: Generation, step: Step) -> Result<(), JobError> {
        self.rank_zero(worker, generation)?;
        self.books.may_commit(step)?;
        self.commits.insert(step);
        self.unsaved.job = true;
        Ok(())
    }

    /// The ledger of `step`'s checkpoint is still to come.
    #[must_use]
    pub fn awaits(&self, step: Step) -> bool {
        self.commits.contains(&step)
    }

    /// Ledgers of commits that are complete now, oldest first. When the job stops at once, nobody waits for reports any
    /// more.
    pub fn complete_commits(&mut self) -> Vec<(Step, Ledger)> {
        let mut complete = Vec::new();
        while let Some(&step) = self.commits.first() {
            match self.ledger_after(step) {
                // nor has anybody reported a later one
                Ok(None) => break,
                Ok(Some(ledger)) => {
                    self.last_checkpoint = Some(step);
                    self.unsaved.books = true;
                    complete.push((step, ledger));
                }
                Err(error) => tracing::error!(%step, %error, "the ledger of a checkpoint is lost"),
            }
            self.commits.pop_first();
            self.unsaved.job = true;
        }
        complete
    }

    fn ledger_after(&mut self, step: Step) -> Result<Option<Ledger>, BooksError> {
        let no_more_reports = self.stops_at_once() || self.outcome.is_some();
        let plan = &self.settings.plan;
        if no_more_reports && step > self.books.complete() {
            // it was finished, else there were no checkpoint of it; only the reports have not come
            self.books.settle(step, |step| planned(plan, step))?;
        }
        self.books.commit(step, |step| planned(plan, step))
    }
}
