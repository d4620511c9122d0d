//! Where in its job this process is: on every line of its log, whichever thread says it.
//!
//! Input: what the process learns, when it learns it. Output: fields for [`crate::log`]. Invariant: a process is in one place
//! at a time (one run, one rank of one generation), so this is one value a process and no span a thread: a writer
//! thread and the client's tasks have it too. A rank changes with the generations, so it is in the lines and not in the
//! names of files.

use std::fmt::{self, Write as _};
use std::sync::{PoisonError, RwLock};

/// What a line says of its place, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Name of the run, or of the dataset that is embedded.
    Run,
    Generation,
    Rank,
    /// The last finished step.
    Step,
    /// The number of a process in an embed job.
    Worker,
    /// The range of items that it makes.
    Range,
}

const FIELDS: [(Field, &str); 6] = [
    (Field::Run, "run"),
    (Field::Generation, "generation"),
    (Field::Rank, "rank"),
    (Field::Step, "step"),
    (Field::Worker, "worker"),
    (Field::Range, "range"),
];

#[derive(Debug, Default)]
pub(crate) struct Place {
    run: Option<String>,
    /// By [`Field`]; the run's stays empty.
    numbers: [Option<u64>; FIELDS.len()],
}

static PLACE: RwLock<Place> = RwLock::new(Place { run: None, numbers: [None; FIELDS.len()] });

/// This process works for `run` from now on.
pub fn set_run(run: &str) {
    change(|place| place.run = Some(run.to_owned()));
}

/// From now on a number of the place is this; `None` takes it away.
pub fn set(field: Field, number: impl Into<Option<u64>>) {
    let number = number.into();
    change(|place| place.numbers[field as usize] = number);
}

/// From now on this process is this rank of this generation.
pub fn set_rank(generation: u64, rank: u32) {
    change(|place| {
        place.numbers[Field::Generation as usize] = Some(generation);
        place.numbers[Field::Rank as usize] = Some(rank.into());
    });
}

fn change(change: impl FnOnce(&mut Place)) {
    change(&mut PLACE.write().unwrap_or_else(PoisonError::into_inner));
}

/// The place as it is now.
pub(crate) fn with<T>(read: impl FnOnce(&Place) -> T) -> T {
    read(&PLACE.read().unwrap_or_else(PoisonError::into_inner))
}

impl Place {
    fn numbers(&self) -> impl Iterator<Item = (&'static str, u64)> {
        FIELDS.iter().filter_map(|&(field, name)| Some((name, self.numbers[field as usize]?)))
    }

    /// `run=shop generation=2 rank=1 step=30`; empty before anything is known.
    pub(crate) fn text(&self) -> String {
        let run = self.run.iter().map(|run| format!("run={run}"));
        let parts: Vec<_> = run.chain(self.numbers().map(|(name, number)| format!("{name}={number}"))).collect();
        parts.join(" ")
    }

    /// The same as members of a JSON object, each followed by a comma.
    ///
    /// # Errors
    /// None in practice: a string takes all.
    pub(crate) fn members(&self, out: &mut String) -> fmt::Result {
        if let Some(run) = &self.run {
            write!(out, "\"run\":{},", Quoted(run))?;
        }
        self.numbers().try_for_each(|(name, number)| write!(out, "\"{name}\":{number},"))
    }
}

/// A JSON string.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for character in self.0.chars() {
            match character {
                '"' | '\\' => write!(f, "\\{character}")?,
                control if control < ' ' => write!(f, "\\u{:04x}", u32::from(control))?,
                other => f.write_char(other)?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_said_as_far_as_it_is_known() {
        let mut place = Place::default();
        assert_eq!(place.text(), "");
        place.run = Some("a \"b\"\\\n".into());
        place.numbers[Field::Step as usize] = Some(30);
        place.numbers[Field::Rank as usize] = Some(0);
        assert_eq!(place.text(), "run=a \"b\"\\\n rank=0 step=30");
        let mut members = String::new();
        place.members(&mut members).unwrap();
        assert_eq!(members, r#""run":"a \"b\"\\\u000a","rank":0,"step":30,"#);
    }
}
