//! Step reports become ledger entries: once, complete and in the order of steps.
//!
//! Input: what each rank says it has trained. Output: the ledger now, and the ledger as it was after any step since the
//! last checkpoint (a checkpoint of step `s` is committed when later steps have already been reported, and a resume
//! replays those). Invariants: a repeated report changes nothing; a step is entered when all its ranks have reported, or
//! when a new generation goes on behind it: then the plan says whose users it had, because one rank can only have finished
//! a step whose gradient holds the shares of all. The serialized books and the [`Change`]s after them give the same books
//! again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use learn_domain::ledger::{Fault, Ledger, LedgerSummary};
use learn_domain::{Rank, Step, UserIndex};
use serde::{Deserialize, Serialize};

/// A rank cannot be this many steps ahead of another: every step ends with a collective operation.
const MAX_OPEN_STEPS: u64 = 4096;

/// One rank's part of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// What has been entered, to be entered again by a coordinator that takes over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    Formed(u32),
    Settled(Step),
    Reported(Entry),
    Left(Rank),
}

impl Change {
    /// About how much room it takes, in users.
    pub fn weight(&self) -> usize {
        match self {
            Self::Reported(entry) => entry.users.len() + 16,
            Self::Formed(_) | Self::Settled(_) | Self::Left(_) => 16,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Open {
    epoch: u32,
    ranks: BTreeSet<Rank>,
    users: Vec<UserIndex>,
}

/// Epoch and users of a step by the plan.
pub trait Planned: Fn(Step) -> (u32, Vec<UserIndex>) {}

impl<T: Fn(Step) -> (u32, Vec<UserIndex>)> Planned for T {}

/// A step that all ranks have reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Complete {
    /// Its users are those of the plan, which can name them again: they need no room here.
    AsPlanned,
    Otherwise {
        epoch: u32,
        users: Vec<UserIndex>,
    },
}

impl Complete {
    fn new(step: Step, (epoch, users): (u32, Vec<UserIndex>), planned: &impl Planned) -> Self {
        let sorted = |mut users: Vec<UserIndex>| {
            users.sort_unstable();
            users
        };
        let (planned_epoch, planned_users) = planned(step);
        if epoch == planned_epoch
            && users.len() == planned_users.len()
            && sorted(users.clone()) == sorted(planned_users)
        {
            Self::AsPlanned
        } else {
            Self::Otherwise { epoch, users }
        }
    }

    fn record(&self, ledger: &mut Ledger, step: Step, planned: &impl Planned) {
        match self {
            Self::AsPlanned => {
                let (epoch, users) = planned(step);
                ledger.record(epoch, &users);
            }
            Self::Otherwise { epoch, users } => ledger.record(*epoch, users),
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Books {
    world_size: u32,
    committed: Ledger,
    committed_step: Step,
    /// Complete steps after `committed_step`, in order.
    since: VecDeque<Complete>,
    /// `committed` and `since` together.
    #[serde(skip)]
    current: Ledger,
    /// Steps that some rank has not reported yet.
    open: BTreeMap<Step, Open>,
    /// Ranks that report no more.
    gone: BTreeSet<Rank>,
    /// Since [`Books::take_changes`].
    #[serde(skip)]
    changes: Vec<Change>,
}

/// Books as they were serialized.
#[derive(Debug, Deserialize)]
pub struct SavedBooks {
    world_size: u32,
    committed: Ledger,
    committed_step: Step,
    since: VecDeque<Complete>,
    open: BTreeMap<Step, Open>,
    gone: BTreeSet<Rank>,
}

impl SavedBooks {
    /// The books again.
    pub fn open(self, planned: impl Planned) -> Books {
        let Self { world_size, committed, committed_step, since, open, gone } = self;
        let mut current = committed.clone();
        for (step, complete) in (committed_step.0 + 1..).zip(&since) {
            complete.record(&mut current, Step(step), &planned);
        }
        Books { world_size, committed, committed_step, since, current, open, gone, changes: Vec::new() }
    }
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
            changes: Vec::new(),
        }
    }

    /// What was entered since the last call.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Enters again what books before these have taken.
    ///
    /// # Errors
    /// If these are other books.
    pub fn replay(&mut self, change: Change, planned: impl Planned) -> Result<(), BooksError> {
        match change {
            Change::Formed(world_size) => self.form(world_size),
            Change::Settled(step) => self.settle(step, planned)?,
            Change::Reported(entry) => drop(self.report(entry, planned)?),
            Change::Left(rank) => self.leave(rank, planned),
        }
        self.changes.clear();
        Ok(())
    }

    /// The last step whose ledger was asked for, and that ledger.
    #[must_use]
    pub fn committed(&self) -> (Step, &Ledger) {
        (self.committed_step, &self.committed)
    }

    /// A generation of `world_size` ranks reports from now on.
    pub fn form(&mut self, world_size: u32) {
        self.changes.push(Change::Formed(world_size));
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
    pub fn settle(&mut self, step: Step, planned: impl Planned) -> Result<(), BooksError> {
        let complete = self.complete();
        if step < complete {
            return Err(BooksError::Behind { step, complete });
        }
        if step.0 - complete.0 > MAX_OPEN_STEPS {
            return Err(BooksError::TooFarAhead { step, complete });
        }
        self.changes.push(Change::Settled(step));
        self.open.clear();
        for step in complete.0 + 1..=step.0 {
            let (epoch, users) = planned(Step(step));
            self.open.insert(Step(step), Open { epoch, users, ..Open::default() });
            self.enter(&planned);
        }
        Ok(())
    }

    /// The last step that all ranks have reported.
    #[must_use]
    pub fn complete(&self) -> Step {
        Step(self.committed_step.0 + self.since.len() as u64)
    }

    /// As [`Ledger::faults`].
    pub fn faults(&self) -> impl Iterator<Item = Fault> {
        self.current.faults()
    }

    #[must_use]
    pub fn summary(&self) -> LedgerSummary {
        self.current.summary()
    }

    /// Takes a report; `false` if it is a repeat.
    ///
    /// # Errors
    /// If the report cannot belong to this job's steps.
    pub fn report(&mut self, entry: Entry, planned: impl Planned) -> Result<bool, BooksError> {
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
        open.users.extend(&users);
        self.changes.push(Change::Reported(Entry { rank, step, epoch, users }));
        self.enter_complete(&planned);
        Ok(true)
    }

    /// A rank has left: nothing waits for its reports.
    pub fn leave(&mut self, rank: Rank, planned: impl Planned) {
        self.changes.push(Change::Left(rank));
        self.gone.insert(rank);
        self.enter_complete(&planned);
    }

    fn enter_complete(&mut self, planned: &impl Planned) {
        let all = self.world_size as usize;
        while self.open.get(&self.next()).is_some_and(|open| open.ranks.union(&self.gone).count() >= all) {
            self.enter(planned);
        }
    }

    /// The ledger after `step` is there, or may come.
    ///
    /// # Errors
    /// If that of a later one was already asked for, or the step is further on than anybody can be.
    pub fn may_commit(&self, step: Step) -> Result<(), BooksError> {
        let complete = self.complete();
        if step < self.committed_step {
            return Err(BooksError::OldCheckpoint { step, committed: self.committed_step });
        }
        if step.0.saturating_sub(complete.0) > MAX_OPEN_STEPS {
            return Err(BooksError::TooFarAhead { step, complete });
        }
        Ok(())
    }

    /// The ledger as it was after `step`; `None` while a rank's report is missing.
    ///
    /// # Errors
    /// As [`Books::may_commit`].
    pub fn commit(&mut self, step: Step, planned: impl Planned) -> Result<Option<Ledger>, BooksError> {
        self.may_commit(step)?;
        if step > self.complete() {
            return Ok(None);
        }
        let complete = self.since.drain(..(step.0 - self.committed_step.0) as usize);
        for (step, complete) in (self.committed_step.0 + 1..).zip(complete) {
            complete.record(&mut self.committed, Step(step), &planned);
        }
        self.committed_step = step;
        Ok(Some(self.committed.clone()))
    }

    fn next(&self) -> Step {
        Step(self.complete().0 + 1)
    }

    fn enter(&mut self, planned: &impl Planned) {
        let step = self.next();
        let open = self.open.remove(&step).unwrap_or_default();
        self.current.record(open.epoch, &open.users);
        self.since.push_back(Complete::new(step, (open.epoch, open.users), planned));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn books() -> Books {
        let mut books = Books::new(Step(0), Ledger::new(8, 100));
        books.form(2);
        books
    }

    /// Of two ranks with one user each.
    fn plan(step: Step) -> (u32, Vec<UserIndex>) {
        ((step.0 / 5) as u32, vec![UserIndex(20 + step.0 as u32), UserIndex(step.0 as u32)])
    }

    fn entry(rank: u32, step: u64, epoch: u32, users: &[u32]) -> Entry {
        Entry { rank: Rank(rank), step: Step(step), epoch, users: users.iter().copied().map(UserIndex).collect() }
    }

    #[test]
    fn a_step_counts_when_all_ranks_have_reported_and_once() {
        let mut books = books();
        assert!(books.report(entry(0, 1, 0, &[0, 1]), plan).unwrap());
        assert!(!books.report(entry(0, 1, 0, &[0, 1]), plan).unwrap());
        assert_eq!(books.summary().epochs, []);
        assert!(books.report(entry(1, 1, 0, &[2, 3]), plan).unwrap());
        assert!(!books.report(entry(1, 1, 0, &[2, 3]), plan).unwrap());
        assert_eq!((books.complete(), books.summary().epochs[0].seen), (Step(1), 4));
        assert!(books.summary().exact);
    }

    #[test]
    fn a_rank_that_is_ahead_does_not_close_the_epoch_of_the_others() {
        let mut books = books();
        books.report(entry(0, 1, 0, &[0, 1, 2, 3]), plan).unwrap();
        books.report(entry(0, 2, 1, &[4]), plan).unwrap();
        books.report(entry(1, 1, 0, &[4, 5, 6, 7]), plan).unwrap();
        books.report(entry(1, 2, 1, &[5]), plan).unwrap();
        let summary = books.summary();
        assert!(summary.exact && summary.epochs.len() == 2, "{summary:?}");
    }

    #[test]
    fn a_checkpoint_gets_the_ledger_of_its_step_not_of_now() {
        let mut books = books();
        assert_eq!(books.commit(Step(1), plan).unwrap(), None);
        for step in 1..=3 {
            for rank in 0..2 {
                books.report(entry(rank, step, 0, &[2 * (step as u32 - 1) + rank]), plan).unwrap();
            }
        }
        let at_two = books.commit(Step(2), plan).unwrap().unwrap();
        assert_eq!(at_two.summary().epochs[0].seen, 4);
        assert_eq!(books.summary().epochs[0].seen, 6);
        assert_eq!(books.commit(Step(2), plan).unwrap().unwrap(), at_two, "a retry gets the same");
        assert!(matches!(books.commit(Step(1), plan), Err(BooksError::OldCheckpoint { .. })));
        let mut resumed = Books::new(Step(2), at_two);
        resumed.form(1);
        resumed.report(entry(0, 3, 0, &[4, 5, 6, 7]), plan).unwrap();
        assert!(resumed.summary().exact && resumed.summary().epochs[0].exact());
    }

    #[test]
    fn a_rank_that_has_left_holds_nothing_up() {
        let mut books = books();
        books.report(entry(0, 1, 0, &[0]), plan).unwrap();
        books.leave(Rank(1), plan);
        assert_eq!(books.complete(), Step(1));
        books.report(entry(0, 2, 0, &[1]), plan).unwrap();
        assert_eq!((books.complete(), books.summary().epochs[0].seen), (Step(2), 2));
    }

    #[test]
    fn a_new_generation_goes_on_behind_the_step_that_a_survivor_finished() {
        let planned = |step: Step| (0, (0..2).map(|user| UserIndex(2 * (step.0 as u32 - 1) + user)).collect());
        let mut books = books();
        for rank in 0..2 {
            books.report(entry(rank, 1, 0, &[rank]), plan).unwrap();
        }
        // rank 0 has finished step 2 and reported step 3, too; only rank 1, which has step 2, survives
        books.report(entry(0, 2, 0, &[2]), plan).unwrap();
        books.report(entry(0, 3, 0, &[4]), plan).unwrap();
        books.form(1);
        books.settle(Step(2), planned).unwrap();
        assert_eq!((books.complete(), books.summary().epochs[0].seen), (Step(2), 4));
        assert!(books.report(entry(0, 3, 0, &[4, 5]), plan).unwrap(), "step 3 is trained again");
        let summary = books.summary();
        assert!(summary.exact && summary.epochs[0].seen == 6, "{summary:?}");
        assert_eq!(books.settle(Step(2), planned), Err(BooksError::Behind { step: Step(2), complete: Step(3) }));
    }

    #[test]
    fn users_that_the_plan_can_name_take_no_room() {
        let mut books = Books::new(Step(0), Ledger::new(90, 5));
        books.form(2);
        for step in 1..=3 {
            for rank in 0..2 {
                // step 2 has another user than planned
                let user = rank * 20 + step as u32 + u32::from(step == 2);
                books.report(entry(rank, step, 0, &[user]), plan).unwrap();
            }
        }
        let kinds: Vec<bool> = books.since.iter().map(|complete| *complete == Complete::AsPlanned).collect();
        assert_eq!(kinds, [true, false, true]);
        let current = books.current.clone();
        assert_eq!(books.commit(Step(3), plan).unwrap(), Some(current), "the same users, from plan or report");
    }

    #[derive(Clone, Debug)]
    enum Act {
        Report(u32, u64),
        Commit(u64),
        Form(u32),
        Settle(u64),
        Leave(u32),
        /// Everything so far is saved, as at a checkpoint.
        Save,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            6 => (0..3_u32, 1..20_u64).prop_map(|(rank, step)| Act::Report(rank, step)),
            1 => (1..20_u64).prop_map(Act::Commit),
            1 => (1..4_u32).prop_map(Act::Form),
            1 => (1..20_u64).prop_map(Act::Settle),
            1 => (0..3_u32).prop_map(Act::Leave),
            1 => Just(Act::Save),
        ]
    }

    proptest! {
        #[test]
        fn saved_books_and_the_changes_after_them_are_the_same_books(acts in proptest::collection::vec(act(), 0..80)) {
            let mut books = Books::new(Step(0), Ledger::new(70, 5));
            let mut saved = serde_json::to_string(&books).unwrap();
            let mut changes = Vec::new();
            for act in acts {
                // a refusal changes nothing
                match act {
                    Act::Report(rank, step) => {
                        let _ = books.report(entry(rank, step, (step / 5) as u32, &[rank * 20 + step as u32]), plan);
                    }
                    // a commit takes no part in the changes: whoever commits saves
                    Act::Commit(step) => {
                        let _ = books.commit(Step(step), plan);
                    }
                    Act::Form(world_size) => books.form(world_size),
                    Act::Settle(step) => drop(books.settle(Step(step), plan)),
                    Act::Leave(rank) => books.leave(Rank(rank), plan),
                    Act::Save => {}
                }
                changes.extend(books.take_changes());
                if matches!(act, Act::Commit(_) | Act::Save) {
                    saved = serde_json::to_string(&books).unwrap();
                    changes.clear();
                }
            }
            let mut again = serde_json::from_str::<SavedBooks>(&saved).unwrap().open(plan);
            for change in changes {
                let line = serde_json::to_string(&change).unwrap();
                again.replay(serde_json::from_str(&line).unwrap(), plan).unwrap();
            }
            prop_assert_eq!(serde_json::to_string(&again).unwrap(), serde_json::to_string(&books).unwrap());
            prop_assert_eq!(again.current, books.current);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let mut books = books();
        books.report(entry(0, 1, 0, &[]), plan).unwrap();
        assert!(matches!(books.report(entry(1, 1, 1, &[]), plan), Err(BooksError::Epoch { .. })));
        assert!(matches!(books.report(entry(1, 9000, 1, &[]), plan), Err(BooksError::TooFarAhead { .. })));
        assert!(matches!(books.settle(Step(u64::MAX), plan), Err(BooksError::TooFarAhead { .. })));
        assert!(matches!(books.commit(Step(9000), plan), Err(BooksError::TooFarAhead { .. })));
    }
}
