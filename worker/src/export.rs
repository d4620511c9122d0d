//! `learn-worker export`: embeddings and weights for other systems.
//!
//! Output directory: `items.parquet` and `users.parquet` (columns `id`, `embedding`), `items.npy` and `users.npy` (the
//! same rows, `[n, d]` f32), `model.safetensors` (published LEARN names), `export.json`, and on request
//! `cvr-features.parquet` (see [`crate::cvr_features`]). Written aside, synced and renamed: what has the name is whole.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arrow_array::{ArrayRef, FixedSizeListArray, Float32Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use learn_dataset::{Progress, Unit};
use learn_domain::Phase;
use learn_domain::config::RowFormat;
use learn_domain::report::{Split, exit};
use learn_domain::run_dir::RunDir;
use parquet::arrow::ArrowWriter;
use tch::Tensor;
use tokio::signal::unix::{SignalKind, signal};

use crate::checkpoint::{self, CheckpointError};
use crate::cvr_features::{self, Features};
use crate::error::WorkerError;
use crate::offline::{Histories, History, Offline, refuse_non_finite};
use crate::panic;

/// Rows that are written at once; of users no more are in memory, besides the output.
const BLOCK: usize = 4096;
/// Tries to remove what was written of an export that is stopped.
const REMOVALS: usize = 10;

/// What to export where.
#[derive(Clone, Debug)]
pub struct ExportSettings {
    pub run: PathBuf,
    pub out: PathBuf,
    pub checkpoint: Option<String>,
    /// Where the run's data lie now; none = where its configuration says.
    pub dataset: Option<PathBuf>,
    /// Write the CVR head's features of the pairs of this split, too.
    pub cvr_features: Option<Split>,
}

/// What was exported.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Exported {
    pub checkpoint: String,
    pub step: u64,
    pub items: usize,
    pub users: usize,
    /// Users of the dataset that are not among them, because no row of its sequences is theirs.
    pub users_without_history: usize,
    pub dim: usize,
    /// How the run's content embeddings were rounded, which the vectors come from.
    pub row_format: RowFormat,
    /// Pairs in `cvr-features.parquet`, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cvr_pairs: Option<usize>,
    pub out: PathBuf,
}

impl fmt::Display for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { items, users, users_without_history: without, dim, step, out, .. } = self;
        let out = out.display();
        write!(f, "exported {items} items and {users} users of dimension {dim} (step {step}) to {out}")?;
        if *without > 0 {
            let reason = "no interaction of theirs lies before the held-out window, or too few";
            write!(f, "\nleft out users without history: {without} ({reason})")?;
        }
        Ok(())
    }
}

/// Exports a run's model.
///
/// # Errors
/// If the run cannot be read, its embeddings are not finite, the output exists already or cannot be written.
pub fn export(settings: &ExportSettings, progress: &dyn Progress) -> Result<Exported, WorkerError> {
    let out = &settings.out;
    if out.exists() {
        let message = format!("{}: it exists already; name a new directory with --out", out.display());
        return Err(WorkerError::Usage(message));
    }
    let aside = out.with_extension(format!("tmp-{}", std::process::id()));
    let ending = Arc::new(Mutex::new(()));
    end_without(&aside, out, &ending)?;
    let write = || {
        let run = RunDir::new(&settings.run);
        let offline = Offline::open(&run, settings.checkpoint.as_deref(), settings.dataset.as_deref())?;
        if settings.cvr_features.is_some() {
            cvr_features::width(&offline)?;
        }
        write_all(&offline, settings, &aside, progress)
    };
    let exported = panic::caught(write, || Phase::Export);
    // a process that was asked to stop waits here for its end
    let _ends = ending.lock();
    let named = exported.and_then(|exported| give_name(&aside, out, checkpoint::sync).map(|()| exported));
    if named.is_err() {
        // the error that is there already is the one to report
        drop(fs::remove_dir_all(&aside));
    }
    named
}

/// Makes what was written into a folder durable: the files, then their names.
fn settle(folder: &Path, sync: impl Fn(&Path) -> Result<(), CheckpointError>) -> Result<(), WorkerError> {
    for entry in fs::read_dir(folder).map_err(failed(folder))? {
        sync(&entry.map_err(failed(folder))?.path())?;
    }
    sync(folder).map_err(Into::into)
}

