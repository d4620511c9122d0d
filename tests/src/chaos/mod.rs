//! Chaos: a real job under a schedule of faults, and what must be true of it afterwards.
//!
//! Input: minutes, a seed, workers. Output: a report, or what was violated, with the schedule so far and where
//! everything is kept. The job is stopped when its schedule is done and resumed for a few more steps, so that it ends by
//! itself at a planned step; then an undisturbed job of one worker takes the same steps.

mod job;
mod sandbox;
mod schedule;
mod strike;
mod verdict;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use self::job::Job;
pub use self::sandbox::enter;
use self::sandbox::{Disk, Sandbox};
pub use self::schedule::{Fault, Kind, plan};
use crate::{Shape, Site};

/// The job's name; its run directory is `runs/chaos`.
const NAME: &str = "chaos";
/// Large enough that evaluations and checkpoints can be hit, small enough for two cores.
const SHAPE: Shape = Shape { users: 300, items: 200, dim: 32 };
const BATCH: u64 = 64;
/// Steps between two evaluations.
const EVALUATION: u64 = 20 * (SHAPE.users as u64).div_ceil(BATCH);
/// A job must have recovered from a fault within this.
const RECOVERY: Duration = Duration::from_secs(90);
/// A job that was asked to stop, or has few steps to go, must have ended within this.
const END: Duration = Duration::from_secs(120);
/// Steps after the schedule.
const REST: u64 = 20;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub length: Duration,
    pub seed: u64,
    pub workers: u32,
    /// Workers share memory, as is the default. Then faults of the network do not meet what they say to each other, and are left
    /// out.
    pub shared_memory: bool,
}

/// Runs it all; the report.
///
/// # Errors
/// Something is not as it must be; the message has the seed, the schedule so far and the folder that was kept.
pub fn run(options: &Options) -> Result<String> {
    let mut site = Site::new(SHAPE);
    // whatever happens, there is something to look at
    site.keep(true);
    let mut chaos = Chaos { options, site: &site, done: Vec::new() };
    match chaos.run() {
        Ok(report) => {
            site.keep(false);
            Ok(report)
        }
        Err(error) => {
            let mut said = format!("seed {}: {error:#}\nfaults so far:\n", options.seed);
            for done in &chaos.done {
                let _ = writeln!(said, "  {done}");
            }
            let _ = write!(said, "everything is kept in {}", site.path("").display());
            bail!(said)
        }
    }
}

struct Chaos<'a> {
    options: &'a Options,
    site: &'a Site,
    /// Faults with what came of them.
    done: Vec<String>,
}

