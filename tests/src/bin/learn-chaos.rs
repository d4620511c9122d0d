//! `learn-chaos`: a real job under a seeded schedule of faults; `cargo xtask chaos` builds and runs it.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use learn_tests::chaos;

/// Disturb a real job and check that nothing was lost.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Minutes that the faults take, roughly
    #[arg(long, default_value_t = 3.0)]
    minutes: f64,
    /// The schedule follows from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Workers that the job starts with, and has at most
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    workers: u32,
    /// Let workers share memory, which is the default of a job, and leave out the faults that slow packets down
    #[arg(long)]
    shared_memory: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let length = match Duration::try_from_secs_f64(arguments.minutes * 60.0) {
        Ok(length) => length,
        Err(error) => {
            eprintln!("error: --minutes {}: {error}", arguments.minutes);
            return ExitCode::from(2);
        }
    };
    let options = chaos::Options {
        length,
        seed: arguments.seed,
        workers: arguments.workers,
        shared_memory: arguments.shared_memory,
    };
    match chaos::enter().and_then(|()| chaos::run(&options)) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("CHAOS FOUND SOMETHING\n{error:#}");
            ExitCode::FAILURE
        }
    }
}
