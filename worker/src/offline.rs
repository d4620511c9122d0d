//! A finished model without a job: embeddings of users and items read from the run directory and the dataset's files.
//!
//! Input: a run directory and a checkpoint name. Output: embeddings in tensors. Used by `export` and `recommend`; one
//! process, no coordinator. Invariant: content embeddings have the values that they had in the run (`data.row_format`).

use std::fs;
use std::path::{Path, PathBuf};

use learn_dataset::{Dataset, Embeddings, HeldOut, Progress};
use learn_domain::Config;
use learn_domain::config::DeviceKind;
use learn_domain::report::Split;
use learn_domain::run_dir::RunDir;
use learn_model::objective::cvr;
use learn_model::{Forward, ItemInputs, Parameters, Pch, Tape};
use learn_torch::TorchError;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{self, Expected, State};
use crate::error::WorkerError;
use crate::evaluate::{Catalogue, embed_histories};
use crate::feed::assemble::{Seen, newest_positions};
use crate::train::{rows_tensor, sequences, shape};

const ITEM_CHUNK: usize = 4096;
const USER_CHUNK: usize = 256;

/// A checkpoint with its dataset.
pub struct Offline {
    pub config: Config,
    pub dataset: Dataset,
    pub state: State,
    pub checkpoint: PathBuf,
    /// None for a model that does not read content.
    table: Option<Embeddings>,
    model: Pch,
    parameters: Parameters,
    device: Device,
}

/// Where a user's newest sequence lies in the dataset.
#[derive(Clone, Copy, Debug)]
enum Known {
    Train(usize),
    HeldOut(Split, usize),
}

/// A user's items, oldest first, and when they were; no times if the dataset has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    pub items: Vec<u32>,
    pub times: Vec<i64>,
}

impl History {
    /// What a held-out row has before its targets.
    #[must_use]
    pub fn before_targets(held_out: &HeldOut, row: usize) -> Self {
        let times = held_out.times(row).map_or(&[][..], |(history, _)| history);
        Self { items: held_out.history(row).to_vec(), times: times.to_vec() }
    }
}

/// # Errors
/// If a value of the embeddings is not a finite number.
pub fn refuse_non_finite(embeddings: &Tensor) -> Result<(), WorkerError> {
    if embeddings.isfinite().all().int64_value(&[]) == 1 { Ok(()) } else { Err(WorkerError::NonFiniteEmbeddings) }
}

/// The device of the run or, where CUDA cannot be used, the CPU: a run of GPUs may be read on a machine that has none.
fn device_here(of_run: DeviceKind) -> Result<Device, TorchError> {
    match learn_torch::device(of_run, 0) {
        Err(TorchError::NoCuda(_)) => {
            tracing::warn!(
                "the run is one of GPUs, and CUDA cannot be used here (`learn-launch doctor` says why); this works on the CPU"
            );
            Ok(Device::Cpu)
        }
        device => device,
    }
}

/// The newest sequence of each user that has one, by global user number.
pub struct Histories<'a> {
    dataset: &'a Dataset,
    known: Vec<Option<Known>>,
}

impl Offline {
    /// Opens a run; `dataset` is where its data lie now, if not where its configuration says.
    ///
    /// # Errors
    /// If configuration, checkpoint or dataset are missing, damaged or do not belong together.
    pub fn open(run: &RunDir, checkpoint: Option<&str>, dataset: Option<&Path>) -> Result<Self, WorkerError> {
        let path = run.config();
        let failed = |reason: String| WorkerError::File { path: path.display().to_string(), reason };
        let text = fs::read(&path).map_err(|error| failed(format!("{error}; is this a run directory?")))?;
        let mut config: Config = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
        if let Some(dataset) = dataset {
            config.data.dataset = dataset.into();
        }
        let checkpoint = checkpoint::resolve(run, checkpoint)?;
        let dataset = Dataset::open(&config.data.dataset)?;
        if config.model.reads_times() && !dataset.has_held_out_times() {
            return Err(WorkerError::Usage(format!(
                "the model reads times, but the held-out rows of the dataset {} have none; prepare it again with \
                 `--replace`, then embed it",
                config.data.dataset.display()
            )));
        }
        let facts = dataset.facts().seen_by(&config.model);
        let expected = Expected { dataset: &facts, signature: None };
        let (state, weights) = checkpoint::read_model(&checkpoint, Some(&expected))?;
        let table = if config.model.item_input.has_content() { Some(dataset.embeddings()?) } else { None };
        let device = device_here(config.cluster.device)?;
        let model = Pch::new(shape(&config, &facts))?;
        let parameters = Parameters::load(model.shape(), weights, Kind::Float, device)?;
        Ok(Self { config, dataset, state, checkpoint, table, model, parameters, device })
    }

