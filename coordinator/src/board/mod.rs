//! What the run's growing files hold, in bounded memory, for those who look: curves, evaluations, events.
//!
//! Input: `metrics.jsonl`, `evaluations.jsonl` and `events.jsonl`, as [`crate::journal`] writes them and as earlier processes
//! have left them. Output: parts of them at once, without asking the job's owner. Invariants: files are read on a thread
//! that may block, a part at a time; the lock is held for as long as a part is taken in or looked at; a line that makes
//! no sense is left out; a file that another has taken the place of (a resume drops lines) is read anew.

mod tail;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use learn_domain::Step;
use learn_domain::curves::{Bucket, Curves};
use learn_domain::event::{Happening, JobEvent};
use learn_domain::report::{Evaluation, StepRecord};
use learn_domain::run_dir::RunDir;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tail::Tail;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

/// How often the files are looked at.
const TICK: Duration = Duration::from_millis(200);
/// Pause after one could not be read.
const AFTER_ERROR: Duration = Duration::from_secs(10);
/// Newest events that are kept.
const EVENTS: usize = 2000;
/// Newest evaluations that are kept.
const EVALUATIONS: usize = 2000;

/// An event with its number, from 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NumberedEvent {
    pub number: u64,
    /// As the log has it.
    pub text: String,
    #[serde(flatten)]
    pub event: JobEvent,
}

#[derive(Debug, Default)]
struct Kept {
    curves: Curves,
    evaluations: VecDeque<Evaluation>,
    /// Evaluations that there were, the forgotten ones included; and events.
    evaluated: u64,
    events: VecDeque<NumberedEvent>,
    happened: u64,
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub steps: u64,
    pub evaluations: u64,
    pub events: u64,
}

/// What was read so far.
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<Mutex<Kept>>);

impl Board {
    // what is taken in is so record by record: after a panic the others are there
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn counts(&self) -> Counts {
        let kept = self.lock();
        Counts { steps: kept.curves.steps(), evaluations: kept.evaluated, events: kept.happened }
    }

    /// See [`Curves::view`].
    #[must_use]
    pub fn curves(&self, from: Step, to: Step, points: usize) -> Vec<Bucket> {
        self.lock().curves.view(from, to, points)
    }

    /// The kept evaluations, oldest first.
    #[must_use]
    pub fn evaluations(&self) -> Vec<Evaluation> {
        self.lock().evaluations.iter().cloned().collect()
    }

    /// At most `most` kept events before number `before` and after number `after`, newest first.
    #[must_use]
    pub fn events(&self, after: u64, before: u64, most: usize) -> Vec<NumberedEvent> {
        let kept = self.lock();
        let within = kept.events.iter().rev().filter(|event| event.number > after && event.number < before);
        within.take(most).cloned().collect()
    }
}

/// Reads the files of a run as they grow.
#[derive(Debug)]
pub struct Follower {
    board: Board,
    steps: Tail,
    evaluations: Tail,
    events: Tail,
}

impl Follower {
    #[must_use]
    pub fn new(run_dir: &RunDir) -> Self {
        Self {
            board: Board::default(),
            steps: Tail::new(run_dir.metrics()),
            evaluations: Tail::new(run_dir.evaluations()),
            events: Tail::new(run_dir.events()),
        }
    }

    #[must_use]
    pub fn board(&self) -> Board {
        self.board.clone()
    }

    /// Reads what has come.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn catch_up(&mut self) -> io::Result<()> {
        let board = &self.board;
        follow(&mut self.events, |event: JobEvent| {
            let text = event.happening.to_string();
            let mut kept = board.lock();
            kept.happened += 1;
            let number = kept.happened;
            if kept.events.len() == EVENTS {
                kept.events.pop_front();
            }
            kept.events.push_back(NumberedEvent { number, text, event: without_users(event) });
        })?;
        if self.evaluations.is_replaced()? {
            let mut kept = board.lock();
            (kept.evaluations, kept.evaluated) = (VecDeque::new(), 0);
        }
        follow(&mut self.evaluations, |evaluation: Evaluation| {
            let mut kept = board.lock();
            kept.evaluated += 1;
            if kept.evaluations.len() == EVALUATIONS {
                kept.evaluations.pop_front();
            }
            kept.evaluations.push_back(evaluation);
        })?;
        if self.steps.is_replaced()? {
            board.lock().curves = Curves::default();
        }
        follow(&mut self.steps, |record: StepRecord| board.lock().curves.add(&record))
    }

    /// Reads for as long as it is polled.
    pub async fn follow(mut self) -> Infallible {
        loop {
            let read = spawn_blocking(move || {
                let read = self.catch_up();
                (self, read)
            });
            let pause = match read.await {
                Ok((again, Ok(()))) => {
                    self = again;
                    TICK
                }
                Ok((again, Err(error))) => {
                    tracing::warn!(%error, "the status page cannot read the run's files");
                    self = again;
                    AFTER_ERROR
                }
                Err(error) => {
                    // the page stays as it is; the job has nothing to do with it
                    tracing::error!(%error, "the status page is not brought up to date any more");
                    return std::future::pending().await;
                }
            };
            sleep(pause).await;
        }
    }
}

