//! TensorBoard's event files, beside the lines that they are made of.
//!
//! Input: the lines of `metrics.jsonl`, `evaluations.jsonl` and `events.jsonl`, and the configuration. Output: one file in
//! `RUN/tensorboard`. Invariants: the file is a function of those lines, and every coordinator makes it anew from them
//! before it adds to it, and again when lines are dropped; so after a resume or a take-over each point is there once, with
//! the time that it was reached, and what a checkpoint's resume has dropped is gone. The new file takes the place of the old
//! one under a later name, and begins with the start of a session, so that a TensorBoard that has read the old one forgets
//! it. Lines are read one by one: no more of them is held at once than when each step was finished.

mod thread;
mod wire;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use learn_domain::event::JobEvent;
use learn_domain::report::{Evaluation, StepRecord, Timed};
use learn_domain::run_dir::RunDir;
use learn_domain::{Config, Step};
use prost::Message as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
pub use thread::{Told, follow};
use wire::{Event, FILE_VERSION, SessionLog, Summary, Value, What, write_frame};

use crate::files::{FileError, Snapshot};
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

/// The lines of a run as they are at one moment.
#[derive(Debug)]
pub struct RunLines {
    steps: Snapshot,
    evaluations: Snapshot,
    events: Snapshot,
}

impl RunLines {
    /// # Errors
    /// A file cannot be read.
    pub fn now(run_dir: &RunDir) -> Result<Self, FileError> {
        Ok(Self {
            steps: Snapshot::take(&run_dir.metrics())?,
            evaluations: Snapshot::take(&run_dir.evaluations())?,
            events: Snapshot::take(&run_dir.events())?,
        })
    }
}

/// What the configuration says about the points.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cvr_weight: f64,
}

impl TensorBoard {
    /// Makes the file from lines; those of older coordinators go.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn make(lines: RunLines, run_dir: &RunDir, config: &Config) -> Result<Self, TensorBoardError> {
        let folder = run_dir.tensorboard();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| TensorBoardError::Write { path, source }
        };
        fs::create_dir_all(&folder).map_err(failed(&folder))?;
        let shape = Shape { cvr_weight: config.objective.cvr_weight };
        let older = event_files(&folder).map_err(failed(&folder))?;
        let path = folder.join(format!("{NAME}{:010}.learn", next_number(&older)));
        // a name that TensorBoard passes over, until all is there
        let aside = folder.join("next.tmp");
        let file = File::create(&aside).map_err(failed(&aside))?;
        let mut frames = Frames { path: &aside, file: BufWriter::new(file) };
        let last_step = frames.add_all(lines, config, shape)?;
        let file = frames.file.into_inner().map_err(io::IntoInnerError::into_error).map_err(failed(&aside))?;
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

/// An event file that is made.
struct Frames<'a> {
    path: &'a Path,
    file: BufWriter<File>,
}

impl Frames<'_> {
    fn add(&mut self, event: &Event) -> Result<(), TensorBoardError> {
        let written = write_frame(&mut self.file, &event.encode_to_vec());
        written.map_err(|source| TensorBoardError::Write { path: self.path.to_owned(), source })
    }

    /// Adds everything that the lines of a run say; gives the last step.
    fn add_all(&mut self, mut lines: RunLines, config: &Config, shape: Shape) -> Result<i64, TensorBoardError> {
        let mut dates = lines.steps.lines::<Dated>()?.collect::<Result<Vec<_>, _>>()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        date(&mut dates, now);
        let first = dates.first().and_then(|step| step.time).unwrap_or(now);
        self.add(&Event { wall_time: first, step: 0, what: Some(What::FileVersion(FILE_VERSION.into())) })?;
        self.add(&Event { wall_time: first, step: 0, what: Some(What::SessionLog(SessionLog { status: 1 })) })?;
        self.add(&summary(first, 0, vec![Value::text("config", configuration(config))]))?;
        for (line, step) in lines.steps.lines::<Timed<StepRecord>>()?.zip(&dates) {
            self.add(&shape.step(&Timed { time: step.time, ..line? }))?;
        }
        for line in lines.evaluations.lines::<Timed<Evaluation>>()? {
            let line = line?;
            let same = dates.binary_search_by_key(&line.value.step, |step| step.step);
            let time = line.time.or_else(|| same.ok().and_then(|at| dates[at].time));
            self.add(&evaluation(&Timed { time, ..line }))?;
        }
        for event in lines.events.lines::<JobEvent>()? {
            let event = event?;
            let before = dates.partition_point(|step| step.time.is_some_and(|time| time <= event.time));
            let step = before.checked_sub(1).map_or(0, |at| dates[at].step.0 as i64);
            self.add(&happening(&event, step))?;
        }
        Ok(dates.last().map_or(0, |step| step.step.0 as i64))
    }
}

/// When a step was finished: of its line, what evaluations and events are placed by.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Dated {
    step: Step,
    #[serde(default)]
    time: Option<f64>,
    seconds: f64,
}

/// Gives lines of older versions, which have no time, the one that their seconds say.
fn date(steps: &mut [Dated], now: f64) {
    let (mut next, mut seconds) = (now, 0.0);
    for step in steps.iter_mut().rev() {
        let time = *step.time.get_or_insert(next - seconds);
        (next, seconds) = (time, step.seconds);
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