/// Gives a folder that is durable its name, which is then durable too, if the folder above can be synced.
fn give_name(aside: &Path, out: &Path, sync: impl Fn(&Path) -> Result<(), CheckpointError>) -> Result<(), WorkerError> {
    fs::rename(aside, out).map_err(failed(out))?;
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty());
    // it is there all the same
    if let Err(error) = sync(parent.unwrap_or(Path::new("."))) {
        tracing::warn!(%error, "the name of the export may be lost if the power fails now");
    }
    Ok(())
}

/// From now on SIGINT and SIGTERM end this process, and what is written aside goes. Whoever holds `ending` decides how it ends.
fn end_without(aside: &Path, out: &Path, ending: &Arc<Mutex<()>>) -> Result<(), WorkerError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(WorkerError::Runtime)?;
    let signals = {
        let _entered = runtime.enter();
        signal(SignalKind::interrupt()).and_then(|interrupt| Ok((interrupt, signal(SignalKind::terminate())?)))
    };
    let (mut interrupt, mut terminate) = signals.map_err(WorkerError::Runtime)?;
    let (aside, out, ending) = (aside.to_owned(), out.to_owned(), Arc::clone(ending));
    // it lives as long as the process
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        let _ends = ending.lock();
        if out.exists() {
            return;
        }
        // a file may be made while the others are removed
        let gone = (0..REMOVALS).any(|_| fs::remove_dir_all(&aside).is_ok() || !aside.exists());
        let left = if gone { String::new() } else { format!("; {} could not be removed", aside.display()) };
        tracing::error!("the export was stopped, and {} was not written{left}", out.display());
        std::process::exit(exit::STOPPED);
    });
    Ok(())
}

fn write_all(
    offline: &Offline,
    settings: &ExportSettings,
    aside: &Path,
    progress: &dyn Progress,
) -> Result<Exported, WorkerError> {
    fs::create_dir_all(aside).map_err(|error| failed(aside)(error))?;
    let counts = &offline.dataset.manifest().counts;
    progress.stage("embed items", Some(counts.items.into()), Unit::Rows);
    let items = offline.items(progress)?;
    let dim = items.size()[1] as usize;
    progress.stage("write items", Some(counts.items.into()), Unit::Rows);
    let item_ids: Vec<String> = offline.dataset.items()?.into_iter().map(|item| item.id).collect();
    let mut table = Table::create(aside, "items", dim)?;
    for (first, ids) in (0_i64..).step_by(BLOCK).zip(item_ids.chunks(BLOCK)) {
        table.append(ids, &items.narrow(0, first, ids.len() as i64))?;
        progress.advance(ids.len() as u64);
    }
    let item_count = table.finish()?;

    progress.stage("embed users", Some(counts.users), Unit::Rows);
    let histories = Histories::new(&offline.dataset);
    let user_ids = offline.dataset.user_ids()?;
    let mut table = Table::create(aside, "users", dim)?;
    for (first, block) in (0..).step_by(BLOCK).zip(user_ids.chunks(BLOCK)) {
        let known = (first..).zip(block).filter_map(|(number, id)| Some((id.clone(), histories.of(number)?)));
        let (ids, sequences): (Vec<String>, Vec<History>) = known.unzip();
        if !ids.is_empty() {
            table.append(&ids, &offline.users(&sequences, progress)?)?;
        }
        let without_history = block.len() - ids.len();
        progress.advance(without_history as u64);
    }
    let users = table.finish()?;
    let features = settings.cvr_features.map(|split| Features { offline, items: &items, split });
    let cvr_pairs = features.map(|features| cvr_features::write(&features, aside, progress)).transpose()?;

    let weights = aside.join("model.safetensors");
    fs::copy(offline.checkpoint.join("model.safetensors"), &weights).map_err(|error| failed(&weights)(error))?;
    let exported = Exported {
        checkpoint: offline.checkpoint.display().to_string(),
        step: offline.state.step.0,
        items: item_count,
        users,
        users_without_history: user_ids.len() - users,
        dim,
        row_format: offline.config.data.row_format,
        cvr_pairs,
        out: settings.out.clone(),
    };
    let facts = aside.join("export.json");
    let text = serde_json::to_vec_pretty(&exported).map_err(|error| failed(&facts)(error))?;
    fs::write(&facts, text).map_err(|error| failed(&facts)(error))?;
    progress.stage("sync", None, Unit::Rows);
    settle(aside, checkpoint::sync)?;
    Ok(exported)
}