    fn catalogue(&self) -> Catalogue<'_> {
        Catalogue { model: &self.model, parameters: &self.parameters }
    }

    fn forward(&self) -> Forward {
        Forward { train: false, precision: self.config.training.precision }
    }

    /// Width of the CVR head's hidden layer, if the model has a head.
    #[must_use]
    pub fn cvr_hidden(&self) -> Option<i64> {
        self.model.shape().cvr_hidden
    }

    /// The CVR head's hidden layer `[K, W]` on the CPU of pairs of embeddings `[K, d]`.
    pub fn cvr_middle(&self, user: &Tensor, item: &Tensor) -> Tensor {
        let on_device = |tensor: &Tensor| tensor.to_device(self.device);
        let middle = tch::no_grad(|| cvr::middle(&self.parameters, &on_device(user), &on_device(item)));
        middle.to_device(Device::Cpu)
    }

    /// Content embeddings `[items, input_dim]`.
    fn rows(&self, items: &[u32]) -> Result<Tensor, WorkerError> {
        let Some(table) = &self.table else { return Ok(rows_tensor(&[], (items.len(), 0), self.device)) };
        let rows = table.gather(items, self.config.data.row_format)?;
        Ok(rows_tensor(&rows, (items.len(), table.dim()), self.device))
    }

    /// Item embeddings `[N, d]` on the CPU, row = item index; `progress` hears of each item.
    ///
    /// # Errors
    /// If a content embedding cannot be read as the run reads it.
    pub fn items(&self, progress: &dyn Progress) -> Result<Tensor, WorkerError> {
        let catalogue: Vec<u32> = (0..self.dataset.facts().items).collect();
        let chunks = catalogue.chunks(ITEM_CHUNK).map(|items| {
            let content = self.rows(items)?;
            let inputs = ItemInputs { items, content: &content, id_seed: None, tape: Some(&Tape::new(0)) };
            let embedded = tch::no_grad(|| self.model.catalogue(&self.parameters, &inputs, &self.forward()));
            let embedded = embedded.to_device(Device::Cpu);
            progress.advance(items.len() as u64);
            Ok(embedded)
        });
        Ok(Tensor::cat(&chunks.collect::<Result<Vec<_>, WorkerError>>()?, 0))
    }

    /// A history as the user tower sees it.
    fn seen<'h>(&self, history: &'h History) -> Seen<'h> {
        let times: &[i64] = if self.config.model.reads_times() { &history.times } else { &[] };
        Seen { items: &history.items, times }
    }

    /// User embeddings `[B, d]` on the CPU, after the whole of each history; `progress` hears of each user.
    ///
    /// # Errors
    /// As [`Offline::items`].
    pub fn users(&self, histories: &[History], progress: &dyn Progress) -> Result<Tensor, WorkerError> {
        let most = self.config.sampling.history as usize;
        let chunks = histories.chunks(USER_CHUNK).map(|chunk| {
            let newest: Vec<Seen<'_>> = chunk.iter().map(|history| self.seen(history).newest(most)).collect();
            let (unique, packed) = newest_positions(&newest);
            let content = self.rows(&unique)?;
            let inputs = ItemInputs { items: &unique, content: &content, id_seed: None, tape: Some(&Tape::new(0)) };
            let packed = sequences(&packed, self.device);
            let embedded = tch::no_grad(|| embed_histories(&self.catalogue(), &inputs, &packed, &self.forward()));
            let embedded = embedded.to_device(Device::Cpu);
            progress.advance(chunk.len() as u64);
            Ok(embedded)
        });
        Ok(Tensor::cat(&chunks.collect::<Result<Vec<_>, WorkerError>>()?, 0))
    }
}

