//! TensorBoard's event files, beside the lines that they are made of.
//!
//! Input: the lines of `metrics.jsonl`, `evaluations.jsonl` and `events.jsonl`, and the configuration. Output: one file in
//! `RUN/tensorboard`. Invariants: the file is a function of those lines, and every coordinator makes it anew from them
//! before it adds to it, and again when lines are dropped; so after a resume or a take-over each point is there once, with
//! the time that it was reached, and what a checkpoint's resume has dropped is gone. The new file takes the place of the old
//! one under a later name, and begins with the start of a session, so that a TensorBoard that has read the old one forgets
//! it.

mod wire;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use learn_domain::Config;
use learn_domain::event::JobEvent;
use learn_domain::report::{Evaluation, StepRecord, Timed};
use learn_domain::run_dir::RunDir;
use prost::Message as _;
use serde::de::DeserializeOwned;
use wire::{Event, FILE_VERSION, SessionLog, Summary, Value, What, write_frame};

use crate::files::{FileError, read_lines};
use crate::journal::{Line, LineFile};

/// What TensorBoard looks for in a name; the seconds that follow order the files.
const NAME: &str = "events.out.tfevents.";

/// The files for TensorBoard could not be written.
#[derive(Debug, thiserror::Error)]
pub enum TensorBoardError {
    #[error(transparent)]
    Lines(#[from] FileError),
    #[error("{path}: {source}; the file was changed or is of another version")]
    Line { path: PathBuf, source: serde_json::Error },
    #[error("cannot write {path}: {source}; is the disk full, or the directory not writable?")]
    Write { path: PathBuf, source: io::Error },
}

impl TensorBoardError {
    pub fn tell(&self) {
        tracing::warn!("no more points for TensorBoard until the job is resumed: {self}");
    }
}

/// The event file of a run.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
    shape: Shape,
    /// The last step that is there, which an event belongs to.
    last_step: i64,
}

/// What the configuration says about the points.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cvr_weight: f64,
}

impl TensorBoard {
    /// Makes the file from the lines that are there; those of older coordinators go. A run without steps and evaluations
    /// gets its file with the first line.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn open(run_dir: &RunDir, config: &Config) -> Result<Self, TensorBoardError> {
        let folder = run_dir.tensorboard();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| TensorBoardError::Write { path, source }
        };
        fs::create_dir_all(&folder).map_err(failed(&folder))?;
        let shape = Shape { cvr_weight: config.objective.cvr_weight };
        let (events, last_step) = all(run_dir, config, shape)?;
        let older = event_files(&folder).map_err(failed(&folder))?;
        let path = folder.join(format!("{NAME}{:010}.learn", next_number(&older)));
        // a name that TensorBoard passes over, until all is there
        let aside = folder.join("next.tmp");
        let write = || {
            let mut file = BufWriter::new(File::create(&aside)?);
            for event in &events {
                write_frame(&mut file, &event.encode_to_vec())?;
            }
            file.into_inner().map_err(io::IntoInnerError::into_error)
        };
        let file = write().map_err(failed(&aside))?;
        fs::rename(&aside, &path).map_err(failed(&path))?;
        for older in older {
            fs::remove_file(&older).map_err(failed(&older))?;
        }
        Ok(Self { path, file, shape, last_step })
    }

    /// Adds what a line says.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, line: &Line) -> Result<(), TensorBoardError> {
        let event = match line.file {
            LineFile::Steps => self.shape.step(&self.parsed(&line.text)?),
            LineFile::Evaluations => evaluation(&self.parsed(&line.text)?),
            LineFile::Events => happening(&self.parsed(&line.text)?, self.last_step),
        };
        if line.file == LineFile::Steps {
            self.last_step = event.step;
        }
        let written = write_frame(&mut self.file, &event.encode_to_vec()).and_then(|()| self.file.flush());
        written.map_err(|source| TensorBoardError::Write { path: self.path.clone(), source })
    }

    fn parsed<T: DeserializeOwned>(&self, line: &str) -> Result<T, TensorBoardError> {
        serde_json::from_str(line).map_err(|source| TensorBoardError::Line { path: self.path.clone(), source })
    }
}

/// The event files of a folder.
fn event_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    let is_ours = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NAME));
    Ok(paths.into_iter().filter(is_ours).collect())
}