/// An event may name a thousand users: the file has them.
fn without_users(mut event: JobEvent) -> JobEvent {
    if let Happening::NonFinite { users, .. } = &mut event.happening {
        users.clear();
    }
    event
}

fn follow<T: DeserializeOwned>(tail: &mut Tail, mut take: impl FnMut(T)) -> io::Result<()> {
    while tail.next_lines(|line| match serde_json::from_slice(line) {
        Ok(value) => take(value),
        Err(error) => tracing::debug!(%error, "a line of the run's files is left out"),
    })? {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use learn_domain::config::NonFinite;
    use learn_domain::report::Split;
    use learn_domain::{Generation, UserIndex};

    use super::*;
    use crate::files::JsonLines;
    use crate::job::forget_beyond;

    #[test]
    fn files_are_followed_and_numbered() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let mut follower = Follower::new(&run_dir);
        follower.catch_up().unwrap();
        let board = follower.board();
        assert_eq!(board.counts(), Counts::default());

        let mut steps = JsonLines::open(run_dir.metrics()).unwrap();
        for step in 1..=3 {
            steps.append(&StepRecord { step: Step(step), loss: 0.5, ..StepRecord::default() }).unwrap();
        }
        steps.append_line("{ not a record").unwrap();
        steps.append(&StepRecord { step: Step(4), ..StepRecord::default() }).unwrap();
        let mut events = JsonLines::open(run_dir.events()).unwrap();
        for world_size in 1..=5 {
            let happening = Happening::Formed { world_size };
            events.append(&JobEvent { time: 1.0, generation: Generation(1), happening }).unwrap();
        }
        let happening = Happening::NonFinite {
            step: Step(4),
            loss: None,
            gradient_norm: None,
            action: NonFinite::Skip,
            users: vec![UserIndex(7)],
            user_count: 1,
            suspected: false,
        };
        events.append(&JobEvent { time: 2.0, generation: Generation(1), happening }).unwrap();
        follower.catch_up().unwrap();
        assert_eq!(board.counts(), Counts { steps: 4, evaluations: 0, events: 6 });
        assert_eq!(board.curves(Step(2), Step(3), 10).len(), 2);
        let numbers = |events: &[NumberedEvent]| events.iter().map(|event| event.number).collect::<Vec<_>>();
        assert_eq!(numbers(&board.events(0, u64::MAX, 2)), [6, 5]);
        assert_eq!(numbers(&board.events(0, 5, 2)), [4, 3]);
        assert_eq!(numbers(&board.events(4, u64::MAX, 9)), [6, 5]);
        let last = serde_json::to_value(&board.events(5, u64::MAX, 1)[0]).unwrap();
        assert_eq!((&last["event"], &last["users"]), (&"non_finite".into(), &serde_json::json!([])));
        assert!(last["text"].as_str().unwrap().contains("step 4"), "{last}");
    }

    #[test]
    fn what_a_resume_has_dropped_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let mut follower = Follower::new(&run_dir);
        let record = |step, loss| StepRecord { step: Step(step), loss, ..StepRecord::default() };
        let mut steps = JsonLines::open(run_dir.metrics()).unwrap();
        (1..=3).for_each(|step| steps.append(&record(step, 0.5)).unwrap());
        let mut evaluations = JsonLines::open(run_dir.evaluations()).unwrap();
        for step in [2, 3] {
            let evaluation = Evaluation {
                split: Split::Valid,
                step: Step(step),
                epoch: 0,
                users: 4,
                metrics: BTreeMap::new(),
                seconds: 0.5,
                segments: Vec::new(),
                comparisons: Vec::new(),
            };
            evaluations.append(&evaluation).unwrap();
        }
        follower.catch_up().unwrap();
        let board = follower.board();
        assert_eq!(board.counts(), Counts { steps: 3, evaluations: 2, events: 0 });
        forget_beyond(&run_dir, Step(2)).unwrap();
        JsonLines::open(run_dir.metrics()).unwrap().append(&record(3, 0.25)).unwrap();
        follower.catch_up().unwrap();
        assert_eq!(board.counts(), Counts { steps: 3, evaluations: 1, events: 0 });
        assert_eq!(board.evaluations()[0].step, Step(2));
        assert_eq!(board.curves(Step(3), Step(3), 1)[0].extents[0].mean(), Some(0.25));
    }

    #[test]
    fn a_long_history_is_read_in_bounded_memory() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let line =
            |step: u64| serde_json::to_string(&StepRecord { step: Step(step), ..StepRecord::default() }).unwrap();
        let text: String = (1..=50_000).map(|step| line(step) + "\n").collect();
        std::fs::write(run_dir.metrics(), text).unwrap();
        let mut follower = Follower::new(&run_dir);
        follower.catch_up().unwrap();
        let view = follower.board().curves(Step(0), Step(u64::MAX), 300);
        assert!(view.len() <= 300 && view.last().unwrap().last == Step(50_000));
    }
}