fn failed<E: ToString>(path: &Path) -> impl Fn(E) -> WorkerError + '_ {
    move |reason| WorkerError::File { path: path.display().to_string(), reason: reason.to_string() }
}

/// One Parquet file and one `.npy` file of the same rows.
struct Table {
    name: PathBuf,
    schema: Arc<Schema>,
    parquet: ArrowWriter<File>,
    npy: BufWriter<File>,
    dim: usize,
    rows: usize,
}

impl Table {
    fn create(folder: &Path, name: &str, dim: usize) -> Result<Self, WorkerError> {
        let path = folder.join(name);
        let value = Arc::new(Field::new("item", DataType::Float32, false));
        let embedding = DataType::FixedSizeList(value, dim as i32);
        let fields = vec![Field::new("id", DataType::Utf8, false), Field::new("embedding", embedding, false)];
        let schema = Arc::new(Schema::new(fields));
        let create = |suffix: &str| File::create(path.with_extension(suffix)).map_err(|error| failed(&path)(error));
        let parquet = ArrowWriter::try_new(create("parquet")?, schema.clone(), None);
        let parquet = parquet.map_err(|error| failed(&path)(error))?;
        let mut npy = BufWriter::new(create("npy")?);
        npy.write_all(&npy_header(0, dim)).map_err(|error| failed(&path)(error))?;
        Ok(Self { name: path, schema, parquet, npy, dim, rows: 0 })
    }

    /// Appends `ids` with their embeddings `[ids, d]`.
    fn append(&mut self, ids: &[String], embeddings: &Tensor) -> Result<(), WorkerError> {
        refuse_non_finite(embeddings)?;
        let values: Vec<f32> = Vec::try_from(embeddings.contiguous().view([-1]))?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.npy.write_all(&bytes).map_err(|error| failed(&self.name)(error))?;
        let value = Arc::new(Field::new("item", DataType::Float32, false));
        let list = FixedSizeListArray::try_new(value, self.dim as i32, Arc::new(Float32Array::from(values)), None);
        let list: ArrayRef = Arc::new(list.map_err(|error| failed(&self.name)(error))?);
        let names: ArrayRef = Arc::new(StringArray::from_iter_values(ids));
        let batch = RecordBatch::try_new(self.schema.clone(), vec![names, list]);
        let batch = batch.map_err(|error| failed(&self.name)(error))?;
        self.parquet.write(&batch).map_err(|error| failed(&self.name)(error))?;
        self.rows += ids.len();
        Ok(())
    }

    fn finish(self) -> Result<usize, WorkerError> {
        use std::io::{Seek, SeekFrom};
        self.parquet.close().map_err(|error| failed(&self.name)(error))?;
        let mut file = self.npy.into_inner().map_err(|error| failed(&self.name)(error.into_error()))?;
        // the number of rows is known only now; the header has a fixed size
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.write_all(&npy_header(self.rows, self.dim)))
            .map_err(|error| failed(&self.name)(error))?;
        Ok(self.rows)
    }
}

