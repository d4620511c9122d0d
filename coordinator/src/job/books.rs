//! Step reports become ledger entries: once, complete and in the order of steps.
//!
//! Input: what each rank says it has trained. Output: the ledger now, and the ledger as it was after any step since the
//! last checkpoint (a checkpoint of step `s` is committed when later steps have already been reported, and a resume
//! replays those). Invariants: a repeated report changes nothing; a step is entered when all its ranks have reported, or
//! when a new generation goes on behind it: then the plan says whose users it had, because one rank can only have finished
//! a step whose gradient holds the shares of all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use learn_domain::ledger::{Ledger, LedgerSummary};
use learn_domain::{Rank, Step, UserIndex};

/// A rank cannot be this many steps ahead of another: every step ends with a collective operation.
const MAX_OPEN_STEPS: u64 = 4096;

/// One rank's part of a step.
#[derive(Clone, Debug)]
pub struct Entry {
    pub rank: Rank,
    /// Finished steps, this one included.
    pub step: Step,
    pub epoch: u32,
    pub users: Vec<UserIndex>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BooksError {
    #[error("step {step} is far ahead of step {complete}, the last one that all ranks have reported")]
    TooFarAhead { step: Step, complete: Step },
    #[error("rank {rank} says that step {step} belongs to epoch {theirs}; another rank said {ours}")]
    Epoch { rank: Rank, step: Step, theirs: u32, ours: u32 },
    #[error(
        "a generation cannot go on from step {step}: all ranks have reported step {complete}, and nobody who holds it is \
         left; `learn-launch resume` continues from the last checkpoint"
    )]
    Behind { step: Step, complete: Step },
    #[error("a checkpoint of step {step} is older than the last committed one, of step {committed}")]
    OldCheckpoint { step: Step, committed: Step },
}

#[derive(Debug, Default)]
struct Open {
    epoch: u32,
    ranks: BTreeSet<Rank>,
    users: Vec<UserIndex>,
}

#[derive(Debug)]
pub struct Books {
    world_size: u32,
    committed: Ledger,
    committed_step: Step,
    /// Complete steps after `committed_step`, in order.
    since: VecDeque<(u32, Vec<UserIndex>)>,
    current: Ledger,
    /// Steps that some rank has not reported yet.
    open: BTreeMap<Step, Open>,
    /// Ranks that report no more.
    gone: BTreeSet<Rank>,
}

impl Books {
    /// Goes on from `ledger`, as it was after `step`; nobody reports before [`Books::form`].
    #[must_use]
    pub fn new(step: Step, ledger: Ledger) -> Self {
        Self {
            world_size: u32::MAX,
            committed: ledger.clone(),
            committed_step: step,
            since: VecDeque::new(),
            current: ledger,
            open: BTreeMap::new(),
            gone: BTreeSet::new(),
        }
    }

    /// A generation of `world_size` ranks reports from now on.
    pub fn form(&mut self, world_size: u32) {
        self.world_size = world_size;
        self.gone.clear();
        // nobody of it reports before [`Books::settle`] has closed the steps of the one before
        for open in self.open.values_mut() {
            open.ranks.clear();
        }
    }

    /// The generation goes on from `step`: steps up to it are entered with the epoch and the users that `planned` gives,
    /// and what was reported of later ones (by ranks that are lost) is forgotten, for they will be trained again.
    ///
    /// # Errors
    /// If all ranks had already reported a later step, or the step is further on than anybody can be.
    pub fn settle(&mut self, step: Step, planned: impl Fn(Step) -> (u32, Vec<UserIndex>)) -> Result<(), BooksError> {
        let complete = self.complete();
        if step < complete {
            return Err(BooksError::Behind { step, complete });
        }
        if step.0 - complete.0 > MAX_OPEN_STEPS {
            return Err(BooksError::TooFarAhead { step, complete });
        }
        self.open.clear();
        for step in complete.0 + 1..=step.0 {
            let (epoch, users) = planned(Step(step));
            self.open.insert(Step(step), Open { epoch, users, ..Open::default() });
            self.enter();
        }
        Ok(())
    }

    /// The last step that all ranks have reported.
    #[must_use]
    pub fn complete(&self) -> Step {
        Step(self.committed_step.0 + self.since.len() as u64)
    }

    #[must_use]
    pub fn summary(&self) -> LedgerSummary {
        self.current.summary()
    }

    /// Takes a report; `false` if it is a repeat.
    ///
    /// # Errors
    /// If the report cannot belong to this job's steps.
    pub fn report(&mut self, entry: Entry) -> Result<bool, BooksError> {
        let Entry { rank, step, epoch, users } = entry;
        let complete = self.complete();
        if step <= complete {
            return Ok(false);
        }
        if step.0 - complete.0 > MAX_OPEN_STEPS {
            return Err(BooksError::TooFarAhead { step, complete });
        }
        let open = self.open.entry(step).or_insert_with(|| Open { epoch, ..Open::default() });
        if open.epoch != epoch {
            return Err(BooksError::Epoch { rank, step, theirs: epoch, ours: open.epoch });
        }
        if !open.ranks.insert(rank) {
            return Ok(false);
        }
        open.users.extend(users);
        self.enter_complete();
        Ok(true)
    }

    /// A rank has left: nothing waits for its reports.
    pub fn leave(&mut self, rank: Rank) {
        self.gone.insert(rank);
        self.enter_complete();
    }

    fn enter_complete(&mut self) {
        let all = self.world_size as usize;
        while self.open.get(&self.next()).is_some_and(|open| open.ranks.union(&self.gone).count() >= all) {
            self.enter();
        }
    }

