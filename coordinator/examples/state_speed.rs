//! What it costs to keep a step before it is answered: `state_speed [USERS [STEPS [FOLDER]]]`.
//!
//! Writes STEPS turns, each with the report of USERS users, as the job's owner does, and then opens the file as a kill would
//! have left it. Prints the time of a turn (median, 99th percentile, longest), the file's size, and the time to open it.

use std::error::Error;
use std::time::{Duration, Instant};

use learn_coordinator::state::{StateFile, Turn};
use learn_domain::report::StepRecord;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let users: u32 = arguments.next().map_or(Ok(2048), |text| text.parse())?;
    let steps: usize = arguments.next().map_or(Ok(5000), |text| text.parse())?;
    let folder = arguments.next().map_or_else(std::env::temp_dir, Into::into);
    let path = folder.join(format!("state-speed-{}.redb", std::process::id()));
    let killed = path.with_extension("killed");

    let mut state = StateFile::create(&path)?;
    let mut times = Vec::with_capacity(steps);
    for step in 0..steps {
        let mut turn = Turn::default();
        let report: Vec<u32> = (0..users).map(|user| user.wrapping_mul(0x9e37_79b9) ^ step as u32).collect();
        turn.entry(&report)?;
        turn.line(&StepRecord::default())?;
        turn.lines_are_written(step as u64);
        turn.value("clock", &step)?;
        let started = Instant::now();
        state.write(turn)?;
        times.push(started.elapsed());
    }
    std::fs::copy(&path, &killed)?;
    let bytes = std::fs::metadata(&killed)?.len();
    let started = Instant::now();
    let entries = StateFile::open(&killed)?.entries::<Vec<u32>>()?.len();
    let opened = started.elapsed();
    drop(state);
    std::fs::remove_file(&path)?;
    std::fs::remove_file(&killed)?;

    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{steps} turns of {users} users: median {:.0} us, p99 {:.0} us, longest {:.0} us; {:.1} MB; opened with {entries} \
         reports after a kill in {:.0} ms",
        micros(at(0.5)),
        micros(at(0.99)),
        micros(at(1.0)),
        bytes as f64 / 1e6,
        opened.as_secs_f64() * 1e3,
    );
    Ok(())
}
