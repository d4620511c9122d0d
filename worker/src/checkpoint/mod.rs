//! Checkpoints: the whole state of a training job after a step, on disk.
//!
//! Input: a [`Snapshot`]. Output: a directory `step-NNNNNNNNNN` with `model.safetensors` (published LEARN parameter
//! names), `optimizer.safetensors` and `state.json` (version, counters, configuration, size and checksum of the other
//! files). Invariants: a directory of that name is whole (it is written aside, synced and renamed, and loses the name before it
//! is removed); a killed write never touches an earlier checkpoint; nothing that is read is trusted before its checksum agrees.

mod file;
mod keep;
mod pace;
mod sum;
mod superseding;
mod writer;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use file::NewFile;
use learn_dataset::files;
use learn_domain::report::DatasetFacts;
use learn_domain::run_dir::{RunDir, checkpoint_step};
use learn_domain::{Config, Step};
use learn_model::safetensors;
pub use pace::{Pace, Rests};
use serde::{Deserialize, Serialize};
pub use sum::FileSum;
pub use superseding::Superseding;
use tch::Tensor;
pub use writer::{Writer, Written};

use crate::init::Origin;

/// Version of the directory's layout. Version 1 is read too: its files are checked by SHA-256 or, as here, by XXH3.
pub const VERSION: u32 = 2;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// A checkpoint could not be written or must not be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("checkpoint {}: {reason}", path.display())]
    Refused { path: PathBuf, reason: String },
    #[error(transparent)]
    Weights(learn_model::safetensors::SafetensorsError),
    /// The name of a checkpoint that is not there.
    #[error("{run} has no checkpoint `{name}`; it has {there}")]
    Unknown { run: String, name: String, there: String },
    #[error("{} cannot be used: {source}; {way}", path.display())]
    Unusable { path: PathBuf, source: Box<Self>, way: String },
    #[error("the checkpoint writer ended early")]
    WriterGone,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { path, source }
}

/// The best evaluation on valid so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: Step,
    pub metric: String,
    pub value: f64,
}

impl Best {
    /// Whether its checkpoint is on disk.
    #[must_use]
    pub fn is_there(&self, run: &RunDir) -> bool {
        run.checkpoint(self.step).exists()
    }
}

/// `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    pub step: Step,
    pub epoch: u32,
    /// Dataset that it was trained on.
    pub fingerprint: String,
    /// Content embeddings that it was trained on.
    pub embeddings_fingerprint: String,
    /// Dimension of the content embeddings.
    pub input_dim: u32,
    /// Hash of the parameters' names and shapes.
    pub signature: String,
    /// Updates that the optimizer's bias correction counts.
    pub optimizer_step: u64,
    pub best: Option<Best>,
    /// Weights that the run started with instead of random ones.
    #[serde(default)]
    pub init: Option<Origin>,
    /// Steps so far whose loss or gradient was not finite.
    #[serde(default)]
    pub non_finite: u32,
    pub config: Config,
    pub files: BTreeMap<String, FileSum>,
}

impl State {
    /// The best so far for who goes on from this checkpoint. That of then may be gone, as a later one took its place, or was
    /// never written; it is then the one on disk, if that is no later than this checkpoint.
    #[must_use]
    pub fn best_there(&self, run: &RunDir) -> Option<Best> {
        let best = self.best.clone()?;
        if best.is_there(run) { Some(best) } else { best_there(run).filter(|other| other.step <= self.step) }
    }
}

/// What `state.json` has in any version.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// Everything a checkpoint holds; tensors on the CPU.
#[derive(Debug)]
pub struct Snapshot {
    /// `files` is filled in when it is written.
    pub state: State,
    pub model: Vec<(String, Tensor)>,
    pub optimizer: Vec<(String, Tensor)>,
}

/// What a checkpoint must match to be continued from.
#[derive(Clone, Debug)]
pub struct Expected<'a> {
    pub dataset: &'a DatasetFacts,
    /// Of the parameters; none = whatever the checkpoint holds.
    pub signature: Option<&'a str>,
}