impl Chaos<'_> {
    fn run(&mut self) -> Result<String> {
        let Options { length, seed, workers, shared_memory } = *self.options;
        let mut sandbox = Sandbox::look();
        if shared_memory {
            sandbox.leave_out(&[Kind::SlowNetwork, Kind::StallNetwork], "workers share memory");
        }
        let arguments = |name: &str, workers, steps| {
            let shared = format!("cluster.shared_memory={shared_memory}");
            [arguments(name, workers, steps), vec!["--set".into(), shared]].concat()
        };
        for (kind, why) in &sandbox.left_out {
            eprintln!("LEFT OUT: {}: {why}", kind.name());
        }
        let faults = plan(seed, length, workers, &sandbox.kinds);
        if faults.is_empty() {
            bail!("nothing to do: at least two workers are needed");
        }
        eprintln!("seed {seed}: {} faults in about {:.1} minutes", faults.len(), length.as_secs_f64() / 60.0);
        let started = Instant::now();
        let mut job = Job::start(self.site, NAME, &arguments(NAME, workers, 100_000_000))?;
        let folder = job.folder();
        job.wait("a run directory", END, |_| folder.join("config.json").exists().then_some(()))?;
        let disk = if sandbox.has_disks() { Some(Disk::mount(&folder.join("checkpoints"))?) } else { None };
        let disturbed = self.disturb(&mut job, &faults, disk.as_ref());
        let stopped = disturbed.and_then(|recoveries| Ok((recoveries, self.end(job)?)));
        if let Some(disk) = disk {
            disk.unmount()?;
        }
        let (recoveries, steps) = stopped?;
        let took = started.elapsed();
        let was_full = faults.iter().any(|fault| fault.kind == Kind::FullDisk);
        let difference = verdict::check(self.site, NAME, steps, was_full, &arguments("calm", 1, steps))?;
        let mut report = format!(
            "chaos seed {seed}: {} faults in {:.1} minutes, {steps} steps, every assertion holds; parameters differ \
             from the undisturbed run's by {difference:.1e} at most\n\n\
             | fault | fired | whole again after, median s | longest s |\n|---|---|---|---|\n",
            faults.len(),
            took.as_secs_f64() / 60.0,
        );
        for kind in Kind::ALL {
            let row = row(kind, &recoveries, &sandbox);
            let _ = writeln!(report, "| {} | {row} |", kind.name());
        }
        Ok(report)
    }

    /// Does all faults; how long the job took to recover from each, those before it without a recovery of their own
    /// included.
    fn disturb(
        &mut self,
        job: &mut Job<'_>,
        faults: &[Fault],
        disk: Option<&Disk>,
    ) -> Result<BTreeMap<Kind, Vec<f64>>> {
        let started = Instant::now();
        let mut recoveries: BTreeMap<Kind, Vec<f64>> = BTreeMap::new();
        let mut wanted = u64::from(self.options.workers);
        job.recovered(wanted, END).context("the start")?;
        for (number, fault) in (1..).zip(faults) {
            if let Some(quiet) = fault.quiet {
                std::thread::sleep(quiet);
            }
            let at = started.elapsed().as_secs_f64();
            self.done.push(format!("{at:6.1} s {number:3}. {fault}"));
            let proof = strike::strike(job, fault, disk, EVALUATION).with_context(|| format!("fault {number}"))?;
            let _ = self.done.last_mut().map(|line| write!(line, ": {proof}"));
            let struck = Instant::now();
            wanted = u64::from(fault.workers);
            let waits = faults.get(number).is_none_or(|next| next.quiet.is_some());
            if waits {
                job.recovered(wanted, RECOVERY).with_context(|| format!("after fault {number}"))?;
                let seconds = struck.elapsed().as_secs_f64();
                recoveries.entry(fault.kind).or_default().push(seconds);
                let _ = self.done.last_mut().map(|line| write!(line, "; whole again {seconds:.1} s later"));
            } else {
                recoveries.entry(fault.kind).or_default().push(f64::NAN);
            }
            eprintln!("{}", self.done.last().map_or("", String::as_str));
        }
        Ok(recoveries)
    }

    /// Stops the job, and lets it go on to a planned end; the steps it has then taken.
    fn end(&self, job: Job<'_>) -> Result<u64> {
        job.launch("stop", &[])?;
        let said = |job: &Job<'_>| job.said();
        let before = said(&job);
        let code = job.finish(END).context("the stop")?;
        if code != Some(3) {
            bail!("exit code {code:?} instead of 3 after the stop: {before}");
        }
        let status = self.site.status(NAME);
        let step = status["last_step"]["step"].as_u64().context("no step was finished")?;
        if status["last_checkpoint"] != step {
            bail!("stopped at step {step} without its checkpoint: {status}");
        }
        let steps = step + REST;
        let resume = ["resume", "runs/chaos", "--set", &format!("training.max_steps={steps}")].map(str::to_owned);
        let resumed = Job::start(self.site, NAME, &resume)?;
        let code = resumed.finish(END).context("the resumed job")?;
        if code != Some(0) {
            let log = self.site.path(&format!("{NAME}.log"));
            bail!("exit code {code:?} instead of 0: {}", std::fs::read_to_string(log).unwrap_or_default());
        }
        Ok(steps)
    }
}

fn row(kind: Kind, recoveries: &BTreeMap<Kind, Vec<f64>>, sandbox: &Sandbox) -> String {
    if sandbox.left_out.iter().any(|(left_out, _)| *left_out == kind) {
        return "left out | - | -".into();
    }
    let all = recoveries.get(&kind).map(Vec::as_slice).unwrap_or_default();
    let mut seconds: Vec<f64> = all.iter().copied().filter(|one| one.is_finite()).collect();
    seconds.sort_by(f64::total_cmp);
    match (seconds.get(seconds.len() / 2), seconds.last()) {
        (Some(median), Some(longest)) => format!("{} | {median:.1} | {longest:.1}", all.len()),
        _ => format!("{} | - | -", all.len()),
    }
}

/// Arguments of a training that takes the same steps whoever takes part.
fn arguments(name: &str, workers: u32, steps: u64) -> Vec<String> {
    let own = [format!("job.name={name}"), format!("cluster.workers={workers}"), format!("training.max_steps={steps}")];
    let batch = format!("training.global_batch={BATCH}");
    let fixed = [
        batch.as_str(),
        "training.epochs=1000000000",
        "model.layers=2",
        "model.hidden=32",
        // slow learning, and no steps out of rounding where gradients vanish; a rate that does not know the end
        "optimizer.learning_rate=1e-4",
        "optimizer.epsilon=1e-5",
        "optimizer.schedule=constant",
        "evaluation.every_epochs=20",
        "evaluation.resamples=0",
        "checkpoint.every_epochs=0",
        "checkpoint.every_steps=40",
        "cluster.heartbeat_timeout=3s",
        "cluster.collective_timeout=20s",
        "cluster.max_restarts=100000",
        "cluster.coordinator_restarts=100000",
        "cluster.max_recoveries=20",
    ];
    let settings = own.iter().map(String::as_str).chain(fixed);
    let sets = settings.flat_map(|setting| ["--set".to_owned(), setting.to_owned()]);
    ["train".to_owned(), "job.toml".to_owned()].into_iter().chain(sets).collect()
}
