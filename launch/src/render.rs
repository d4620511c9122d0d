//! What people see of jobs and metrics, as pure functions.

mod quality;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use learn_domain::Phase;
use learn_domain::ledger::{EpochCount, LedgerSummary};
use learn_domain::report::{EmbeddingStatus, EmbeddingWorker, Evaluation, JobState, JobStatus, StepRecord};
pub use quality::{evaluated, summary};

type Metrics = BTreeMap<String, f64>;

/// Whether the numbers of a status are those of a running job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// A coordinator answers for them.
    Live,
    /// The job has ended, these are its last words.
    Ended,
    /// The coordinator is gone without having ended the job.
    Stale,
    /// A scheduler will start the job, or go on with it.
    Queued,
    /// Whether its coordinator lives cannot be told from this machine.
    Unknown,
}

impl Freshness {
    /// As JSON has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Ended => "ended",
            Self::Stale => "stale",
            Self::Queued => "queued",
            Self::Unknown => "unknown",
        }
    }
}

/// `1234567` as `1,234,567`.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Seconds as `1h 02m`, `3m 04s` or `5.6s`.
#[must_use]
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    if seconds < 60.0 {
        return format!("{seconds:.1}s");
    }
    let whole = std::time::Duration::from_secs_f64(seconds.min(1e15)).as_secs();
    if whole < 3600 {
        format!("{}m {:02}s", whole / 60, whole % 60)
    } else {
        format!("{}h {:02}m", whole / 3600, whole % 3600 / 60)
    }
}

/// Bytes as `1.5 GiB`.
#[must_use]
pub fn bytes(number: u64) -> String {
    indicatif::BinaryBytes(number).to_string()
}

#[must_use]
pub fn users_per_second(step: &StepRecord) -> f64 {
    if step.seconds > 0.0 { f64::from(step.users) / step.seconds } else { 0.0 }
}

/// The embed job of a dataset, and the content embeddings that the dataset `has` now.
#[must_use]
pub fn embedding(job: Option<&EmbeddingStatus>, freshness: Freshness, has: Option<&str>) -> String {
    let mut out = match (freshness, has) {
        (Freshness::Live, _) => "being embedded",
        (Freshness::Stale | Freshness::Queued | Freshness::Unknown, _) => {
            "its embed job is at its end, or was broken off: `learn-launch embed CONFIG` goes on where it was"
        }
        (Freshness::Ended, Some(_)) => "embedded",
        (Freshness::Ended, None) => "not embedded; `learn-launch embed CONFIG` does it",
    }
    .to_owned();
    out.push('\n');
    if let Some(job) = job {
        let _infallible = writeln!(out, "items       {} of {}", count(job.items_done), count(job.items));
        let _infallible = writeln!(out, "ranges      {} of {}", count(job.ranges_done), count(job.ranges));
        for EmbeddingWorker { worker, host, pid, range, seconds_since_heard } in &job.workers {
            let range = range.map_or("no range".to_owned(), |range| format!("range {range}"));
            let heard = duration(*seconds_since_heard);
            let _infallible = writeln!(out, "process {worker}   {host} pid {pid}: {range}, heard {heard} ago");
        }
        if let Some(failure) = &job.failure {
            let _infallible = writeln!(out, "failure     {failure}");
        }
    }
    if let Some(has) = has {
        let _infallible = writeln!(out, "embeddings  {has}");
    }
    out
}

/// The words beside the progress bar of a step.
#[must_use]
pub fn step(step: &StepRecord) -> String {
    format!(
        "epoch {} loss {:.4} accuracy {:.3} {:.0} users/s",
        step.epoch + 1,
        step.loss,
        step.accuracy,
        users_per_second(step)
    )
}