/// Writes a checkpoint into `folder` and returns its directory; `before_piece` is called before each
/// piece of its files.
///
/// # Errors
/// If the disk refuses; what was half written is removed.
pub fn write(
    folder: &Path,
    mut snapshot: Snapshot,
    pace: Pace,
    before_piece: &dyn Fn(),
) -> Result<PathBuf, CheckpointError> {
    let target = RunDir::new(folder.parent().unwrap_or(folder)).checkpoint(snapshot.state.step);
    let aside = aside_of(&target, "");
    let written = write_aside(&aside, &mut snapshot, pace, before_piece).and_then(|()| {
        put_in_place(&aside, &target).map_err(io(&target))?;
        sync(folder)?;
        if aside.exists()
            && let Err(error) = fs::remove_dir_all(&aside)
        {
            // the new one stands; whoever prunes tries again
            tracing::warn!(%error, "the checkpoint that was replaced could not be removed");
        }
        Ok(())
    });
    if written.is_err() {
        // the write error is the one to report
        let _ = fs::remove_dir_all(&aside);
    }
    written.map(|()| target)
}

/// This start of the program, among all that may write into a run directory. The number of a process is not enough: in a
/// container of its own each worker may be number 1.
static START: LazyLock<String> = LazyLock::new(start);

fn start() -> String {
    format!("{}-{:016x}", std::process::id(), RandomState::new().hash_one(std::process::id()))
}

/// The name that `target` has while it is not whole; no other process uses it, not even one that the job has gone on without
/// and that still writes the same step. Whoever prunes knows it by its beginning.
fn aside_of(target: &Path, why: &str) -> PathBuf {
    target.with_extension(format!("tmp-{}{why}", *START))
}

/// How the name of a record of the best checkpoint ends while it is not whole.
const BEST: &str = "-best";

/// Whether this is a record of the best checkpoint that this process has begun.
fn is_own_record(aside: &Path) -> bool {
    aside.extension().and_then(|kind| kind.to_str()).is_some_and(|kind| kind == format!("tmp-{}{BEST}", *START))
}

/// Gives a directory its name; one that has it so far takes the other's.
fn put_in_place(aside: &Path, target: &Path) -> std::io::Result<()> {
    match fs::rename(aside, target) {
        // there may be one of this step: written before a regroup, or by another process this moment
        Err(_) if target.exists() => files::exchange(aside, target, &aside_of(target, "-replaced")),
        renamed => renamed,
    }
}

fn write_aside(
    aside: &Path,
    snapshot: &mut Snapshot,
    pace: Pace,
    before_piece: &dyn Fn(),
) -> Result<(), CheckpointError> {
    if aside.exists() {
        fs::remove_dir_all(aside).map_err(io(aside))?;
    }
    fs::create_dir_all(aside).map_err(io(aside))?;
    let direct = matches!(pace, Pace::Sparing(_));
    for (name, tensors) in [(MODEL, &snapshot.model), (OPTIMIZER, &snapshot.optimizer)] {
        let path = aside.join(name);
        let mut file = NewFile::create(&path, direct, before_piece).map_err(io(&path))?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::write(&mut file, &path, tensors, &metadata).map_err(CheckpointError::Weights)?;
        snapshot.state.files.insert(name.to_owned(), file.finish().map_err(io(&path))?);
    }
    let path = aside.join(STATE);
    let text = serde_json::to_vec_pretty(&snapshot.state).map_err(|error| io(&path)(error.into()))?;
    File::create(&path).and_then(|mut file| file.write_all(&text)).map_err(io(&path))?;
    sync(&path)?;
    sync(aside)
}

/// Makes a file or a directory's entries durable.
pub(crate) fn sync(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io(path))
}

/// Reads `state.json` and compares every file with its checksum.
///
/// # Errors
/// If anything is missing, damaged or of another version.
pub fn check(path: &Path) -> Result<State, CheckpointError> {
    check_files(path, &[MODEL, OPTIMIZER])
}