    /// The ledger as it was after `step`; `None` while a rank's report is missing.
    ///
    /// # Errors
    /// If a later one was already asked for.
    pub fn commit(&mut self, step: Step) -> Result<Option<Ledger>, BooksError> {
        if step < self.committed_step {
            return Err(BooksError::OldCheckpoint { step, committed: self.committed_step });
        }
        if step > self.complete() {
            return Ok(None);
        }
        for (epoch, users) in self.since.drain(..(step.0 - self.committed_step.0) as usize) {
            self.committed.record(epoch, &users);
        }
        self.committed_step = step;
        Ok(Some(self.committed.clone()))
    }

    fn next(&self) -> Step {
        Step(self.complete().0 + 1)
    }

    fn enter(&mut self) {
        let open = self.open.remove(&self.next()).unwrap_or_default();
        self.current.record(open.epoch, &open.users);
        self.since.push_back((open.epoch, open.users));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn books() -> Books {
        let mut books = Books::new(Step(0), Ledger::new(8, 100));
        books.form(2);
        books
    }

    fn entry(rank: u32, step: u64, epoch: u32, users: &[u32]) -> Entry {
        Entry { rank: Rank(rank), step: Step(step), epoch, users: users.iter().copied().map(UserIndex).collect() }
    }

    #[test]
    fn a_step_counts_when_all_ranks_have_reported_and_once() {
        let mut books = books();
        assert!(books.report(entry(0, 1, 0, &[0, 1])).unwrap());
        assert!(!books.report(entry(0, 1, 0, &[0, 1])).unwrap());
        assert_eq!(books.summary().epochs, []);
        assert!(books.report(entry(1, 1, 0, &[2, 3])).unwrap());
        assert!(!books.report(entry(1, 1, 0, &[2, 3])).unwrap());
        assert_eq!((books.complete(), books.summary().epochs[0].seen), (Step(1), 4));
        assert!(books.summary().exact);
    }

    #[test]
    fn a_rank_that_is_ahead_does_not_close_the_epoch_of_the_others() {
        let mut books = books();
        books.report(entry(0, 1, 0, &[0, 1, 2, 3])).unwrap();
        books.report(entry(0, 2, 1, &[4])).unwrap();
        books.report(entry(1, 1, 0, &[4, 5, 6, 7])).unwrap();
        books.report(entry(1, 2, 1, &[5])).unwrap();
        let summary = books.summary();
        assert!(summary.exact && summary.epochs.len() == 2, "{summary:?}");
    }

    #[test]
    fn a_checkpoint_gets_the_ledger_of_its_step_not_of_now() {
        let mut books = books();
        assert_eq!(books.commit(Step(1)).unwrap(), None);
        for step in 1..=3 {
            for rank in 0..2 {
                books.report(entry(rank, step, 0, &[2 * (step as u32 - 1) + rank])).unwrap();
            }
        }
        let at_two = books.commit(Step(2)).unwrap().unwrap();
        assert_eq!(at_two.summary().epochs[0].seen, 4);
        assert_eq!(books.summary().epochs[0].seen, 6);
        assert_eq!(books.commit(Step(2)).unwrap().unwrap(), at_two, "a retry gets the same");
        assert!(matches!(books.commit(Step(1)), Err(BooksError::OldCheckpoint { .. })));
        let mut resumed = Books::new(Step(2), at_two);
        resumed.form(1);
        resumed.report(entry(0, 3, 0, &[4, 5, 6, 7])).unwrap();
        assert!(resumed.summary().exact && resumed.summary().epochs[0].exact());
    }

    #[test]
    fn a_rank_that_has_left_holds_nothing_up() {
        let mut books = books();
        books.report(entry(0, 1, 0, &[0])).unwrap();
        books.leave(Rank(1));
        assert_eq!(books.complete(), Step(1));
        books.report(entry(0, 2, 0, &[1])).unwrap();
        assert_eq!((books.complete(), books.summary().epochs[0].seen), (Step(2), 2));
    }

    #[test]
    fn a_new_generation_goes_on_behind_the_step_that_a_survivor_finished() {
        let planned = |step: Step| (0, (0..2).map(|user| UserIndex(2 * (step.0 as u32 - 1) + user)).collect());
        let mut books = books();
        for rank in 0..2 {
            books.report(entry(rank, 1, 0, &[rank])).unwrap();
        }
        // rank 0 has finished step 2 and reported step 3, too; only rank 1, which has step 2, survives
        books.report(entry(0, 2, 0, &[2])).unwrap();
        books.report(entry(0, 3, 0, &[4])).unwrap();
        books.form(1);
        books.settle(Step(2), planned).unwrap();
        assert_eq!((books.complete(), books.summary().epochs[0].seen), (Step(2), 4));
        assert!(books.report(entry(0, 3, 0, &[4, 5])).unwrap(), "step 3 is trained again");
        let summary = books.summary();
        assert!(summary.exact && summary.epochs[0].seen == 6, "{summary:?}");
        assert_eq!(books.settle(Step(2), planned), Err(BooksError::Behind { step: Step(2), complete: Step(3) }));
    }

    #[test]
    fn nonsense_is_refused() {
        let mut books = books();
        books.report(entry(0, 1, 0, &[])).unwrap();
        assert!(matches!(books.report(entry(1, 1, 1, &[])), Err(BooksError::Epoch { .. })));
        assert!(matches!(books.report(entry(1, 9000, 1, &[])), Err(BooksError::TooFarAhead { .. })));
        let settled = books.settle(Step(u64::MAX), |_| (0, Vec::new()));
        assert!(matches!(settled, Err(BooksError::TooFarAhead { .. })));
    }
}
