//! The coordinator's job and many workers in virtual time: thousands of random histories with faults, each of which can be
//! run again alone.
//!
//! `SIMULATION_SEED=17` runs one history, `SIMULATION_SCHEDULES=100000` another number of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod checks;
mod faults;
mod group;
mod process;
mod training;
mod world;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use learn_domain::membership::{Outcome, StopCause};
use world::World;

/// Histories of a run.
const SCHEDULES: u64 = 10_000;

macro_rules! fired {
    ($($name:ident),* $(,)?) => {
        /// How often each kind of fault, and what should follow from faults, came up.
        #[derive(Clone, Debug, Default)]
        pub struct Fired {
            $(pub $name: u64,)*
            pub losses: BTreeMap<&'static str, u64>,
            pub outcomes: BTreeMap<&'static str, u64>,
        }

        impl Fired {
            fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
                for (cause, count) in &other.losses {
                    *self.losses.entry(cause).or_default() += count;
                }
                for (outcome, count) in &other.outcomes {
                    *self.outcomes.entry(outcome).or_default() += count;
                }
            }

            fn never(&self) -> Vec<&'static str> {
                let all = [$((stringify!($name), self.$name)),*];
                all.into_iter().filter(|(_, count)| *count == 0).map(|(name, _)| name).collect()
            }
        }
    };
}

fired! {
    kills, silent_kills, pauses, woken, disconnects, breaks, crashes, storms, ups, downs, operator_stops, signals,
    lost_messages, duplicated, resent, stale, unknown, rejoined, transfers, yielded, dismissed, ended_for_some,
    unreported, followed_up, collective_timeouts, commits, generations, state_lost, told_again,
}

fn label(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Finished => "finished",
        Outcome::Stopped(StopCause::Operator) => "operator",
        Outcome::Stopped(StopCause::Lost(_)) => "lost",
        Outcome::Stopped(StopCause::JoinDeadline { .. }) => "join deadline",
        Outcome::Stopped(StopCause::NeverJoined { .. }) => "never joined",
        Outcome::Stopped(StopCause::NoProgress { .. }) => "no progress",
        Outcome::Stopped(StopCause::Failed { .. }) => "failed",
        Outcome::Stopped(StopCause::GaveUp { .. }) => "gave up",
    }
}

fn history(seed: u64) -> Fired {
    let lived = std::panic::catch_unwind(AssertUnwindSafe(|| World::new(seed).live()));
    match lived {
        Ok((mut fired, outcome)) => {
            fired.outcomes.insert(label(&outcome), 1);
            fired
        }
        Err(panic) => {
            eprintln!("SIMULATION_SEED={seed} runs this history again");
            std::panic::resume_unwind(panic)
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

#[test]
fn every_history_keeps_every_step() {
    if let Some(seed) = number("SIMULATION_SEED") {
        println!("{:#?}", history(seed));
        return;
    }
    let (schedules, next) = (number("SIMULATION_SCHEDULES").unwrap_or(SCHEDULES), AtomicU64::new(0));
    let work = || {
        let mut sum = Fired::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= schedules {
                return sum;
            }
            sum.add(&history(seed));
        }
    };
    let threads = thread::available_parallelism().map_or(1, Into::into);
    let mut fired = Fired::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().for_each(|worker| fired.add(&worker.join().unwrap()));
    });
    println!("{schedules} histories: {fired:#?}");
    assert_eq!(fired.never(), Vec::<&str>::new(), "each kind of fault fires somewhere");
    for cause in ["silent", "disconnected", "crashed", "stuck"] {
        assert!(fired.losses.contains_key(cause), "no worker was ever lost because it was {cause}");
    }
    let finished = fired.outcomes.get("finished").copied().unwrap_or_default();
    assert!(finished * 2 > schedules, "most of them finish: {:?}", fired.outcomes);
}