/// As [`check`], of these files alone.
fn check_files(path: &Path, names: &[&str]) -> Result<State, CheckpointError> {
    let refuse = |reason: String| CheckpointError::Refused { path: path.to_owned(), reason };
    let text = fs::read(path.join(STATE)).map_err(|error| refuse(format!("{STATE} cannot be read ({error})")))?;
    let strange = |error: serde_json::Error| refuse(format!("{STATE} is not understood ({error})"));
    // a later version may have other fields
    let Versioned { version } = serde_json::from_slice(&text).map_err(strange)?;
    if !(1..=VERSION).contains(&version) {
        return Err(refuse(format!("it has layout version {version}, this program reads 1 to {VERSION}")));
    }
    let state: State = serde_json::from_slice(&text).map_err(strange)?;
    let named = path.file_name().and_then(|name| checkpoint_step(name.to_str()?));
    if named.is_some_and(|named| named != state.step) {
        return Err(refuse(format!(
            "{STATE} is of step {}; give the directory the name of its step again",
            state.step
        )));
    }
    for &name in names {
        let wanted = state.files.get(name).ok_or_else(|| refuse(format!("{STATE} does not list {name}")))?;
        let file = path.join(name);
        if let Some(difference) = wanted.mismatch(&file).map_err(|error| refuse(io(&file)(error).to_string()))? {
            return Err(refuse(format!("{name} is damaged ({difference}, as {STATE} says)")));
        }
    }
    Ok(state)
}

/// Reads a whole checkpoint after checking it.
///
/// # Errors
/// As [`check`], and if it belongs to another dataset or model.
pub fn read(path: &Path, expected: Option<&Expected<'_>>) -> Result<Snapshot, CheckpointError> {
    let state = check(path)?;
    refuse_other(path, &state, expected)?;
    Ok(Snapshot { model: load(path, MODEL)?, optimizer: load(path, OPTIMIZER)?, state })
}

/// Reads the weights of a checkpoint and its state after checking both. The moments, which are twice as large, are not looked
/// at.
///
/// # Errors
/// As [`read`], but for what is wrong with the moments.
pub fn read_model(
    path: &Path,
    expected: Option<&Expected<'_>>,
) -> Result<(State, Vec<(String, Tensor)>), CheckpointError> {
    let state = check_files(path, &[MODEL])?;
    refuse_other(path, &state, expected)?;
    Ok((state, load(path, MODEL)?))
}

/// # Errors
/// The checkpoint belongs to another dataset or model.
fn refuse_other(path: &Path, state: &State, expected: Option<&Expected<'_>>) -> Result<(), CheckpointError> {
    let refuse = |reason: String| Err(CheckpointError::Refused { path: path.to_owned(), reason });
    let Some(expected) = expected else { return Ok(()) };
    let DatasetFacts { fingerprint, embeddings_fingerprint, .. } = expected.dataset;
    if state.fingerprint != *fingerprint {
        return refuse(format!(
            "it was trained on the dataset {}, this is {fingerprint}; point data.dataset to the former",
            state.fingerprint
        ));
    }
    if state.embeddings_fingerprint != *embeddings_fingerprint {
        return refuse(format!(
            "it was trained on the content embeddings {}, the dataset has {embeddings_fingerprint} now; embed it with the \
             encoder of then",
            state.embeddings_fingerprint
        ));
    }
    if expected.signature.is_some_and(|signature| state.signature != signature) {
        return refuse("its parameters have other names or shapes; use the run's own [model] settings".into());
    }
    Ok(())
}

/// The tensors of one of its files.
fn load(path: &Path, name: &str) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    safetensors::read(&path.join(name))
        .map_err(|error| CheckpointError::Refused { path: path.to_owned(), reason: error.to_string() })
}

/// The file of a checkpoint's weights and its state, after checking both.
///
/// # Errors
/// As [`check`], but for what is wrong with the moments.
pub fn model_file(path: &Path) -> Result<(PathBuf, State), CheckpointError> {
    check_files(path, &[MODEL]).map(|state| (path.join(MODEL), state))
}

/// A checkpoint directory as `learn-worker checkpoints` lists it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listed {
    pub step: Step,
    pub path: PathBuf,
    pub valid: bool,
    /// Why it is not valid.
    pub reason: Option<String>,
    pub best: bool,
}

/// All checkpoints of a run, oldest first, each checked.
///
/// # Errors
/// If the directory exists but cannot be read.
pub fn list(run: &RunDir) -> Result<Vec<Listed>, CheckpointError> {
    let best = read_best(run).map(|best| best.step);
    let mut listed: Vec<Listed> = steps(&run.checkpoints())?
        .into_iter()
        .map(|step| {
            let path = run.checkpoint(step);
            let reason = check(&path).err().map(|error| error.to_string());
            Listed { step, path, valid: reason.is_none(), reason, best: best == Some(step) }
        })
        .collect();
    listed.sort_by_key(|one| one.step);
    Ok(listed)
}