/// Seconds since the epoch, or more, so that it is behind all that are there: TensorBoard reads files by their names.
fn next_number(older: &[PathBuf]) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let numbers = older.iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.strip_prefix(NAME)?;
        name.split('.').next()?.parse::<u64>().ok()
    });
    numbers.map(|number| number + 1).fold(now, u64::max)
}

/// Everything that the lines of a run say, and the last step.
fn all(run_dir: &RunDir, config: &Config, shape: Shape) -> Result<(Vec<Event>, i64), TensorBoardError> {
    let mut steps: Vec<Timed<StepRecord>> = read_lines(&run_dir.metrics())?;
    let evaluations: Vec<Timed<Evaluation>> = read_lines(&run_dir.evaluations())?;
    let events: Vec<JobEvent> = read_lines(&run_dir.events())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    date(&mut steps, now);
    let first = steps.first().and_then(|step| step.time).unwrap_or(now);
    let last_step = steps.last().map_or(0, |step| step.value.step.0 as i64);
    let mut all = vec![
        Event { wall_time: first, step: 0, what: Some(What::FileVersion(FILE_VERSION.into())) },
        Event { wall_time: first, step: 0, what: Some(What::SessionLog(SessionLog { status: 1 })) },
        summary(first, 0, vec![Value::text("config", configuration(config))]),
    ];
    all.extend(steps.iter().map(|step| shape.step(step)));
    all.extend(evaluations.into_iter().map(|line| {
        let same = steps.binary_search_by_key(&line.value.step, |step| step.value.step);
        let time = line.time.or_else(|| same.ok().and_then(|at| steps[at].time));
        evaluation(&Timed { time, ..line })
    }));
    all.extend(events.iter().map(|event| {
        let before = steps.partition_point(|step| step.time.is_some_and(|time| time <= event.time));
        let step = before.checked_sub(1).map_or(0, |at| steps[at].value.step.0 as i64);
        happening(event, step)
    }));
    Ok((all, last_step))
}

/// Gives lines of older versions, which have no time, the one that their seconds say.
fn date(steps: &mut [Timed<StepRecord>], now: f64) {
    let (mut next, mut seconds) = (now, 0.0);
    for step in steps.iter_mut().rev() {
        let time = *step.time.get_or_insert(next - seconds);
        (next, seconds) = (time, step.value.seconds);
    }
}

fn summary(wall_time: f64, step: i64, value: Vec<Value>) -> Event {
    Event { wall_time, step, what: Some(What::Summary(Summary { value })) }
}

/// The configuration as Markdown.
fn configuration(config: &Config) -> String {
    let json = serde_json::to_string_pretty(config).unwrap_or_default();
    json.lines().map(|line| format!("    {line}\n")).collect()
}

impl Shape {
    fn step(self, line: &Timed<StepRecord>) -> Event {
        let record = &line.value;
        let mut values = vec![Value::scalar("loss/total", record.loss)];
        if let Some(cvr) = record.cvr_loss {
            values.push(Value::scalar("loss/contrastive", record.loss - self.cvr_weight * cvr));
            values.push(Value::scalar("loss/cvr", cvr));
        }
        values.extend([
            Value::scalar("train/accuracy", record.accuracy),
            Value::scalar("train/learning_rate", record.learning_rate),
            Value::scalar("train/gradient_norm", record.gradient_norm),
            Value::scalar("train/epoch", f64::from(record.epoch + 1)),
            Value::scalar("throughput/padding_share", record.padding_share),
            Value::scalar("throughput/step_seconds", record.seconds),
            Value::scalar("job/generation", record.generation.0 as f64),
        ]);
        if record.seconds > 0.0 {
            values.push(Value::scalar("throughput/users_per_second", f64::from(record.users) / record.seconds));
            values.push(Value::scalar("throughput/tokens_per_second", record.tokens as f64 / record.seconds));
        }
        summary(line.time.unwrap_or_default(), record.step.0 as i64, values)
    }
}

fn evaluation(line: &Timed<Evaluation>) -> Event {
    let Evaluation { split, step, metrics, seconds, .. } = &line.value;
    let mut values: Vec<_> =
        metrics.iter().map(|(name, value)| Value::scalar(format!("{split}/{name}"), *value)).collect();
    values.push(Value::scalar(format!("{split}/seconds"), *seconds));
    summary(line.time.unwrap_or_default(), step.0 as i64, values)
}

fn happening(event: &JobEvent, step: i64) -> Event {
    let text = format!("generation {}: {}", event.generation, event.happening);
    summary(event.time, step, vec![Value::text("events", text)])
}

#[cfg(test)]
mod tests;