impl<'a> Histories<'a> {
    /// Finds the newest sequence of every user.
    #[must_use]
    pub fn new(dataset: &'a Dataset) -> Self {
        let mut known = vec![None; dataset.facts().users as usize];
        for row in 0..dataset.train().len() {
            known[dataset.train().user(row) as usize] = Some(Known::Train(row));
        }
        // valid, then test: each history holds the one before
        for split in [Split::Valid, Split::Test] {
            let held_out = dataset.held_out(split);
            for row in 0..held_out.len() {
                known[held_out.user(row) as usize] = Some(Known::HeldOut(split, row));
            }
        }
        Self { dataset, known }
    }

    /// All items of a user, oldest first; `None` if no row is the user's. That is so in a split by time where all of its
    /// interactions lie in one held-out window, or its only one before the windows.
    #[must_use]
    pub fn of(&self, user: usize) -> Option<History> {
        match (*self.known.get(user)?)? {
            Known::Train(row) => {
                let train = self.dataset.train();
                Some(History { items: train.items(row).to_vec(), times: train.times(row).to_vec() })
            }
            Known::HeldOut(split, row) => {
                let held_out = self.dataset.held_out(split);
                let times = held_out.times(row).map_or_else(Vec::new, |(before, targets)| [before, targets].concat());
                Some(History { items: [held_out.history(row), held_out.targets(row)].concat(), times })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use learn_domain::config::{PrepareConfig, SplitPolicy};

    use super::*;

    #[test]
    fn a_run_of_gpus_is_read_on_any_machine() {
        let any = learn_torch::device(DeviceKind::Auto, 0).unwrap();
        assert_eq!(device_here(DeviceKind::Cuda).unwrap(), any);
        assert_eq!(device_here(DeviceKind::Cpu).unwrap(), Device::Cpu);
    }

    #[test]
    fn who_has_too_little_before_the_held_out_windows_has_no_history() {
        let folder = tempfile::tempdir().unwrap();
        let (file, out) = (folder.path().join("interactions.csv"), folder.path().join("dataset"));
        // valid is from 100 on, test from 200 on
        let before = (0..14).map(|time| ("long", time, time));
        let single = [("one", 3, 5), ("two", 4, 6), ("two", 5, 100)];
        let late = [("long", 14, 100), ("long", 15, 200), ("late", 1, 200), ("late", 2, 200)];
        let rows = before.chain(single).chain(late).map(|(user, item, time)| format!("{user},item-{item:02},{time}\n"));
        let text: String = std::iter::once("user_id,item_id,timestamp\n".to_owned()).chain(rows).collect();
        fs::write(&file, text).unwrap();
        let mut config = PrepareConfig { split: SplitPolicy::ByTime, min_length: 1, ..PrepareConfig::default() };
        config.interactions.files.push(file);
        learn_dataset::prepare(&config, "windows", &out, &()).unwrap();

        let dataset = Dataset::open(&out).unwrap();
        let by_time = dataset.manifest().split.by_time.clone().unwrap();
        assert_eq!((by_time.valid_from, by_time.test_from), (100, 200));
        let (ids, histories) = (dataset.user_ids().unwrap(), Histories::new(&dataset));
        let length = |number| histories.of(number).map(|history| history.items.len());
        let mut lengths: Vec<_> = ids.iter().enumerate().map(|(number, id)| (id.as_str(), length(number))).collect();
        lengths.sort_unstable();
        assert_eq!(lengths, [("late", None), ("long", Some(16)), ("one", None), ("two", Some(2))]);
    }
}