/// Steps of the checkpoint directories in `folder`; none if it does not exist.
fn steps(folder: &Path) -> Result<Vec<Step>, CheckpointError> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut steps = Vec::new();
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let name = entry.map_err(io(folder))?.file_name();
        steps.extend(name.to_str().and_then(checkpoint_step));
    }
    Ok(steps)
}

/// Records which checkpoint is the best one; none = there is none yet.
fn write_best(run: &RunDir, best: Option<&Best>) -> Result<(), CheckpointError> {
    let path = run.best();
    let Some(best) = best else {
        return if path.exists() { fs::remove_file(&path).map_err(io(&path)) } else { Ok(()) };
    };
    let text = serde_json::to_vec(best).map_err(|error| io(&path)(error.into()))?;
    // by its step, too: the training thread may record an earlier one while the writer records its own
    let aside = aside_of(&run.checkpoint(best.step), BEST);
    let written = fs::write(&aside, text).map_err(io(&aside)).and_then(|()| {
        sync(&aside)?;
        fs::rename(&aside, &path).map_err(io(&path))
    });
    if written.is_err() {
        // the write error is the one to report
        let _ = fs::remove_file(&aside);
    }
    written.and_then(|()| sync(&run.checkpoints()))
}

/// Makes the checkpoint of `resumed` the newest one: later ones belong to a past that is not continued. They move to
/// `checkpoints/superseded`, where only a person looks for them, and `best` is what it was then, if that is there.
fn supersede_later(run: &RunDir, resumed: &State) -> Result<(), CheckpointError> {
    let later: Vec<Step> = steps(&run.checkpoints())?.into_iter().filter(|step| *step > resumed.step).collect();
    let folder = run.checkpoints().join("superseded");
    for step in later {
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        let from = run.checkpoint(step);
        let to = folder.join(from.file_name().unwrap_or_default());
        if to.exists() {
            fs::remove_dir_all(&to).map_err(io(&to))?;
        }
        fs::rename(&from, &to).map_err(io(&from))?;
    }
    write_best(run, resumed.best_there(run).as_ref())
}

/// The best evaluation's checkpoint, if the run has one.
#[must_use]
pub fn read_best(run: &RunDir) -> Option<Best> {
    serde_json::from_slice(&fs::read(run.best()).ok()?).ok()
}

/// As [`read_best`], if that checkpoint is on disk.
#[must_use]
pub fn best_there(run: &RunDir) -> Option<Best> {
    read_best(run).filter(|best| best.is_there(run))
}

/// The checkpoint that `name` means: a directory name, `best`, `last`, or none = the best, else the last. A damaged one is
/// refused with the name of the whole one before it.
///
/// # Errors
/// If there is no such checkpoint, or it is damaged.
pub fn resolve(run: &RunDir, name: Option<&str>) -> Result<PathBuf, CheckpointError> {
    let mut steps = steps(&run.checkpoints())?;
    steps.sort();
    let best = || read_best(run).map(|best| best.step).filter(|step| steps.contains(step));
    let last = steps.last().copied();
    let chosen = match name {
        None => best().or(last),
        Some("last") => last,
        Some("best") => best(),
        Some(name) => checkpoint_step(name).filter(|step| steps.contains(step)),
    };
    let Some(chosen) = chosen else {
        let there: Vec<String> = steps.iter().map(|step| name_of(&run.checkpoint(*step))).collect();
        let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
        let name = name.unwrap_or("last").to_owned();
        return Err(CheckpointError::Unknown { run: run.root().display().to_string(), name, there });
    };
    let path = run.checkpoint(chosen);
    let weights = |path: &Path| check_files(path, &[MODEL]);
    let Err(error) = weights(&path) else { return Ok(path) };
    let earlier = steps.iter().rev().map(|step| (step, run.checkpoint(*step)));
    let earlier = earlier.filter(|(step, _)| **step < chosen).find(|(_, path)| weights(path).is_ok());
    let way = match earlier {
        Some((_, path)) => format!("the one before it is whole: add `--checkpoint {}`", name_of(&path)),
        None => "there is no whole one before it".to_owned(),
    };
    Err(CheckpointError::Unusable { path, source: Box::new(error), way })
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
pub(crate) mod tests;