/// What a job does: the words beside its progress bar.
#[must_use]
pub fn doing(status: &JobStatus) -> String {
    let evaluates = status.workers.iter().any(|worker| !worker.left && worker.phase == Phase::Evaluation);
    match (&status.last_step, evaluates && status.state == JobState::Running) {
        (None, false) => status.state.name().to_owned(),
        (None, true) => "evaluating".to_owned(),
        (Some(last), false) => step(last),
        (Some(last), true) => format!("evaluating; {}", step(last)),
    }
}

/// The evaluations of a status that are new to whoever has seen `known`: it has only the newest, and that of a coordinator
/// which was restarted perhaps fewer.
#[must_use]
pub fn newer<'a>(known: &[Evaluation], status: &'a JobStatus) -> &'a [Evaluation] {
    let all = status.evaluations.as_slice();
    let behind = |seen: &Evaluation| all.iter().rposition(|one| one == seen).map(|place| place + 1);
    &all[known.iter().rev().find_map(behind).unwrap_or(0)..]
}

/// One line for one evaluation; AUC and HR wait for the table.
#[must_use]
pub fn evaluation(evaluation: &Evaluation) -> String {
    let mut line = format!("{} at step {} (epoch {}):", evaluation.split, evaluation.step, evaluation.epoch);
    let shown = ordered(&evaluation.metrics).into_iter().filter(|(name, _)| *name != "auc" && !name.starts_with("hr@"));
    for (name, value) in shown {
        let _infallible = write!(line, " {name} {value:.4}");
    }
    let _infallible = write!(line, " ({} users, {})", count(evaluation.users), duration(evaluation.seconds));
    line
}

/// Metrics by name, then by the number after `@`.
fn ordered(metrics: &Metrics) -> Vec<(&str, f64)> {
    let mut rows: Vec<_> = metrics.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    rows.sort_by_key(|(name, _)| {
        let (kind, cutoff) = name.split_once('@').unwrap_or((name, "0"));
        (kind.to_owned(), cutoff.parse::<u64>().unwrap_or(u64::MAX))
    });
    rows
}

/// Width of the names of metrics.
const NAME: usize = 16;

/// A table of metrics, one column each; the rows are those of all columns together.
#[must_use]
pub fn metrics_table(columns: &[(&str, &Metrics)]) -> String {
    let mut all = Metrics::new();
    for (_, metrics) in columns {
        all.extend(metrics.iter().map(|(name, value)| (name.clone(), *value)));
    }
    let mut out = format!("{:<NAME$}", "metric");
    for (title, _) in columns {
        let _infallible = write!(out, "{title:>13}");
    }
    out.push('\n');
    for (name, _) in ordered(&all) {
        let _infallible = write!(out, "{name:<NAME$}");
        for (_, metrics) in columns {
            let cell = metrics.get(name).map_or("-".to_owned(), |value| format!("{value:.4}"));
            let _infallible = write!(out, "{cell:>13}");
        }
        out.push('\n');
    }
    out
}

/// A job and its state.
fn heading(status: &JobStatus, freshness: Freshness) -> String {
    let fresh = match freshness {
        Freshness::Live => "",
        Freshness::Ended => " (ended)",
        Freshness::Queued => " (waits in the queue of its scheduler to go on)",
        Freshness::Unknown => " (its coordinator was on another machine, and may be there still)",
        Freshness::Stale => " (STALE: its coordinator is gone; `learn-launch resume` continues the job)",
    };
    format!("{}: {}{fresh}", status.name, status.state.name())
}

/// A status in one line.
#[must_use]
pub fn last_word(status: &JobStatus, freshness: Freshness) -> String {
    let done = status.last_step.as_ref().map_or(0, |step| step.step.0);
    format!("{}, step {} of {}", heading(status, freshness), count(done), count(status.total_steps))
}