/// Header of a version 1.0 `.npy` file of `[rows, dim]` little-endian f32, 128 bytes for any number of rows
/// (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).
fn npy_header(rows: usize, dim: usize) -> Vec<u8> {
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}");
    let padding = 128 - 10 - 1 - dict.len();
    dict.extend(std::iter::repeat_n(' ', padding));
    dict.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((dict.len() as u16).to_le_bytes());
    header.extend(dict.as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn vectors_that_are_not_finite_are_no_export() {
        let folder = tempfile::tempdir().unwrap();
        let ids = ["a".to_owned(), "b".to_owned()];
        for (value, code) in [(1.0_f32, None), (f32::NAN, Some(5)), (f32::INFINITY, Some(5))] {
            let mut table = Table::create(folder.path(), "items", 2).unwrap();
            let rows = Tensor::from_slice(&[0.5, 1.0, value, 2.0]).view([2, 2]);
            let error = table.append(&ids, &rows).err();
            assert_eq!(error.map(|error| error.exit_code()), code, "{value}");
        }
    }

    #[test]
    fn a_name_that_is_taken_is_wrong_usage() {
        let folder = tempfile::tempdir().unwrap();
        let settings = ExportSettings {
            run: "none".into(),
            out: folder.path().into(),
            checkpoint: None,
            dataset: None,
            cvr_features: None,
        };
        let error = export(&settings, &()).unwrap_err();
        assert_eq!(error.exit_code(), exit::USAGE);
        assert!(error.to_string().ends_with("it exists already; name a new directory with --out"), "{error}");
    }

    #[test]
    fn an_export_says_whom_it_leaves_out() {
        let mut exported = Exported {
            checkpoint: "runs/a/checkpoints/step-0000000007".into(),
            step: 7,
            items: 3,
            users: 2,
            users_without_history: 0,
            dim: 8,
            row_format: RowFormat::F16,
            cvr_pairs: None,
            out: "out".into(),
        };
        assert_eq!(exported.to_string(), "exported 3 items and 2 users of dimension 8 (step 7) to out");
        exported.users_without_history = 5;
        let text = exported.to_string();
        let (_, left_out) = text.split_once('\n').unwrap();
        assert!(left_out.starts_with("left out users without history: 5 (no interaction of theirs"), "{text}");
    }

    #[test]
    fn an_export_has_its_name_once_it_is_durable() {
        let folder = tempfile::tempdir().unwrap();
        let (aside, out) = (folder.path().join("aside"), folder.path().join("out"));
        fs::create_dir(&aside).unwrap();
        let files = ["export.json", "items.npy", "items.parquet"].map(|name| aside.join(name));
        files.iter().for_each(|file| fs::write(file, "whole").unwrap());
        let synced = RefCell::new(Vec::new());
        let sync = |path: &Path| {
            synced.borrow_mut().push((path.to_owned(), out.exists()));
            checkpoint::sync(path)
        };
        settle(&aside, sync).unwrap();
        synced.borrow_mut()[..files.len()].sort();
        give_name(&aside, &out, sync).unwrap();
        let before = files.iter().chain([&aside]).map(|path| (path.clone(), false));
        let wanted: Vec<_> = before.chain([(folder.path().to_owned(), true)]).collect();
        assert_eq!(*synced.borrow(), wanted);
        let refused = settle(&out, |_| Err(CheckpointError::WriterGone));
        assert!(refused.is_err(), "a disk that keeps nothing is told");
        give_name(&out, &aside, |_| Err(CheckpointError::WriterGone)).unwrap();
        assert!(aside.is_dir(), "it is there, whatever becomes of its name");
    }

    const ASIDE: &str = "LEARN_TEST_ASIDE";

    /// Starts itself again as the process that is stopped.
    #[test]
    fn an_export_that_is_stopped_leaves_nothing_behind() {
        if let Some(aside) = std::env::var_os(ASIDE).map(PathBuf::from) {
            end_without(&aside, &aside.with_extension("out"), &Arc::default()).unwrap();
            fs::create_dir(&aside).unwrap();
            fs::write(aside.join("items.npy"), "half").unwrap();
            println!("\nready");
            std::thread::sleep(std::time::Duration::from_secs(600));
        }
        for signal in ["INT", "TERM"] {
            let folder = tempfile::tempdir().unwrap();
            let aside = folder.path().join("aside");
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "export::tests::an_export_that_is_stopped_leaves_nothing_behind", "--nocapture"]);
            let mut child = command.env(ASIDE, &aside).stdout(Stdio::piped()).spawn().unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap() == "ready") && aside.exists());
            let kill = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
            assert!(kill.unwrap().success());
            assert_eq!(child.wait().unwrap().code(), Some(exit::STOPPED));
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn the_npy_header_has_one_size() {
        for (rows, dim) in [(0, 1), (1682, 64), (usize::MAX, 4096)] {
            let header = npy_header(rows, dim);
            assert_eq!(header.len(), 128);
            assert_eq!(header[127], b'\n');
            assert_eq!(u16::from_le_bytes([header[8], header[9]]), 118);
        }
    }
}