/// A whole status; `age` is how many seconds ago it was written, none of one that its coordinator has just told.
#[must_use]
pub fn status(status: &JobStatus, freshness: Freshness, age: Option<f64>) -> String {
    let mut out = heading(status, freshness);
    out.push('\n');
    let mut row = |name: &str, value: String| {
        let _infallible = writeln!(out, "  {name:<12}{value}");
    };
    if let Some(stall) = &status.stall {
        row("stands still", stall.clone());
    }
    if let Some(cause) = &status.cause {
        row("cause", cause.clone());
    }
    let dataset = &status.dataset;
    row("dataset", format!("{}: {} users, {} items", dataset.name, count(dataset.users), count(dataset.items.into())));
    let done = status.last_step.as_ref().map_or(0, |step| step.step.0);
    let epochs = status.total_steps.checked_div(status.steps_per_epoch).unwrap_or(0);
    row("steps", format!("{} of {} ({} epochs)", count(done), count(status.total_steps), epochs));
    if let Some(last) = &status.last_step {
        row("last step", step(last));
    }
    if let Some(checkpoint) = status.last_checkpoint {
        row("checkpoint", format!("step {checkpoint}"));
    }
    if let Some(best) = &status.best {
        row("best", evaluation(best));
    }
    for line in ledger(&status.ledger) {
        row("ledger", line);
    }
    row("generation", format!("{} with {} workers", status.generation, status.world_size));
    for worker in &status.workers {
        let rank = worker.rank.map_or("-".to_owned(), |rank| rank.to_string());
        let place = format!("{} pid {} {}", worker.host, worker.pid, worker.device);
        let doing = format!("step {} {}", worker.step, worker.phase);
        // only a coordinator that is there knows when it has heard of a worker
        let told = freshness == Freshness::Live && age.is_none();
        let heard = if told { format!(", heard {:.1}s ago", worker.seconds_since_heartbeat) } else { String::new() };
        row("worker", format!("rank {rank} {place}: {doing}{heard}"));
    }
    for server in &status.data_servers {
        row("data server", format!("{} pid {}: {}", server.host, server.pid, server.location));
    }
    if status.restarts > 0 {
        row("restarts", format!("{} by its scheduler", status.restarts));
    }
    row(if freshness == Freshness::Live { "running for" } else { "ran for" }, duration(status.seconds));
    if let Some(age) = age.filter(|_| freshness != Freshness::Ended) {
        row("written", format!("{} ago; nothing newer is known", duration(age)));
    }
    out
}

/// All exact epochs in one line, and one for each of the others: hours of training must not push the ranks off the screen.
fn ledger(ledger: &LedgerSummary) -> Vec<String> {
    let newest = ledger.epochs.last();
    let (exact, others): (Vec<_>, Vec<_>) = ledger.epochs.iter().partition(|epoch| epoch.exact());
    let out_of_turn = (!ledger.exact && others.is_empty()).then(|| "an epoch came again, or was left out".to_owned());
    let exact = match (exact.len() as u64, others.is_empty()) {
        (0, _) => None,
        (1, _) => Some("1 epoch, exact".to_owned()),
        (number, true) => Some(format!("{} epochs, all exact", count(number))),
        (number, false) => Some(format!("{} epochs, exact", count(number))),
    };
    let other = |epoch: &EpochCount| {
        let verdict = match (epoch.repeated, epoch.unknown) {
            (0, 0) if Some(epoch) == newest => "open".to_owned(),
            (0, 0) => "the others were left out".to_owned(),
            (repeated, unknown) => format!("{repeated} repeated, {unknown} unknown"),
        };
        let (seen, users) = (count(epoch.seen.into()), count(epoch.users.into()));
        format!("epoch {}: {seen} of {users} users seen: {verdict}", epoch.epoch + 1)
    };
    exact.into_iter().chain(out_of_turn).chain(others.into_iter().map(other)).collect()
}

/// How many workers, for a progress line.
#[must_use]
pub fn workers(count: usize) -> String {
    if count == 1 { "1 worker".into() } else { format!("{count} workers") }
}

#[cfg(test)]
mod tests;
